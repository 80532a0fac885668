"""Decode and prefill of a model on this machine, next to what ``plan`` predicts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from tpjax.planning.measure import best_s
from tpjax.planning.plan import Plan, Workload

_DECODE_TOKENS = 64


@dataclass(frozen=True)
class BenchReport:
    """Measured figures, and the plan's.

    Attributes:
        plan: the prediction.
        decode_ms: a step at the plan's context, measured; the best of several rounds.
        prefill_ms: the plan's prompt, measured.
    """

    plan: Plan
    decode_ms: float
    prefill_ms: float

    @property
    def rows(self) -> list[tuple[str, float, float]]:
        """(what, measured ms, predicted ms)."""
        workload = self.plan.workload
        return [
            (f"decode at {workload.context} tokens", self.decode_ms, self.plan.decode.total * 1e3),
            (f"prefill of {workload.prompt_len} tokens", self.prefill_ms, self.plan.prefill.total * 1e3),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        (_, decode, decode_plan), (_, prefill, prefill_plan) = self.rows
        return {
            "model": self.plan.model.counts.name,
            "device": self.plan.model.hardware.name,
            "tp": self.plan.tp,
            **asdict(self.plan.workload),
            "decode": {"measured_ms": decode, "predicted_ms": decode_plan},
            "prefill": {"measured_ms": prefill, "predicted_ms": prefill_plan},
        }

    def __rich__(self) -> RenderableType:
        plan = self.plan
        title = (
            f"{plan.model.counts.name} at tp={plan.tp} on {plan.model.hardware.name}, {plan.workload.dtype}"
        )
        table = Table(
            title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.add_column("")
        for name in ("measured ms", "predicted ms", "predicted / measured", "tokens/s"):
            table.add_column(name, justify="right")
        for (what, measured, predicted), tokens in zip(self.rows, (1, plan.workload.prompt_len), strict=True):
            speed = f"{tokens * 1e3 / measured:.1f}"
            table.add_row(what, f"{measured:.2f}", f"{predicted:.2f}", f"{predicted / measured:.2f}", speed)
        return table


def longest(workload: Workload) -> int:
    """Tokens of the longest sequence that the benchmark runs."""
    return max(workload.context + _DECODE_TOKENS, workload.prompt_len)


def run(runner: Any, plan: Plan, rounds: int | None = None) -> BenchReport:
    """Times the runner at the plan's context and prompt, one sequence.

    Args:
        runner: with room for :func:`longest`.
        plan: what is predicted.
        rounds: as :func:`best_s` takes it; fewer are quicker, and noisier.
    """
    workload = plan.workload
    seconds = best_s(
        {
            "decode": lambda: _decode(runner, workload.context),
            "prefill": lambda: _prefill(runner, workload.prompt_len),
        },
        rounds,
    )
    return BenchReport(plan, seconds["decode"] / _DECODE_TOKENS * 1e3, seconds["prefill"] * 1e3)


def _decode(runner: Any, context: int) -> Any:
    # the middle of what is decoded has the context asked for
    first = max(0, context - _DECODE_TOKENS // 2)
    for position in range(first, first + _DECODE_TOKENS, runner.limits.steps):
        drawn = runner.decode([_row(runner, position, runner.limits.steps)], runner.limits.steps)
    return drawn


def _prefill(runner: Any, tokens: int) -> Any:
    largest = runner.chunk_sizes[-1]
    for start in range(0, tokens, largest):
        drawn = runner.prefill(_row(runner, start, 1), [0] * min(largest, tokens - start))
    return drawn


def _row(runner: Any, position: int, remaining: int) -> Any:
    from tpjax.runtime.runner import Row
    from tpjax.sampling_params import SamplingParams

    pages = list(range(1, 1 + runner.limits.blocks))
    return Row(0, position, pages, SamplingParams(temperature=0), seed=0, remaining=remaining)
