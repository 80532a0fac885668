"""``tpjax bench``: decode and prefill of a model on this machine, next to what ``plan`` predicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType

from tpjax.planning.measure import OtherPrograms, best_s, others_note
from tpjax.planning.plain_table import plain_table
from tpjax.planning.plan import Plan
from tpjax.planning.workload import Workload

_DECODE_TOKENS = 64


@dataclass(frozen=True)
class BenchReport:
    """Measured times next to predicted ones.

    Attributes:
        plan: the prediction.
        decode_ms: measured milliseconds of a decode step at the context of the plan, the best of all rounds.
        prefill_ms: measured milliseconds to prefill the prompt of the plan, the best of all rounds.
    """

    plan: Plan
    decode_ms: float
    prefill_ms: float

    @property
    def rows(self) -> list[tuple[str, float, float]]:
        """What was measured, its measured and its predicted milliseconds."""
        workload = self.plan.workload
        return [
            (f"decode at {workload.context} tokens", self.decode_ms, self.plan.decode.total * 1e3),
            (f"prefill of {workload.prompt_len} tokens", self.prefill_ms, self.plan.prefill.total * 1e3),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        (_, decode, decode_plan), (_, prefill, prefill_plan) = self.rows
        return {
            "model": self.plan.model.counts.name,
            "device": self.plan.model.hardware.name,
            "tp": self.plan.tp,
            "dp": self.plan.replicas,
            **asdict(self.plan.workload),
            "decode": {"measured_ms": decode, "predicted_ms": decode_plan},
            "prefill": {"measured_ms": prefill, "predicted_ms": prefill_plan},
        }

    def __rich__(self) -> RenderableType:
        plan = self.plan
        layout = f"tp={plan.tp}" if plan.replicas == 1 else f"dp={plan.replicas} × tp={plan.tp}"
        title = f"{plan.model.counts.name} at {layout} on {plan.model.hardware.name}, {plan.workload.dtype}"
        numbers = ("measured ms", "predicted ms", "predicted / measured", "tokens/s")
        table = plain_table(title, "", numbers=numbers)
        for (what, measured, predicted), tokens in zip(self.rows, (1, plan.workload.prompt_len), strict=True):
            speed = f"{tokens * plan.replicas * 1e3 / measured:.1f}"
            table.add_row(what, f"{measured:.2f}", f"{predicted:.2f}", f"{predicted / measured:.2f}", speed)
        return table


def longest(workload: Workload) -> int:
    """Returns the tokens of the longest sequence that the benchmark runs."""
    return max(workload.context + _DECODE_TOKENS, workload.prompt_len)


def run(runner: Any, plan: Plan, rounds: int | None = None, beside: Sequence[Any] = ()) -> BenchReport:
    """Times a runner at the context and prompt of a plan, with one sequence.

    Args:
        runner: a runner with room for :func:`longest` tokens.
        plan: the prediction.
        rounds: passed to :func:`best_s`.
        beside: runners of other replicas, which do the same at the same time; all are waited for.
    """
    workload, runners, others = plan.workload, (runner, *beside), OtherPrograms()
    with ThreadPoolExecutor(len(runners)) as threads:
        timings = best_s(
            {
                "decode": lambda: [*threads.map(lambda one: _decode(one, workload.context), runners)],
                "prefill": lambda: [*threads.map(lambda one: _prefill(one, workload.prompt_len), runners)],
            },
            rounds,
        )
    if busy := others_note(others.share()):
        print(f"tpjax: {busy}: measured times may be too long", file=sys.stderr)
    return BenchReport(plan, timings["decode"] / _DECODE_TOKENS * 1e3, timings["prefill"] * 1e3)


def _decode(runner: Any, context: int) -> Any:
    # the context of the plan is that of the middle token
    first = max(0, context - _DECODE_TOKENS // 2)
    for position in range(first, first + _DECODE_TOKENS, runner.limits.steps):
        sampled = runner.decode([_row(runner, position, runner.limits.steps)], runner.limits.steps)
    return sampled


def _prefill(runner: Any, tokens: int) -> Any:
    from tpjax.runtime.rows import Chunk

    largest = runner.limits.usable_chunk_shapes[-1].tokens
    for start in range(0, tokens, largest):
        out = runner.step([], [Chunk(_row(runner, start, 1), [0] * min(largest, tokens - start))])
    return out.sampled


def _row(runner: Any, position: int, remaining: int) -> Any:
    from tpjax.runtime.rows import Row
    from tpjax.sampling_params import SamplingParams

    pages = list(range(1, 1 + runner.limits.blocks))
    return Row(0, position, [pages], SamplingParams(temperature=0), seed=0, remaining=remaining)
