"""The sharded sampler against a plain NumPy one, at several tp."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpjax.engine.masks import pack_mask
from tpjax.inspect.collectives import find_collectives
from tpjax.mesh import make_mesh
from tpjax.sampling import (
    ALL_MASKED_TOKEN,
    NAN_TOKEN,
    NO_HISTORY,
    History,
    Sampled,
    SamplingRows,
    mask_words,
    sample,
)
from tpjax.sampling_params import SamplingParams
from tpjax.sharding import pad_to_multiple

V = 50
ROWS = 256  # of every batch, so that there is one program per tp
EVERY_TP = (1, 2, 3, 5, 8)
GREEDY = SamplingParams(temperature=0)


@functools.cache
def program(tp: int, rows: int = ROWS, greedy: bool = False) -> Callable[..., tuple[Sampled, History]]:
    mesh = make_mesh(tp)
    padded = pad_to_multiple(V, tp)
    history = History.abstract(rows, rows, padded, mesh)
    shapes = (
        jax.ShapeDtypeStruct((rows, padded), jnp.float32, sharding=history.bias.sharding),
        SamplingRows(
            jax.ShapeDtypeStruct((rows, 6), jnp.float32), jax.ShapeDtypeStruct((rows, 6), jnp.int32)
        ),
        history,
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    compiled = jax.jit(functools.partial(sample, mesh=mesh, greedy=greedy)).lower(*shapes).compile()

    def call(logits: np.ndarray, packed: SamplingRows, past: History, slots: Any, positions: Any) -> Any:
        past = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), past, history)
        return compiled(
            jax.device_put(logits, history.bias.sharding), packed, past, np.int32(slots), np.int32(positions)
        )

    return call


@dataclass
class Past:
    """One row's history, unpadded."""

    in_prompt: np.ndarray
    counts: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(
        cls, prompt: Sequence[int] = (), output: Sequence[int] = (), bias: dict[int, float] | None = None
    ) -> Past:
        past = cls(np.zeros(V, bool), np.zeros(V, np.int32), np.zeros(V, np.float32))
        past.in_prompt[list(prompt)] = True
        np.add.at(past.counts, list(output), 1)
        for token, value in (bias or {}).items():
            past.bias[token] = value
        return past


def masks_of(allowed: np.ndarray, slots: int, padded_vocab: int) -> np.ndarray:
    """The masks of slots, from bools [n, V]; the rest allow nothing."""
    words = np.zeros((slots + 1, mask_words(padded_vocab) + 1), np.uint32)
    for row, mask in enumerate(allowed):
        packed = pack_mask(len(mask), np.flatnonzero(mask).tolist())
        words[row, : len(packed)] = packed
    return words


def draw(
    tp: int,
    logits: np.ndarray,
    params: Sequence[SamplingParams],
    seeds: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    pasts: Sequence[Past] | None = None,
    rows: int = ROWS,
    allowed: np.ndarray | None = None,
    greedy: bool = False,
) -> tuple[Sampled, History]:
    """Samples one token a row; ``logits`` [n, V] with n <= rows."""
    count, padded = len(params), pad_to_multiple(V, tp)
    assert logits.shape == (count, V) and count <= rows

    def pad(x: np.ndarray, fill: Any, dtype: type, rows: int) -> np.ndarray:
        out = np.full((rows, padded), fill, dtype)
        out[: len(x), :V] = x
        return out

    pasts = pasts or [Past.of()] * count
    past = History(
        pad(np.array([p.in_prompt for p in pasts]), False, np.bool_, rows + 1),
        pad(np.array([p.counts for p in pasts]), 0, np.int32, rows + 1),
        pad(np.array([p.bias for p in pasts]), 0, np.float32, rows + 1),
        masks_of(np.zeros((count, V)) if allowed is None else allowed, rows, padded),
    )
    masked = [0 if allowed is None else 2**31 - 1] * count
    every = range(count)
    packed = SamplingRows.pack(params, [0] * count if seeds is None else seeds, masked, every, rows)
    at = np.zeros(rows, np.int32)
    at[:count] = 0 if positions is None else positions
    sampled, past = program(tp, rows, greedy)(
        np.where(np.arange(padded) < V, pad(logits, 0, np.float32, rows), -np.inf).astype(np.float32),
        packed,
        past,
        np.arange(rows),
        at,
    )
    host = jax.tree.map(np.asarray, sampled)
    return Sampled(
        *(part[:count] for part in (host.tokens, host.logprobs, host.top_tokens, host.top_logprobs))
    ), past


