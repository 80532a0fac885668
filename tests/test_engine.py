"""The engine over a model of arithmetic: whatever comes when, every request gets what it gets alone.

``FakeRunner`` keeps tokens where the real one keeps keys and values, in pages, and draws the next token from
what it finds there: a page given to two, reused too early, or not computed, changes what is sampled.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st

from tpjax import LLM, SamplingParams
from tpjax.engine.engine import Engine
from tpjax.engine.generation import Generation
from tpjax.engine.masks import pack_mask
from tpjax.engine.replica import Replica
from tpjax.engine.request import Request
from tpjax.engine.request_builder import RequestBuilder
from tpjax.engine.router import Router
from tpjax.errors import EngineError, RequestError
from tpjax.runtime.limits import PAGE_SIZE, ChunkShape, Limits, chunk_shapes
from tpjax.runtime.rows import NO_TOKEN, Chunk, Row
from tpjax.runtime.runner import StepOutput
from tpjax.sampling import NAN_TOKEN, Sampled
from tpjax.windows import ONE_GROUP, Windows, pages_held

V, PAGE = 23, 4
SHAPES = (ChunkShape(1, 2), ChunkShape(2, 2), ChunkShape(2, 4))
# as those of a CPU: prompts beside decode rows run in fewer tokens than a page, those with scores in a page
CPU_SHAPES = [ChunkShape(rows, length * PAGE // PAGE_SIZE) for rows, length in chunk_shapes("cpu")]
POISON = 22  # a prompt with this token makes logits that are not numbers
STOP = 7


def next_token(tokens: Sequence[int], seed: int, counted: Sequence[int] = (), allowed: Any = None) -> int:
    """What the fake model says after ``tokens``."""
    if POISON in tokens:
        return NAN_TOKEN
    choices = [token for token in range(V - 1) if allowed is None or allowed[token]]
    return random.Random(repr((list(tokens), seed, sorted(counted)))).choice(choices)


class FakeRope:
    """Like a rotary embedding that changes if a sequence may get beyond 20 tokens."""

    @staticmethod
    def scaling_key(max_length: int) -> tuple[int, ...]:
        return (int(max_length > 20),)


class FakeConfig:
    rope = FakeRope()


class FakeRunner:
    config = FakeConfig()

    def __init__(
        self,
        slots: int,
        pages: int,
        longest: int = 48,
        steps: int = 4,
        histories: int | None = None,
        windows: Windows = ONE_GROUP,
        stages: int = 1,
        shapes: Sequence[ChunkShape] = SHAPES,
    ) -> None:
        sizes = slots, longest, pages + 1, PAGE, tuple(shapes), tuple(shapes[:2]), steps
        self.limits = Limits(*sizes, max_histories=histories, windows=windows, stages=stages)
        self.compile_count = 0
        self.kept = np.full((pages + 1, PAGE), -1)
        self.tokens = np.full(slots + 1, -1)
        self.history: dict[int, tuple[list[int], list[int]]] = {}
        self.masks: dict[int, np.ndarray] = {}
        self.prefilled = 0
        self.state_resets = 0

    def reset(self) -> None:
        self.state_resets += 1
        self.kept[:] = self.tokens[:] = -1

    def fail(self, error: BaseException) -> None:
        """There are no other processes."""

    def chunk_shapes(self) -> tuple[Sequence[ChunkShape], Sequence[ChunkShape]]:
        return self.limits.usable_chunk_shapes, self.limits.mixed_chunk_shapes

    def step(self, decode: Sequence[Row], chunks: Sequence[Chunk]) -> StepOutput:
        scored = any(chunk.targets is not None for chunk in chunks)
        shapes = self.limits.mixed_chunk_shapes if decode else self.limits.usable_chunk_shapes
        # what the real one needs: a shape that fits
        shape = self.limits.fitting(
            [c.span for c in chunks], [self.limits.score_chunks] if scored else shapes
        )
        rows = [*decode, *(chunk.row for chunk in chunks)]
        assert len({row.slot for row in rows}) == len(rows) and len(decode) <= self.limits.max_rows
        for row in decode:
            self.keep(row, row.position, self.tokens[row.slot])
        for chunk in chunks:
            for i, token in enumerate(chunk.token_ids):  # a prompt takes several chunks, each with its tables
                first = chunk.row.position + i - i % shape.length
                self.keep(replace(chunk.row, position=first), chunk.row.position + i, token)
            self.prefilled += len(chunk.token_ids)
        out = [self.draw(row, row.position + 1) for row in decode]
        for chunk in chunks:
            first = chunk.row.position + (len(chunk.token_ids) - 1) // shape.length * shape.length
            out.append(self.draw(replace(chunk.row, position=first), chunk.span[1]))
        places = list(range(len(decode), len(out)))
        if not scored:
            return StepOutput(self.sampled([out]), places, None, [])
        (chunk,) = chunks
        padded = np.array([*(chunk.targets or ()), *[0] * (shape.tokens - len(chunk.targets or ()))])
        top = np.tile(np.arange(20), (shape.tokens, 1))
        scores = Sampled(padded, -padded.astype(float), top, -top.astype(float))
        return StepOutput(self.sampled([out]), places, scores, [0])

    def decode(self, rows: Sequence[Row], steps: int) -> Sampled:
        out = np.full((self.limits.steps, len(rows)), NO_TOKEN)
        assert 1 <= steps <= self.limits.steps and len({row.slot for row in rows}) == len(rows)
        assert len(rows) <= self.limits.max_rows
        for column, row in enumerate(rows):
            for step in range(min(steps, row.remaining)):
                self.keep(row, row.position + step, self.tokens[row.slot])
                token = out[step, column] = self.draw(row, row.position + step + 1)
                if token in row.stop_ids or token == NAN_TOKEN:
                    break
        return self.sampled(out)

    def set_history(
        self, row: int, prompt: Any, output: Any, params: SamplingParams, barred: Any = ()
    ) -> None:
        assert 0 <= row < self.limits.history_rows
        self.history[row] = (list(prompt), list(output))

    def set_masks(self, masks: Mapping[int, np.ndarray]) -> None:
        self.masks.update(masks)

    def page(self, row: Row, group: int, position: int) -> int:
        """The page that a program would find in the block table of a row."""
        columns, block = self.limits.table_columns, position // PAGE
        table = row.block_tables(self.limits)[sum(columns[:group]) :][: columns[group]]
        page = int(table[block if self.limits.windows[group] is None else block % columns[group]])
        assert 0 < page <= self.limits.num_pages - 1 and page == row.pages[group][block]
        return page

    def keep(self, row: Row, position: int, token: int) -> None:
        for group in range(len(self.limits.windows)):
            self.kept[self.page(row, group, position), position % PAGE] = (
                token + self.turn(row) + 5000 * group
            )

    def draw(self, row: Row, length: int) -> int:
        groups = []
        for group, window in enumerate(self.limits.windows):
            first = 0 if window is None else max(0, length - window)
            kept = [self.kept[self.page(row, group, at), at % PAGE] for at in range(first, length)]
            groups.append([int(token) - self.turn(row) - 5000 * group for token in kept])
        seen = groups[0]
        if any(here != seen[-len(here) :] for here in groups):
            # Groups keep the same tokens, but of a row that has ended, which the host does not know yet: what
            # is drawn for that is not read. Any other would end with an error that it does not have alone.
            self.tokens[row.slot] = NAN_TOKEN
            return NAN_TOKEN
        counted = self.history[row.history_row][1] if row.params.needs_history else []
        bits = (self.masks[row.slot][:, None] >> np.arange(32)) & 1 if length < row.masked_until else None
        token = next_token(seen, row.seed, counted, None if bits is None else bits.reshape(-1))
        self.tokens[row.slot] = token
        counted.append(token)
        return token

    def turn(self, row: Row) -> int:
        return 1000 * self.config.rope.scaling_key(row.max_length)[0]  # keys of the other class are no keys

    @staticmethod
    def sampled(tokens: Any) -> Sampled:
        tokens = np.asarray(tokens)
        top = np.tile(np.arange(20), (*tokens.shape, 1))
        return Sampled(tokens, -tokens.astype(float), top, -top.astype(float))


class EveryThird:
    """Allows the tokens that are as many as have been sampled, modulo 3; ends by itself after five."""

    error = None

    def __init__(self) -> None:
        self.count = 0

    @property
    def finished(self) -> bool:
        return self.count == 5

    def mask(self) -> np.ndarray:
        return np.array([sum(1 << t for t in range(V) if t % 3 == self.count % 3)], np.uint32)

    def advance(self, token: int) -> None:
        assert token % 3 == self.count % 3
        self.count += 1


def alone(request: Request, window: int | None = None) -> tuple[list[int], str]:
    """What a request gets by itself: the definition. The model sees as many tokens as the window has."""
    tokens, out = list(request.prompt_token_ids), []
    grammar = EveryThird() if request.grammar is not None else None
    while len(out) < max(1, request.params.max_tokens):  # the prompt's end is run in any case
        counted = out if request.params.needs_history else []
        bits = None if grammar is None else [int(grammar.mask()[0]) >> t & 1 for t in range(V)]
        token = next_token((tokens + out)[-(window or 0) :], request.seed, counted, bits)
        if token == NAN_TOKEN:
            return out, "error"
        if not request.params.max_tokens:
            break
        out.append(token)
        if grammar is not None:
            grammar.advance(token)
        if token in request.stop_ids or (grammar is not None and grammar.finished):
            return out, "stop"
    return out, "length"


def check(engine: Engine, pages: int) -> None:
    """What holds between any two steps."""
    scheduler, blocks = engine.scheduler, engine.scheduler.blocks
    slots = [one.slot for one in scheduler.running]
    assert len(set(slots)) == len(slots) and None not in slots
    assert sorted([*slots, *scheduler._free_slots]) == list(range(engine.runner.limits.max_slots))
    rows = [one.history_row for one in scheduler.running if one.params.needs_history]
    assert sorted([*rows, *scheduler._free_history_rows]) == list(range(engine.runner.limits.history_rows))
    others = [one for one in scheduler.running if not one.params.needs_history]
    assert all(one.history_row is None for one in (*scheduler.waiting, *others))
    of_requests = [[page for pages in one.pages for page in pages if page] for one in scheduler.running]
    held = [page for pages in of_requests for page in pages]
    assert len(set(held)) + blocks.free == pages and 0 not in held
    for page in set(held):
        assert blocks._users[page] == held.count(page)
    assert all(one.slot is None and not one.pages for one in scheduler.waiting)
    for queue in (scheduler.running, scheduler.waiting):
        assert [one.rank for one in queue] == sorted(one.rank for one in queue)
    if not any(one.priority for one in (*scheduler.running, *scheduler.waiting)):
        arrivals = [one.arrival for one in (*scheduler.running, *scheduler.waiting)]
        assert arrivals == sorted(arrivals)  # nobody overtakes, and who was preempted goes on first
    stats = engine.stats()
    assert (stats.pages, stats.pages_in_use) == (pages, len(set(held)))
    assert stats.pages_in_use + stats.pages_cached + len(blocks._free_list) == pages
    assert stats.kv_cache_usage == pytest.approx(stats.pages_in_use / pages)
    assert [one.slot for one in stats.requests] == slots
    for told, one, mine in zip(stats.requests, scheduler.running, of_requests, strict=True):
        assert (told.pages, told.tokens) == (len(mine), one.num_tokens)
        assert len(mine) <= engine.runner.limits.pages_held(one.max_length)
        assert told.prompt_tokens == len(one.prompt_token_ids) and told.prefilled <= told.to_prefill


shapes = st.tuples(
    st.integers(1, 30),  # prompt
    st.integers(0, 12),  # max_tokens
    st.integers(0, 2),  # which of three common beginnings
    st.sampled_from(("", "", "", "salt")),
    st.sampled_from(("", "", "", "stop", "history", "grammar", "nan", "prompt")),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shapes=st.lists(shapes, min_size=1, max_size=12),
    slots=st.integers(1, 5),
    histories=st.integers(1, 2),
    pages=st.integers(0, 18),
    windows=st.sampled_from((ONE_GROUP, (None, 6, 6), (None, None, 5), (6,))),
    steps_and_stages=st.sampled_from(((1, 1), (4, 1), (1, 2), (1, 3))),
    chunks=st.sampled_from((SHAPES, CPU_SHAPES)),
    budget=st.sampled_from((2, 6, 12, None)),
    seed=st.integers(0, 2**16),
)
def test_the_same_in_any_mix(
    shapes: Sequence[tuple[int, int, int, str, str]],
    slots: int,
    histories: int,
    pages: int,
    windows: Windows,
    steps_and_stages: tuple[int, int],
    chunks: Sequence[ChunkShape],
    budget: int | None,
    seed: int,
) -> None:
    """Arrivals, cancellations, few pages or histories, shared beginnings, ends at any step: all the same."""
    rng = random.Random(seed)
    pages += pages_held(48, windows, PAGE, chunks[-1].tokens)
    steps, stages = steps_and_stages
    runner: Any = FakeRunner(
        slots,
        pages,
        steps=steps,
        histories=min(slots, histories),
        windows=windows,
        stages=stages,
        shapes=chunks,
    )
    engine = Engine(runner, max_num_batched_tokens=budget)
    requests = []
    for number, (prompt, tokens, start, salt, extra) in enumerate(shapes):
        ids = [(start * 5 + i * i) % (V - 1) for i in range(prompt)]
        if extra == "nan":
            ids[-1] = POISON
        params = SamplingParams(
            max_tokens=tokens,
            presence_penalty=float(extra == "history"),
            prompt_logprobs=2 if extra == "prompt" else None,
            logprobs=1 if number % 2 else None,
        )
        requests.append(
            Request(
                ids,
                params,
                seed=number % 4,
                stop_ids=(STOP,) if extra == "stop" else (),
                cache_salt=salt,
                grammar=EveryThird() if extra == "grammar" else None,
                priority=number % 3 if seed % 2 else 0,
            )
        )
    coming, ended, streamed = list(requests), [], {id(one): [] for one in requests}
    for _ in range(3000):
        if coming and rng.random() < 0.4:
            engine.add(coming.pop(0))
        active = [*engine.scheduler.running, *engine.scheduler.waiting]
        if active and rng.random() < 0.05:
            engine.cancel(rng.choice(active))
        for one, tokens in engine.step():
            streamed[id(one)] += tokens
            ended += [one] * (one.finish_reason is not None)
        check(engine, pages)
        if not coming and not engine.busy:
            break
    else:
        raise AssertionError("the loop does not end")

    assert engine.scheduler.blocks.free == pages
    for one in requests:
        tokens, reason = alone(one, windows[0])
        assert streamed[id(one)] == one.output_token_ids
        assert ended.count(one) == (one.finish_reason != "abort")  # exactly once
        if one.finish_reason == "abort":
            assert tokens[: len(one.output_token_ids)] == one.output_token_ids
            continue
        assert (one.output_token_ids, one.finish_reason) == (tokens, reason)
        assert (one.error is None) == (reason != "error")
        if (cached := one.cached_tokens) is not None:
            assert cached % PAGE == 0 and cached < len(one.prompt_token_ids)
        if one.params.logprobs is not None and reason != "error":
            assert [entry.token_id for entry in one.logprobs] == tokens
        if one.params.prompt_logprobs is not None:
            first, *rest = one.prompt_logprobs
            assert first is None and [entry.token_id for entry in rest] == list(one.prompt_token_ids[1:])
            assert all(entry.logprob == -entry.token_id and list(entry.top) == [0, 1] for entry in rest)


def test_the_property_test_preempts_and_shares() -> None:
    """Else it would hold for an engine that does neither."""
    runner: Any = FakeRunner(slots=4, pages=12)
    engine = Engine(runner)
    requests = [Request(list(range(9)), SamplingParams(max_tokens=30), seed) for seed in range(4)]
    for one in requests:
        engine.add(one)
    while engine.busy:
        engine.step()
        check(engine, 12)
    assert [(one.output_token_ids, one.finish_reason) for one in requests] == [alone(one) for one in requests]
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.prefix_hits >= 24  # 3 times 2 pages
    assert [one.cached_tokens for one in requests] == [0, 8, 8, 8]
    assert (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0.0)


def test_prompt_log_probabilities_survive_preemption_beside_decode_rows() -> None:
    """They were complete before: what is prefilled again takes the chunks of other prompts."""
    runner: Any = FakeRunner(slots=3, pages=12, shapes=CPU_SHAPES)
    engine = Engine(runner)
    sizes = ((9, 20, None), (5, 10, None), (7, 20, 0))
    requests = [
        Request([i + 1] * prompt, SamplingParams(max_tokens=tokens, prompt_logprobs=scores), seed=i)
        for i, (prompt, tokens, scores) in enumerate(sizes)
    ]
    for one in requests:
        engine.add(one)
    beside = False
    while engine.busy:
        engine.step()
        check(engine, 12)
        old, _, scored = requests
        again = scored.slot is not None and scored.prefilling and bool(scored.output_token_ids)
        beside = beside or (again and not old.finished)
    assert beside
    assert [(one.output_token_ids, one.finish_reason) for one in requests] == [alone(one) for one in requests]
    assert [entry and entry.token_id for entry in requests[2].prompt_logprobs] == [None, *[3] * 6]


class SlowRunner(FakeRunner):
    """A step takes as long as a small model's: a replica's thread does not run ahead of the front."""

    def decode(self, rows: Sequence[Row], steps: int) -> Sampled:
        time.sleep(0.005)
        return super().decode(rows, steps)


def test_a_replica_with_free_slots_takes_what_waits_at_another() -> None:
    """A burst with a long common beginning is routed to where that is cached: the other would idle."""
    router = Router([Engine(SlowRunner(slots=2, pages=60)) for _ in range(2)])  # type: ignore[arg-type]

    def generations(count: int) -> list[Generation]:
        params = SamplingParams(max_tokens=7)
        return [Generation(Request(list(range(40)), params, seed), None) for seed in range(count)]

    def run(all_of: list[Generation]) -> None:
        for one in all_of:
            router.add(one)
        while router.busy:
            router.step()
            router.deltas.clear()
        assert [one.request.output_token_ids for one in all_of] == [alone(one.request)[0] for one in all_of]

    run(generations(1))  # it is cached in the first
    run(generations(20))
    ran = [status.stats.prefix_queries // 40 for status in router.status()]
    assert sum(ran) == 21 and min(ran) >= 6
    assert [(one.requests, one.prompt_pages, one.recalled) for one in router._members] == [(0, 0, 0)] * 2


def test_replicas_that_all_fail_while_a_request_is_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks at them: it ends as if they had failed a moment later."""
    router = Router([Engine(FakeRunner(slots=1, pages=12)) for _ in range(2)])  # type: ignore[arg-type]
    looks = itertools.count()
    failing = property(lambda member: None if next(looks) < 2 else "it failed")
    monkeypatch.setattr("tpjax.engine.router._Member.error", failing, raising=False)
    generation = Generation(Request([1, 2, 3], SamplingParams(max_tokens=3), 0), None)
    router.add(generation)
    router.step()
    ((ended, delta),) = router.deltas
    assert ended is generation and delta.error == "all 2 replicas have failed: it failed"
    assert not router.runs(generation)
    with pytest.raises(EngineError, match="all 2 replicas have failed"):
        router.run(lambda engine: None)


