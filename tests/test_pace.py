"""What the engine does in how many dispatches, steps and operations: counts, no times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import GOLDENS
from test_engine import PAGE, SHAPES, EveryThird, FakeRunner, alone

from tpjax import LLM, SamplingParams
from tpjax.engine.block_manager import BlockManager
from tpjax.engine.engine import Engine
from tpjax.engine.replica import Replica
from tpjax.engine.request import Request
from tpjax.engine.scheduler import Scheduler
from tpjax.runtime.rows import Row
from tpjax.sampling import Sampled

STEPS = 4


class Watching(FakeRunner):
    """Notes each decode dispatch, and when it is read."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.dispatches: list[tuple[set[int], int]] = []
        self.events: list[tuple[str, int]] = []

    def decode(self, rows: Sequence[Row], steps: int) -> Sampled:
        number = len(self.dispatches)
        self.dispatches.append(({row.slot for row in rows}, steps))
        self.events.append(("dispatch", number))
        sampled = super().decode(rows, steps)
        read = Late(sampled.tokens, lambda: self.events.append(("read", number)))
        return Sampled(read, sampled.logprobs, sampled.top_tokens, sampled.top_logprobs)  # type: ignore[arg-type]


class Late:
    """Tokens on the devices."""

    def __init__(self, tokens: np.ndarray, note: Callable[[], None]) -> None:
        self.tokens, self.note = tokens, note

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.note()
        return self.tokens


class Endless(EveryThird):
    """Goes on until the request's length ends it."""

    finished = False  # type: ignore[assignment]


def start(engine: Engine, requests: Sequence[Request]) -> None:
    """Steps until each has its first token."""
    for request in requests:
        engine.add(request)
    while not all(request.output_token_ids for request in requests):
        engine.step()


def plain(tokens: int, first: int = 0) -> Request:
    return Request([first, first + 1], SamplingParams(max_tokens=tokens), seed=first)


# --- rows that wait for the host, and rows that do not -----------------------------------------------------


@pytest.mark.parametrize("streams", (1, 3))
def test_plain_streams_beside_a_grammar(streams: int) -> None:
    """They take as many steps as alone, most of them four a dispatch, and never wait to be read."""
    runner: Any = Watching(slots=streams + 1, pages=200, longest=200)
    engine = Engine(runner)
    free = [plain(100, first) for first in range(streams)]
    bound = Request([9, 9], SamplingParams(max_tokens=100), 5, grammar=Endless())
    start(engine, [*free, bound])
    begun = len(runner.dispatches)
    before = [len(request.output_token_ids) for request in (*free, bound)]
    while not any(request.finish_reason for request in free):
        engine.step()
    got = [len(one.output_token_ids) - n for one, n in zip((*free, bound), before, strict=True)]
    dispatches = runner.dispatches[begun:]
    steps = sum(steps for _, steps in dispatches)
    assert steps <= min(got[:-1]) + 2 * STEPS  # each step gives each of them a token; some are in flight
    assert len(dispatches) <= 0.4 * steps + 2  # five tokens in two dispatches; alone, four in one
    assert got[-1] >= 0.2 * steps - 2  # one of five steps is the grammar's
    dispatched = 0
    for what, number in runner.events:
        dispatched = number if what == "dispatch" else dispatched
        assert (
            number < begun or what == "dispatch" or dispatched > number
        )  # the devices have the next by then
    while engine.busy:
        engine.step()
    assert [one.output_token_ids for one in free] == [alone(one)[0] for one in free]
    assert len(bound.output_token_ids) == 100