# --- the same in NumPy -------------------------------------------------------------------------------------


def scores_of(logits: np.ndarray, p: SamplingParams, past: Past) -> np.ndarray:
    p = p.resolved({})
    scores = logits.astype(np.float64)
    for token in range(V):
        if past.in_prompt[token] or past.counts[token]:
            scores[token] = (
                scores[token] / p.repetition_penalty
                if scores[token] > 0
                else scores[token] * p.repetition_penalty
            )
        scores[token] -= p.frequency_penalty * past.counts[token]
        if past.counts[token]:
            scores[token] -= p.presence_penalty
    return scores + past.bias


def probabilities(logits: np.ndarray, p: SamplingParams, past: Past | None = None) -> np.ndarray:
    """Probability of each token: penalties, temperature, top-k, top-p, min-p, in this order."""
    p = p.resolved({})
    scaled_logits = scores_of(logits, p, past or Past.of()) / p.temperature
    odds = np.exp(scaled_logits - scaled_logits.max())
    if 0 < p.top_k < V:
        odds[odds < np.sort(odds)[-p.top_k]] = 0
    odds /= odds.sum()
    if p.top_p < 1:
        order = np.sort(odds)[::-1]
        together = np.cumsum(order)
        assert np.abs(together - p.top_p).min() > 1e-4, "too close for float32: take another seed"
        odds[odds < order[np.argmax(together >= p.top_p)]] = 0
    odds[odds < p.min_p * odds.max()] = 0
    return odds / odds.sum()


def gumbel(seed: int, position: int) -> np.ndarray:
    """Noise keyed by (seed, position, token id), through the public API of ``jax.random``."""
    words = jnp.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], jnp.uint32)
    key = jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), position)
    keys = jax.vmap(lambda token: jax.random.fold_in(key, token))(jnp.arange(V))
    high, low = np.asarray(jax.random.key_data(keys)).astype(np.float64).T
    return -np.log(-np.log1p(-(high + (low + 0.5) * 2.0**-32) * 2.0**-32))


def random_logits(seed: int, count: int = 1, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(count, V))).astype(np.float32)


def sampled_tokens(
    tp: int, logits: np.ndarray, p: SamplingParams, rounds: int, past: Past | None = None
) -> np.ndarray:
    """Many draws from one distribution: a batch of seeds, then the same at other positions."""
    each = [
        draw(
            tp,
            np.repeat(logits, ROWS, axis=0),
            [p] * ROWS,
            np.random.default_rng(turn).integers(0, 2**32, ROWS).tolist(),
            [turn] * ROWS,
            [past or Past.of()] * ROWS,
        )[0].tokens
        for turn in range(rounds)
    ]
    return np.concatenate(each)


# --- greedy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", EVERY_TP)
def test_greedy(tp: int) -> None:
    logits = random_logits(0, 40)
    sampled, _ = draw(tp, logits, [GREEDY] * 40)
    np.testing.assert_array_equal(sampled.tokens, logits.argmax(axis=1))


@pytest.mark.parametrize("tp", EVERY_TP)
def test_greedy_ties_go_to_the_lowest_id(tp: int) -> None:
    rows = ([49, 3], [10, 11, 12], [24, 25], [6, 7], [0, 49], list(range(V)), [48])
    logits = random_logits(1, len(rows))
    for row, tied in enumerate(rows):
        logits[row, tied] = 9.0
    logits[5] = -7.0  # all equal
    sampled, _ = draw(tp, logits, [GREEDY] * len(rows))
    assert sampled.tokens.tolist() == [min(tied) for tied in rows]


