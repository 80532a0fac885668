"""What is sampled, at real vocabulary sizes: the noise, and the distribution of draws.

The oracle is the definition in float64 NumPy (softmax, then filters over sorted probabilities), held against
transformers' own warpers where torch is installed. Programs are compiled as shipped: at the optimisation
level of the other tests the noise of a large vocabulary takes ten times as long.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tpjax import LLM, SamplingParams
from tpjax.engine.masks import pack_mask
from tpjax.mesh import make_mesh
from tpjax.sampling import (
    ALL_MASKED_TOKEN,
    NAN_TOKEN,
    History,
    SamplingRows,
    ThresholdSearch,
    _best,
    _distribution,
    _gumbel,
    _gumbel_of,
    _perturb,
    mask_words,
    sample,
)
from tpjax.sharding import LOGITS

VOCABULARIES = (49_152, 128_256, 262_144)  # SmolLM2, Llama 3, Gemma 3
AS_SHIPPED: Any = {"xla_backend_optimization_level": 3}


@dataclass
class Case:
    """One distribution: logits, parameters and what a slot remembers, all of one vocabulary."""

    logits: np.ndarray
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=1.0))
    in_prompt: np.ndarray | None = None
    counts: np.ndarray | None = None
    bias: np.ndarray | None = None
    allowed: np.ndarray | None = None


def rows_of(vocab: int) -> int:
    """Draws of one dispatch: of a small vocabulary many, since a dispatch takes its time."""
    return max(64, 2**20 // vocab)


@functools.cache
def program(vocab: int, tp: int) -> Callable[..., Any]:
    """Draws from one distribution, by one slot's history."""
    mesh, count = make_mesh(tp), rows_of(vocab)

    def draw(logits: Any, rows: SamplingRows, history: History, positions: Any) -> Any:
        every = jax.lax.with_sharding_constraint(
            jnp.broadcast_to(logits, (count, vocab)), jax.NamedSharding(mesh, LOGITS)
        )
        return sample(every, rows, history, jnp.zeros(count, jnp.int32), positions, mesh)[0].tokens

    return jax.jit(draw, compiler_options=AS_SHIPPED)


def history_of(case: Case, tp: int) -> History:
    """What one slot remembers, in one row and a spare one."""
    vocab = len(case.logits)

    def one_slot(values: np.ndarray | None, dtype: type) -> np.ndarray:
        return np.repeat((np.zeros(vocab) if values is None else values).astype(dtype)[None], 2, axis=0)

    masks = np.zeros((1, mask_words(vocab) + 1), np.uint32)
    if case.allowed is not None:
        packed = pack_mask(vocab, np.flatnonzero(case.allowed).tolist())
        masks[0, : len(packed)] = packed
    history = History(
        one_slot(case.in_prompt, np.bool_),
        one_slot(case.counts, np.int32),
        one_slot(case.bias, np.float32),
        masks,
    )
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(make_mesh(tp), spec), History.specs())
    return jax.tree.map(jax.device_put, history, shardings)  # type: ignore[no-any-return]


def rows_for(case: Case, seeds: list[int]) -> SamplingRows:
    """A row for each seed."""
    count = len(seeds)
    masked = [0 if case.allowed is None else 2**31 - 1] * count
    return SamplingRows.pack([case.params] * count, seeds, masked, [0] * count, count)


