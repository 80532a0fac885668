"""Simulates a server on a virtual clock: the engine's own scheduler and pages, and predicted step times.

What ``Engine`` does is done here with the same :class:`Scheduler` and :class:`BlockManager`: the next
dispatch starts before the outputs of the last are read, and requests that arrive meanwhile wait for the one
after. Requests are routed to replicas by the function that ``Router`` calls. Only the devices are missing: a
dispatch takes as long as :mod:`tpjax.step_time` says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpjax.engine.block_manager import BlockManager
from tpjax.engine.request import Request
from tpjax.engine.routing import ReplicaLoad, choose
from tpjax.engine.scheduler import Scheduler, Step
from tpjax.errors import ConfigError
from tpjax.planning.arrivals import Arrival
from tpjax.planning.cost_model import CostModel
from tpjax.planning.serving_figures import Outcome, Result
from tpjax.runtime.limits import PAGE_SIZE, STEPS, Limits, chunk_shapes, mixed_chunk_shapes
from tpjax.runtime.memory import CPU_SLOTS, SLOT_TOKENS, SLOTS, PagePool, windows_of
from tpjax.sampling_params import SamplingParams
from tpjax.step_time import StepTokens

StepSeconds = Callable[[StepTokens], float]


@dataclass(frozen=True)
class ServerModel:
    """What is simulated of a server.

    Attributes:
        limits: sizes of slots, cache and programs.
        step_s: returns the seconds of a step on the devices.
        predict: what the scheduler goes by, as :meth:`tpjax.step_time.StepTime.seconds`.
        overhead_s: seconds of each dispatch that the devices wait for the host.
    """

    limits: Limits
    step_s: StepSeconds
    predict: Callable[[int, int, int, int], float]
    overhead_s: float = 0.0


@dataclass(frozen=True)
class Simulation:
    """One simulated run.

    Attributes:
        result: what clients saw.
        mean_cache_usage: fraction of the cache pages in use, over the time that the devices computed.
        peak_cache_usage: the largest such fraction.
        preemptions: preempted requests.
    """

    result: Result
    mean_cache_usage: float
    peak_cache_usage: float
    preemptions: int

    def summary(self) -> dict[str, Any]:
        """Returns the figures of :meth:`Result.summary`, and those of the cache."""
        return {
            **self.result.summary(),
            "mean_kv_cache_usage": self.mean_cache_usage,
            "peak_kv_cache_usage": self.peak_cache_usage,
            "preemptions": self.preemptions,
        }


def plan_server(
    model: CostModel, *, max_slots: int | None = None, max_model_len: int | None = None
) -> ServerModel:
    """Sets up the server that the engine would be on these chips.

    Args:
        model: the model on one replica.
        max_slots: requests that run at once. ``None``: as the engine chooses them, the largest power of two
            up to 256 of which each has cache pages for 1,024 tokens, or 8 on a CPU.
        max_model_len: tokens of the longest sequence. ``None``: the model's longest context, if it fits.

    Raises:
        ConfigError: the model does not fit, or no sequence of that length.
    """
    usable, longest = model.hardware.usable_bytes, max_model_len or model.config.longest_context
    windows = windows_of(model.config, longest)
    pool = PagePool(windows, model.page_bytes(windows))

    def room(slots: int) -> int:
        """Returns how many cache pages fit beside what so many requests need."""
        need = model.memory(slots, 1)
        return int((usable - need.weights - need.workspace) // pool.page_bytes) - 1  # the null page

    slots = max_slots or CPU_SLOTS
    if max_slots is None and not model.hardware.shared:
        each = pool.held(min(longest, SLOT_TOKENS))
        slots = next((slots for slots in SLOTS if slots * each <= room(slots)), 1)
    pages = room(slots)
    length = max_model_len or pool.longest(pages, longest)
    if pages < pool.held(max(1, length)):
        raise ConfigError(
            f"{model.counts.name} at tp={model.tp} leaves room for {max(pages, 0)} cache pages of "
            f"{PAGE_SIZE} tokens in the {usable / 1e9:.1f} GB usable of {model.hardware.name}: too few for "
            f"one request of {max(length, 1)} tokens"
        )
    pages = min(pages, slots * pool.held(length))
    platform = model.hardware.platform
    limits = Limits(
        max_slots=slots,
        max_model_len=length,
        num_pages=pages + 1,
        chunk_shapes=chunk_shapes(platform),
        mixed_shapes=mixed_chunk_shapes(platform),
        steps=STEPS.get(platform, 1),
        windows=windows,
    )
    return ServerModel(limits, lambda tokens: model.step(tokens).total, model.seconds)


def simulate(
    server: ServerModel,
    arrivals: Sequence[Arrival],
    *,
    rate: float = float("inf"),
    replicas: int = 1,
    max_concurrency: int | None = None,
    goals: Mapping[str, float] | None = None,
) -> Simulation:
    """Simulates requests from the first arrival to the last response.

    Args:
        server: the server; each replica is one.
        arrivals: the requests, in order of arrival.
        rate: requests a second, as reported.
        replicas: number of replicas.
        max_concurrency: most requests in flight over all replicas; further ones wait with their clients, and
            their time begins when they are sent. ``None``: no limit.
        goals: milliseconds by metric, for goodput.

    Raises:
        RequestError: a request can never run: it does not fit the context or the cache.
    """
    runs = [_Replica(server) for _ in range(replicas)]
    pending, now = deque(arrivals), 0.0
    while pending or any(run.busy for run in runs):
        first = min((run for run in runs if run.busy), key=lambda run: run.next_at, default=None)
        room = max_concurrency is None or sum(run.requests for run in runs) < max_concurrency
        if pending and room and (first is None or pending[0].at <= first.next_at):
            arrival = pending.popleft()
            sent = arrival.at if max_concurrency is None else max(arrival.at, now)
            runs[choose([run.load for run in runs])].send(arrival, sent)
        else:
            assert first is not None
            now = first.next_at
            first.turn()
    duration = max(run.clock for run in runs)
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    busy = sum(run.busy_s for run in runs)
    return Simulation(
        Result(rate, duration, outcomes, goals or {}),
        sum(run.usage_s for run in runs) / busy,
        max(run.peak_usage for run in runs),
        sum(run.scheduler.preemptions for run in runs),
    )


@dataclass
class _Client:
    """A request's client: what it has seen so far."""

    sent: float
    outcome: Outcome
    last: float = 0.0

    def receive(self, now: float, tokens: int) -> None:
        """Notes an event of the response."""
        outcome = self.outcome
        if outcome.output_tokens:
            outcome.itl.append(now - self.last)
        else:
            outcome.ttft = now - self.sent
        outcome.output_tokens += tokens
        outcome.latency = now - self.sent
        self.last = now