@pytest.mark.parametrize("tp", EVERY_TP)
def test_the_plain_variant_samples_what_the_other_does(tp: int) -> None:
    """Ties, a NaN and a row without any token included; it computes no log-probabilities, counts nothing."""
    logits = random_logits(8, 40)
    logits[:10, [3, 30, 49]] = 9.0
    logits[10], logits[11, 20] = -np.inf, np.nan
    full, _ = draw(tp, logits, [GREEDY] * 40)
    plain, past = draw(tp, logits, [GREEDY] * 40, greedy=True)
    np.testing.assert_array_equal(plain.tokens, full.tokens)
    assert plain.tokens[[0, 10, 11]].tolist() == [3, ALL_MASKED_TOKEN, NAN_TOKEN]
    assert not plain.logprobs.any() and not plain.top_tokens.any() and not plain.top_logprobs.any()
    assert not np.asarray(past.counts).any()


@pytest.mark.parametrize("tp", EVERY_TP)
def test_padding_is_never_sampled(tp: int) -> None:
    """V = 50 is padded to 51 at tp = 3 and to 56 at tp = 8; real logits are as low as they get."""
    logits = np.repeat(np.array([[-1e4], [-3e38]], np.float32), [200, 56], axis=0) * np.ones(
        (1, V), np.float32
    )
    params = [SamplingParams(temperature=t, top_k=k) for t in (0, 1.0, 100.0) for k in (0, 50, 10_000)]
    sampled, _ = draw(tp, logits, (params * ROWS)[:ROWS], range(ROWS))
    assert sampled.tokens.min() >= 0 and sampled.tokens.max() < V
    assert len(set(sampled.tokens[:200].tolist())) > 40


# --- which tokens can be sampled ---------------------------------------------------------------------------

FLAT = np.random.default_rng(7).uniform(0, 2, (1, V)).astype(np.float32)
TIED = np.repeat(np.array([[3.0, 2.0, 1.0, 0.5, 0.0]], np.float32), 10, axis=0).T.reshape(1, V)  # ten of each

FILTERS = {
    "none": (FLAT, {}),
    "top_k": (FLAT, {"top_k": 7}),
    "top_k one": (FLAT, {"top_k": 1}),
    "top_k ties": (TIED, {"top_k": 13}),  # the 13th ties with ten: 20 stay
    "top_k of V": (FLAT, {"top_k": V}),
    "top_k beyond V": (FLAT, {"top_k": 10**9}),
    "top_p": (FLAT, {"top_p": 0.6}),
    "top_p small": (FLAT, {"top_p": 0.01}),
    "top_p ties": (TIED, {"top_p": 0.3}),
    "top_p after top_k": (FLAT, {"top_k": 10, "top_p": 0.5}),
    "min_p": (FLAT, {"min_p": 0.4}),
    "min_p one": (TIED, {"min_p": 1.0}),
    "min_p after top_p": (FLAT, {"top_p": 0.8, "min_p": 0.5}),
    "temperature sharp": (FLAT, {"temperature": 0.5, "top_p": 0.5}),
    "temperature flat": (FLAT, {"temperature": 3.0, "top_p": 0.5}),
    "all": (FLAT, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.3}),
}


@pytest.mark.parametrize("name", FILTERS)
def test_exactly_the_allowed_tokens_are_sampled(name: str) -> None:
    logits, filters = FILTERS[name]
    params = SamplingParams(**{"temperature": 1.0, **filters})
    expected = probabilities(logits[0], params)
    tokens = sampled_tokens(3, logits, params, rounds=8)
    assert set(tokens.tolist()) == set(np.flatnonzero(expected).tolist())


