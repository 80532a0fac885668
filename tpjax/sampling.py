"""Drawing tokens from logits that stay cut along the vocabulary.

Nothing here gathers [B, V]. Top-k and top-p are both a threshold on the logits, found exactly by narrowing
down its bits with sums over all devices; the draw itself is an arg-max of logits plus Gumbel noise
(Gumbel 1954; Maddison et al. 2014, https://arxiv.org/abs/1411.0030), of which each device sends one
candidate. The noise of a token depends on (seed, position, token id) alone, so every tp draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt

from tpjax.mesh import AXIS
from tpjax.sampling_params import MAX_LOGPROBS, SamplingParams
from tpjax.sharding import LOGITS, Leaf

# Bits of the threshold settled per round; each round is one small all-reduce of 2**bits - 1 sums a row.
_BITS_PER_ROUND = 4
NAN_TOKEN = -2  # drawn where the logits are not numbers
ALL_MASKED_TOKEN = -3  # drawn where every token is masked: all logits are minus infinity
_LEAST_MASS = 1e-30  # a top_p that float32 rounds to 0 still keeps the likeliest token
_MAX, _TINY = (float(x) for x in (np.finfo(np.float32).max, np.finfo(np.float32).tiny))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of a batch, packed so that a step uploads two small arrays.

    Attributes:
        floats: temperature, top_p, min_p, repetition, presence and frequency penalty.
        ints: top_k, the seed's upper and lower 32 bits, whether to apply history, whether to return
            log-probabilities, and the position up to which only what the slot's mask allows is drawn.
    """

    floats: Float[Leaf, "B 6"]
    ints: Int[Leaf, "B 6"]

    @classmethod
    def pack(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], masked_until: Sequence[int], rows: int
    ) -> SamplingRows:
        """Packs parameters into ``rows`` rows; rows past the last are greedy.

        Args:
            params: one a row.
            seeds: one a row, any integer of 64 bits, signed or not.
            masked_until: per row the position before which only what its slot's mask allows is drawn.
            rows: rows to fill.
        """
        floats: Any = np.tile(np.array([0, 1, 0, 1, 0, 0], np.float32), (rows, 1))
        ints: Any = np.zeros((rows, 6), np.int32)
        for row, (p, seed, until) in enumerate(zip(params, seeds, masked_until, strict=True)):
            floats[row] = (
                p.value("temperature"),
                p.value("top_p"),
                p.value("min_p"),
                max(
                    p.value("repetition_penalty"), _TINY
                ),  # it divides: devices may flush what is smaller to 0
                p.presence_penalty,
                p.frequency_penalty,
            )
            # float32 cannot hold a k above 2**24; no vocabulary is that large
            ints[row] = (
                min(p.value("top_k"), 2**24),
                np.uint32(seed >> 32 & 0xFFFFFFFF).view(np.int32),
                np.uint32(seed & 0xFFFFFFFF).view(np.int32),
                p.needs_history,
                p.logprobs is not None,
                until,
            )
        return cls(floats, ints)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What penalties, biases and masks need to know of each slot's tokens; all cut along V.

    Attributes:
        in_prompt: whether the token is in the prompt.
        counts: how often the token was generated.
        bias: added to the logits.
        allowed: whether a row that is masked may draw the token next.
    """

    in_prompt: Bool[Leaf, "slots V"]
    counts: Int[Leaf, "slots V"]
    bias: Float[Leaf, "slots V"]
    allowed: Bool[Leaf, "slots V"]

    @classmethod
    def abstract(cls, slots: int, padded_vocab: int, mesh: Mesh) -> History:
        """Shapes, dtypes and shardings."""

        def buffer(dtype: type) -> Any:
            return jax.ShapeDtypeStruct((slots, padded_vocab), dtype, sharding=NamedSharding(mesh, LOGITS))

        return cls(buffer(jnp.bool_), buffer(jnp.int32), buffer(jnp.float32), buffer(jnp.bool_))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The tokens drawn and, where asked for, log-probabilities (else zeros).

    Attributes:
        tokens: token id per row; ``NAN_TOKEN`` where logits are not numbers, ``ALL_MASKED_TOKEN`` where all
            are minus infinity.
        logprobs: of the drawn token.
        top_tokens: the likeliest tokens.
        top_logprobs: theirs.
    """

    tokens: Int[Leaf, "*steps B"]
    logprobs: Float[Leaf, "*steps B"]
    top_tokens: Int[Leaf, "*steps B top"]
    top_logprobs: Float[Leaf, "*steps B top"]