def keys(count: int, at_once: int, seed: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Seeds and positions of dispatches of ``at_once`` draws, at least ``count`` together.

    The n-th draw's are the same whatever ``at_once`` is.
    """
    random = np.random.default_rng(seed)
    for _ in range(-(-count // at_once)):
        words = random.integers(-(2**63), 2**63 - 1, (at_once, 2), endpoint=True)
        yield words[:, 0].tolist(), (words[:, 1] % 100_000).astype(np.int32)


def sampled(case: Case, count: int, tp: int = 1, seed: int = 0) -> np.ndarray:
    """At least ``count`` tokens, each with a seed and a position of its own."""
    vocab = len(case.logits)
    draw, history = program(vocab, tp), history_of(case, tp)
    logits = jax.device_put(case.logits.astype(np.float32)[None], jax.NamedSharding(make_mesh(tp), LOGITS))
    tokens = [
        draw(logits, rows_for(case, seeds), history, positions)
        for seeds, positions in keys(count, rows_of(vocab), seed)
    ]
    return np.concatenate([np.asarray(part) for part in tokens])


# --- the noise ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """2**26 of it: sixteen rows of 2**22 tokens."""
    draw = jax.jit(_gumbel, compiler_options=AS_SHIPPED)
    tokens = jnp.arange(2**22, dtype=jnp.int32)
    parts = [
        draw(jnp.array([[0, s]], jnp.int32), jnp.array([11 * s], jnp.int32), tokens)[0] for s in range(16)
    ]
    return np.concatenate([np.asarray(part) for part in parts])


def test_noise_is_finite_and_follows_the_gumbel_distribution(noise: np.ndarray) -> None:
    assert noise.dtype == np.float32 and noise.size == 2**26
    assert np.isfinite(noise).all()
    wide = noise.astype(np.float64)
    assert wide.mean() == pytest.approx(np.euler_gamma, abs=5 * np.pi / np.sqrt(6) / 2**13)
    assert wide.std() == pytest.approx(np.pi / np.sqrt(6), rel=1e-3)
    # P(noise > t) = 1 - exp(-exp(-t)), far into the tail, where draws are decided
    for t in (-2, -1, 0, 1, 2, 4, 6, 8, 10, 12, 14, 16):
        chance = -np.expm1(-np.exp(-t))
        expected = chance * noise.size
        assert abs((noise > t).sum() - expected) < 5 * np.sqrt(expected * (1 - chance)), t
    # a uniform of 23 bits ends at 16.6; of 2**26 draws seven are expected beyond 16
    assert noise.max() > 16.7
    # of the largest 4,096, the winners of as many draws over 16,384 tokens, hardly any two are equal
    largest = np.sort(noise)[-4096:]
    assert (np.diff(largest) == 0).sum() < 8


def test_noise_of_every_extreme_word_is_finite_and_falls() -> None:
    edges = [0, 1, 2, 3, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 129, 2**32 - 128]
    words = np.array([*edges, 2**32 - 2, 2**32 - 1], np.uint32)
    high, low = np.meshgrid(words, words, indexing="ij")
    found = np.asarray(jax.jit(_gumbel_of)(high, low)).astype(np.float64)
    assert np.isfinite(found).all()
    assert (np.diff(found.reshape(-1)) <= 0).all()
    uniform = (high.astype(np.float64) + (low + 0.5) * 2.0**-32) * 2.0**-32
    below = uniform < 0.9
    exact = -np.log(-np.log1p(-uniform[below]))
    np.testing.assert_allclose(found[below], exact, rtol=1e-6, atol=1e-6)
    assert found.max() == pytest.approx(np.log(2.0**65), rel=1e-6)


# --- no token without probability --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab", "tp"),
    (
        (VOCABULARIES[0], 1),
        (VOCABULARIES[2], 4),
        *(
            pytest.param(vocab, tp, marks=pytest.mark.slow)
            for vocab, tp in zip((*VOCABULARIES[1:], *VOCABULARIES[:2]), (1, 1, 4, 4), strict=True)
        ),
    ),
)
def test_a_token_of_probability_one_is_always_sampled(vocab: int, tp: int) -> None:
    """Where the uniform could be 1, one token in 2**24 won whatever its logit: 1 draw in 64 at 262,144."""
    sure = vocab // 3
    logits = np.random.default_rng(vocab).normal(0, 2, vocab)
    logits[sure] = 80.0
    assert (sampled(Case(logits), 256, tp) == sure).all()
    cold = Case(np.where(np.arange(vocab) == sure, 0.5, 0.0), SamplingParams(temperature=0.01))
    assert (sampled(cold, 256, tp) == sure).all()


@pytest.mark.parametrize("tp", (1, 4))
def test_masked_tokens_are_never_sampled(tp: int) -> None:
    """Not even where all that is allowed is hopeless, and the rest is at infinity."""
    vocab = VOCABULARIES[0]
    allowed = np.zeros(vocab, bool)
    allowed[[5, 40_000]] = True
    for logits in (np.zeros(vocab), np.where(allowed, -3e38, 3e38), np.where(allowed, -90.0, np.inf)):
        tokens = sampled(Case(logits, allowed=allowed), 256, tp)
        assert set(tokens.tolist()) == {5, 40_000}
    one = np.arange(vocab) == 17
    for temperature in (0.0, 1e-30, 1.0, 1e30):
        params = SamplingParams(temperature=temperature, top_p=0.5, top_k=9, min_p=0.3)
        assert (sampled(Case(np.zeros(vocab), params, allowed=one), 64, tp) == 17).all()


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("tp", (1, 4))
def test_nothing_allowed_is_told(tp: int, temperature: float) -> None:
    vocab = VOCABULARIES[0]
    params = SamplingParams(temperature=temperature, top_k=3, top_p=0.5)
    none = np.zeros(vocab, bool)
    assert (sampled(Case(np.zeros(vocab), params, allowed=none), 64, tp) == ALL_MASKED_TOKEN).all()
    assert (sampled(Case(np.full(vocab, -np.inf), params), 64, tp) == ALL_MASKED_TOKEN).all()
    broken = np.where(np.arange(vocab) == 40_000, np.nan, 0.0)
    for allowed in (None, none, ~none):  # a mask hides no broken model
        assert (sampled(Case(broken, params, allowed=allowed), 64, tp) == NAN_TOKEN).all()


@pytest.mark.parametrize("tp", (1, 4))
def test_numbers_at_the_ends_of_float32(tp: int) -> None:
    """What a temperature, a penalty or a bias would make infinite is neither noise nor an error."""
    vocab = VOCABULARIES[0]
    best = np.where(np.arange(vocab) == 9, -3.0e38, -3.3e38)
    for temperature in (1e-38, 1e-5, 0.5, 1.0):
        params = SamplingParams(temperature=temperature)
        assert (sampled(Case(best, params), 64, tp) == 9).all()
        assert (sampled(Case(-best[::-1] - 6.2e38, params), 64, tp) != NAN_TOKEN).all()
    # the tokens that share the top are sampled alike, however cold, and near ties are told apart
    pair = np.full(vocab, -1.0)
    pair[[100, 30_000]] = 1e4
    cold = sampled(Case(pair, SamplingParams(temperature=1e-4)), 512, tp)
    assert set(cold.tolist()) == {100, 30_000} and 190 < (cold == 100).sum() < 322
    # a penalty that overflows, one that float32 rounds to 0, biases that add up to infinity
    seen = np.zeros(vocab, bool)
    seen[[3, 5]] = True
    logits = np.where(seen, -2.0, -50.0)
    heavy = SamplingParams(temperature=1.0, repetition_penalty=3e38)
    assert not np.isin(sampled(Case(logits, heavy, in_prompt=seen), 64, tp), [3, 5, NAN_TOKEN]).any()
    light = SamplingParams(temperature=1.0, repetition_penalty=1e-46)
    assert np.isin(sampled(Case(logits, light, in_prompt=seen), 64, tp), [3, 5]).all()
    everything = SamplingParams(temperature=1.0, repetition_penalty=3e38)
    tokens = sampled(Case(np.full(vocab, -2.0), everything, in_prompt=np.ones(vocab)), 64, tp)
    assert tokens.min() >= 0 and len(set(tokens.tolist())) > 50
    biased = SamplingParams(temperature=1.0, logit_bias={7: 3e38})
    tokens = sampled(
        Case(np.full(vocab, 3e38), biased, bias=np.where(np.arange(vocab) == 7, 3e38, 0)), 64, tp
    )
    assert (tokens == 7).all()


# --- the distribution --------------------------------------------------------------------------------------


def scores_of(case: Case) -> np.ndarray:
    """Penalised logits, float64, from the definition."""
    p, vocab = case.params.resolved({}), len(case.logits)
    scores = case.logits.astype(np.float32).astype(np.float64)
    zero = np.zeros(vocab)
    counts = zero if case.counts is None else case.counts
    seen = (counts > 0) | ((zero if case.in_prompt is None else case.in_prompt) > 0)
    if p.needs_history:
        penalty = p.repetition_penalty
        scores[seen] = [s / penalty if s > 0 else s * penalty for s in scores[seen]]
        scores = scores - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)
        scores = scores + (zero if case.bias is None else case.bias)
    if case.allowed is not None:
        scores = np.where(case.allowed, scores, -np.inf)
    return scores


def probabilities(case: Case) -> np.ndarray:
    """Probability of each token: temperature, top-k, top-p, min-p, in this order, over sorted tokens."""
    p = case.params.resolved({})
    scores = scores_of(case) / p.temperature
    order = np.argsort(-scores, kind="stable")
    odds = np.exp(scores[order] - scores[order[0]])
    if p.top_k:
        odds[p.top_k :] = 0
    odds /= odds.sum()
    if p.top_p < 1:
        before = np.cumsum(odds) - odds  # of those likelier than each
        odds[before >= p.top_p] = 0
    odds[odds < p.min_p * odds[0]] = 0
    out = np.zeros_like(odds)
    out[order] = odds / odds.sum()
    return out


def nucleus(logits: np.ndarray, near: float, temperature: float = 1.0, top_k: int = 0) -> float:
    """A ``top_p`` near that one which no rounding decides: half-way into a token's share."""
    plain = Case(logits, SamplingParams(temperature=temperature, top_k=top_k))
    together = np.cumsum(np.sort(probabilities(plain))[::-1])
    at = int(np.argmax(together >= near))
    return float((together[at - 1] + together[at]) / 2)


def deviations(tokens: np.ndarray, expected: np.ndarray) -> float:
    """How far counts are from what was asked for: chi-squared, as standard deviations of a normal.

    The larger of two: over tokens, those expected fewer than 20 times pooled in the order of their
    probability (what is next to impossible must come as rarely), and over 64 ranges of ids.
    """
    wanted = expected * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected)).astype(np.float64)
    assert counts[expected == 0].sum() == 0, np.flatnonzero((counts > 0) & (expected == 0))
    order = np.argsort(wanted, kind="stable")
    pools = np.concatenate([_pools(wanted[order][wanted[order] < 20]), np.arange((wanted >= 20).sum())])
    pools[(wanted < 20).sum() :] += pools[(wanted < 20).sum() - 1] + 1 if (wanted < 20).any() else 0
    ranges = np.arange(len(expected)) * min(64, len(expected)) // len(expected)
    return max(
        _deviations(np.bincount(pools, counts[order]), np.bincount(pools, wanted[order])),
        _deviations(np.bincount(ranges, counts), np.bincount(ranges, wanted)),
        key=abs,
    )


