"""The steps that serving compiles: pure functions of a model, the device state and host arguments.

Each returns the next device state and then its results. The model comes with its weights. Keyword arguments
are static: ``programs.py`` binds them and compiles.

Of a pipeline, each stage has its part of the model and its own state. All stages but the last run
:func:`layers`, which hands hidden states on; the last runs the same steps as a model in one piece, with the
argument ``hidden`` in place of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from tpjax.cache import BatchMetadata, PagedKVCache, TokenGroup
from tpjax.model import Decoder
from tpjax.runtime.rows import NO_TOKEN, PackedRows, PackedStep
from tpjax.runtime.state import DeviceState, StageState
from tpjax.sampling import Sampled, sample
from tpjax.sampling import score as score_tokens
from tpjax.sharding import REPLICATED, SEQUENCE_PARALLEL, constrain, pad_to_multiple

# With sequence parallelism a step's tokens are padded to this many for each device: a TPU's tile of bfloat16.
ROWS_PER_DEVICE = 16


def layers(
    model: Decoder,
    state: StageState,
    batch: PackedRows | PackedStep,
    inputs: Int[Array, " slots"] | Float[Array, "N D"],
    *,
    residual: PartitionSpec,
    rows: int,
    blocks: int = 0,
) -> tuple[StageState, Float[Array, "rows D"]]:
    """Runs a stage that is not the last: returns the hidden states of a step's tokens after its layers.

    Args:
        model: the stage's part of the model, with its weights.
        state: the stage's state.
        batch: the rows of a decode step, or those and prompt chunks.
        inputs: of the first stage the last token of each slot, as the last stage has drawn them; else the
            hidden states that the stage before returned.
        residual: sharding of the residual.
        rows: hidden states that the next stage takes, padding included: on other numbers of devices it pads
            a step otherwise.
        blocks: as :func:`decode` takes it.
    """
    if isinstance(batch, PackedRows):
        alive, at = batch.remaining > 0, batch.positions
        hidden, cache = _run_rows(model, state.cache, batch, alive, at, batch.slots, inputs, blocks)
    else:
        hidden, cache, _ = _run(model, state.cache, batch, inputs, residual)
    if rows != len(hidden):
        hidden = jnp.pad(hidden[:rows], ((0, max(0, rows - len(hidden))), (0, 0)))
    return replace(state, cache=cache), hidden


def decode(
    model: Decoder,
    state: DeviceState,
    rows: PackedRows,
    count: Int[Array, ""],
    hidden: Float[Array, "N D"] | None = None,
    *,
    steps: int,
    greedy: bool,
    mesh: Mesh,
    blocks: int = 0,
) -> tuple[DeviceState, Sampled]:
    """Feeds each row its slot's last token and samples the next, ``count`` times.

    Results are [steps, B, ...], of which the first ``count`` count. Rows that have output a stop token or all
    their remaining tokens output ``NO_TOKEN``.

    Args:
        model: with its weights.
        state: device state.
        rows: the rows; those of padding have no remaining tokens.
        count: 1 to ``steps``.
        hidden: of the last stage of a pipeline, what the stage before returned; ``steps`` is then 1.
        steps: steps at most.
        greedy: all rows take the likeliest token, and nothing else is asked for.
        mesh: the mesh.
        blocks: blocks of pages that all rows have together, at most, if attention is compiled for so many.
    """
    start, remaining = rows.positions, rows.remaining
    if steps == 1:
        alive = remaining > 0
        state, sampled = _decode_once(model, state, rows, alive, start, greedy, mesh, blocks, hidden)
        return state, jax.tree.map(lambda x: x[None], sampled)

    def body(i: Array, carry: tuple[DeviceState, Array, Sampled]) -> tuple[DeviceState, Array, Sampled]:
        state, alive, out = carry
        state, sampled = _decode_once(model, state, rows, alive, start + i, greedy, mesh, blocks)
        sampled = replace(sampled, tokens=jnp.where(alive, sampled.tokens, NO_TOKEN))
        out = jax.tree.map(lambda all_, one: all_.at[i].set(one), out, sampled)
        ended = jnp.any(sampled.tokens[:, None] == rows.stop_ids, axis=1) | (sampled.tokens < 0)
        return state, alive & ~ended & (i + 1 < remaining), out

    shapes = jax.eval_shape(
        lambda: _decode_once(model, state, rows, remaining > 0, start, greedy, mesh, blocks)[1]
    )
    out = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), shapes)
    state, _, out = jax.lax.fori_loop(0, count, body, (state, remaining > 0, out))
    return state, out


def with_tokens(
    step: Callable[..., tuple[Any, ...]],
) -> Callable[..., tuple[Any, ...]]:
    """Returns a step of the last stage that also returns the last token of each slot, for the first stage."""

    def step_with_tokens(*arguments: Any) -> tuple[Any, ...]:
        state, *results = step(*arguments)
        return state, *results, state.tokens

    return step_with_tokens


def step(
    model: Decoder,
    state: DeviceState,
    batch: PackedStep,
    hidden: Float[Array, "N D"] | None = None,
    *,
    residual: PartitionSpec,
    greedy: bool,
    mesh: Mesh,
) -> tuple[DeviceState, Sampled]:
    """Runs prompt chunks and one decode step of other rows together, and samples the token after each.

    Everything but attention sees all tokens at once: weights are read once. Results are [1, B + C, ...].

    Args:
        model: with its weights.
        state: device state.
        batch: decode rows, or none, and prompt chunks.
        hidden: as in :func:`decode`.
        residual: sharding of the residual.
        greedy: as in :func:`decode`.
        mesh: the mesh.
    """
    state, hidden, _ = _run_last(model, state, batch, hidden, residual)
    return _sample_step(model, state, batch, hidden, greedy, mesh)


def step_and_score(
    model: Decoder,
    state: DeviceState,
    batch: PackedStep,
    targets: Int[Array, "C S"],
    hidden: Float[Array, "N D"] | None = None,
    *,
    residual: PartitionSpec,
    greedy: bool,
    mesh: Mesh,
) -> tuple[DeviceState, Sampled, Sampled]:
    """Runs :func:`step` and also computes the log-probability of ``targets``, the tokens one later.

    Its results are [C * S, ...].
    """
    state, hidden, metadata = _run_last(model, state, batch, hidden, residual)
    of_chunks = constrain(metadata.split(hidden)[-1], REPLICATED)  # all-gather with sequence parallelism
    logits = model.logits(of_chunks.reshape(targets.size, -1))
    scored = score_tokens(logits, targets.reshape(-1), mesh)
    return *_sample_step(model, state, batch, hidden, greedy, mesh), scored


def score(
    model: Decoder,
    state: DeviceState,
    batch: PackedStep,
    hidden: Float[Array, "N D"] | None = None,
    *,
    residual: PartitionSpec,
) -> tuple[DeviceState, Float[Array, "tokens V"]]:
    """Runs prompt chunks and returns the logits after each of their tokens, sharded over the vocabulary."""
    state, hidden, _ = _run_last(model, state, batch, hidden, residual)
    return state, model.logits(constrain(hidden, REPLICATED)[: batch.token_ids.size])


def set_history(
    state: DeviceState,
    row: Int[Array, ""],
    in_prompt: Bool[Array, "1 V"],
    counts: Int[Array, "1 V"],
    bias: Float[Array, "1 V"],
) -> tuple[DeviceState]:
    """Replaces a row of the history."""
    history = state.history
    corner = (row, jnp.int32(0))
    history = replace(
        history,
        in_prompt=jax.lax.dynamic_update_slice(history.in_prompt, in_prompt, corner),
        counts=jax.lax.dynamic_update_slice(history.counts, counts, corner),
        bias=jax.lax.dynamic_update_slice(history.bias, bias, corner),
    )
    return (replace(state, history=history),)


def set_masks(
    state: DeviceState, slots: Int[Array, " B"], words: UInt[Array, "B words"]
) -> tuple[DeviceState]:
    """Replaces the masks of slots."""
    masks = state.history.masks.at[slots, : words.shape[1]].set(words)
    return (replace(state, history=replace(state.history, masks=masks)),)


def _run_last(
    model: Decoder,
    state: DeviceState,
    batch: PackedStep,
    hidden: Float[Array, "N D"] | None,
    residual: PartitionSpec,
) -> tuple[DeviceState, Float[Array, "N D"], BatchMetadata]:
    """Runs the only or the last stage: see :func:`_run`."""
    inputs = state.tokens if hidden is None else hidden
    hidden, cache, metadata = _run(model, state.cache, batch, inputs, residual)
    return replace(state, cache=cache), hidden, metadata


def _run(
    model: Decoder,
    cache: PagedKVCache,
    batch: PackedStep,
    inputs: Int[Array, " slots"] | Float[Array, "N D"],
    residual: PartitionSpec,
) -> tuple[Float[Array, "N D"], PagedKVCache, BatchMetadata]:
    """Returns the hidden states of a step's tokens, and the cache with their keys and values.

    Args:
        model: a model, or a stage's part of it.
        cache: of its layers.
        batch: decode rows, or none, and prompt chunks.
        inputs: last token of each slot; after the first stage the hidden states of the tokens.
        residual: sharding of the residual.
    """
    rows, decoded = batch.rows[: batch.batch], batch.batch > 0
    chunks, length = batch.rows[batch.batch :], batch.token_ids.shape[1]
    if model.is_first:
        token_ids = [batch.token_ids.reshape(-1)]
        if decoded:
            token_ids.insert(0, inputs[rows.slots])
        inputs = jnp.concatenate(token_ids)
    size = batch.batch + batch.token_ids.size
    padding = padded_tokens(size, residual, model.tp) - size
    positions = chunks.positions[:, None] + jnp.arange(length)
    metadata = []
    for number, window in enumerate(cache.windows):
        groups = [_decode_group(rows, rows.remaining > 0, rows.positions, number, window)] if decoded else []
        tables, cyclic = chunks.block_tables(number), window is not None
        groups.append(TokenGroup(tables, positions, batch.lengths, chunks.max_lengths, True, cyclic))
        metadata.append(BatchMetadata(tuple(groups), padding))
    if model.is_first:
        inputs = jnp.pad(inputs, (0, padding))
    hidden, cache = model(inputs, cache, metadata, residual)
    return hidden, cache, metadata[0]


def _run_rows(
    model: Decoder,
    cache: PagedKVCache,
    rows: PackedRows,
    alive: Bool[Array, " B"],
    positions: Int[Array, " B"],
    slots: Int[Array, " B"],
    inputs: Int[Array, " slots"] | Float[Array, "B D"],
    blocks: int,
) -> tuple[Float[Array, "B D"], PagedKVCache]:
    """Returns the hidden states of decode rows at ``positions``, and the cache: see :func:`_run`."""
    metadata = [
        BatchMetadata((_decode_group(rows, alive, positions, number, window, blocks),))
        for number, window in enumerate(cache.windows)
    ]
    return model(inputs[slots] if model.is_first else inputs, cache, metadata)


def padded_tokens(tokens: int, residual: PartitionSpec, tp: int) -> int:
    """Returns the tokens of a step, padded to what sequence parallelism cuts evenly if that is the layout."""
    return pad_to_multiple(tokens, ROWS_PER_DEVICE * tp) if residual == SEQUENCE_PARALLEL else tokens


def _decode_group(
    rows: PackedRows,
    alive: Bool[Array, " B"],
    positions: Int[Array, " B"],
    number: int,
    window: int | None,
    blocks: int = 0,
) -> TokenGroup:
    """Returns the decode rows as layers of a page group see them."""
    tables, lengths, cyclic = rows.block_tables(number), alive.astype(jnp.int32), window is not None
    return TokenGroup(tables, positions[:, None], lengths, rows.max_lengths, cyclic=cyclic, walk=blocks)


def _sample_step(
    model: Decoder,
    state: DeviceState,
    batch: PackedStep,
    hidden: Float[Array, "N D"],
    greedy: bool,
    mesh: Mesh,
) -> tuple[DeviceState, Sampled]:
    """Samples the token after each decode row and each chunk; results are [1, B + C, ...]."""
    rows, (chunks, length) = batch.rows, batch.token_ids.shape
    last = batch.batch + jnp.arange(chunks) * length + jnp.maximum(batch.lengths - 1, 0)
    places = jnp.concatenate([jnp.arange(batch.batch), last])
    # with sequence parallelism this sums a row over tp for each of them; slices would gather all tokens
    sampled_from = constrain(hidden.at[places].get(mode="promise_in_bounds"), REPLICATED)
    fed = jnp.concatenate([jnp.ones(batch.batch, jnp.int32), batch.lengths])
    slots = jnp.where(fed > 0, rows.slots, state.spare_slot)
    state, sampled = _sample(model, state, rows, sampled_from, slots, rows.positions + fed, greedy, mesh)
    return state, jax.tree.map(lambda x: x[None], sampled)


def _decode_once(
    model: Decoder,
    state: DeviceState,
    rows: PackedRows,
    alive: Bool[Array, " B"],
    positions: Int[Array, " B"],
    greedy: bool,
    mesh: Mesh,
    blocks: int,
    hidden: Float[Array, "B D"] | None = None,
) -> tuple[DeviceState, Sampled]:
    """Feeds each row its slot's last token at ``positions`` and samples the next."""
    # a row that has ended goes on computing, but on the null page and the spare slot
    slots = jnp.where(alive, rows.slots, state.spare_slot)
    inputs = state.tokens if hidden is None else hidden
    hidden, cache = _run_rows(model, state.cache, rows, alive, positions, slots, inputs, blocks)
    state = replace(state, cache=cache)
    return _sample(model, state, rows, hidden, slots, positions + 1, greedy, mesh)


def _sample(
    model: Decoder,
    state: DeviceState,
    rows: PackedRows,
    hidden: Float[Array, "B D"],
    slots: Int[Array, " B"],
    positions: Int[Array, " B"],
    greedy: bool,
    mesh: Mesh,
) -> tuple[DeviceState, Sampled]:
    """Samples a token per row, each for its position, and keeps it as its slot's last token."""
    logits = model.logits(hidden)
    sampled, history = sample(logits, rows.sampling, state.history, slots, positions, mesh, greedy=greedy)
    return DeviceState(state.cache, state.tokens.at[slots].set(sampled.tokens), history), sampled