def test_a_replica_that_failed_gives_its_waiting_requests_to_another() -> None:
    """Also one that was preempted with its first token in flight, which nobody reads any more."""
    first, second = (Replica(Engine(FakeRunner(slots=1, pages=12))) for _ in range(2))  # type: ignore[arg-type]
    generation = Generation(Request([1, 2, 3], SamplingParams(max_tokens=3), 0), None)
    first.add(generation)
    first.step()
    first.engine.scheduler._preempt(generation.request)
    assert generation.request.unread and first.withdraw() == [generation]
    second.add(generation)
    for _ in range(9):
        second.step()
    assert alone(generation.request) == (generation.request.output_token_ids, "length")


HANDED_OVER = {"finish", "release", "_release", "_enqueue", "cancel", "step", "_step", "_end", "generate"}


@contextlib.contextmanager
def interrupt_at(number: int) -> Iterator[list[str]]:
    """Raises a ``KeyboardInterrupt`` in the n-th line that hands over tokens, pages or slots; tells which."""
    lines, where, before = itertools.count(1), [], sys.gettrace()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_name not in HANDED_OVER or "/tpjax/" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(lines) == number:
            where.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield where
    finally:
        sys.settrace(before)


def test_an_interrupt_at_any_line_leaves_nothing_and_loses_no_token() -> None:
    """Of one call while another one's stream waits: that goes on, or ends with an error, without a gap."""
    prompts, params = [[1] * 9 + [k] for k in range(4)], SamplingParams(max_tokens=9, seed=5)

    def make() -> Any:
        llm: Any = LLM.__new__(LLM)
        runner: Any = FakeRunner(slots=2, pages=13)
        llm.front, llm._streams, llm.tokenizer = Replica(Engine(runner)), {}, None
        llm._requests = RequestBuilder(V, None, frozenset(), {}, 0, GOLDENS)
        return llm

    wanted = [one.token_ids for one in make().generate(prompts, params)]
    for number in itertools.count(1, 13):
        llm = make()
        stream = llm.stream(prompts[0], params)
        got = list(next(stream).token_ids)
        with interrupt_at(number) as where, contextlib.suppress(KeyboardInterrupt):
            llm.generate(prompts, params)
        deltas = list(itertools.islice(stream, 20))
        got += [token for delta in deltas for token in delta.token_ids]
        assert got == wanted[0][: len(got)], where
        assert deltas[-1].finish_reason == "error" or got == wanted[0], where
        scheduler = llm.engine.scheduler
        assert not llm._streams and not llm.front._running and not scheduler.busy, where
        assert scheduler.blocks.free == scheduler.blocks.capacity, where
        assert [one.token_ids for one in llm.generate(prompts, params)] == wanted, where
        if not where:
            break
    assert number > 300


