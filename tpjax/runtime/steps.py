"""The steps that serving compiles: pure functions of a model, the device state and host arguments.

Each returns the next device state and then its results. The model comes with its weights. Keyword arguments
are static: ``programs.py`` binds them and compiles.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from tpjax.cache import NULL_PAGE, BatchMetadata
from tpjax.model import Decoder
from tpjax.runtime.rows import NO_TOKEN, PackedRows
from tpjax.runtime.state import DeviceState
from tpjax.sampling import History, Sampled, sample
from tpjax.sampling import score as score_tokens


def prefill(
    model: Decoder,
    state: DeviceState,
    rows: PackedRows,
    tokens: Int[Array, "1 S"],
    length: Int[Array, ""],
    *,
    residual: PartitionSpec,
    mesh: Mesh,
) -> tuple[DeviceState, Sampled]:
    """Runs a prompt chunk and samples the token after it.

    Args:
        model: with its weights.
        state: device state.
        rows: one row.
        tokens: the chunk, padded.
        length: tokens of the chunk that are not padding.
        residual: sharding of the residual.
        mesh: the mesh.
    """
    state, hidden = _run_chunk(model, state, rows, tokens, residual)
    return _sample_after_chunk(model, state, rows, hidden, length, mesh)


def prefill_and_score(
    model: Decoder,
    state: DeviceState,
    rows: PackedRows,
    tokens: Int[Array, "1 S"],
    length: Int[Array, ""],
    targets: Int[Array, "1 S"],
    *,
    residual: PartitionSpec,
    mesh: Mesh,
) -> tuple[DeviceState, Sampled, Sampled]:
    """Runs :func:`prefill` and also computes the log-probability of ``targets``, the tokens one later."""
    state, hidden = _run_chunk(model, state, rows, tokens, residual)
    scored = score_tokens(model.logits(hidden[0]), targets[0], mesh)
    return *_sample_after_chunk(model, state, rows, hidden, length, mesh), scored


def score(
    model: Decoder,
    state: DeviceState,
    rows: PackedRows,
    tokens: Int[Array, "1 S"],
    *,
    residual: PartitionSpec,
) -> tuple[DeviceState, Float[Array, "S V"]]:
    """Runs a prompt chunk and returns the logits after each of its tokens, sharded over the vocabulary."""
    state, hidden = _run_chunk(model, state, rows, tokens, residual)
    return state, model.logits(hidden[0])


def decode(
    model: Decoder, state: DeviceState, rows: PackedRows, *, steps: int, mesh: Mesh
) -> tuple[DeviceState, Sampled]:
    """Feeds each row its slot's last token and samples the next, ``steps`` times.

    Results are [steps, B, ...]. Rows that have output a stop token or all their remaining tokens output
    ``NO_TOKEN``.
    """
    start, remaining = rows.positions, rows.remaining
    if steps == 1:
        state, sampled = _decode_step(model, state, rows, remaining > 0, start, mesh)
        return state, jax.tree.map(lambda x: x[None], sampled)

    def body(i: Array, carry: tuple[DeviceState, Array, Sampled]) -> tuple[DeviceState, Array, Sampled]:
        state, alive, out = carry
        # a row that has ended attends from position 0, where it walks one page only
        positions = jnp.where(alive, start + i, 0)
        state, sampled = _decode_step(model, state, rows, alive, positions, mesh)
        sampled = replace(sampled, tokens=jnp.where(alive, sampled.tokens, NO_TOKEN))
        out = jax.tree.map(lambda all_, one: all_.at[i].set(one), out, sampled)
        ended = jnp.any(sampled.tokens[:, None] == rows.stop_ids, axis=1) | (sampled.tokens < 0)
        return state, alive & ~ended & (i + 1 < remaining), out

    shapes = jax.eval_shape(lambda: _decode_step(model, state, rows, remaining > 0, start, mesh)[1])
    out = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), shapes)
    state, _, out = jax.lax.fori_loop(0, steps, body, (state, remaining > 0, out))
    return state, out


def set_history(
    state: DeviceState,
    slot: Int[Array, ""],
    in_prompt: Bool[Array, "1 V"],
    counts: Int[Array, "1 V"],
    bias: Float[Array, "1 V"],
) -> tuple[DeviceState]:
    """Replaces a slot's history; the tokens that its mask allows stay."""
    history = state.history
    corner = (slot, jnp.int32(0))
    history = History(
        jax.lax.dynamic_update_slice(history.in_prompt, in_prompt, corner),
        jax.lax.dynamic_update_slice(history.counts, counts, corner),
        jax.lax.dynamic_update_slice(history.bias, bias, corner),
        history.allowed,
    )
    return (replace(state, history=history),)