def test_filters_keep_what_the_documentation_says() -> None:
    """The NumPy sampler itself, on a distribution worked by hand: 0.5, 0.25, 0.125, 0.125."""
    logits = np.full(V, -100.0, np.float32)
    logits[[9, 2, 30, 31]] = np.log([0.5, 0.25, 0.125, 0.125])
    for filters, kept in (
        ({"top_k": 2}, [2, 9]),
        ({"top_k": 3}, [2, 9, 30, 31]),  # a tie with the last
        ({"top_p": 0.4}, [9]),
        ({"top_p": 0.6}, [2, 9]),
        ({"top_p": 0.8}, [2, 9, 30, 31]),
        ({"top_k": 2, "top_p": 0.7}, [2, 9]),  # 2/3 and 1/3 of what top_k left
        ({"top_k": 2, "top_p": 0.6}, [9]),
        ({"min_p": 0.4}, [2, 9]),
        ({"min_p": 0.2}, [2, 9, 30, 31]),
    ):
        params = SamplingParams(temperature=1.0, **filters)  # type: ignore[arg-type]
        assert np.flatnonzero(probabilities(logits, params) > 1e-9).tolist() == kept
        assert set(sampled_tokens(2, logits[None], params, rounds=1).tolist()) == set(kept)


@pytest.mark.parametrize("top_p", (1e-10, 1e-38, 1e-46, 5e-324))
def test_tiny_top_p_keeps_the_likeliest(top_p: float) -> None:
    """As documented: the smallest set that reaches it has one token."""
    tokens = sampled_tokens(2, FLAT, SamplingParams(temperature=1.0, top_p=top_p), rounds=1)
    assert set(tokens.tolist()) == {int(FLAT.argmax())}


@pytest.mark.parametrize("temperature", (1e-4, 1e-30, 2e-38, 1e-41, 1e-300))
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(3, scale=10)
    tokens = sampled_tokens(2, logits, SamplingParams(temperature=temperature), rounds=1)
    assert set(tokens.tolist()) == {int(logits.argmax())}


def test_huge_temperature_is_uniform_over_the_real_vocabulary() -> None:
    tokens = sampled_tokens(8, random_logits(3, scale=10), SamplingParams(temperature=1e38), rounds=4)
    assert set(tokens.tolist()) == set(range(V))


# --- how often ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "filters", ({}, {"temperature": 0.6}, {"top_k": 12}, {"temperature": 1.5, "top_p": 0.7, "min_p": 0.2})
)
def test_frequencies_follow_the_softmax(filters: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, **filters})
    expected = probabilities(FLAT[0], params)
    tokens = sampled_tokens(5, FLAT, params, rounds=40)
    kept = np.flatnonzero(expected)
    counts = np.bincount(tokens, minlength=V)
    assert counts[expected == 0].sum() == 0
    wanted = expected[kept] * len(tokens)
    assert wanted.min() > 20
    chi_square = ((counts[kept] - wanted) ** 2 / wanted).sum()
    freedom = len(kept) - 1
    # Wilson and Hilferty: the cube root is normal; 3.1 deviations is one chance in a thousand
    deviations = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert abs(deviations) < 3.1


def test_positions_and_seeds_give_independent_draws() -> None:
    """Draws at neighbouring positions, and with neighbouring seeds, agree as often as chance has it."""
    flat = np.zeros((ROWS, V), np.float32)
    params = [SamplingParams(temperature=1.0)] * ROWS
    by_seed = [draw(1, flat, params, range(ROWS), [p] * ROWS)[0].tokens for p in range(8)]
    for first, second in ((0, 1), (3, 4), (0, 7)):
        assert (by_seed[first] == by_seed[second]).sum() < 20  # 256 / 50 is 5
    tokens = np.stack(by_seed)
    assert (tokens[:, 1:] == tokens[:, :-1]).sum() < 80  # 8 * 255 / 50 is 41


# --- the same at every tp, alone and in a batch ------------------------------------------------------------


def mixture(count: int) -> list[SamplingParams]:
    kinds: list[dict[str, Any]] = [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 0},
        {"top_k": 20, "top_p": 0.6, "min_p": 0.1, "temperature": 0.8},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logprobs": 20},
    ]
    return [SamplingParams(**{"temperature": 1.3, **kinds[i % len(kinds)]}) for i in range(count)]


PASTS = [Past.of(prompt=range(i % 7), output=[i % V, (3 * i) % V, i % V]) for i in range(ROWS)]
SEEDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, *np.random.default_rng(1).integers(0, 2**32, ROWS - 5).tolist()]
POSITIONS = [0, 1, 2**31 - 1, *np.random.default_rng(2).integers(0, 10_000, ROWS - 3).tolist()]


