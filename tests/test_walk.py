"""How many cache pages attention reads: no more than the contexts and windows of the batch's rows need.

Counted by callbacks in the compiled programs.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS

from tpjax import LLM, SamplingParams
from tpjax.attention import backends, paged_attention
from tpjax.cache import NULL_PAGE, LatentCache, LayerCache, TokenGroup
from tpjax.engine.engine import Engine
from tpjax.engine.request import Request
from tpjax.runtime.runner import Runner

PAGE, BLOCKS = 8, 6


class Counts:
    """Counts the pages read and tokens written by programs compiled while it is installed, in all layers."""

    def __init__(self) -> None:
        self._counter: Counter[str] = Counter()

    def note(self, what: str) -> None:
        jax.debug.callback(lambda: self._counter.update([what]))

    def reset(self) -> tuple[int, int]:
        """Returns reads and writes since the last call."""
        jax.effects_barrier()
        counts = self._counter["read"], self._counter["write"]
        self._counter.clear()
        return counts


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    made = Counts()

    def counted(original: Any, what: str) -> Any:
        @functools.wraps(original)
        def call(*arguments: Any) -> Any:
            made.note(what)
            return original(*arguments)

        return call

    for kind in (LayerCache, LatentCache):
        for what in ("read", "write"):
            monkeypatch.setattr(kind, what, counted(getattr(kind, what), what))
    jax.clear_caches()  # a layer that was traced before is not traced again, and would not count
    yield made
    jax.clear_caches()


def pages(first: int, last: int) -> int:
    """Returns the number of pages that hold the keys at ``first`` to ``last``."""
    return len({at // PAGE for at in range(max(first, 0), last + 1)})


@pytest.mark.parametrize("window", (None, 1, 5, 8, 12))
@pytest.mark.parametrize(
    "positions",
    (
        [3],
        [40, 0],  # a row of padding sits at position 0, with the null page alone
        [47, 0, 0, 0],
        [41, 17, 30],
        [5, 47, 0, 0, 22, 0, 0, 0],
    ),
)
def test_a_decode_step(counts: Counts, positions: list[int], window: int | None) -> None:
    """The walk takes as many iterations as its longest row needs, wherever the others are."""
    rows = len(positions)
    table = np.arange(rows * BLOCKS, dtype=np.int32).reshape(rows, BLOCKS) + 1
    table[[at == 0 for at in positions]] = NULL_PAGE
    cache = LayerCache(*(jnp.zeros((rows * BLOCKS + 1, 1, PAGE, 2)) for _ in range(2)))
    new = jnp.zeros((rows, 1, 1, 2))
    metadata = TokenGroup(jnp.asarray(table), jnp.asarray(positions, jnp.int32)[:, None])
    attend = jax.jit(functools.partial(paged_attention, scale=1.0, window=window))
    attend(new[:, :, :, None], new, new, cache, metadata).block_until_ready()
    visible = BLOCKS * PAGE if window is None else window
    assert counts.reset()[0] == max(pages(at - visible + 1, at) for at in positions)


@pytest.mark.parametrize("window", (None, 2, 5, 12))
@pytest.mark.parametrize(("first", "length"), ((0, 16), (8, 8), (24, 16), (36, 4)))
def test_a_chunk(counts: Counts, first: int, length: int, window: int | None) -> None:
    """The pages before it that its first query sees; its own keys, padding included, are no pages."""
    cache = LayerCache(*(jnp.zeros((BLOCKS + 1, 1, PAGE, 2)) for _ in range(2)))
    new = jnp.zeros((1, length, 1, 2))
    metadata = TokenGroup(
        jnp.arange(1, BLOCKS + 1, dtype=jnp.int32)[None],
        jnp.arange(first, first + length, dtype=jnp.int32)[None],
        chunks=True,
    )
    attend = jax.jit(functools.partial(paged_attention, scale=1.0, window=window))
    attend(new[:, :, :, None], new, new, cache, metadata).block_until_ready()
    visible = BLOCKS * PAGE if window is None else window
    assert counts.reset()[0] == pages(first - visible + 1, first - 1)


def generate(llm: LLM, steps: int, lengths: Sequence[int], tokens: Sequence[int], counts: Counts) -> int:
    """Runs greedy requests side by side; the pages that were read once all had their first token."""
    limits = replace(llm.runner.limits, steps=steps)
    engine = Engine(Runner(llm.runner.model, llm.mesh, limits, llm.runner.dtype))
    requests = [
        Request([at % 50 for at in range(length)], SamplingParams(count, 0, ignore_eos=True), 0)
        for length, count in zip(lengths, tokens, strict=True)
    ]
    for request in requests:
        engine.add(request)
    while not all(request.output_token_ids for request in requests):
        engine.step()
    counts.reset()
    left = [count - len(request.output_token_ids) for request, count in zip(requests, tokens, strict=True)]
    while engine.busy:
        engine.step()
    assert [len(request.output_token_ids) for request in requests] == list(tokens)
    read, written = counts.reset()
    assert written >= llm.config.num_layers * (max(left) - 2 * steps)  # but for what was in flight
    return read


@pytest.mark.slow
@pytest.mark.parametrize("steps", (1, 4))
def test_a_padded_batch_keeps_its_windows(counts: Counts, steps: int) -> None:
    """Three rows in a batch of four, far apart in contexts of up to three pages, under windows of 7 keys."""
    llm = LLM(GOLDENS / "mistral", tp=1, max_model_len=512, max_slots=4)
    assert set(map(llm.config.attention.window_of, llm.config.attention.layer_types)) == {7}
    read = generate(llm, steps, (300, 40, 200), (40, 40, 40), counts)
    assert read <= llm.config.num_layers * 40  # one page a layer and step; no window crosses a page boundary


@pytest.mark.parametrize("name", ("llama", pytest.param("deepseek_v3", marks=pytest.mark.slow)))
def test_a_row_that_has_ended_is_not_walked(counts: Counts, name: str) -> None:
    """The long one gets three tokens only; after it, one page a layer and step is all."""
    llm = LLM(GOLDENS / name, tp=1, max_model_len=512, max_slots=2)
    read = generate(llm, 4, (300, 40), (22, 42), counts)
    assert read <= llm.config.num_layers * (3 * 22 + 1 * 42)


@pytest.mark.slow
def test_programs_for_so_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs without a kernel: requests get the tokens of any other walk, by the smallest program."""
    prompts, sizes = [[at % 50 for at in range(length)] for length in (300, 40)], {"max_model_len": 512}
    llm = LLM(GOLDENS / "gemma3", tp=1, max_slots=2, **sizes)
    expected = [one.token_ids for one in llm.generate(prompts, SamplingParams(8, 0, ignore_eos=True))]
    monkeypatch.setattr(backends, "FIXED_TRIPS", ("cpu",))
    llm = LLM(GOLDENS / "gemma3", tp=1, max_slots=2, **sizes)
    assert [shape.blocks for shape in llm.runner.decode_shapes] == [1, 2, 8]
    llm.prepare(prompts[0], SamplingParams(200, 0))  # one row of three pages, then four
    decode = {spec.blocks for spec in llm.runner.programs.compiled if spec.kind == "decode"}
    assert decode == {8}
    found = [one.token_ids for one in llm.generate(prompts, SamplingParams(8, 0, ignore_eos=True))]
    assert found == expected
    (alone,) = llm.generate(prompts[1:], SamplingParams(8, 0, ignore_eos=True))
    assert alone.token_ids == expected[1]
    decode = {spec.blocks for spec in llm.runner.programs.compiled if spec.kind == "decode"}
    assert decode == {1, 8}