def test_many_grammars_do_not_wait_for_one_plain_stream() -> None:
    """Nor it for them: it gets a token each step, they one every second step."""
    runner: Any = Watching(slots=4, pages=200, longest=200)
    engine = Engine(runner)
    free = plain(40)
    bound = [Request([9, n], SamplingParams(max_tokens=40), n, grammar=Endless()) for n in range(3)]
    start(engine, [free, *bound])
    runner.dispatches.clear()
    before = [len(one.output_token_ids) for one in bound]
    while free.finish_reason is None:
        engine.step()
    steps = sum(steps for _, steps in runner.dispatches)
    assert steps <= 42
    assert all(len(one.output_token_ids) - n >= steps // 2 - 2 for one, n in zip(bound, before, strict=True))


def test_grammars_out_of_step_get_into_step() -> None:
    """Else there would always be one that may go on, and no dispatch of several steps."""
    runner: Any = Watching(slots=6, pages=300, longest=200)
    engine = Engine(runner)
    free = [plain(120, first) for first in range(4)]
    bound = [Request([9, n], SamplingParams(max_tokens=100), n, grammar=Endless()) for n in range(2)]
    start(engine, [*free, bound[0]])
    start(engine, bound[1:])
    runner.dispatches.clear()
    for _ in range(20):
        engine.step()
    assert Counter(steps for _, steps in runner.dispatches) == {1: 10, STEPS: 10}


def test_grammars_alone_take_a_token_each_step() -> None:
    runner: Any = Watching(slots=2, pages=24)
    engine = Engine(runner)
    bound = [Request([9, n], SamplingParams(max_tokens=20), n, grammar=Endless()) for n in range(2)]
    start(engine, bound)
    while engine.busy:
        engine.step()
    assert len(runner.dispatches) <= 20 and {steps for _, steps in runner.dispatches} == {1}


@pytest.mark.slow
def test_real_streams_beside_a_real_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled programs: the same tokens as alone, in the steps that they take alone."""

    class Even:
        finished, error = False, None

        def mask(self) -> np.ndarray:
            return np.full(5, 0x55555555, np.uint32)

        def advance(self, token: int) -> None:
            assert token % 2 == 0

    llm = LLM(GOLDENS / "llama", tp=1, max_model_len=128, max_slots=4)
    params = SamplingParams(max_tokens=61, temperature=0, ignore_eos=True)
    dispatches: list[int] = []
    decode = llm.runner.decode

    def counted(rows: Sequence[Row], steps: int) -> Sampled:
        dispatches.append(steps)
        return decode(rows, steps)

    monkeypatch.setattr(llm.runner, "decode", counted)

    def ran(bound: list[Request]) -> tuple[list[list[int]], list[int]]:
        free = [Request([3 * first, 5], params, 0) for first in range(3)]
        start(llm.engine, [*bound, *free])
        begun = len(dispatches)
        while any(one.finish_reason is None for one in free):
            llm.engine.step()
        taken = dispatches[begun:]
        while llm.engine.busy:
            llm.engine.step()
        return [one.output_token_ids for one in free], taken

    expected, by_themselves = ran([])
    bound = Request([20, 21], params, 0, grammar=Even())
    tokens, beside = ran([bound])
    assert tokens == expected and len(bound.output_token_ids) == 61
    assert sum(beside) <= sum(by_themselves) + 2 * STEPS
    assert beside.count(STEPS) >= 0.7 * by_themselves.count(STEPS)


# --- somebody waits ----------------------------------------------------------------------------------------


def test_a_queue_does_not_end_dispatches_of_several_steps() -> None:
    """Twelve requests of 45 tokens over three slots: four a dispatch, but where a slot becomes free."""
    runner: Any = Watching(slots=3, pages=200)
    engine = Engine(runner)
    requests = [plain(45, first % 20) for first in range(12)]
    for request in requests:
        engine.add(request)
    ended: list[int] = []
    while engine.busy:
        engine.step()
        ended.append(sum(request.finish_reason is not None for request in requests))
    assert [one.output_token_ids for one in requests] == [alone(one)[0] for one in requests]
    counts = Counter(steps for _, steps in runner.dispatches)
    assert STEPS * counts[STEPS] >= 0.75 * sum(steps * n for steps, n in counts.items())
    # slots do not stand empty: each row that a step has room for is in use, but for the ends
    assert sum(steps for _, steps in runner.dispatches) <= 4 * 45 + 12 * STEPS


# --- thousands of requests ---------------------------------------------------------------------------------


class Watched(Request):
    """Counts what is asked of requests: attributes, and comparisons with others (as ``in`` makes them)."""

    asked = 0

    def __getattribute__(self, name: str) -> Any:
        Watched.asked += 1
        return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        Watched.asked += 1
        return self is other

    __hash__ = object.__hash__


@pytest.fixture(scope="module")
def tiny() -> LLM:
    llm = LLM(GOLDENS / "llama", tp=1, max_model_len=64, max_slots=4)
    runner: Any = FakeRunner(slots=4, pages=60)
    llm.front = Replica(Engine(runner))  # and all above it; what the devices would do is counted elsewhere
    return llm


def generated(llm: LLM, count: int) -> float:
    """Operations a request of ``LLM.generate`` over many tiny prompts."""
    Watched.asked = 0
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    done = llm.generate([[n % 20, n // 20 % 20] for n in range(count)], params)
    assert {len(one.token_ids) for one in done} == {2}
    return Watched.asked / count


def test_work_grows_with_the_number_of_prompts_and_no_faster(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpjax.engine.request_builder.Request", Watched)
    few, many = generated(tiny, 200), generated(tiny, 2_000)
    assert many <= 1.2 * few


def test_cancelling_thousands_too(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that ends while thousands wait, and an exception that ends them all."""
    monkeypatch.setattr("tpjax.engine.request_builder.Request", Watched)

    def abandoned(count: int) -> float:
        Watched.asked = 0

        def step() -> Any:
            if len(done) == 20:
                raise KeyboardInterrupt
            outputs = real()
            done.extend(one for one, _ in outputs if one.finish_reason)
            return outputs

        done: list[Request] = []
        real = Engine.step.__get__(tiny.engine)
        with monkeypatch.context() as patch:
            patch.setattr(tiny.engine, "step", step)
            with pytest.raises(KeyboardInterrupt):
                generated(tiny, count)
        assert not tiny.engine.scheduler.busy and not tiny._streams
        return Watched.asked / count

    few, many = abandoned(200), abandoned(2_000)
    assert many <= 1.2 * few


class Prompt(list[int]):
    """Counts the tokens that are read from it."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        self.read += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        self.read += len(self)
        return super().__iter__()


def test_the_head_of_the_queue_is_read_once() -> None:
    """It waits for pages, with a slot free, while another decodes; its tokens are not gone through again."""
    blocks = BlockManager(101, PAGE)
    of = Scheduler(2, 400, SHAPES, SHAPES[:2], SHAPES[1], None, lambda *sizes: 1.0, 1, blocks)
    running, head = plain(300), Request(Prompt(range(100, 390)), SamplingParams(max_tokens=1), 0)
    of.add(running)
    of.add(head)
    seen: list[int] = []
    while running.finish_reason is None:
        work = of.schedule()
        assert work is not None
        of.dispatched(work)
        if work.decode or work.chunks[0].final:
            running.append(1)
        seen.append(head.prompt_token_ids.read)  # type: ignore[attr-defined]
    assert len(seen) >= 300 and seen[-1] == seen[1] <= 2 * 290
    of.finish(running)
    while (work := of.schedule()) is not None:  # chunk by chunk
        of.dispatched(work)
    assert head.dispatched_tokens == 1
    assert head.prompt_token_ids.read <= 4 * 290  # type: ignore[attr-defined]
