"""An engine together with the generations that it runs, stepped by its caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from tpjax.engine.engine import Engine, Stats
from tpjax.engine.generation import Delta, Generation
from tpjax.engine.request import Request

Result = TypeVar("Result")


class ReplicaStatus(NamedTuple):
    """A replica as metrics and ``/health`` report it.

    Attributes:
        stats: its load and counters.
        error: why it has failed; ``None`` while it works.
    """

    stats: Stats
    error: str | None = None


class Replica:
    """Runs generations on one engine. Only one thread at a time may use it.

    Args:
        engine: the engine.

    Attributes:
        engine: as given.
        deltas: what has been generated since somebody took it from here.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.deltas: deque[tuple[Generation, Delta]] = deque()
        self._running: dict[Request, Generation] = {}
        self._outputs: deque[tuple[Request, list[int]]] = deque()  # of the engine, without their text yet

    @property
    def slots(self) -> int:
        """Requests that can run at once."""
        return self.engine.runner.limits.max_slots

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has something to do."""
        return self.engine.busy or bool(self._outputs)

    def runs(self, generation: Generation) -> bool:
        """Whether a generation has been added and has not ended."""
        return generation.request in self._running

    def add(self, generation: Generation) -> None:
        """Queues a generation.

        Raises:
            RequestError: its request can never run.
            EngineError: the engine is closed.
        """
        self.engine.add(generation.request)
        self._running[generation.request] = generation

    def cancel(self, generation: Generation) -> None:
        """Ends a generation early and releases what it holds; does nothing if it has ended."""
        self._running.pop(generation.request, None)
        self.engine.cancel(generation.request)

    def step(self) -> None:
        """Steps the engine and adds what its generations have got to ``deltas``."""
        self._outputs.extend(self.engine.step())
        while self._outputs:  # an interrupt in between leaves the rest for the next step
            request, tokens = self._outputs.popleft()
            generation = self._running.get(request)
            if generation is None:
                continue  # cancelled after its dispatch
            error = None if request.grammar is None else request.grammar.error
            if error and request.finish_reason != "length":
                request.finish_reason, request.error = "error", error
            if delta := generation.advance(tokens):
                self.deltas.append((generation, delta))
            if delta.finish_reason is not None:
                del self._running[request]
                self.engine.cancel(request)

    def withdraw(self) -> list[Generation]:
        """Takes back the generations that have not begun, so that another replica can run them."""
        waiting = [one for one in self._running.values() if not_begun(one.request)]
        for generation in waiting:
            generation.request.dispatched_tokens = 0  # what may be in flight here is never read
        return self._taken_back(waiting)

    def recall(self, count: int) -> list[Generation]:
        """Takes back the last generations that wait, at most so many; none that ever had a slot."""
        waiting = [one for one in self._running.values() if one.request.queued]
        never_ran = [one for one in waiting if one.request.cached_tokens is None]
        never_ran.sort(key=lambda one: one.request.rank)
        return self._taken_back(never_ran[-count:])

    def _taken_back(self, generations: list[Generation]) -> list[Generation]:
        for generation in generations:
            self.engine.scheduler.finish(generation.request)
            del self._running[generation.request]
        return generations

    def fail(self, why: str) -> None:
        """Ends all generations with an error."""
        for generation in self._running.values():
            self.refuse(generation, why)
        self._running.clear()

    def refuse(self, generation: Generation, why: str) -> None:
        """Ends a generation that the engine does not run, with an error."""
        self.deltas.append((generation, failed(generation, why)))

    def run(self, function: Callable[[Engine], Result]) -> Result:
        """Calls a function with the engine, between two steps."""
        return function(self.engine)

    def run_on_all(self, function: Callable[[Engine], None]) -> None:
        """Does the same: there is one engine. See :meth:`Router.run_on_all`."""
        function(self.engine)

    def status(self) -> list[ReplicaStatus]:
        """Returns the engine's load and counters."""
        return [ReplicaStatus(self.engine.stats())]

    def check_open(self) -> None:
        """Raises an ``EngineError`` if the engine is closed."""
        self.engine.check_open()

    def wake(self) -> None:
        """Does nothing: :meth:`step` waits for nobody but the devices. See :meth:`Router.wake`."""

    def close(self) -> None:
        """Ends all generations with an error, and frees the memory of the devices."""
        self.engine.close()


def failed(generation: Generation, why: str) -> Delta:
    """Returns the last delta of a generation that has failed, or fails now for a reason."""
    request = generation.request
    if request.finish_reason is None:
        request.finish_reason, request.error, request.state_lost = "error", why, True
    return generation.advance([])


def not_begun(request: Request) -> bool:
    """Whether a request waits, and has output nothing so far."""
    return request.queued and not request.output_token_ids and request.finish_reason is None