def sample(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    history: History,
    slots: Int[Array, " B"],
    positions: Int[Array, " B"],
    mesh: Mesh,
) -> tuple[Sampled, History]:
    """Draws one token per row and counts it in the row's slot.

    Args:
        logits: float32, cut along V; padding is minus infinity.
        rows: sampling parameters.
        history: tokens seen per slot.
        slots: the slot of each row.
        positions: the position each drawn token will take; keys the noise.
        mesh: the mesh the logits are cut over.
    """
    cut, whole = LOGITS, P()
    return jax.shard_map(
        _sample_shard,
        mesh=mesh,
        in_specs=(cut, whole, cut, whole, whole),
        out_specs=(whole, cut),
        check_vma=False,
    )(logits, rows, history, slots, positions)


def score(logits: Float[Array, "N V"], tokens: Int[Array, " N"], mesh: Mesh) -> Sampled:
    """Log-probabilities of given tokens, and of the likeliest, each under its row of logits."""

    def shard(logits: Array, tokens: Array) -> Sampled:
        share = logits.shape[-1]
        mine = jax.lax.axis_index(AXIS) * share + jnp.arange(share)
        return Sampled(tokens, *_logprobs(logits, mine, tokens))

    return jax.shard_map(shard, mesh=mesh, in_specs=(LOGITS, P()), out_specs=P(), check_vma=False)(
        logits, tokens
    )


def _sample_shard(
    logits: Array, rows: SamplingRows, history: History, slots: Array, positions: Array
) -> tuple[Sampled, History]:
    """One device's part: ``logits`` and ``history`` hold its share of the vocabulary."""
    temperature, top_p, min_p = (rows.floats[:, i, None] for i in range(3))
    top_k, (uses_history, wants_logprobs) = rows.ints[:, 0], (rows.ints[:, i] != 0 for i in (3, 4))
    masked = positions < rows.ints[:, 5]
    share = logits.shape[-1]
    tokens = jax.lax.axis_index(AXIS) * share + jnp.arange(share)

    scores = jax.lax.cond(
        jnp.any(uses_history),
        lambda: _penalise(logits, rows, history, slots),
        lambda: logits,
    )
    scores = jax.lax.cond(
        jnp.any(masked),
        # a NaN stays: whoever asked is told that the model is broken
        lambda: jnp.where(history.allowed[slots] | ~masked[:, None] | jnp.isnan(scores), scores, -jnp.inf),
        lambda: scores,
    )

    def draw() -> Array:
        # the likeliest token is at 0 whatever the temperature: nothing overflows, and noise keeps its digits
        below = _below(scores, jax.lax.pmax(scores.max(axis=-1, keepdims=True), AXIS))
        warm = below / jnp.where(temperature > 0, jnp.maximum(temperature, _TINY), 1.0)
        lowest = jnp.full((warm.shape[0], 1), -jnp.inf)
        floor = jax.lax.cond(
            jnp.any(top_k > 0),
            lambda: _threshold(
                warm, jnp.ones_like(warm), jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)[:, None]
            ),
            lambda: lowest,
        )
        # top_p counts probability among what top_k left, as transformers does
        mass = jnp.where(warm >= floor, jnp.exp(warm), 0.0)
        total = jax.lax.psum(mass.sum(axis=-1, keepdims=True), AXIS)
        floor = jnp.maximum(
            floor,
            jax.lax.cond(
                jnp.any(top_p < 1),
                lambda: _threshold(
                    warm, mass, jnp.where(top_p < 1, jnp.maximum(top_p * total, _LEAST_MASS), jnp.inf)
                ),
                lambda: lowest,
            ),
        )
        floor = jnp.maximum(floor, jnp.log(min_p))
        # masked after the noise too: what has no probability must not win whatever the noise is
        kept = (warm >= floor) & (scores > -jnp.inf)
        noisy = jnp.where(kept, warm + _gumbel(rows.ints[:, 1:3], positions, tokens), -jnp.inf)
        # a NaN is below every threshold; it must win all the same, to be seen
        return jnp.where((temperature > 0) & ~jnp.isnan(scores), noisy, scores)

    contest = jax.lax.cond(jnp.any(temperature > 0), draw, lambda: scores)
    chosen = _winner(contest, tokens)

    nothing = (
        jnp.zeros(chosen.shape, jnp.float32),
        jnp.zeros((*chosen.shape, MAX_LOGPROBS), jnp.int32),
        jnp.zeros((*chosen.shape, MAX_LOGPROBS), jnp.float32),
    )
    reported = jax.lax.cond(
        jnp.any(wants_logprobs), lambda: _logprobs(logits, tokens, chosen), lambda: nothing
    )
    mine = ((chosen[:, None] == tokens) & uses_history[:, None]).astype(jnp.int32)
    counts = jax.lax.cond(
        jnp.any(uses_history), lambda: history.counts.at[slots].add(mine), lambda: history.counts
    )
    return Sampled(chosen, *reported), History(history.in_prompt, counts, history.bias, history.allowed)


