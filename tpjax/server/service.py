"""Runs the engine on its own thread; a queue carries commands to it, callbacks carry deltas back.

One thread owns the model: it loads it and steps its engine, and no other thread touches either. Commands
(add, cancel) take effect between two steps; the deltas of a step go back to the event loop in one call. With
several replicas, "the engine" is their router, which has a thread for each (:mod:`tpjax.engine.router`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tpjax.engine.generation import Delta, Generation
from tpjax.errors import LostProcessError
from tpjax.server.error_responses import ApiError, bad_request, internal_error
from tpjax.server.json_types import JsonObject
from tpjax.server.metrics import ChoiceTimings, Metrics
from tpjax.server.pace import Pace, at_most_a_minute
from tpjax.server.shards import shards

if TYPE_CHECKING:
    from tpjax.engine.replica import Replica, ReplicaStatus
    from tpjax.engine.router import Router
    from tpjax.llm import LLM

log = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed"]


class Stream:
    """Queues the deltas of one HTTP request's generations for its response. Used on the event loop only.

    Args:
        generations: generations in the order of the choices.
        limit: most deltas that may wait to be read; ``None``: any number. Above it the reader is too slow,
            and the generations end.

    Attributes:
        generations: generations in the order of the choices.
        timings: times of each choice, for metrics.
    """

    def __init__(self, generations: Sequence[Generation], limit: int | None = None) -> None:
        self.generations = generations
        self.timings = [ChoiceTimings() for _ in generations]
        self._limit = limit
        self._deltas: deque[tuple[int, Delta]] = deque()
        self._open = len(generations)
        self._error: ApiError | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether all choices have ended, or the stream has failed."""
        return self._error is not None or not self._open

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yields (index of the choice, delta) until all choices have ended.

        Raises:
            ApiError: a generation failed.
        """
        while True:
            while self._deltas:
                yield self._deltas.popleft()
            if self._error is not None:
                raise self._error
            if not self._open:
                return
            self._news.clear()
            await self._news.wait()

    def put(self, index: int, delta: Delta) -> bool:
        """Adds a delta; returns False if the reader is too slow."""
        if self.ended:
            return True
        if delta.finish_reason == "error":
            request = self.generations[index].request
            if request.state_lost:  # an internal error: the details are for the log
                why = "the engine failed while this ran; the server's log has it"
                self.fail(ApiError(500, why, code="engine_failed"))
            elif request.grammar is not None and request.grammar.error:  # the client's could not be followed
                self.fail(bad_request(request.error or "", code="grammar_too_complex"))
            else:
                message = request.error or "the generation failed"
                self.fail(ApiError(500, message, code="generation_failed"))
            return True
        self._open -= delta.finish_reason is not None
        self._deltas.append((index, delta))
        self._news.set()
        if self._limit is None or len(self._deltas) <= self._limit:
            return True
        self.fail(ApiError(408, f"{self._limit} deltas of the response were not read", code="slow_reader"))
        return False

    def fail(self, error: ApiError) -> None:
        """Ends the stream with an error; deltas added before are still read."""
        if not self.ended:
            self._error = error
            self._news.set()


class Service:
    """Serves one model to many clients.

    Args:
        load: loads the model; called on the engine's thread.
        model: name of the model in the API.
        max_queue: most choices that may wait for a slot; more are refused.
        warm_up: compile programs before requests are accepted, and the rest in the background.
        on_ready: called once, on the event loop, when requests are accepted.
        on_failure: called once, on the event loop, if an exception ends the engine's thread.

    Attributes:
        state: requests are accepted while it is ``ready``.
        error: the exception that ended the engine's thread.
        model: name of the model in the API.
        shards: how the model is sharded; ``None`` until that is known, shortly after the model is loaded.
        metrics: metrics over all requests.
        max_queue: most choices that may wait for a slot.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        model: str,
        max_queue: int = 256,
        *,
        warm_up: bool = False,
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.state: State = "loading"
        self.error: BaseException | None = None
        self._status: Sequence[ReplicaStatus] = ()  # of an only replica
        self.shards: JsonObject | None = None
        self.model = model
        self.metrics = Metrics(model, lambda: self.replicas)
        self.max_queue = max_queue
        self._load = load
        self._warm_up = warm_up
        self._compiling: LLM | None = None
        self._on_ready = on_ready
        self._on_failure = on_failure
        self._llm: LLM | None = None
        # on the event loop only
        self._streams: set[Stream] = set()
        self._preparing = 0
        self._pace = Pace()  # of choices
        self._loading_since = self._drained_at = 0.0  # seconds of ``time.perf_counter``
        # on the engine's thread only
        self._active: dict[Generation, tuple[Stream, int]] = {}
        self._commands: queue.SimpleQueue[Callable[[Replica | Router], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tpjax-engine", daemon=True)

    # --- on the event loop -------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the engine's thread, once; the model is loaded when ``state`` is ``ready``."""
        if self._thread.ident is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._loading_since = time.perf_counter()
        self._thread.start()

    @property
    def llm(self) -> LLM:
        """The model.

        Raises:
            ApiError: 503, the model is loading or no more requests are accepted.
        """
        if self.state != "ready" or self._llm is None:
            why = f"the server is not ready: {self.state}"
            if self.compiling:
                why += f", {self.compiling}"
            raise ApiError(503, why, code=self.state, headers=self._retry_when_ready())
        return self._llm

    def _retry_when_ready(self) -> Mapping[str, str]:
        """Returns the headers of a response while no requests are accepted.

        A model that loads may take as long again as it has so far. Where a server drains, the next one can
        be here when this one has ended; one that has failed does not know of a next.
        """
        match self.state:
            case "loading":
                seconds = time.perf_counter() - self._loading_since
            case "draining":
                seconds = self._drained_at - time.perf_counter()
            case _:
                return {}
        return {"Retry-After": str(at_most_a_minute(seconds))}

    @property
    def replicas(self) -> Sequence[ReplicaStatus]:
        """The figures of each replica after its last step; none while the model loads."""
        if self._llm is not None and self._llm.dp > 1:  # their threads go on while this one waits
            return self._llm.front.status()
        return self._status

    @property
    def compiling(self) -> str:
        """``program 7 of 19`` while programs are being compiled, or nothing."""
        done, programs = self._compiling.compile_progress if self._compiling is not None else (0, 0)
        return f"program {min(done + 1, programs)} of {programs}" if programs else ""

    @property
    def loaded(self) -> bool:
        """Whether the model has been loaded, in any state."""
        return self._llm is not None

    @property
    def pending(self) -> int:
        """Number of choices that are being prepared, wait or run."""
        return self._preparing + sum(len(stream.generations) for stream in self._streams)

    def admit(self, choices: int) -> None:
        """Checks that the queue has room for some choices.

        Raises:
            ApiError: 429, the queue is full; 503, no requests are accepted.
        """
        room = self.llm.front.slots + self.max_queue
        if (excess := self.pending + choices - room) > 0:
            raise ApiError(
                429,
                f"the queue is full: {self.pending} choices wait or run, {choices} more are over {room}",
                code="queue_full",
                headers={"Retry-After": str(self._pace.retry_after_s(excess, 1, time.perf_counter()))},
            )

    @contextlib.contextmanager
    def preparing(self, choices: int) -> Iterator[None]:
        """Holds places in the queue while the prompts of some choices are rendered and tokenised.

        Raises:
            ApiError: 429, the queue is full; 503, no requests are accepted.
        """
        self.admit(choices)
        self._preparing += choices
        try:
            yield
        finally:
            self._preparing -= choices

    def submit(self, generations: Sequence[Generation], limit: int | None = None) -> Stream:
        """Submits generations to the engine; ``close`` the returned stream in any case.

        Raises:
            ApiError: 429, the queue is full; 503, no requests are accepted.
        """
        self.admit(len(generations))
        stream = Stream(generations, limit)
        if not self._streams:
            self._pace.begin(time.perf_counter())
        self._streams.add(stream)
        self._command(lambda front: self._add(front, stream))
        return stream

    def close(self, stream: Stream) -> None:
        """Closes a stream that is read no more; its running generations are cancelled within a step."""
        if stream in self._streams:
            self._streams.remove(stream)
            self._command(lambda front: self._cancel(front, stream))

    async def drain(self, limit_s: float) -> None:
        """Stops accepting requests and waits for the running ones; after ``limit_s`` seconds they fail."""
        if self.state != "failed":
            self.state = "draining"
        self._drained_at = time.perf_counter() + limit_s
        while self._streams and time.perf_counter() < self._drained_at:
            await asyncio.sleep(0.02)
        self._fail_streams(ApiError(503, f"the server stopped after {limit_s:g} s", code="draining"))

    async def stop(self) -> None:
        """Ends the engine's thread; a thread that is still loading ends with the process."""
        self._command(None)
        if self._llm is not None:
            await asyncio.to_thread(self._thread.join)
            if self._llm.role.leader is not None:
                await asyncio.to_thread(self._llm.role.leader.close)

    def _command(self, command: Callable[[Replica | Router], None] | None) -> None:
        self._commands.put(command)
        if self._llm is not None:
            self._llm.front.wake()

    def _deliver(self, outputs: list[tuple[Stream, int, Delta]], now: float) -> None:
        for stream, index, delta in outputs:
            self.metrics.record(stream.generations[index].request, stream.timings[index], delta, now)
            if delta.finish_reason is not None:
                self._pace.end(1, now)
            if not stream.put(index, delta):
                log.warning("a reader was too slow: its request ends")
                self.close(stream)

    def _fail_streams(self, error: ApiError) -> None:
        for stream in list(self._streams):
            stream.fail(error)

    def _ready(self) -> None:
        if self.state == "loading":
            self.state = "ready"
            self._on_ready()

    def _failed(self, error: BaseException) -> None:
        self.state, self.error = "failed", error
        self._fail_streams(internal_error())
        self._on_failure()

    def _lost(self, reason: str) -> None:
        """Answers all streams: another process is lost, and this one ends in seconds."""
        self.state, self.error = "failed", LostProcessError(reason)
        self._fail_streams(ApiError(500, f"the model has stopped: {reason}", code="process_lost"))

    # --- on the engine's thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            llm = self._load()
            if llm.role.leader is not None:
                llm.role.leader.on_lost = lambda reason: self._call(lambda: self._lost(reason))
            if self._warm_up:
                self._compiling = llm
                llm.warm_up(background=True)
                # it compiles too, and nobody who asks for tokens should wait for that
                threading.Thread(target=self._describe, args=(llm,), daemon=True).start()
            else:
                self._describe(llm)
            self._llm = llm
            self._status = llm.front.status()
            self._call(self._ready)
            while self._process_commands(llm.front):
                self._step(llm.front)
                self._status = llm.front.status()
                llm.front.check_open()
            for generation in self._active:  # no replica's thread may be at work when the process ends
                llm.front.cancel(generation)
            llm.front.run_on_all(lambda engine: None)
        except BaseException as error:
            if self.loaded:  # the command line reports a model that cannot be loaded
                log.exception("the engine stopped")
            failure = error
            self._call(lambda: self._failed(failure))

    def _describe(self, llm: LLM) -> None:
        """Sets ``shards``."""
        try:
            self.shards = shards(llm)
        except Exception:  # requests do not need it
            log.exception("the page has no shards to show")

    def _process_commands(self, front: Replica | Router) -> bool:
        """Processes queued commands; blocks while the engine is idle. Returns False on the stop command."""
        while True:
            try:
                command = self._commands.get(block=not front.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(front)
            self._status = front.status()

    def _step(self, front: Replica | Router) -> None:
        front.step()
        outputs = []
        while front.deltas:
            generation, delta = front.deltas.popleft()
            if generation not in self._active:
                continue
            stream, index = self._active[generation]
            if delta.finish_reason is not None:
                del self._active[generation]
            outputs.append((stream, index, delta))
        if outputs:
            now = time.perf_counter()
            self._call(lambda: self._deliver(outputs, now))

    def _add(self, front: Replica | Router, stream: Stream) -> None:
        try:
            for index, generation in enumerate(stream.generations):
                front.add(generation)
                self._active[generation] = (stream, index)
        except Exception:  # each was checked before: this is a bug, and must not end the other requests
            log.exception("a checked request was refused")
            self._cancel(front, stream)
            self._call(lambda: stream.fail(internal_error()))

    def _cancel(self, front: Replica | Router, stream: Stream) -> None:
        aborted = 0
        for generation in stream.generations:
            if self._active.pop(generation, None) is not None:
                front.cancel(generation)
                aborted += 1
        if aborted:
            self._call(lambda: self.metrics.record_aborts(aborted))

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the event loop has closed: there is nothing left to notify
            log.debug("the event loop has closed")


def name_in_api(model: str) -> str:
    """Returns the name that clients ask for: an alias or a Hugging Face id, or the last part of a path."""
    return Path(model).name if Path(model).exists() else model
