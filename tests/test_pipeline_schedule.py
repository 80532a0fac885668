"""Which stage of a pipeline works when: the real engine over stages with given times, on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_engine import EveryThird, FakeRunner, alone

from tpjax import SamplingParams
from tpjax.engine.engine import Engine
from tpjax.engine.request import Request
from tpjax.runtime.rows import Chunk, Row
from tpjax.runtime.runner import StepOutput
from tpjax.sampling import Sampled

STAGE_S = 1.0


class Late:
    """Tokens that are there at a given time: who reads them waits for it."""

    def __init__(self, runner: ClockedRunner, tokens: np.ndarray, ready: float) -> None:
        self.runner, self.tokens, self.ready = runner, tokens, ready

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.runner.now = max(self.runner.now, self.ready)
        return self.tokens


class ClockedRunner(FakeRunner):
    """A pipeline whose stages take a second a step, whatever is in it, and whose host takes no time."""

    def __init__(self, stages: int, rows: int, transfer_s: float) -> None:
        super().__init__(rows, 400, longest=400, steps=1, stages=stages)
        self.transfer_s, self.now = transfer_s, 0.0
        self.free = [0.0] * stages  # when a stage has done all that it was given
        self.work: list[list[tuple[float, float]]] = [[] for _ in range(stages)]
        self.drawn: dict[int, float] = {}  # when the last token of a slot is back at the first stage

    def decode(self, rows: Sequence[Row], steps: int) -> Sampled:
        done = self.pass_through(rows, rows)
        return self.late(super().decode(rows, steps), done)

    def step(self, decode: Sequence[Row], chunks: Sequence[Chunk]) -> StepOutput:
        done = self.pass_through(decode, [*decode, *(chunk.row for chunk in chunks)])
        output = super().step(decode, chunks)
        return output._replace(sampled=self.late(output.sampled, done))

    def pass_through(self, fed: Sequence[Row], drawn: Sequence[Row]) -> float:
        """Runs a step through all stages and returns when the last has ended."""
        ready = max([self.now, *(self.drawn[row.slot] for row in fed)])
        for stage, free in enumerate(self.free):
            start = max(free, ready)
            self.free[stage] = start + STAGE_S
            self.work[stage].append((start, start + STAGE_S))
            ready = start + STAGE_S + self.transfer_s
        self.drawn |= {row.slot: ready for row in drawn}
        return ready - self.transfer_s

    def late(self, sampled: Sampled, done: float) -> Sampled:
        return replace(sampled, tokens=Late(self, sampled.tokens, done))

    def idle(self, start: float, stop: float) -> list[float]:
        """The fraction of a span in which each stage had nothing to do."""
        return [
            1 - sum(max(0.0, min(end, stop) - max(begin, start)) for begin, end in work) / (stop - start)
            for work in self.work
        ]


def decoding(
    stages: int, rows: int, transfer_s: float, bound: bool = False
) -> tuple[ClockedRunner, list[float]]:
    """A pipeline with so many long answers, and the idle fraction of each stage while all are decoded."""
    runner: Any = ClockedRunner(stages, rows, transfer_s)
    engine = Engine(runner)
    requests = [
        Request([row % 20, 3], SamplingParams(max_tokens=60), row, grammar=Endless() if bound else None)
        for row in range(rows)
    ]
    for request in requests:
        engine.add(request)
    while not all(len(request.output_token_ids) > 6 for request in requests):
        engine.step()
    start = runner.now
    while not any(len(request.output_token_ids) > 50 for request in requests):
        engine.step()
    stop = runner.now
    while engine.busy:
        engine.step()
    if not bound:
        assert [one.output_token_ids for one in requests] == [alone(one)[0] for one in requests]
    return runner, runner.idle(start, stop)


class Endless(EveryThird):
    """Goes on until the request's length ends it."""

    finished = False  # type: ignore[assignment]


@pytest.mark.parametrize("bound", (False, True))
@pytest.mark.parametrize(("stages", "rows"), ((2, 2), (2, 5), (2, 16), (3, 3), (3, 7), (4, 4), (4, 9)))
def test_no_stage_is_idle(stages: int, rows: int, bound: bool) -> None:
    """As many rows as stages are enough, also if each has to be read before it goes on."""
    _, idle = decoding(stages, rows, 0.0, bound)
    assert idle == pytest.approx([0.0] * stages, abs=1e-9)


@pytest.mark.parametrize(("stages", "rows"), ((2, 1), (3, 1), (3, 2), (4, 2), (4, 3)))
def test_fewer_rows_than_stages_leave_stages_idle(stages: int, rows: int) -> None:
    _, idle = decoding(stages, rows, 0.0)
    assert idle == pytest.approx([1 - rows / stages] * stages, abs=0.03)


@pytest.mark.parametrize(("stages", "rows"), ((2, 4), (3, 3), (4, 9)))
def test_a_stage_waits_for_transfers_alone(stages: int, rows: int) -> None:
    """With as many groups as stages a stage waits for one transfer a step."""
    transfer_s = 0.25
    _, idle = decoding(stages, rows, transfer_s)
    assert idle == pytest.approx([transfer_s / (STAGE_S + transfer_s)] * stages, abs=0.03)


def test_groups_are_even() -> None:
    """Rows that end leave no stage with a small step for long."""
    runner: Any = ClockedRunner(2, 8, 0.0)
    sizes: list[int] = []
    decode = runner.decode
    runner.decode = lambda rows, steps: sizes.append(len(rows)) or decode(rows, steps)
    engine = Engine(runner)
    for row in range(8):  # those of even number form one group, and end
        engine.add(Request([row, 3], SamplingParams(max_tokens=10 if row < 4 else 40), row))
    while engine.busy:
        engine.step()
    assert max(sizes) == 4 and sizes[-30:-4] == [2] * 26


def test_parts_of_a_prompt_follow_each_other_through_the_stages() -> None:
    """A prompt of many chunks keeps all stages busy but for the time in which it fills them."""
    runner: Any = ClockedRunner(3, 1, 0.0)
    engine = Engine(runner)
    prompt = Request([i % 20 for i in range(160)], SamplingParams(max_tokens=1), 0)
    engine.add(prompt)
    while engine.busy:
        engine.step()
    assert prompt.output_token_ids == alone(prompt)[0]
    chunks = len(runner.work[0])
    assert chunks == 20 and runner.free == [chunks, chunks + 1, chunks + 2]