def set_masks(
    state: DeviceState, slots: Int[Array, " B"], words: UInt[Array, "B words"]
) -> tuple[DeviceState]:
    """Replaces the tokens that slots may sample next; bit ``i`` of word ``w`` allows token ``32 * w + i``."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    padded_vocab = state.history.allowed.shape[1]
    allowed = bits.reshape(len(slots), -1)[:, :padded_vocab].astype(jnp.bool_)
    allowed = jnp.pad(allowed, ((0, 0), (0, padded_vocab - allowed.shape[1])))
    history = replace(state.history, allowed=state.history.allowed.at[slots].set(allowed))
    return (replace(state, history=history),)


def _run_chunk(
    model: Decoder,
    state: DeviceState,
    rows: PackedRows,
    tokens: Int[Array, "1 S"],
    residual: PartitionSpec,
) -> tuple[DeviceState, Float[Array, "1 S D"]]:
    """Returns the state with the chunk's keys and values, and the chunk's hidden states."""
    positions = rows.positions[:, None] + jnp.arange(tokens.shape[1])
    metadata = BatchMetadata(rows.block_tables, positions, rows.max_lengths)
    hidden, cache = model(tokens, state.cache, metadata, residual)
    return replace(state, cache=cache), hidden


def _sample_after_chunk(
    model: Decoder,
    state: DeviceState,
    rows: PackedRows,
    hidden: Float[Array, "1 S D"],
    length: Int[Array, ""],
    mesh: Mesh,
) -> tuple[DeviceState, Sampled]:
    """Samples the token that follows a chunk of ``length`` tokens; results are [1, 1, ...]."""
    # with sequence parallelism this sums one row over tp; a slice would gather all of them
    is_last = jnp.arange(hidden.shape[1]) == length - 1
    last = jax.lax.reduce_sum(jnp.where(is_last[:, None], hidden, 0), (1,))
    state, sampled = _sample(model, state, rows, last, rows.slots, rows.positions + length, mesh)
    return state, jax.tree.map(lambda x: x[None], sampled)


def _decode_step(
    model: Decoder,
    state: DeviceState,
    rows: PackedRows,
    alive: Bool[Array, " B"],
    positions: Int[Array, " B"],
    mesh: Mesh,
) -> tuple[DeviceState, Sampled]:
    """Feeds each row its slot's last token at ``positions`` and samples the next."""
    slots = jnp.where(alive, rows.slots, state.spare_slot)
    # a row that has ended goes on computing, but on the null page and the spare slot
    tables = jnp.where(alive[:, None], rows.block_tables, NULL_PAGE)
    metadata = BatchMetadata(tables, positions[:, None], rows.max_lengths)
    hidden, cache = model(state.tokens[slots][:, None], state.cache, metadata)
    return _sample(model, replace(state, cache=cache), rows, hidden[:, 0], slots, positions + 1, mesh)


def _sample(
    model: Decoder,
    state: DeviceState,
    rows: PackedRows,
    hidden: Float[Array, "B D"],
    slots: Int[Array, " B"],
    positions: Int[Array, " B"],
    mesh: Mesh,
) -> tuple[DeviceState, Sampled]:
    """Samples a token per row, each for its position, and keeps it as its slot's last token."""
    logits = model.logits(hidden)
    sampled, history = sample(logits, rows.sampling, state.history, slots, positions, mesh)
    return DeviceState(state.cache, state.tokens.at[slots].set(sampled.tokens), history), sampled
