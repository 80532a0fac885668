"""One front for several replicas, each stepped by a thread of its own.

Threads share the interpreter, and a dispatch holds it for as long as the host works: with programs that do
nothing, 0.2 ms at 8 rows, 0.6 ms at 64 and 1.8 ms at 256 (``scripts/bench_host.py``, on two cores that others
used, too). While the devices work, it is free. So four replicas dispatch four times as much as one if a step
takes longer on the devices than four dispatches on the host: with steps of 4 ms 996 times a second at 8 rows,
where four processes without a front dispatch 999 times; at 64 rows 427 and 757. With programs that take no
time processes dispatch 2.0 times as much, which is all that two cores have. A decode step takes that long for
the models that replicas are for; threads read weights once, ask any prefix cache without a message, and need
no second runtime on the machine's devices. Elsewhere :mod:`tpjax.deploy.ray` runs a process a replica.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import NamedTuple

from tpjax.engine.engine import Engine
from tpjax.engine.generation import Delta, Generation
from tpjax.engine.replica import Replica, ReplicaStatus, Result, failed
from tpjax.engine.request import Request
from tpjax.engine.routing import ReplicaLoad, choose
from tpjax.errors import EngineError

log = logging.getLogger(__name__)

_STATUS_S = 0.05


class _News(NamedTuple):
    """What a replica's thread tells the front.

    Attributes:
        deltas: what generations have got.
        returned: generations that the replica has not begun and gives up: it failed, or was asked for them.
        recalled: the replica that was asked for some, and for how many.
    """

    deltas: Sequence[tuple[Generation, Delta]] = ()
    returned: Sequence[Generation] = ()
    recalled: tuple[_Member, int] | None = None


class Router:
    """Spreads generations over replicas; has the methods of :class:`Replica`.

    Only one thread at a time may use it.

    A generation goes where its prefix is cached, or where least is queued: see :mod:`tpjax.engine.routing`.
    The seed is in its request, so that its tokens do not depend on the replica. Where slots are free and
    others have a queue, the last in it move there: what was known when they were routed may not have lasted.

    Where a dispatch fails, the requests that ran on that replica end with an error, and a step of nothing is
    tried there. If it fails too, the replica has failed: its memory is freed, what it has not begun goes to
    others, and it gets nothing any more.

    Args:
        engines: an engine for each replica, on devices of its own.

    Attributes:
        deltas: what has been generated since somebody took it from here.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.deltas: deque[tuple[Generation, Delta]] = deque()
        self._news: SimpleQueue[_News] = SimpleQueue()
        self._members = [_Member(number, engine, self._news) for number, engine in enumerate(engines)]
        self._open: dict[Generation, _Place] = {}
        self._closed = False

    @property
    def engine(self) -> Engine:
        """The engine of the first replica that has not failed, or of the first one."""
        return (self._alive() or self._members)[0].replica.engine

    @property
    def slots(self) -> int:
        """Requests that can run at once on the replicas that work."""
        return sum(one.replica.slots for one in self._alive())

    @property
    def busy(self) -> bool:
        """Whether any generation has not ended."""
        return bool(self._open or self.deltas)

    def runs(self, generation: Generation) -> bool:
        """Whether a generation has been added and its last delta has not been added to ``deltas``."""
        return generation in self._open

    def add(self, generation: Generation) -> None:
        """Routes a generation to a replica.

        Raises:
            EngineError: all replicas have failed or are closed.
        """
        working = self._working()
        loads = [one.load(generation.request) for one in working]
        chosen = choose(loads)
        member = working[chosen]
        self._open[generation] = _Place(member, member.pages(generation.request) - loads[chosen].cached)
        member.add(generation)

    def cancel(self, generation: Generation) -> None:
        """Ends a generation early, between two steps of its replica; does nothing if it has ended."""
        place = self._open.pop(generation, None)
        if place is not None:
            place.leave()
            place.member.post(lambda replica: replica.cancel(generation))

    def step(self) -> None:
        """Waits until a replica has something to tell, or :meth:`wake`, and adds that to ``deltas``."""
        if not self._open and self._news.empty():
            return
        news = self._news.get()
        while True:
            self._take(news)
            try:
                news = self._news.get_nowait()
            except Empty:
                return

    def wake(self) -> None:
        """Lets :meth:`step` return, of another thread."""
        self._news.put(_News())

    def run(self, function: Callable[[Engine], Result]) -> Result:
        """Calls a function with the first working replica's engine, between two of its steps.

        Raises:
            EngineError: all replicas have failed or are closed.
        """
        return self._working()[0].submit(function).result()

    def run_on_all(self, function: Callable[[Engine], None]) -> None:
        """Calls a function with each working replica's engine, at the same time."""
        for one in [member.submit(function) for member in self._alive()]:
            one.result()

    def status(self) -> list[ReplicaStatus]:
        """Returns load and counters of each replica after its last step, and which have failed."""
        return [one.status for one in self._members]

    def check_open(self) -> None:
        """Raises an ``EngineError`` if the replicas are closed, or have all failed."""
        self._working()

    def close(self) -> None:
        """Ends all generations with an error, and frees the memory of the devices."""
        if not self._closed:
            self._closed = True
            for one in [member.submit(Engine.close) for member in self._alive()]:
                one.result()

    def _alive(self) -> list[_Member]:
        return [one for one in self._members if one.error is None]

    def _working(self) -> list[_Member]:
        """Returns the replicas that have not failed; each may fail from now on, on its own thread.

        Raises:
            EngineError: there are none, or they are closed.
        """
        if self._closed:
            self._members[0].replica.engine.check_open()
        if alive := self._alive():
            return alive
        raise EngineError(f"all {len(self._members)} replicas have failed: {self._members[-1].error}")

    def _take(self, news: _News) -> None:
        for generation, delta in news.deltas:
            place = self._open.get(generation)
            if place is None:
                continue  # cancelled meanwhile
            self.deltas.append((generation, delta))
            place.begin()
            if delta.finish_reason is not None:
                self._open.pop(generation).leave()
        for generation in news.returned:
            place = self._open.pop(generation, None)
            if place is not None:
                place.leave()
                self._route_again(generation)
        if news.recalled is not None:
            member, count = news.recalled
            member.recalled -= count
        self._level()

    def _level(self) -> None:
        """Asks for what waits at some replicas, as far as others have free slots for it."""
        working = self._alive()
        free = sum(max(0, one.replica.slots - one.requests) - one.recalled for one in working)
        for one in working:
            count = min(free, one.requests - one.replica.slots - one.recalled)
            if count > 0:
                one.recall(count)
                free -= count

    def _route_again(self, generation: Generation) -> None:
        try:
            self.add(generation)
        except EngineError as error:
            self.deltas.append((generation, failed(generation, str(error))))