def _penalise(logits: Array, rows: SamplingRows, history: History, slots: Array) -> Array:
    repetition, presence, frequency = (rows.floats[:, i, None] for i in range(3, 6))
    counts = history.counts[slots]
    repeated = history.in_prompt[slots] | (counts > 0)
    scores = jnp.where(repeated, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    scores = scores - frequency * counts.astype(jnp.float32) - jnp.where(counts > 0, presence, 0.0)
    bias = history.bias[slots]
    # a possible token stays possible, and padding does not become so: what overflows is held at the ends
    scores = jnp.where(jnp.isneginf(bias), -jnp.inf, jnp.clip(scores + bias, -_MAX, _MAX))
    return jnp.where((rows.ints[:, 3, None] != 0) & (logits > -jnp.inf), scores, logits)


def _below(scores: Float[Array, "B share"], top: Float[Array, "B 1"]) -> Float[Array, "B share"]:
    """How far each score is under the top of its row: 0 at the top, infinite or not."""
    return jnp.where(scores == top, 0.0, scores - top)


def _threshold(
    scores: Float[Array, "B share"], weights: Float[Array, "B share"], target: Float[Array, "B 1"]
) -> Float[Array, "B 1"]:
    """The largest value t such that the weights of all scores >= t, over all devices, sum to ``target``.

    Minus infinity where no t does. The order of floats is that of suitably flipped bits, so t is found
    from its highest bits down, a few at a time.
    """
    keys = _ordered(scores)
    fan = 2**_BITS_PER_ROUND - 1
    steps = jnp.arange(1, fan + 1, dtype=jnp.uint32)

    def settle(round_: Int[Array, ""], low: UInt[Array, "B 1"]) -> UInt[Array, "B 1"]:
        shift = (32 - _BITS_PER_ROUND * (round_ + 1)).astype(jnp.uint32)
        candidates = low + (steps << shift)  # [B, fan], ascending
        above = keys[:, None, :] >= candidates[:, :, None]
        sums = jax.lax.psum(jnp.where(above, weights[:, None, :], 0.0).sum(axis=-1), AXIS)
        reached = (sums >= target).sum(axis=-1, keepdims=True).astype(jnp.uint32)
        return low + (reached << shift)

    low = jnp.zeros((scores.shape[0], 1), jnp.uint32)
    low = jax.lax.fori_loop(0, 32 // _BITS_PER_ROUND, settle, low)
    return _unordered(low)


def _ordered(x: Float[Array, "*n"]) -> UInt[Array, "*n"]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def _unordered(keys: UInt[Array, "*n"]) -> Float[Array, "*n"]:
    """Inverse of :func:`_ordered`; keys under every float give minus infinity."""
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32(0x7FFFFFFF), ~keys)
    value = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


def _gumbel(seeds: Int[Array, "B 2"], positions: Int[Array, " B"], tokens: Int[Array, " share"]) -> Array:
    """Standard Gumbel noise for each row and token, float32 [B, share]."""

    def words(seed: Array, position: Array) -> Array:
        # a key is two words: for a seed of 32 bits this is jax.random.key(seed)
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, tokens))  # [share, 2]

    drawn = jax.vmap(words)(jax.lax.bitcast_convert_type(seeds, jnp.uint32), positions)
    return _gumbel_of(drawn[..., 0], drawn[..., 1])