def test_same_draws_at_every_tp() -> None:
    logits, params = random_logits(11, ROWS), mixture(ROWS)
    sampled = {tp: draw(tp, logits, params, SEEDS, POSITIONS, PASTS) for tp in EVERY_TP}
    for tp in EVERY_TP[1:]:
        np.testing.assert_array_equal(sampled[tp][0].tokens, sampled[1][0].tokens)
        np.testing.assert_array_equal(
            np.asarray(sampled[tp][1].counts)[:ROWS, :V], np.asarray(sampled[1][1].counts)[:ROWS]
        )
    assert len(set(sampled[1][0].tokens.tolist())) == V


def test_draws_are_the_arg_max_of_scores_and_noise() -> None:
    """Token for token: large seeds, positions, filters, penalties."""
    logits, params = random_logits(12, 40), mixture(40)
    sampled, _ = draw(3, logits, params, SEEDS[:40], POSITIONS[:40], PASTS[:40])
    for row, p in enumerate(params):
        scores = scores_of(logits[row], p, PASTS[row] if p.needs_history else Past.of())
        if p.temperature:
            allowed = probabilities(logits[row], p, PASTS[row] if p.needs_history else None) > 0
            noisy = scores / p.temperature + gumbel(SEEDS[row], POSITIONS[row])
            scores = np.where(allowed, noisy, -np.inf)
        assert sampled.tokens[row] == scores.argmax(), f"row {row}: {p}"


def test_rows_do_not_touch_each_other() -> None:
    """A row alone, greedy strangers beside it, any place in the batch: the same token."""
    logits, params = random_logits(13, ROWS), mixture(ROWS)
    together, _ = draw(2, logits, params, SEEDS, POSITIONS, PASTS)
    for row in range(16):
        only = slice(row, row + 1)
        alone, _ = draw(2, logits[only], params[only], SEEDS[only], POSITIONS[only], PASTS[only], rows=1)
        assert alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(
            alone.logprobs, together.logprobs[only] if params[row].logprobs else 0, atol=1e-5
        )
    order = np.random.default_rng(4).permutation(ROWS)

    def shuffled(x: Sequence[Any]) -> list[Any]:
        return [x[i] for i in order]

    moved, _ = draw(2, logits[order], shuffled(params), shuffled(SEEDS), shuffled(POSITIONS), shuffled(PASTS))
    np.testing.assert_array_equal(moved.tokens, together.tokens[order])


# --- penalties and biases ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", (1, 3, 8))
@pytest.mark.parametrize(
    "penalties",
    (
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 1.2},
        {"frequency_penalty": 0.9},
        {"presence_penalty": -2, "frequency_penalty": -0.4},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    ),
)
def test_penalties(tp: int, penalties: dict[str, float]) -> None:
    rng = np.random.default_rng(5)
    logits = random_logits(14, 60)
    pasts = [Past.of(rng.integers(0, V, 20).tolist(), rng.integers(0, V, 20).tolist()) for _ in range(60)]
    params = SamplingParams(temperature=0, **penalties)  # type: ignore[arg-type]
    expected = [int(scores_of(row, params, past).argmax()) for row, past in zip(logits, pasts, strict=True)]
    sampled, past = draw(tp, logits, [params] * 60, pasts=pasts)
    assert sampled.tokens.tolist() == expected
    assert (sampled.tokens != logits.argmax(axis=1)).any()  # it did something
    for row in range(60):  # and the token was counted, in its own slot alone
        counts = pasts[row].counts.copy()
        counts[expected[row]] += 1
        np.testing.assert_array_equal(np.asarray(past.counts)[row, :V], counts)
    assert not np.asarray(past.counts)[60:].any()
    np.testing.assert_array_equal(np.asarray(past.in_prompt)[:60, :V], [p.in_prompt for p in pasts])