class _Place:
    """Where a generation has been routed to, and what it adds to what is queued there.

    Args:
        member: the replica.
        pages: pages of its prompt that were not cached.
    """

    def __init__(self, member: _Member, pages: int) -> None:
        self.member = member
        self._pages = pages
        member.requests += 1
        member.prompt_pages += pages

    def begin(self) -> None:
        """Its prompt has run."""
        self.member.prompt_pages -= self._pages
        self._pages = 0

    def leave(self) -> None:
        """It has ended."""
        self.begin()
        self.member.requests -= 1


class _Member:
    """A replica and its thread, which lives while there is something to do.

    Args:
        number: its number among the replicas.
        engine: its engine, which its thread alone uses from now on.
        news: gets what its generations have got.

    Attributes:
        replica: the replica.
        error: why it has failed; ``None`` while it works.
        status: load and counters after its last step, or up to 50 ms before.
        requests: those that have been routed to it and have not ended; used by the front alone.
        prompt_pages: pages of their prompts that have not run, as far as the front knows.
        recalled: how many of them it has been asked for; used by the front alone.
    """

    def __init__(self, number: int, engine: Engine, news: SimpleQueue[_News]) -> None:
        self.replica = Replica(engine)
        self.error: str | None = None
        self.status = ReplicaStatus(engine.stats())
        self.requests = self.prompt_pages = self.recalled = 0
        self._status_at = time.monotonic()
        self._number = number
        self._news = news
        self._commands: deque[Callable[[Replica], None]] = deque()
        self._lock = threading.Lock()  # of the next one
        self._awake = False  # whether a thread will look at the commands again

    # --- on any thread -------------------------------------------------------------------------------------

    def pages(self, request: Request) -> int:
        """Returns the pages of a request's prompt."""
        return -(-len(request.prompt_token_ids) // self.replica.engine.runner.limits.page_size)

    def load(self, request: Request) -> ReplicaLoad:
        """Returns what a request would meet; the replica may step meanwhile."""
        cached = self.replica.engine.cached_pages(request)
        return ReplicaLoad(self.requests < self.replica.slots, self.requests + self.prompt_pages, cached)

    def add(self, generation: Generation) -> None:
        """Queues a generation; it is returned if the replica fails before that."""

        def add(replica: Replica) -> None:
            if self.error is not None:
                self._news.put(_News(returned=[generation]))
                return
            try:
                replica.add(generation)
            except Exception as error:  # it was checked before: this is a bug, and must not end the others
                log.exception("a checked request was refused")
                replica.refuse(generation, f"{type(error).__name__}: {error}")

        self.post(add)

    def recall(self, count: int) -> None:
        """Asks for the last generations that wait; at most so many are returned."""
        self.recalled += count

        def recall(replica: Replica) -> None:
            returned = [] if self.error is not None else replica.recall(count)
            self._news.put(_News(returned=returned, recalled=(self, count)))

        self.post(recall)

    def submit(self, function: Callable[[Engine], Result]) -> Future[Result]:
        """Calls a function with the engine between two steps; returns its result to come."""
        future: Future[Result] = Future()

        def run(replica: Replica) -> None:
            try:
                future.set_result(replica.run(function))
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        return future

    def post(self, command: Callable[[Replica], None]) -> None:
        """Calls a function with the replica between two steps."""
        with self._lock:
            self._commands.append(command)
            if not self._awake:
                self._awake = True
                name = f"tpjax-replica-{self._number}"
                threading.Thread(target=self._run, name=name, daemon=True).start()

    # --- on its own thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._commands and (self.error or not self.replica.busy):
                    self._awake = False
                    return
            try:
                self._work()
            except BaseException as error:
                self._fail(error)
            self._publish()

    def _work(self) -> None:
        """Runs the commands and a step; if a dispatch of these failed, a step of nothing shows if all do."""
        replica, runner = self.replica, self.replica.engine.runner
        resets = runner.state_resets
        while self._commands:
            self._commands.popleft()(replica)
        if self.error is None and replica.busy:
            replica.step()
        if runner.state_resets != resets and not replica.engine.closed:
            replica.engine.check_devices()

    def _fail(self, error: BaseException) -> None:
        """Takes the replica out of service."""
        self.error = f"replica {self._number} has failed: {type(error).__name__}: {error}"
        log.critical("%s; the others go on", self.error, exc_info=error)
        returned: list[Generation] = []
        try:
            returned = self.replica.withdraw()
            self.replica.close()
        except Exception:
            log.exception("replica %d could not be closed: its memory may not be free", self._number)
        self.replica.fail(self.error)
        self._news.put(_News(returned=returned))

    def _publish(self) -> None:
        """Tells the front what has changed."""
        deltas = [*self.replica.deltas]
        self.replica.deltas.clear()
        now = time.monotonic()  # the pages of all requests are counted: not at every step
        if self.error or not self.replica.busy or now - self._status_at > _STATUS_S:
            self.status, self._status_at = ReplicaStatus(self.replica.engine.stats(), self.error), now
        if deltas or self.error:
            self._news.put(_News(deltas))