def test_the_next_dispatch_starts_before_the_last_is_read() -> None:
    events: list[str] = []

    class Watching(FakeRunner):
        def decode(self, rows: Sequence[Row], steps: int) -> Sampled:
            events.append(f"dispatch {steps}")
            sampled = super().decode(rows, steps)
            return Sampled(Late(sampled.tokens), sampled.logprobs, sampled.top_tokens, sampled.top_logprobs)

    class Late:
        def __init__(self, tokens: np.ndarray) -> None:
            self.tokens = tokens

        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            events.append("read")
            return self.tokens

    runner: Any = Watching(slots=1, pages=12)
    engine = Engine(runner)
    engine.add(Request([1, 2], SamplingParams(max_tokens=13), 0))
    while engine.busy:
        engine.step()
    # one read a dispatch, each after the next dispatch
    assert events == ["dispatch 4", "dispatch 4", "read", "dispatch 4", "read", "read"]


def test_a_long_prompt_does_not_stall_a_stream() -> None:
    """While it is prefilled the stream gets a token with every step, whose chunks are within the budget."""
    runner: Any = FakeRunner(slots=2, pages=24)
    engine = Engine(runner, max_num_batched_tokens=5)
    stream, long = (Request(list(ids), SamplingParams(max_tokens=20), 0) for ids in ([1], range(10, 22)))
    engine.add(stream)
    engine.step()
    engine.add(long)
    waited, most = 0, 0
    while not long.output_token_ids:
        before = runner.prefilled
        outputs = [one for one, _ in engine.step()]
        assert runner.prefilled - before <= 4
        waited = 0 if stream in outputs else waited + 1
        most = max(most, waited)
    assert most == 0