def test_bias_is_added_before_the_temperature() -> None:
    logits = random_logits(15)
    past = Past.of(bias={4: 2.0, 11: -100.0, int(logits.argmax()): -3.0})
    greedy = SamplingParams(temperature=0, logit_bias={4: 2.0})
    sampled, _ = draw(3, logits, [greedy], pasts=[past])
    assert sampled.tokens[0] == (logits[0] + past.bias).argmax()
    params = SamplingParams(temperature=0.7, top_k=6, logit_bias={4: 2.0})
    expected = probabilities(logits[0], params, past)
    tokens = sampled_tokens(3, logits, params, rounds=8, past=past)
    assert set(tokens.tolist()) == set(np.flatnonzero(expected).tolist())
    assert 4 in tokens and 11 not in tokens


def test_history_of_rows_that_do_not_use_it_is_left_alone() -> None:
    """A slot may hold what an earlier request left: neither read nor written."""
    logits = random_logits(16, 3)
    stale = Past.of(prompt=range(V), output=[int(logits[i].argmax()) for i in range(3)] * 5, bias={0: 100.0})
    users = [GREEDY, SamplingParams(temperature=0, frequency_penalty=2.0), GREEDY]
    sampled, past = draw(2, logits, users, pasts=[stale] * 3)
    assert sampled.tokens[[0, 2]].tolist() == logits[[0, 2]].argmax(axis=1).tolist()
    assert sampled.tokens[1] == 0
    counts = np.asarray(past.counts)
    np.testing.assert_array_equal(counts[[0, 2], :V], [stale.counts] * 2)
    assert not counts[3:].any()
    assert counts[1, 0] == stale.counts[0] + 1


@pytest.mark.parametrize("tp", (1, 2, 3))
def test_rows_say_whose_history_and_mask_it_is(tp: int) -> None:
    """Two histories and a spare one for four slots: the third row has none, whatever its parameters."""
    mesh, padded = make_mesh(tp), pad_to_multiple(V, tp)
    logits = np.full((3, padded), -np.inf, np.float32)
    logits[:, :V] = 0
    logits[:, 7], logits[:, 9], logits[:, 40] = 5.0, 4.0, 3.0
    past = [np.zeros((3, padded), dtype) for dtype in (bool, np.int32, np.float32)]
    past[1][:, 7] = 1
    allowed = np.ones((4, V), bool)
    allowed[2, [7, 9]] = False
    history = History(*past, masks_of(allowed, 4, padded))  # type: ignore[arg-type]
    params = [SamplingParams(temperature=0, presence_penalty=2.0)] * 3
    rows = SamplingRows.pack(params, [0] * 3, [0, 9, 0], [1, 0, NO_HISTORY], 3)
    sampled, after = jax.jit(functools.partial(sample, mesh=mesh))(
        logits, rows, history, np.array([3, 2, 0]), np.array([5, 5, 5])
    )
    assert sampled.tokens.tolist() == [9, 40, 7]
    counted = np.asarray(after.counts) - past[1]
    assert np.argwhere(counted).tolist() == [[0, 40], [1, 9]] and counted.sum() == 2


@pytest.mark.parametrize("tp", (1, 3, 5, 8))
def test_masks_of_shards_that_begin_inside_a_word(tp: int) -> None:
    """32 tokens a word: of 203 tokens a device has 203, 68, 41 or 26."""
    vocab = 203
    mesh, padded = make_mesh(tp), pad_to_multiple(vocab, tp)
    allowed = np.random.default_rng(8).random((32, vocab)) < 0.05
    allowed[np.arange(32), np.arange(32) * 6] = True
    logits = np.where(np.arange(padded) < vocab, np.random.default_rng(9).normal(size=(32, padded)), -np.inf)
    past = (np.zeros((2, padded), dtype) for dtype in (bool, np.int32, np.float32))
    history = History(*past, masks_of(allowed, 32, padded))  # type: ignore[arg-type]
    rows = SamplingRows.pack([GREEDY] * 32, [0] * 32, [9] * 32, [NO_HISTORY] * 32, 32)
    sampled, _ = jax.jit(functools.partial(sample, mesh=mesh))(
        logits.astype(np.float32), rows, history, np.arange(32), np.full(32, 5)
    )
    expected = np.where(allowed, logits[:, :vocab], -np.inf).argmax(axis=1)
    np.testing.assert_array_equal(sampled.tokens, expected)


