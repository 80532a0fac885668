"""Samples tokens from logits that stay sharded over the vocabulary.

Nothing here gathers [B, V]. Top-k and top-p are both a threshold on the logits, found exactly by bisecting
over its bits with sums over all devices. Sampling is an arg-max of logits plus Gumbel noise (Gumbel 1954;
Maddison et al. 2014, https://arxiv.org/abs/1411.0030), for which each device sends one candidate. The noise
of a token depends on (seed, position, token id) only, so every tp samples the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt

from tpjax.mesh import AXIS
from tpjax.sampling_params import MAX_LOGPROBS, SamplingParams
from tpjax.sharding import LOGITS, REPLICATED, Leaf

_BLOCK = 128  # tokens whose maximum stands for them in the search for the likeliest
NAN_TOKEN = -2  # sampled if the logits are not numbers
HISTORY_BYTES = 9  # of a token of the vocabulary, in a row of ``History`` but for masks
NO_HISTORY = -1  # row of the history of what has none
ALL_MASKED_TOKEN = -3  # sampled if every token is masked: all logits are minus infinity
_LEAST_MASS = 1e-30  # so that a top_p that float32 rounds to 0 still keeps the likeliest token
_MAX, _TINY = (float(x) for x in (np.finfo(np.float32).max, np.finfo(np.float32).tiny))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of a batch, packed so that a step uploads two small arrays.

    Attributes:
        floats: temperature, top_p, min_p, repetition, presence and frequency penalty.
        ints: top_k, the seed's upper and lower 32 bits, the row of its history, whether to return
            log-probabilities, and the position before which the slot's mask applies.
    """

    floats: Float[Leaf, "B 6"]
    ints: Int[Leaf, "B 6"]

    @classmethod
    def pack(
        cls,
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        masked_until: Sequence[int],
        history_rows: Sequence[int],
        rows: int,
    ) -> SamplingRows:
        """Packs parameters into ``rows`` rows; rows past the last are greedy.

        Args:
            params: one per row.
            seeds: one per row, any integer of 64 bits, signed or not.
            masked_until: per row the position before which its slot's mask applies.
            history_rows: per row that of its history; not read if its parameters need none.
            rows: number of rows to fill.
        """
        every = zip(params, seeds, history_rows, strict=True)
        return cls.stack([cls.one(*of_row) for of_row in every], masked_until, rows)

    @staticmethod
    def one(params: SamplingParams, seed: int, history_row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the floats and ints of one row; but for the end of its mask they stay the same."""
        floats = (
            params.value("temperature"),
            params.value("top_p"),
            params.value("min_p"),
            # it divides: devices may flush what is smaller to 0
            max(params.value("repetition_penalty"), _TINY),
            params.presence_penalty,
            params.frequency_penalty,
        )
        # float32 cannot hold a k above 2**24; no vocabulary is that large
        ints = (
            min(params.value("top_k"), 2**24),
            np.uint32(seed >> 32 & 0xFFFFFFFF).view(np.int32),
            np.uint32(seed & 0xFFFFFFFF).view(np.int32),
            history_row if params.needs_history else NO_HISTORY,
            params.logprobs is not None,
            0,
        )
        return np.array(floats, np.float32), np.array(ints, np.int32)

    @classmethod
    def stack(
        cls, ones: Sequence[tuple[np.ndarray, np.ndarray]], masked_until: Sequence[int], rows: int
    ) -> SamplingRows:
        """Packs what :meth:`one` returned for each row into ``rows`` rows; rows past the last are greedy."""
        floats: Any = np.empty((rows, 6), np.float32)
        ints: Any = np.empty((rows, 6), np.int32)
        count = len(ones)
        if count:
            np.concatenate([one for one, _ in ones], out=floats[:count].reshape(-1))
            np.concatenate([one for _, one in ones], out=ints[:count].reshape(-1))
            ints[:count, 5] = masked_until
        floats[count:], ints[count:] = (0, 1, 0, 1, 0, 0), (0, 0, 0, NO_HISTORY, 0, 0)
        return cls(floats, ints)

    @property
    def temperature(self) -> Float[Leaf, "B 1"]:
        """Divides the logits; 0: greedy."""
        return self.floats[:, 0, None]

    @property
    def top_p(self) -> Float[Leaf, "B 1"]:
        """Probability of the tokens to keep; 1: all."""
        return self.floats[:, 1, None]

    @property
    def min_p(self) -> Float[Leaf, "B 1"]:
        """Fraction of the likeliest token's probability; 0: all tokens are kept."""
        return self.floats[:, 2, None]

    @property
    def penalties(self) -> tuple[Float[Leaf, "B 1"], Float[Leaf, "B 1"], Float[Leaf, "B 1"]]:
        """Repetition, presence and frequency penalty."""
        return self.floats[:, 3, None], self.floats[:, 4, None], self.floats[:, 5, None]

    @property
    def top_k(self) -> Int[Leaf, " B"]:
        """Number of tokens to keep; 0: all."""
        return self.ints[:, 0]

    @property
    def seeds(self) -> Int[Leaf, "B 2"]:
        """Upper and lower 32 bits of the seeds."""
        return self.ints[:, 1:3]

    @property
    def history_rows(self) -> Int[Leaf, " B"]:
        """Rows of the histories whose penalties and biases apply; ``NO_HISTORY``: none do."""
        return self.ints[:, 3]

    @property
    def wants_logprobs(self) -> Bool[Leaf, " B"]:
        """Whether log-probabilities are returned."""
        return self.ints[:, 4] != 0

    @property
    def masked_until(self) -> Int[Leaf, " B"]:
        """Position before which the slot's mask applies."""
        return self.ints[:, 5]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """What penalties, biases and masks need to know of sequences.

    Penalties and biases take 9 bytes a token of the vocabulary for each sequence, and few requests have any:
    there are rows for some. A mask takes a bit a token: each slot has one. The last row of each is spare.

    Attributes:
        in_prompt: whether the token is in the prompt; sharded over V, as are the next two.
        counts: how often the token was generated.
        bias: added to the logits.
        masks: which tokens may be sampled next; bit ``i`` of word ``w`` is of token ``32 * w + i``.
    """

    in_prompt: Bool[Leaf, "rows V"]
    counts: Int[Leaf, "rows V"]
    bias: Float[Leaf, "rows V"]
    masks: UInt[Leaf, "slots words"]

    @classmethod
    def abstract(cls, slots: int, rows: int, padded_vocab: int, mesh: Mesh) -> History:
        """Returns shapes, dtypes and shardings, without memory, of that many slots and rows and the spare."""

        def buffer(dtype: jax.typing.DTypeLike) -> Any:
            return jax.ShapeDtypeStruct((rows + 1, padded_vocab), dtype, sharding=NamedSharding(mesh, LOGITS))

        # one word more than there are tokens for: a shard that does not begin at a word reads two halves
        shape, replicated = (slots + 1, mask_words(padded_vocab) + 1), NamedSharding(mesh, REPLICATED)
        masks: Any = jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=replicated)
        return cls(buffer(jnp.bool_), buffer(jnp.int32), buffer(jnp.float32), masks)

    @classmethod
    def specs(cls) -> History:
        """Returns the partition specs as a tree of the same structure."""
        specs: Any = (LOGITS, LOGITS, LOGITS, REPLICATED)
        return cls(*specs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """Sampled tokens and, if asked for, log-probabilities (else zeros).

    Attributes:
        tokens: token id per row; ``NAN_TOKEN`` if logits are not numbers, ``ALL_MASKED_TOKEN`` if all are
            minus infinity.
        logprobs: log-probability of the sampled token.
        top_tokens: the likeliest tokens.
        top_logprobs: log-probabilities of the likeliest tokens.
    """

    tokens: Int[Leaf, "*steps B"]
    logprobs: Float[Leaf, "*steps B"]
    top_tokens: Int[Leaf, "*steps B top"]
    top_logprobs: Float[Leaf, "*steps B top"]


def mask_words(vocab_size: int) -> int:
    """Returns the number of uint32 words that hold a bit per token."""
    return -(-vocab_size // 32)


def sample(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    history: History,
    slots: Int[Array, " B"],
    positions: Int[Array, " B"],
    mesh: Mesh,
    *,
    greedy: bool = False,
) -> tuple[Sampled, History]:
    """Samples one token per row and counts it in the row's history, if it has one.

    There are two variants, between which the host chooses. The plain one takes the likeliest token and does
    nothing else: it fits where every row is :attr:`SamplingParams.plain_greedy` and no mask applies. The
    other does everything; of that only the searches of top-k and top-p take long, so their loops run no round
    unless a row needs one.

    Args:
        logits: float32, sharded over V; padding is minus infinity.
        rows: sampling parameters.
        history: tokens seen so far, and masks.
        slots: slot of each row, whose mask applies.
        positions: position that each sampled token will take, which the noise is keyed by.
        mesh: the mesh that the logits are sharded over.
        greedy: the plain variant, which reads the logits alone; its log-probabilities are zeros.
    """
    if greedy:
        shard_map = jax.shard_map(
            _greedy_shard, mesh=mesh, in_specs=LOGITS, out_specs=REPLICATED, check_vma=False
        )
        return shard_map(logits), history
    platform: str = mesh.devices.flat[0].platform
    return jax.shard_map(
        partial(_sample_shard, search=ThresholdSearch.on(platform)),
        mesh=mesh,
        in_specs=(LOGITS, REPLICATED, History.specs(), REPLICATED, REPLICATED),
        out_specs=(REPLICATED, History.specs()),
        check_vma=False,
    )(logits, rows, history, slots, positions)


def score(logits: Float[Array, "N V"], tokens: Int[Array, " N"], mesh: Mesh) -> Sampled:
    """Computes the log-probability of each given token under its row of logits, and the likeliest tokens."""

    def shard(logits: Array, tokens: Array) -> Sampled:
        ids = _token_ids(logits)
        own = jnp.where(ids == tokens[:, None], logits, -jnp.inf).max(axis=-1, keepdims=True)
        own, *summary = _all_gather(own, *_summary(logits, ids))
        return Sampled(tokens, *_logprobs(summary, own.max(axis=1)))

    in_specs = (LOGITS, REPLICATED)
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED, check_vma=False)
    return mapped(logits, tokens)


@jax.named_scope("sampling")
def _greedy_shard(logits: Float[Array, "B shard"]) -> Sampled:
    """Returns the likeliest tokens, on one device, which holds a shard of the vocabulary."""
    tokens, _ = _winner(*_all_gather(*_best(logits, _token_ids(logits))))
    top = (*tokens.shape, MAX_LOGPROBS)
    return Sampled(
        tokens, jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32)
    )


