"""Prometheus metrics, under vLLM's names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from tpjax.engine.generation import Delta
    from tpjax.engine.replica import ReplicaStatus
    from tpjax.engine.request import Request

_FAST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_SLOW = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)

# Figures of a replica, which has the label ``engine``, as vLLM calls it.
_Figures = tuple[tuple[str, str, "Callable[[ReplicaStatus], float]"], ...]
_GAUGES: _Figures = (
    ("num_requests_running", "Choices that hold a slot.", lambda one: one.stats.running),
    ("num_requests_waiting", "Choices in the queue.", lambda one: one.stats.waiting),
    ("kv_cache_usage_perc", "Cache pages in use; 1 is all.", lambda one: one.stats.kv_cache_usage),
    ("engine_up", "1 while the replica works, 0 when it has failed.", lambda one: one.error is None),
)
_COUNTERS: _Figures = (
    ("num_preemptions", "Requests that gave their cache pages back.", lambda one: one.stats.preemptions),
    ("prefix_cache_queries", "Prompt tokens looked up in the cache.", lambda one: one.stats.prefix_queries),
    ("prefix_cache_hits", "Prompt tokens found in the cache.", lambda one: one.stats.prefix_hits),
    ("compiles", "Programs compiled.", lambda one: one.stats.compiles),
)


@dataclass
class ChoiceTimings:
    """Times of a choice, seconds of ``time.perf_counter``.

    Attributes:
        start: arrival.
        last: last delta; 0 before the first.
        tokens: number of tokens generated.
    """

    start: float = field(default_factory=time.perf_counter)
    last: float = 0.0
    tokens: int = 0


class Metrics:
    """Counts requests, tokens and time. Used on the event loop only.

    Args:
        model: name of the model, a label of every metric.
        replicas: returns the figures of each replica; none while the model loads.

    Attributes:
        generated_tokens: tokens generated since the start.
    """

    def __init__(self, model: str, replicas: Callable[[], Sequence[ReplicaStatus]]) -> None:
        self.generated_tokens = 0
        self._model = model
        self._replicas = replicas
        self._registry = CollectorRegistry()
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of choices that began.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "tpjax:request_success",
            "Choices that ended, by why.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _FAST)
        self._gap = self._histogram("inter_token_latency_seconds", "Between two tokens.", _FAST)
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to end.", _SLOW)
        self._registry.register(self)  # a collector only needs collect()

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def record(self, request: Request, timings: ChoiceTimings, delta: Delta, now: float) -> None:
        """Counts a delta of a choice and updates the choice's timings."""
        count = len(delta.token_ids)
        if not timings.last:
            self._prompt_tokens.inc(len(request.prompt_token_ids))
        if count:
            if not timings.tokens:
                self._first.observe(now - timings.start)
            else:
                for _ in range(count):  # the tokens of one dispatch share its time
                    self._gap.observe((now - timings.last) / count)
            timings.tokens += count
            self.generated_tokens += count
            self._generation_tokens.inc(count)
        timings.last = now
        if delta.finish_reason is not None:
            self._success.labels(self._model, delta.finish_reason).inc()
            self._whole.observe(now - timings.start)

    def record_aborts(self, choices: int) -> None:
        """Counts choices whose clients disconnected before they ended."""
        self._success.labels(self._model, "abort").inc(choices)

    def collect(self) -> Iterator[Metric]:
        """Yields the figures of each replica; Prometheus's client calls this at each scrape."""
        replicas = self._replicas()
        if not replicas:
            return
        labels = ["model_name", "engine"]
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(f"tpjax:{name}", text, labels=labels)
            for number, one in enumerate(replicas):
                gauge.add_metric([self._model, str(number)], value(one))
            yield gauge
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(f"tpjax:{name}", text, labels=labels)
            for number, one in enumerate(replicas):
                counter.add_metric([self._model, str(number)], value(one))
            yield counter

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"tpjax:{name}", text, ("model_name",), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"tpjax:{name}", text, ("model_name",), registry=self._registry, buckets=buckets)
        return made.labels(self._model)
