"""Figures of serving: latencies, throughput and goodput, with the names of vLLM's benchmark.

``tpjax bench serve`` measures them, ``tpjax plan --serve`` simulates them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpjax.planning.plots import save

METRICS = {"ttft": "Time to First Token", "tpot": "Time per Output Token", "itl": "Inter-token Latency"}
METRICS["e2el"] = "End-to-end Latency"
PERCENTILES = {"median": 50, "p90": 90, "p99": 99}


@dataclass
class Outcome:
    """One request, as its client saw it; times in seconds.

    Attributes:
        prompt_tokens: tokens sent.
        output_tokens: tokens received.
        ttft: time to the first token.
        latency: time to the end.
        itl: times between two events of the response.
        error: why it failed; ``None`` if it did not.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; ``None`` for a single one."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def meets(self, goals: Mapping[str, float]) -> bool:
        """Whether it is within the goals, milliseconds by metric."""
        values = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2el": self.latency}
        return self.error is None and all(values[name] * 1000 <= goal for name, goal in goals.items())


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        request_rate: requested requests a second; ``inf``: all at once.
        duration: seconds.
        outcomes: outcomes of all requests.
        goals: milliseconds by metric.
    """

    request_rate: float
    duration: float
    outcomes: list[Outcome]
    goals: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Returns the figures under vLLM's names."""
        fine = [one for one in self.outcomes if one.error is None]
        prompt = sum(one.prompt_tokens for one in fine)
        output = sum(one.output_tokens for one in fine)
        figures: dict[str, Any] = {
            "request_rate": self.request_rate if math.isfinite(self.request_rate) else "inf",
            "completed": len(fine),
            "failed": len(self.outcomes) - len(fine),
            "duration": self.duration,
            "total_input_tokens": prompt,
            "total_output_tokens": output,
            "request_throughput": len(fine) / self.duration,
            "input_throughput": prompt / self.duration,
            "output_throughput": output / self.duration,
            "total_token_throughput": (prompt + output) / self.duration,
        }
        if self.goals:
            figures["request_goodput"] = sum(one.meets(self.goals) for one in fine) / self.duration
        samples = {
            "ttft": [one.ttft for one in fine],
            "tpot": [one.tpot for one in fine if one.tpot is not None],
            "itl": [gap for one in fine for gap in one.itl],
            "e2el": [one.latency for one in fine],
        }
        for name, values in samples.items():
            ms = sorted(1000 * value for value in values)
            figures[f"mean_{name}_ms"] = sum(ms) / len(ms) if ms else None
            for kind, percent in PERCENTILES.items():
                figures[f"{kind}_{name}_ms"] = percentile(ms, percent)
        return figures

    def table(self) -> str:
        """Returns the figures in the layout of vLLM's benchmark."""
        figures = self.summary()
        rows = [
            ("Successful requests:", figures["completed"]),
            ("Failed requests:", figures["failed"]),
            ("Request rate asked for (req/s):", figures["request_rate"]),
            ("Benchmark duration (s):", figures["duration"]),
            ("Total input tokens:", figures["total_input_tokens"]),
            ("Total generated tokens:", figures["total_output_tokens"]),
            ("Request throughput (req/s):", figures["request_throughput"]),
            ("Request goodput (req/s):", figures.get("request_goodput")),
            ("Input token throughput (tok/s):", figures["input_throughput"]),
            ("Output token throughput (tok/s):", figures["output_throughput"]),
            ("Total token throughput (tok/s):", figures["total_token_throughput"]),
        ]
        lines = [f"{' Serving Benchmark Result ':=^50}", *(_row(*row) for row in rows if row[1] is not None)]
        for name, title in METRICS.items():
            lines.append(f"{f' {title} ':-^50}")
            for kind in ("mean", *PERCENTILES):
                label = f"{kind.capitalize()} {name.upper()} (ms):"
                lines.append(_row(label, figures[f"{kind}_{name}_ms"]))
        return "\n".join([*lines, "=" * 50])


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Interpolates a percentile of ascending values linearly; ``None`` if there are none."""
    if not ordered:
        return None
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draws latency and throughput over the request rate, in the format of the file's suffix.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    summaries = [result.summary() for result in results]
    labels = [f"{result.request_rate:g}" for result in results]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, axis in zip(("ttft", "tpot"), axes, strict=False):
        for kind in ("median", "p99"):
            values = [summary[f"{kind}_{name}_ms"] or math.nan for summary in summaries]
            axis.plot(labels, values, marker="o", label=kind)
        axis.set(title=METRICS[name], ylabel="ms")
        axis.legend()
    axes[2].plot(labels, [summary["output_throughput"] for summary in summaries], marker="o", color="C2")
    axes[2].set(title="Output throughput", ylabel="tokens/s")
    for axis in axes:
        axis.set(xlabel="requests a second asked for", ylim=(0, 1.1 * axis.dataLim.ymax))
        axis.grid(alpha=0.3)
    save(figure, path)


def _row(label: str, value: Any) -> str:
    shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40}{shown:<10}"
