"""Simulated serving over request rates, and its report: tables in a terminal, and plain data."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tpjax.planning.arrivals import Arrival, at_rate, poisson, read_trace
from tpjax.planning.plain_table import plain_table
from tpjax.planning.plan import Plan
from tpjax.planning.serving import ServerModel, Simulation, plan_server, simulate
from tpjax.planning.serving_figures import PERCENTILES


class ServingLoad:
    """Requests to simulate: those of a trace, or of sampled lengths.

    Args:
        trace: file with lengths and times; ``None``: lengths are sampled.
        lengths: mean tokens of prompts and of answers.
        num_prompts: number of requests.
        range_ratio: lengths are between ``(1 - r)`` and ``(1 + r)`` times these.
        seed: seed of lengths and times.

    Raises:
        ConfigError: the trace cannot be read.
    """

    def __init__(
        self, trace: Path | None, lengths: tuple[int, int], num_prompts: int, range_ratio: float, seed: int
    ) -> None:
        self._trace = None if trace is None else read_trace(trace)
        self._sampled = (num_prompts, *lengths, range_ratio)
        self._seed = seed
        self.default_rates: list[float] = [math.inf] if self._trace is None else [_rate_of(self._trace)]
        if self._trace is None:
            varied = f" ± {range_ratio:.0%}" * (range_ratio > 0)
            self.words = (
                f"{num_prompts} of {lengths[0]} tokens, answered by {lengths[1]}{varied}, Poisson arrivals"
            )
        else:
            self.words = f"{len(self._trace)} of {trace}"

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return max(one.input_len + one.output_len for one in self.arrivals(math.inf))

    def arrivals(self, rate: float | None) -> list[Arrival]:
        """Returns the requests; ``rate`` a second, or ``None``: at the times of the trace."""
        rng = random.Random(self._seed)
        if self._trace is None:
            count, prompt, answer, spread = self._sampled
            return poisson(count, math.inf if rate is None else rate, prompt, answer, spread, rng)
        return self._trace if rate is None else at_rate(self._trace, rate, rng)


def _rate_of(trace: Sequence[Arrival]) -> float:
    """Returns the requests a second of a trace."""
    return (len(trace) - 1) / trace[-1].at if trace[-1].at else math.inf


def serve_load(
    plan: Plan,
    load: ServingLoad,
    rates: Sequence[float] | None,
    goals: Mapping[str, float],
    max_slots: int | None = None,
    max_concurrency: int | None = None,
) -> ServingReport:
    """Simulates a load on the server of a plan, once for each rate.

    Args:
        plan: model, chips and tp.
        load: the requests.
        rates: requests a second. ``None``: at the times of the trace, or all at once.
        goals: the objective of goodput, milliseconds by metric.
        max_slots: requests that run at once on a replica.
        max_concurrency: most requests in flight over all replicas.

    Raises:
        ConfigError: the model does not fit.
        RequestError: a request does not fit the context or the cache.
    """
    server = plan_server(plan.full, max_slots=max_slots)
    runs = [
        simulate(
            server,
            load.arrivals(rate if rates else None),
            rate=rate,
            replicas=plan.replicas,
            max_concurrency=max_concurrency,
            goals=goals,
        )
        for rate in rates or load.default_rates
    ]
    return ServingReport(plan, server, load.words, goals, runs)


@dataclass(frozen=True)
class ServingReport:
    """Simulated serving of a model over request rates.

    Attributes:
        plan: model, chips and tp.
        server: the server of each replica.
        load: the requests, in words.
        goals: the objective of goodput, milliseconds by metric.
        runs: one run for each rate.
    """

    plan: Plan
    server: ServerModel
    load: str
    goals: Mapping[str, float]
    runs: Sequence[Simulation]

    @property
    def assumptions(self) -> list[str]:
        """What the simulation assumes, a sentence each."""
        limits, plan = self.server.limits, self.plan
        objective = ", ".join(f"{name} of {ms:g} ms" for name, ms in self.goals.items())
        replicas = (
            f"{plan.replicas} replicas; a request goes where least is queued"
            if plan.replicas > 1
            else "one replica"
        )
        return [
            f"tp={plan.tp} devices; {replicas}; each has {limits.max_slots} slots and "
            f"{limits.num_pages - 1} cache pages of {limits.page_size} tokens",
            "the engine's own scheduler, on a virtual clock; devices as fast as `tpjax plan` predicts "
            f"({plan.hardware.source})",
            f"requests: {self.load}; nothing is shared in the prefix cache, and no answer ends early",
            "the host keeps up with the devices, and networks and tokenizers take no time",
            f"goodput counts requests within {objective}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        plan, limits = self.plan, self.server.limits
        return {
            "model": plan.model.counts.name,
            "hardware": plan.hardware.name,
            "chips": plan.chips,
            "devices": plan.devices,
            "tp": plan.tp,
            "replicas": plan.replicas,
            "dtype": plan.workload.dtype,
            "max_slots": limits.max_slots,
            "max_model_len": limits.max_model_len,
            "cache_pages": limits.num_pages - 1,
            "goodput_objective_ms": dict(self.goals),
            "assumptions": self.assumptions,
            "runs": [run.summary() for run in self.runs],
        }

    def __rich__(self) -> RenderableType:
        plan = self.plan
        head = (
            f"{plan.model.counts.name}, {plan.workload.dtype}, served by {plan.chips} × {plan.hardware.name}"
        )
        assumed = [Text(f"- {text}") for text in self.assumptions]
        return Group(Text(head, style="bold"), *assumed, self._throughput(), self._latency())

    def _throughput(self) -> Table:
        numbers = ("asked", "requests/s", "goodput", "tokens/s in", "out", "cache", "peak", "preempted")
        table = plain_table("requests and tokens a second", numbers=numbers)
        for figures in (run.summary() for run in self.runs):
            table.add_row(
                _rate(figures["request_rate"]),
                f"{figures['request_throughput']:.2f}",
                f"{figures['request_goodput']:.2f}",
                f"{figures['input_throughput']:.0f}",
                f"{figures['output_throughput']:.0f}",
                f"{figures['mean_kv_cache_usage']:.0%}",
                f"{figures['peak_kv_cache_usage']:.0%}",
                str(figures["preemptions"]),
            )
        return table

    def _latency(self) -> Table:
        kinds = list(PERCENTILES)
        names = [
            f"{name.upper()} {kinds[0]}" if not at else kind
            for name in _SHOWN
            for at, kind in enumerate(kinds)
        ]
        table = plain_table("latency, ms", numbers=("asked", *names))
        for figures in (run.summary() for run in self.runs):
            values = [figures[f"{kind}_{name}_ms"] for name in _SHOWN for kind in kinds]
            shown = ["-" if value is None else f"{value:.1f}" for value in values]
            table.add_row(_rate(figures["request_rate"]), *shown)
        return table


_SHOWN = ("ttft", "tpot", "itl")


def _rate(rate: float | str) -> str:
    return rate if isinstance(rate, str) else f"{rate:g}"