def _pools(wanted: np.ndarray) -> np.ndarray:
    """Numbers of consecutive pools that are expected some 20 times each."""
    together = np.cumsum(wanted)
    return (
        np.minimum(together / 20, max(1, together[-1] // 20) - 1).astype(int)
        if len(wanted)
        else wanted.astype(int)
    )


def _deviations(counts: np.ndarray, wanted: np.ndarray) -> float:
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    chi_square = ((counts - wanted) ** 2 / wanted).sum()
    # Wilson and Hilferty: the cube root is normal
    return float(((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom)))


def case_of(name: str, vocab: int) -> Case:
    """The distributions that are tried; two of three tokens of a real model's are next to impossible."""
    random = np.random.default_rng(len(name))
    logits = random.normal(0, 2.5, vocab).astype(np.float32)
    past = {
        "in_prompt": random.random(vocab) < 0.02,
        "counts": random.poisson(0.02, vocab),
        "bias": np.where(random.random(vocab) < 0.01, random.normal(0, 3, vocab), 0).astype(np.float32),
    }
    match name:
        case "plain":
            return Case(logits)
        case "cold":
            return Case(logits, SamplingParams(temperature=0.4))
        case "hot":
            return Case(logits, SamplingParams(temperature=1.8))
        case "top_k":
            return Case(logits, SamplingParams(temperature=0.9, top_k=vocab // 100))
        case "top_p":
            return Case(logits, SamplingParams(temperature=1.0, top_p=nucleus(logits, 0.9)))
        case "min_p":
            return Case(logits, SamplingParams(temperature=1.3, min_p=0.02))
        case "mask":
            return Case(logits, allowed=random.random(vocab) < 0.1)
        case "penalties":
            penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.6, "frequency_penalty": 0.3}
            return Case(logits, SamplingParams(temperature=1.0, logit_bias={0: 0.0}, **penalties), **past)  # type: ignore[arg-type]
        case _:
            top_p = nucleus(logits, 0.95, 0.8, vocab // 16)
            every = SamplingParams(temperature=0.8, top_k=vocab // 16, top_p=top_p, min_p=0.001)
            return Case(logits, every)


NAMES = ("plain", "cold", "hot", "top_k", "top_p", "min_p", "mask", "penalties", "all")


@pytest.mark.parametrize(
    ("name", "count", "tp"), (("plain", 2048, 1), ("mask", 1024, 4), ("penalties", 1024, 1), ("all", 256, 4))
)
def test_draws_follow_the_softmax(name: str, count: int, tp: int) -> None:
    case = case_of(name, VOCABULARIES[0])
    assert abs(deviations(sampled(case, count, tp), probabilities(case))) < 4


def distribution_of(case: Case) -> np.ndarray:
    """The logits that the sampler adds noise to."""
    vocab, mesh = len(case.logits), make_mesh(1)

    def shard(logits: Any, rows: SamplingRows, history: History) -> Any:
        first, tokens = jnp.zeros(1, jnp.int32), jnp.arange(vocab, dtype=jnp.int32)
        return _distribution(logits, rows, history, first, first, tokens, ThresholdSearch.on("cpu"))[1]

    specs = {"in_specs": (LOGITS, P(), History.specs()), "out_specs": LOGITS, "check_vma": False}
    find = jax.jit(jax.shard_map(shard, mesh=mesh, **specs), compiler_options=AS_SHIPPED)
    logits = case.logits.astype(np.float32)[None]
    return np.asarray(find(logits, rows_for(case, [0]), history_of(case, 1)))[0]


def threefry(key: Sequence[Any], word: Any) -> list[Any]:
    """Threefry-2x32 of the words 0 and ``word``: what ``jax.random.fold_in`` computes, in a loop on a CPU."""
    words = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    left, right = words[0], word + words[1]
    for turn in range(5):
        for shift in ((13, 15, 26, 6), (17, 29, 16, 24))[turn % 2]:
            left = left + right
            right = left ^ (right << np.uint32(shift) | right >> np.uint32(32 - shift))
        left = left + words[(turn + 1) % 3]
        right = right + words[(turn + 2) % 3] + np.uint32(turn + 1)
    return [left, right]


@functools.partial(jax.jit, static_argnums=2, compiler_options=AS_SHIPPED)
def noise_of(seeds: Any, positions: Any, vocab: int) -> Any:
    """The sampler's noise, in half its time."""
    words = jax.lax.bitcast_convert_type(seeds, jnp.uint32)
    key = threefry((words[:, 0], words[:, 1]), positions.astype(jnp.uint32))
    return _gumbel_of(*threefry([word[:, None] for word in key], jnp.arange(vocab, dtype=jnp.uint32)))


@functools.partial(jax.jit, compiler_options=AS_SHIPPED)
def picked(noise: Any, distributions: Any) -> Any:
    """What the sampler picks, of each distribution and row of noise [B, V]: [C, B].

    A distribution is logits and the ids of their tokens: those of a vocabulary, or some of them.
    """

    def pick(logits: Any, ids: Any) -> Any:
        of_ids = noise[:, : len(ids)] if len(ids) in VOCABULARIES else noise[:, ids]
        return _best(_perturb(jnp.broadcast_to(logits, of_ids.shape), of_ids), ids)[1][:, 0]

    return jnp.stack([pick(*distribution) for distribution in distributions])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_draws_follow_the_softmax() -> None:
    """Nine distributions of each vocabulary; 10**5 draws from each or, of the larger two, from each kind.

    Each distribution is compared number by number, so that draws tell of the noise and of what wins. The
    parts of the sampler are called one by one: the noise of a key, most of the work, is the same for all, and
    a smaller vocabulary's is the beginning of a larger one's. The first draws are also taken by the sampler.
    """
    cases, distributions = [], []
    for vocab in VOCABULARIES:
        drawn_from = NAMES if vocab == VOCABULARIES[0] else ("plain", "top_p", "mask", "all")
        for name in NAMES:
            case = case_of(name, vocab)
            scaled_logits = distribution_of(case)
            odds = np.exp(scaled_logits.astype(np.float64))
            np.testing.assert_allclose(odds / odds.sum(), probabilities(case), rtol=1e-5, atol=1e-12)
            if name in drawn_from:
                kept = np.flatnonzero(scaled_logits > -np.inf).astype(np.int32)
                cases.append(case)
                distributions.append((scaled_logits[kept], kept))
    most = VOCABULARIES[-1]
    at_once = 2**20 // most  # that many numbers a core's cache holds
    parts = []
    for seeds, positions in keys(100_000, at_once, seed=1):
        words = np.array([[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)
        parts.append(picked(noise_of(words.view(np.int32), positions, most), distributions))
    tokens = np.concatenate([np.asarray(part) for part in parts], axis=1)
    assert tokens.shape[1] >= 100_000
    for case, of_case in zip(cases, tokens, strict=True):
        assert abs(deviations(of_case, probabilities(case))) < 4, case.params
        itself = sampled(case, 1, seed=1)
        np.testing.assert_array_equal(of_case[: len(itself)], itself)


def test_the_statistic_sees_a_wrong_distribution() -> None:
    """What it is there for: one draw in 340 from any token; a temperature off by 2%."""
    random = np.random.default_rng(3)

    def of(share: np.ndarray, expected: np.ndarray) -> float:
        return deviations(random.choice(len(share), 100_000, p=share), expected)

    for name in ("plain", "cold"):
        expected = probabilities(case_of(name, VOCABULARIES[0]))
        assert abs(of(expected, expected)) < 3
    assert of(expected * (339 / 340) + 1 / 340 / len(expected), expected) > 10
    warmer = dataclasses.replace(case_of("cold", VOCABULARIES[0]), params=SamplingParams(temperature=0.408))
    assert of(probabilities(warmer), expected) > 4


@pytest.mark.parametrize("name", NAMES)
def test_oracle_against_transformers(name: str) -> None:
    """Transformers' own processors, in float64."""
    torch = pytest.importorskip("torch", reason="needs the parity extra: pip install -e '.[parity]'")
    from transformers.generation import logits_process as warpers

    case = case_of(name, 2000)
    p = case.params.resolved({})
    scores = torch.tensor(case.logits.astype(np.float64))[None]
    if p.needs_history:
        seen = np.flatnonzero((case.counts > 0) | case.in_prompt)  # type: ignore[operator]
        scores = warpers.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(
            torch.tensor(seen)[None], scores
        )
        past = p.frequency_penalty * case.counts + p.presence_penalty * (case.counts > 0) - case.bias  # type: ignore[operator]
        scores = scores - torch.tensor(past)[None]
    if case.allowed is not None:
        scores = scores.masked_fill(~torch.tensor(case.allowed)[None], -torch.inf)
    scores = warpers.TemperatureLogitsWarper(p.temperature)(None, scores)
    if p.top_k:
        scores = warpers.TopKLogitsWarper(p.top_k)(None, scores)
    if p.top_p < 1:
        scores = warpers.TopPLogitsWarper(p.top_p)(None, scores)
    if p.min_p:
        scores = warpers.MinPLogitsWarper(p.min_p)(None, scores)
    np.testing.assert_allclose(probabilities(case), scores.softmax(-1)[0].numpy(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("tp", (1, 4))
@pytest.mark.parametrize("kind", ("normal", "flat", "peaked", "zipf"))
@pytest.mark.parametrize("search", (ThresholdSearch.on("cpu"), ThresholdSearch.on("gpu")), ids=repr)
def test_top_p_of_a_large_vocabulary(search: ThresholdSearch, kind: str, tp: int) -> None:
    """The kept mass is right to 1e-6, also where it is a sum of many tokens that float32 loses one by one."""
    vocab = VOCABULARIES[2]
    random, ids = np.random.default_rng(1), np.arange(vocab)
    logits = {
        "normal": random.normal(0, 3, vocab),
        "flat": random.uniform(0, 0.01, vocab),
        "peaked": np.where(ids == 777, 0, np.log(1e-8) + random.uniform(0, 1, vocab)),
        "zipf": -np.log(1 + random.permutation(vocab)),
    }[kind]
    scaled_logits = (logits - logits.max()).astype(np.float32)
    mass, order = np.exp(scaled_logits), np.sort(np.exp(scaled_logits.astype(np.float64)))[::-1]
    together = np.cumsum(order) / order.sum()
    top_ps = np.array([0.1, 0.5, 0.9, 0.99, 0.998, 0.9999])
    targets = (top_ps * mass.sum(dtype=np.float64)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=AS_SHIPPED)
    def find(scaled_logits: Any, mass: Any) -> Any:
        every = [jnp.broadcast_to(x, (len(top_ps), vocab)) for x in (scaled_logits, mass)]
        specs = {"in_specs": (LOGITS, LOGITS, P()), "out_specs": P(), "check_vma": False}
        return jax.shard_map(search.threshold, mesh=make_mesh(tp), **specs)(
            *every, jnp.asarray(targets)[:, None]
        )

    for top_p, floor in zip(top_ps, np.asarray(find(scaled_logits, mass))[:, 0], strict=True):
        kept, smallest = int((scaled_logits >= floor).sum()), int(np.argmax(together >= top_p)) + 1
        assert abs(together[kept - 1] - together[smallest - 1]) < 1e-6, (top_p, kept, smallest)


@pytest.mark.parametrize("step", ("position", 1, 2**31, 2**32, 2**63))
def test_neighbouring_keys_draw_independently(step: Any) -> None:
    """16 equal tokens: how often each pair of draws comes, of 2**15, is as chance has it."""
    count, tokens = 2**15, jnp.arange(16, dtype=jnp.int32)

    @jax.jit
    def best(seeds: Any, positions: Any) -> Any:
        return _gumbel(seeds, positions, tokens).argmax(axis=-1)

    def words(seeds: list[int]) -> np.ndarray:
        pairs = [[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF] for seed in seeds]
        return np.array(pairs, np.uint32).view(np.int32)

    at = np.arange(count, dtype=np.int32)
    same = np.full(count, 5, np.int32)
    if step == "position":
        first, second = (best(words([5] * count), at + turn) for turn in (0, 1))
    else:
        first, second = (best(words([s + turn * step for s in range(count)]), same) for turn in (0, 1))
    pairs = np.asarray(first) * 16 + np.asarray(second)
    assert abs(deviations(pairs, np.full(256, 1 / 256))) < 3.5
    assert abs(deviations(np.asarray(first), np.full(16, 1 / 16))) < 3.5


# --- through a model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Iterator[LLM]:
    yield LLM(smollm2_gguf, tp=1, max_model_len=512, max_slots=32)


@pytest.mark.parametrize("seed", (1, 263, 427, 1174, 1580, 2015))
def test_a_cold_draw_is_the_likeliest_token(smollm2: LLM, seed: int) -> None:
    """Five of these six drew a token at random."""
    params = SamplingParams(max_tokens=1, temperature=0.01, seed=seed)
    assert smollm2.generate(["The capital of France is"], params)[0].text == " Paris"


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "likes": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "kind": {"enum": ["cat", "dog", None]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("model", "count", "length"),
    (
        pytest.param("smollm2", 100, 200, marks=(pytest.mark.slow, pytest.mark.as_shipped)),
        ("smollm2_short", 4, 24),
    ),
)
def test_answers_by_a_schema_are_valid(
    request: pytest.FixtureRequest, model: str, count: int, length: int
) -> None:
    """At temperature 1: valid JSON, or at the limit a beginning that the grammar accepts."""
    llm: LLM = request.getfixturevalue(model)
    llguidance = pytest.importorskip("llguidance", reason="pip install -e '.[serve]'")
    from tpjax.engine.generation import Generation
    from tpjax.server.grammars.compiler import TokenGrammar, vocabulary

    tokenizer = llm.tokenizer
    assert tokenizer is not None
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA))
    words = vocabulary(tokenizer)

    def fresh() -> TokenGrammar:
        matcher = llguidance.LLMatcher(words, grammar)
        return TokenGrammar(matcher, tokenizer.eos_ids, llm.config.vocab_size)

    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Describe a person as JSON."}])
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    asked = [
        llm.request(ids, SamplingParams(max_tokens=length, temperature=1.0, seed=i), grammar=fresh())
        for i in range(count)
    ]
    generations = {one: Generation(one, tokenizer) for one in asked}
    for one in asked:
        llm.engine.add(one)
    while llm.engine.busy:
        for one, tokens in llm.engine.step():
            generations[one].advance(tokens)
    reasons = [one.finish_reason for one in asked]
    assert set(reasons) <= {"stop", "length"}
    for one, reason in zip(asked, reasons, strict=True):
        if reason == "stop":
            answer = json.loads(generations[one].text)
            assert set(answer) <= {"name", "age", "likes", "kind"} and isinstance(answer["age"], int)
            continue
        again = fresh()
        for token in one.output_token_ids:
            mask = again.mask()
            assert mask[token // 32] >> np.uint32(token % 32) & 1
            again.advance(token)
        assert len(one.output_token_ids) == length and again.error is None
    if length >= 200:
        assert reasons.count("stop") > count // 2