def test_a_request_larger_than_the_cache_is_refused_at_once() -> None:
    runner: Any = FakeRunner(slots=2, pages=12)
    engine = Engine(runner)
    engine.scheduler.blocks.capacity = 5
    with pytest.raises(RequestError, match="needs 6 cache pages, but there are 5"):
        engine.add(Request([1] * 20, SamplingParams(max_tokens=4), 0))
    assert not engine.busy


# --- and the real model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(GOLDENS / "llama", tp=2, max_model_len=512, max_slots=3)


def run(llm: LLM, requests: Sequence[Request], budget: int = 32, pages: int | None = None) -> Engine:
    engine = Engine(llm.runner, budget)
    if pages is not None:
        engine.scheduler.blocks._free_list = engine.scheduler.blocks._free_list[-pages:]
    for one in requests:
        engine.add(one)
    while engine.busy:
        engine.step()
    return engine


def request(ids: Sequence[int], tokens: int, **extra: Any) -> Request:
    params = {name: extra.pop(name) for name in list(extra) if name in SamplingParams.__dataclass_fields__}
    return Request(list(ids), SamplingParams(**{"temperature": 0, **params}, max_tokens=tokens), 3, **extra)


def test_real_greedy_text_survives_mixing_reuse_and_preemption(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    common = rng.integers(0, 131, 140).tolist()
    prompts = [common + rng.integers(0, 131, n).tolist() for n in (3, 40, 130)]
    wanted = []
    for prompt in prompts:
        one = request(prompt, 120)
        run(llm, [one])
        assert one.cached_tokens == 0
        wanted.append(one.output_token_ids)
    again = [request(prompt, 120, presence_penalty=0.0) for prompt in prompts]
    engine = run(llm, again, pages=4)
    assert engine.scheduler.preemptions > 0
    assert [one.output_token_ids for one in again] == wanted
    assert again[1].cached_tokens == 128


def test_real_penalties_survive_preemption(llm: LLM) -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 131, 120).tolist() for _ in range(2)]

    def both(**how: Any) -> list[list[int]]:
        requests = [
            request(prompt, 100, temperature=1.0, frequency_penalty=1.5, repetition_penalty=1.3)
            for prompt in prompts
        ]
        engine = run(llm, requests, **how)
        assert (engine.scheduler.preemptions > 0) == ("pages" in how)
        return [one.output_token_ids for one in requests]

    assert both() == both(pages=3)