def _gumbel_of(high: UInt[Array, "*n"], low: UInt[Array, "*n"]) -> Float[Array, "*n"]:
    """Standard Gumbel noise from 64 random bits, -2.9 to 45.1.

    Draws are decided in the upper tail, and that is where the uniform is small: a float32 has all its digits
    there. 64 bits, since 32 would end the tail at 22.9, and equal ones tie.
    """
    units = high.astype(jnp.float32) + (low.astype(jnp.float32) + 0.5) * 2.0**-32  # of 2**-32
    # float32 rounds the largest to 1, whose noise would be minus infinity
    uniform = jnp.minimum(units * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _winner(scores: Float[Array, "B share"], tokens: Int[Array, " share"]) -> Int[Array, " B"]:
    """The token of the highest score over all devices; of equals, the lowest id. One small all-gather.

    A NaN counts as highest, and gives ``NAN_TOKEN``; minus infinity gives ``ALL_MASKED_TOKEN``.
    """
    local = jnp.argmax(scores, axis=-1)
    best = jnp.take_along_axis(scores, local[:, None], axis=-1)[:, 0]
    # both as integers: a small token id would be a denormal as a float, which hardware may flush to 0
    bits = jax.lax.bitcast_convert_type(best, jnp.int32)
    candidates = jax.lax.all_gather(jnp.stack([bits, tokens[local]]), AXIS)  # [tp, 2, B]
    highest = jax.lax.bitcast_convert_type(candidates[:, 0], jnp.float32)
    device = jnp.argmax(highest, axis=0)[None]
    score, token = (jnp.take_along_axis(x, device, axis=0)[0] for x in (highest, candidates[:, 1]))
    return jnp.where(jnp.isnan(score), NAN_TOKEN, jnp.where(jnp.isneginf(score), ALL_MASKED_TOKEN, token))


def _logprobs(logits: Array, tokens: Array, chosen: Array) -> tuple[Array, Array, Array]:
    """Log-probabilities of the chosen and of the likeliest tokens; id -1 where there are no more tokens."""
    top = jax.lax.pmax(logits.max(axis=-1, keepdims=True), AXIS)
    below = _below(logits, top)
    log_total = jnp.log(jax.lax.psum(jnp.exp(below).sum(axis=-1, keepdims=True), AXIS))
    mine = tokens == chosen[:, None]
    of_chosen = jax.lax.psum(jnp.where(mine, below, 0.0).sum(axis=-1), AXIS) - log_total[:, 0]
    # two stages: the global top-n are among the devices' own top-n
    values, places = jax.lax.top_k(below, min(MAX_LOGPROBS, below.shape[-1]))
    values = jax.lax.all_gather(values, AXIS, axis=1, tiled=True)
    ids = jax.lax.all_gather(tokens[places], AXIS, axis=1, tiled=True)
    count = min(MAX_LOGPROBS, values.shape[-1])
    values, order = jax.lax.top_k(values, count)
    ids = jnp.take_along_axis(ids, order, axis=1)
    ids = jnp.where(jnp.isneginf(values), -1, ids)  # a vocabulary below 20 has no more than its tokens
    pad = ((0, 0), (0, MAX_LOGPROBS - count))
    return (
        of_chosen,
        jnp.pad(ids, pad, constant_values=-1),
        jnp.pad(values - log_total, pad, constant_values=-jnp.inf),
    )