# --- log-probabilities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", EVERY_TP)
def test_logprobs(tp: int) -> None:
    """Of the model's own distribution, whatever the temperature, filters and penalties."""
    logits = random_logits(17, 30, scale=3)
    logits[0, 10:20] = logits[0].max() + 1  # ties: the lower id first
    params = [
        SamplingParams(temperature=i % 3, top_k=i % 4, presence_penalty=(i % 2) * 1.5, logprobs=i % 21)
        for i in range(30)
    ]
    sampled, _ = draw(tp, logits, params, range(30), pasts=[Past.of(output=[i]) for i in range(30)])
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(sampled.logprobs, expected[np.arange(30), sampled.tokens], atol=1e-5)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(sampled.top_tokens, order)
    np.testing.assert_allclose(sampled.top_logprobs, np.take_along_axis(expected, order, axis=1), atol=1e-5)


def test_no_logprobs_unless_asked_for() -> None:
    sampled, _ = draw(3, random_logits(18, 2), [GREEDY] * 2)
    assert not sampled.logprobs.any() and not sampled.top_tokens.any() and not sampled.top_logprobs.any()


@pytest.mark.parametrize("tp", (1, 4, 8))
def test_logprobs_of_a_vocabulary_below_twenty(tp: int) -> None:
    """Ten tokens, padded to 12 or 16: ids that do not exist must not be reported as tokens."""
    mesh, padded = make_mesh(tp), pad_to_multiple(10, tp)
    logits = np.full((1, padded), -np.inf, np.float32)
    logits[0, :10] = np.arange(10)
    past = (np.zeros((1, padded), dtype) for dtype in (bool, np.int32, np.float32))
    history = History(*past, masks_of(np.zeros((0, 10)), 1, padded))  # type: ignore[arg-type]
    rows = SamplingRows.pack([SamplingParams(temperature=0, logprobs=20)], [0], [0], [NO_HISTORY], 1)
    sampled, _ = jax.jit(functools.partial(sample, mesh=mesh))(
        logits, rows, history, np.array([0]), np.array([0])
    )
    assert sampled.top_tokens[0, :10].tolist() == list(range(9, -1, -1))
    assert np.isfinite(sampled.top_logprobs[0, :10]).all()
    assert sampled.top_tokens[0, 10:].tolist() == [-1] * 10
    assert np.isneginf(sampled.top_logprobs[0, 10:]).all()


# --- masks, and logits that are not numbers ----------------------------------------------------------------