def test_real_prompt_logprobs_are_those_of_the_logits(llm: LLM) -> None:
    prompt = np.random.default_rng(2).integers(0, 131, 150).tolist()
    one = request(prompt, 0, prompt_logprobs=3)
    run(llm, [one])
    assert one.finish_reason == "length" and one.output_token_ids == []
    logits = llm.logits(prompt).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert one.prompt_logprobs[0] is None and len(one.prompt_logprobs) == 150
    for at, entry in enumerate(one.prompt_logprobs[1:]):
        assert entry is not None and entry.token_id == prompt[at + 1]
        assert entry.logprob == pytest.approx(expected[at, entry.token_id], abs=1e-4)
        best = np.argsort(-expected[at])[:3]
        assert list(entry.top) == best.tolist()
        assert list(entry.top.values()) == pytest.approx(expected[at, best], abs=1e-4)


def test_real_grammar(llm: LLM) -> None:
    class Only:
        """Token 40 + i at step i, or nothing."""

        finished, error = False, None

        def __init__(self) -> None:
            self.next = 40

        def mask(self) -> np.ndarray:
            words = np.zeros(5, np.uint32)
            words[self.next // 32] = np.uint32(1 << self.next % 32)
            return words

        def advance(self, token: int) -> None:
            assert token == self.next
            self.next += 1

    prompt = list(range(20))
    free, bound = request(prompt, 12), request(prompt, 12, grammar=Only(), temperature=1.0)
    alone = request(prompt, 12)
    run(llm, [alone])
    run(llm, [free, bound])
    assert bound.output_token_ids == list(range(40, 52))
    assert free.output_token_ids == alone.output_token_ids


def test_only_masks_that_changed_are_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time; after the state is lost all are uploaded again."""
    monkeypatch.setattr("tpjax.runtime.limits.MASK_BATCH", 2)
    runner = LLM(GOLDENS / "llama", tp=2, max_model_len=128, max_slots=3).runner
    uploads: list[list[int]] = []
    dispatch_all = runner._dispatch_all

    def watch(spec: Any, calls: list[tuple[np.ndarray, np.ndarray]]) -> Any:
        uploads.extend([slot for slot in slots.tolist() if slot != 3] for slots, _ in calls)
        return dispatch_all(spec, calls)

    monkeypatch.setattr(runner, "_dispatch_all", watch)
    masks = {slot: pack_mask(131, [slot, 7, 128 + slot]) for slot in range(3)}
    runner.set_masks(masks)
    assert uploads == [[0, 1], [2]]
    runner.set_masks(masks)
    masks[1][0] ^= 2  # the caller may go on using its array
    runner.set_masks(masks)
    assert uploads[2:] == [[1]]
    held = np.asarray(runner.state.history.masks)
    np.testing.assert_array_equal(held[:3, :5], [masks[slot] for slot in range(3)])
    assert not held[:, 5:].any()
    runner.reset()
    runner.set_masks({2: masks[2]})
    assert uploads[3:] == [[2]]
    np.testing.assert_array_equal(np.asarray(runner.state.history.masks)[[0, 2], :5], [[0] * 5, masks[2]])