@jax.named_scope("sampling")
def _sample_shard(
    logits: Float[Array, "B shard"],
    rows: SamplingRows,
    history: History,
    slots: Int[Array, " B"],
    positions: Int[Array, " B"],
    *,
    search: ThresholdSearch,
) -> tuple[Sampled, History]:
    """Samples on one device, which holds a shard of the vocabulary of ``logits`` and ``history``."""
    tokens = _token_ids(logits)
    scores, scaled_logits = _distribution(logits, rows, history, slots, positions, tokens, search)
    with jax.named_scope("gumbel"):
        perturbed_logits = _perturb(scaled_logits, _gumbel(rows.seeds, positions, tokens))
        # a NaN is below every threshold, but has to win, so that it reaches the caller
        scores = jnp.where((rows.temperature > 0) & ~jnp.isnan(scores), perturbed_logits, scores)
    best, token = _best(scores, tokens)
    logit = jnp.take_along_axis(logits, token - tokens[0], axis=1)
    best, token, logit, *summary = _all_gather(best, token, logit, *_summary(logits, tokens))
    sampled, device = _winner(best, token)
    wanted = rows.wants_logprobs
    logprobs = [
        jnp.where(wanted.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
        for x in _logprobs(summary, jnp.take_along_axis(logit, device[:, None, None], axis=1)[:, 0])
    ]
    has_history, history_rows = _history_rows(rows, history)
    # a token of another device, and one that is not counted, is out of bounds here
    place = jnp.where(has_history & (sampled >= tokens[0]), sampled - tokens[0], len(tokens))
    counts = history.counts.at[history_rows, place].add(1, mode="drop")
    return Sampled(sampled, *logprobs), replace(history, counts=counts)


def _history_rows(rows: SamplingRows, history: History) -> tuple[Bool[Array, " B"], Int[Array, " B"]]:
    """Returns which rows have a history, and the row of each one's: the spare one where there is none."""
    has_history = rows.history_rows != NO_HISTORY
    return has_history, jnp.where(has_history, rows.history_rows, len(history.counts) - 1)


def _token_ids(logits: Float[Array, "B shard"]) -> Int[Array, " shard"]:
    """Returns the token ids of this device's shard of the vocabulary."""
    shard_size = logits.shape[-1]
    return jax.lax.axis_index(AXIS) * shard_size + jnp.arange(shard_size)


@jax.named_scope("penalties")
def _penalise(
    logits: Float[Array, "B shard"],
    rows: SamplingRows,
    in_prompt: Bool[Array, "B shard"],
    counts: Int[Array, "B shard"],
    bias: Float[Array, "B shard"],
) -> Float[Array, "B shard"]:
    """Applies penalties and biases."""
    repetition, presence, frequency = rows.penalties
    repeated = in_prompt | (counts > 0)
    scores = jnp.where(repeated, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    scores = scores - frequency * counts.astype(jnp.float32) - jnp.where(counts > 0, presence, 0.0)
    # clipped: a possible token stays possible, whatever overflows, and padding stays impossible
    scores = jnp.where(jnp.isneginf(bias), -jnp.inf, jnp.clip(scores + bias, -_MAX, _MAX))
    return jnp.where(logits > -jnp.inf, scores, logits)


@jax.named_scope("mask")
def _allowed(words: UInt[Array, "B words"], tokens: Int[Array, " shard"]) -> Bool[Array, "B shard"]:
    """Returns which tokens of this device's shard masks allow: the bits of a part of their words."""
    first, size = tokens[0], len(tokens)
    # 32 bits more than the shard: it may begin inside a word
    part = jax.lax.dynamic_slice_in_dim(words, first // 32, mask_words(size + 31), axis=1)
    bits = (part[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return jax.lax.dynamic_slice_in_dim(bits.reshape(len(words), -1), first % 32, size, axis=1) != 0


@jax.named_scope("mask")
def _mask(
    scores: Float[Array, "B shard"], masked: Bool[Array, " B"], allowed: Bool[Array, "B shard"]
) -> Float[Array, "B shard"]:
    """Sets tokens that are not allowed to minus infinity, in the rows that are masked."""
    # a NaN stays: it has to reach the caller
    return jnp.where(allowed | ~masked[:, None] | jnp.isnan(scores), scores, -jnp.inf)


def _distribution(
    logits: Float[Array, "B shard"],
    rows: SamplingRows,
    history: History,
    slots: Int[Array, " B"],
    positions: Int[Array, " B"],
    tokens: Int[Array, " shard"],
    search: ThresholdSearch,
) -> tuple[Float[Array, "B shard"], Float[Array, "B shard"]]:
    """Returns scores, logits after penalties, biases and masks, and the distribution to sample from.

    The distribution is the softmax of the second: scores over the temperature, relative to the likeliest
    token, minus infinity for what masks, top-k, top-p and min-p leave out.
    """
    has_history, history_rows = _history_rows(rows, history)
    past = jax.tree.map(lambda x: x[history_rows], (history.in_prompt, history.counts, history.bias))
    scores = jnp.where(has_history[:, None], _penalise(logits, rows, *past), logits)
    scores = _mask(scores, positions < rows.masked_until, _allowed(history.masks[slots], tokens))
    temperature = rows.temperature
    top_k, top_p = rows.top_k[:, None], rows.top_p
    # the likeliest token is at 0 whatever the temperature: nothing overflows, and noise keeps its digits
    relative = _relative_to(scores, jax.lax.pmax(scores.max(axis=-1, keepdims=True), AXIS))
    scaled_logits = relative / jnp.where(temperature > 0, jnp.maximum(temperature, _TINY), 1.0)
    with jax.named_scope("top_k"):
        is_cut = (top_k > 0) & (temperature > 0)
        target = jnp.where(is_cut, top_k.astype(jnp.float32), jnp.inf)
        floor = search.threshold(scaled_logits, jnp.ones_like(scaled_logits), target)
    with jax.named_scope("top_p"):
        # among the tokens that top_k left, as in transformers
        mass = jnp.where(scaled_logits >= floor, jnp.exp(scaled_logits), 0.0)
        total = jax.lax.psum(mass.sum(axis=-1, keepdims=True), AXIS)
        is_cut = (top_p < 1) & (temperature > 0)
        target = jnp.where(is_cut, jnp.maximum(top_p * total, _LEAST_MASS), jnp.inf)
        floor = jnp.maximum(floor, search.threshold(scaled_logits, mass, target))
    with jax.named_scope("min_p"):
        floor = jnp.maximum(floor, jnp.log(rows.min_p))
    kept = (scaled_logits >= floor) & (scores > -jnp.inf)
    return scores, jnp.where(kept, scaled_logits, -jnp.inf)


def _perturb(
    scaled_logits: Float[Array, "B shard"], noise: Float[Array, "B shard"]
) -> Float[Array, "B shard"]:
    """Adds Gumbel noise: the arg-max of the result is a sample from the softmax of ``scaled_logits``."""
    # masked after the noise too: a token without probability must not win whatever the noise is
    return jnp.where(scaled_logits > -jnp.inf, scaled_logits + noise, -jnp.inf)


def _relative_to(scores: Float[Array, "*n"], top: Float[Array, "*m"]) -> Float[Array, "*n"]:
    """Returns scores minus the top of their row: 0 at the top, even if it is infinite."""
    return jnp.where(scores == top, 0.0, scores - top)


@dataclass(frozen=True)
class ThresholdSearch:
    """How the thresholds of top-k and top-p are searched for: by bisecting over the bits of a float.

    Attributes:
        bits: bits found per round, each of which takes an all-reduce of 2**bits - 1 sums per row: few where
            sums take long, many where an all-reduce does.
        fixed: whether each search takes all its rounds, even if no row needs it: a GPU would wait for the
            host at every round of a loop whose length is computed.
    """

    bits: int
    fixed: bool

    @classmethod
    def on(cls, platform: str) -> ThresholdSearch:
        """Returns the search for a platform."""
        return cls(bits=2 if platform == "cpu" else 4, fixed=platform == "gpu")

    @property
    def rounds(self) -> int:
        """Rounds of a search."""
        return 32 // self.bits

    @property
    def sums(self) -> int:
        """Sums per row of each round's all-reduce."""
        return (1 << self.bits) - 1

    def threshold(
        self, scores: Float[Array, "B shard"], weights: Float[Array, "B shard"], target: Float[Array, "B 1"]
    ) -> Float[Array, "B 1"]:
        """Returns the largest t such that the weights of all scores >= t, on all devices, sum to ``target``.

        Minus infinity if no t does, as for an infinite target. From the highest bit down: suitably flipped,
        the bits of floats are integers in the order of the floats.
        """
        keys = _ordered(scores)
        steps = jnp.arange(1, self.sums + 1, dtype=jnp.uint32)

        def bisect(round_: Int[Array, ""], low: UInt[Array, "B 1"]) -> UInt[Array, "B 1"]:
            shift = (32 - self.bits * (round_ + 1)).astype(jnp.uint32)
            candidates = low + (steps << shift)  # [B, sums], ascending
            above = keys[:, None, :] >= candidates[:, :, None]
            sums = jax.lax.psum(jnp.where(above, weights[:, None, :], 0.0).sum(axis=-1), AXIS)
            reached = (sums >= target).sum(axis=-1, keepdims=True).astype(jnp.uint32)
            next_low: Array = low + (reached << shift)
            return next_low

        rounds = self.rounds if self.fixed else jnp.where(jnp.any(jnp.isfinite(target)), self.rounds, 0)
        low = jnp.zeros((scores.shape[0], 1), jnp.uint32)
        low = jax.lax.fori_loop(0, rounds, bisect, low)
        return _unordered(low)


def _ordered(x: Float[Array, "*n"]) -> UInt[Array, "*n"]:
    """Maps floats to unsigned integers of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def _unordered(keys: UInt[Array, "*n"]) -> Float[Array, "*n"]:
    """Inverts :func:`_ordered`; keys below every float give minus infinity."""
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32(0x7FFFFFFF), ~keys)
    value = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


def _gumbel(
    seeds: Int[Array, "B 2"], positions: Int[Array, " B"], tokens: Int[Array, " shard"]
) -> Float[Array, "B shard"]:
    """Returns standard Gumbel noise for each row and token, float32."""

    def words(seed: Array, position: Array) -> Array:
        # a key is two words: for a seed of 32 bits this is jax.random.key(seed)
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        keys: Array = jax.vmap(jax.random.fold_in, (None, 0))(key, tokens)
        return jax.random.key_data(keys)  # [shard, 2]

    bits = jax.vmap(words)(jax.lax.bitcast_convert_type(seeds, jnp.uint32), positions)
    return _gumbel_of(bits[..., 0], bits[..., 1])


def _gumbel_of(high: UInt[Array, "*n"], low: UInt[Array, "*n"]) -> Float[Array, "*n"]:
    """Maps 64 random bits to standard Gumbel noise, -2.9 to 45.1.

    Samples are decided in the upper tail, where the uniform is small and a float32 has all its digits. It
    takes 64 bits: 32 would end the tail at 22.9, and equal ones tie.
    """
    units = high.astype(jnp.float32) + (low.astype(jnp.float32) + 0.5) * 2.0**-32  # of 2**-32
    # float32 rounds the largest to 1, whose noise would be minus infinity
    uniform = jnp.minimum(units * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _best(
    scores: Float[Array, "B shard"], tokens: Int[Array, " shard"]
) -> tuple[Float[Array, "B 1"], Int[Array, "B 1"]]:
    """Returns this device's highest score and the lowest token id that has it; a NaN counts as highest."""
    # plain reductions: on a CPU XLA does not vectorise an arg-max, and its maximum may pass over a NaN
    best, is_nan = scores.max(axis=-1, keepdims=True), jnp.isnan(scores)
    token = jnp.where((scores == best) | is_nan, tokens, tokens[-1]).min(axis=-1, keepdims=True)
    return jnp.where(is_nan.any(axis=-1, keepdims=True), jnp.nan, best), token


@jax.named_scope("winner")
def _winner(
    best: Float[Array, "B tp 1"], tokens: Int[Array, "B tp 1"]
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Returns the token of the highest score over all devices, of equal ones the lowest id, and its device.

    A NaN counts as highest, and gives ``NAN_TOKEN``; minus infinity gives ``ALL_MASKED_TOKEN``.
    """
    device = jnp.argmax(best[:, :, 0], axis=1)
    score, token = (jnp.take_along_axis(x[:, :, 0], device[:, None], axis=1)[:, 0] for x in (best, tokens))
    token = jnp.where(jnp.isnan(score), NAN_TOKEN, jnp.where(jnp.isneginf(score), ALL_MASKED_TOKEN, token))
    return token, device


def _all_gather(*parts: Array) -> list[Array]:
    """Gathers [B, n] numbers of each device, in one all-gather; returns them as [B, tp, n]."""
    # all as integers: a small token id would be a denormal as a float, which hardware may flush to 0
    bits = [jax.lax.bitcast_convert_type(part, jnp.int32) for part in parts]
    gathered = jax.lax.all_gather(jnp.concatenate(bits, axis=1), AXIS, axis=1)
    ends = np.cumsum([part.shape[1] for part in parts])
    split = jnp.split(gathered, ends[:-1].tolist(), axis=2)
    return [jax.lax.bitcast_convert_type(x, part.dtype) for x, part in zip(split, parts, strict=True)]


@jax.named_scope("logprobs")
def _summary(
    logits: Float[Array, "B shard"], tokens: Int[Array, " shard"]
) -> tuple[Float[Array, "B 1"], Float[Array, "B 1"], Float[Array, "B top"], Int[Array, "B top"]]:
    """Returns what log-probabilities need of a device's logits.

    Returns:
        The highest, the sum of exponentials relative to it, and the likeliest tokens' logits and ids.
    """
    highest = logits.max(axis=-1, keepdims=True)
    total = jnp.exp(_relative_to(logits, highest)).sum(axis=-1, keepdims=True)
    values, places = _top(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return highest, total, values, tokens[places]


def _top(x: Float[Array, "B n"], count: int) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """Returns ``jax.lax.top_k(x, count)``, which is faster on the few blocks with the highest maxima."""
    size, padding = _BLOCK, -x.shape[1] % _BLOCK
    padded = jnp.pad(x, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    blocks = padded.reshape(len(x), -1, size)
    if blocks.shape[1] <= count:
        values, places = jax.lax.top_k(x, count)
        return values, places
    # in order of place: of equal numbers the first comes first
    chosen = jnp.sort(jax.lax.top_k(blocks.max(axis=-1), count)[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(len(x), -1)
    values, places = jax.lax.top_k(candidates, count)
    return values, jnp.take_along_axis(chosen, places // size, axis=1) * size + places % size


@jax.named_scope("logprobs")
def _logprobs(
    summary: Sequence[Array], logit: Float[Array, "B 1"]
) -> tuple[Float[Array, " B"], Int[Array, "B top"], Float[Array, "B top"]]:
    """Returns log-probabilities of a token and of the likeliest ones; id -1 if there are no more.

    Args:
        summary: what :func:`_summary` returns, of each device: [B, tp, n].
        logit: of the token.
    """
    highest, total, values, ids = summary
    top = highest.max(axis=1)
    log_total = jnp.log((total * jnp.exp(_relative_to(highest, top[:, None]))).sum(axis=1))
    # the likeliest tokens of all are among each device's own
    count = min(MAX_LOGPROBS, ids.shape[1] * ids.shape[2])
    best, order = jax.lax.top_k(values.reshape(len(values), -1), count)
    found = jnp.take_along_axis(ids.reshape(len(ids), -1), order, axis=1)
    found = jnp.where(jnp.isneginf(best), -1, found)  # a vocabulary below 20 has no more than its tokens
    pad = ((0, 0), (0, MAX_LOGPROBS - count))
    return (
        (_relative_to(logit, top) - log_total)[:, 0],
        jnp.pad(found, pad, constant_values=-1),
        jnp.pad(_relative_to(best, top) - log_total, pad, constant_values=-jnp.inf),
    )