@dataclass
class _Dispatch:
    """A dispatch in flight: when it ends, and the tokens that each request gets then."""

    end: float
    outputs: list[tuple[Request, int]]


@dataclass
class _Replica:
    """One server with its devices and clients.

    Attributes:
        server: the server.
        clock: time of its last turn.
        busy_s: seconds that its devices computed.
        usage_s: the same, weighted by the fraction of the cache pages in use.
        peak_usage: the largest such fraction.
        outcomes: what clients saw.
        requests: those that it has and that have not ended.
    """

    server: ServerModel
    clock: float = 0.0
    busy_s: float = 0.0
    usage_s: float = 0.0
    peak_usage: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = _scheduler(self.server)
        self._clients: dict[Request, _Client] = {}
        self._in_flight: deque[_Dispatch] = deque()
        self._devices_free = 0.0
        self._tokens_sent = 0
        self._prompt_pages = 0  # of prompts that have not run
        self._waits = False  # whether it has done all it can until a dispatch ends

    @property
    def requests(self) -> int:
        return len(self._clients)

    @property
    def busy(self) -> bool:
        """Whether it has anything left to do."""
        return bool(self._clients or self._in_flight)

    @property
    def next_at(self) -> float:
        """When its next turn is, if it is busy."""
        return max(self.clock, self._in_flight[0].end) if self._waits else self.clock

    @property
    def load(self) -> ReplicaLoad:
        """What a request would meet, as ``Router`` tells it."""
        free_slot = self.requests < self.server.limits.max_slots
        return ReplicaLoad(free_slot, self.requests + self._prompt_pages, cached=0)

    def turn(self) -> None:
        """Reads a dispatch that has ended, starts another, and waits for the one before that."""
        if self._waits:
            self.clock = self.next_at
            self._read(self._in_flight.popleft())
        before = bool(self._in_flight)
        if (dispatched := self._dispatch()) is not None:
            self._in_flight.append(dispatched)
        self._waits = before

    def send(self, arrival: Arrival, sent: float) -> None:
        """Adds a request, whose client sends it at a time."""
        if not self.busy:
            self.clock = max(self.clock, sent)
        # every prompt has tokens of its own, so that the prefix cache finds nothing
        first, self._tokens_sent = self._tokens_sent, self._tokens_sent + arrival.input_len
        params = SamplingParams(temperature=0, max_tokens=arrival.output_len, ignore_eos=True)
        request = Request(range(first, self._tokens_sent), params, seed=0)
        self.scheduler.add(request)
        outcome = Outcome(prompt_tokens=arrival.input_len)
        self.outcomes.append(outcome)
        self._clients[request] = _Client(sent, outcome)
        self._prompt_pages += self._pages(request)

    def _pages(self, request: Request) -> int:
        return -(-len(request.prompt_token_ids) // self.server.limits.page_size)

    def _dispatch(self) -> _Dispatch | None:
        """Starts what the scheduler decides, once the devices are free."""
        work = self.scheduler.schedule()
        if work is None:
            return None
        seconds, outputs = _work(work, self.server)
        self.scheduler.dispatched(work)
        seconds += self.server.overhead_s
        blocks = self.scheduler.blocks
        usage = 1 - blocks.free / blocks.capacity
        self.busy_s += seconds
        self.usage_s += seconds * usage
        self.peak_usage = max(self.peak_usage, usage)
        self._devices_free = max(self.clock, self._devices_free) + seconds
        return _Dispatch(self._devices_free, outputs)

    def _read(self, dispatch: _Dispatch) -> None:
        """Appends the outputs of a dispatch to their requests, and ends those that are complete."""
        for request, tokens in dispatch.outputs:
            if not request.output_token_ids:
                self._prompt_pages -= self._pages(request)
            for _ in range(tokens):
                request.append(0)
            self._clients[request].receive(self.clock, tokens)
            if request.finished:
                self.scheduler.finish(request)
                del self._clients[request]


# --- what the scheduler decides, and how long it takes -----------------------------------------------------


def _scheduler(server: ServerModel) -> Scheduler:
    limits = server.limits
    return Scheduler(
        limits.max_slots,
        limits.max_model_len,
        limits.usable_chunk_shapes,
        limits.mixed_chunk_shapes,
        limits.score_chunks,
        None,
        server.predict,
        limits.steps,
        BlockManager(limits.num_pages, limits.page_size),
        limits.windows,
    )


def _work(step: Step, server: ServerModel) -> tuple[float, list[tuple[Request, int]]]:
    """Returns the seconds of a step, and the tokens that each request gets at its end.

    Rows and chunks are padded to the sizes of the compiled programs: what pads them is computed as well, but
    reads no cache and chooses no expert.
    """
    limits, steps = server.limits, step.steps
    spans = tuple((chunk.start, chunk.stop) for chunk in step.chunks)
    rows, context, padding_rows, padding_tokens = len(step.decode), 0.0, 0, 0
    if rows:
        sizes = limits.mixed_batch_sizes if spans else limits.batch_sizes
        padding_rows = next(size for size in sizes if size >= rows) - rows
        keys = sum(one.next_position + 1 for one in step.decode)
        context = keys / rows + (steps - 1) / 2  # of the middle step
    if spans:
        shape = limits.fitting(spans, among=limits.mixed_chunk_shapes if rows else ())
        padding_tokens = shape.tokens - sum(stop - start for start, stop in spans)
    seconds = steps * server.step_s(StepTokens(rows, context, spans, padding_rows, padding_tokens))
    outputs = [(one, min(steps, one.remaining)) for one in step.decode]
    return seconds, outputs + [(chunk.request, 1) for chunk in step.chunks if chunk.final]