@pytest.mark.parametrize("tp", (1, 3))
@pytest.mark.parametrize("temperature", (0, 1))
def test_mask_allows_what_it_says(tp: int, temperature: float) -> None:
    """Row by row what is sampled is what would be sampled if the rest had no probability at all."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(4, V)).astype(np.float32)
    allowed = rng.random((4, V)) < 0.2
    params = [SamplingParams(temperature=temperature)] * 4
    sampled, _ = draw(tp, logits, params, seeds=range(4), allowed=allowed)
    assert allowed[np.arange(4), sampled.tokens].all()
    only = np.where(allowed, logits, -1e4).astype(np.float32)
    assert sampled.tokens.tolist() == draw(tp, only, params, seeds=range(4))[0].tokens.tolist()


@pytest.mark.parametrize("tp", (1, 3))
@pytest.mark.parametrize("params", (SamplingParams(temperature=0), SamplingParams(top_k=5, top_p=0.9)))
def test_nan_is_told_and_stays_with_its_row(tp: int, params: SamplingParams) -> None:
    logits = np.random.default_rng(6).normal(size=(4, V)).astype(np.float32)
    clean = draw(tp, logits, [params] * 4)[0].tokens
    logits[1, V - 2] = np.nan
    logits[3] = np.nan
    tokens = draw(tp, logits, [params] * 4)[0].tokens.tolist()
    assert tokens == [clean[0], NAN_TOKEN, clean[2], NAN_TOKEN]


# --- packing -----------------------------------------------------------------------------------------------


def test_pack() -> None:
    params = [
        SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5,
                       presence_penalty=0.5, frequency_penalty=-0.5, logprobs=0),
        SamplingParams(top_k=10**12, logit_bias={3: 1.0}),
    ]  # fmt: skip
    rows = SamplingRows.pack(params, [2**32 - 1, -(2**33) + 2**31], [0, 17], [3, 2], 4)
    assert rows.floats.dtype == np.float32 and rows.ints.dtype == np.int32
    assert rows.floats.tolist() == [
        [0.5, 0.25, 0.125, 1.5, 0.5, -0.5],
        [1, 1, 0, 1, 0, 0],
        [0, 1, 0, 1, 0, 0],  # rows that do not exist are greedy
        [0, 1, 0, 1, 0, 0],
    ]
    assert rows.ints.tolist() == [
        [7, 0, -1, 3, 1, 0],
        [2**24, -2, -(2**31), 2, 0, 17],
        [0, 0, 0, NO_HISTORY, 0, 0],
        [0, 0, 0, NO_HISTORY, 0, 0],
    ]
    # a row of parameters that need no history has none
    assert SamplingRows.pack([GREEDY], [0], [0], [3], 1).ints.tolist() == [[0, 0, 0, NO_HISTORY, 0, 0]]


def test_large_seeds_differ() -> None:
    seeds = [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 2, 2**32, 2**63 - 1, -(2**63), -2, 2**33]
    flat = np.zeros((len(seeds), V), np.float32)
    tokens = [
        tuple(
            draw(1, flat, [SamplingParams(temperature=1.0)] * len(seeds), seeds, [p] * len(seeds))[
                0
            ].tokens.tolist()
        )
        for p in range(6)
    ]
    assert len(set(zip(*tokens, strict=True))) == len(seeds)  # as many different sequences


# --- what moves between devices ----------------------------------------------------------------------------


def optimised_hlo(rows: int, vocab: int, tp: int, greedy: bool) -> str:
    mesh = make_mesh(tp)
    history = History.abstract(3, 2, vocab, mesh)
    logits = jax.ShapeDtypeStruct((rows, vocab), jnp.float32, sharding=history.bias.sharding)
    packed = jax.tree.map(np.asarray, SamplingRows.pack([], [], [], [], rows))
    integers = jax.ShapeDtypeStruct((rows,), jnp.int32)
    jitted = jax.jit(functools.partial(sample, mesh=mesh, greedy=greedy), donate_argnums=2)
    hlo: str = jitted.lower(logits, packed, history, integers, integers).compile().as_text()
    return hlo


def test_the_plain_variant_is_one_gather_of_candidates() -> None:
    hlo = optimised_hlo(2, 4096, 4, greedy=True)
    assert [(one.kind, one.shapes) for one in find_collectives(hlo)] == [
        ("all-gather", "s32[2,4,2]")
    ]  # [B, tp, 2]: the winner
    assert " conditional(" not in hlo and " while(" not in hlo
    assert not re.search(r"(exponential|log-plus-one|sort|topk)", hlo, re.IGNORECASE)


def test_nothing_of_the_size_of_the_vocabulary_moves() -> None:
    rows, vocab, tp = 2, 4096, 4
    hlo = optimised_hlo(rows, vocab, tp, greedy=False)
    found = find_collectives(hlo)
    assert " conditional(" not in hlo
    sums = f"f32[{rows},3]"  # of a round of a search
    assert [(one.kind, one.shapes) for one in found] == [
        ("all-reduce", f"f32[{rows},1]"),  # the highest score
        ("all-reduce", sums),  # of top-k
        ("all-reduce", f"f32[{rows},1]"),  # the mass that is left
        ("all-reduce", sums),  # of top-p
        ("all-gather", f"s32[{rows},{tp},45]"),  # the winner, and 20 likeliest tokens with their logits
    ]
    # no collective escaped the parser
    names = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
    assert len(re.findall(names, hlo)) == len(found)
