"""Process 0's end: it has the requests, and sends each dispatch to the followers, which run the same.

Everything that can differ between processes is decided here and sent: which programs there are and in which
order they run, limits, the attention backend. What fails on one process cannot be repaired on the others,
whose collectives wait for it: any loss ends all of them, for their launcher to start again.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from tpjax.distributed import coordinator_host, num_processes, parting, publish, report_failure
from tpjax.errors import DistributedError, LostProcessError
from tpjax.runtime.channel import SECRET_BYTES, Buffer, Connection, Frame, Kind, accept, listen
from tpjax.runtime.processes import (
    EXIT_LOST,
    SILENCE_S,
    Facts,
    Pulse,
    differences,
    from_json,
    leave,
    next_place,
    to_json,
)
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.replay_codec import DispatchEncoder

log = logging.getLogger(__name__)

_NOTE_EVERY_S = 10.0
_LEAVE_S = 10.0  # a follower has this long to finish what was sent before STOP
_TELL_S = 0.5  # for the followers to read why they end, before the connection does
_ANSWER_S = 3.0  # for the streams to be answered, and /health to be asked, before the process ends


class _Follower:
    """A follower as process 0 knows it."""

    def __init__(self, process: int, connection: Connection, facts: dict[str, Any]) -> None:
        self.process, self.connection, self.facts = process, connection, facts
        self.pulse: Pulse | None = None
        self.left = threading.Event()
        self.explained: Future[Any] = Future()


class Leader:
    """Waits for the followers, checks that they would run the same, and leads them.

    Args:
        facts: what every process must agree on: version, model, flags, digest of the checkpoint.
        own: what may differ, for :meth:`gathered`.
        timeout_s: seconds to wait for all followers.

    Attributes:
        on_lost: called once, on any thread, with the reason, if all processes have to end; they do so seconds
            later.

    Raises:
        LostProcessError: a follower is missing or differs.
        DistributedError: the coordinator's address is not of this machine.
    """

    def __init__(self, facts: Facts, own: Facts, timeout_s: float) -> None:
        self.on_lost: Callable[[str], None] = lambda reason: None
        self._own = dict(own)
        self._count = num_processes()
        self._lock = threading.Lock()
        self._order = threading.Lock()
        self._asking = threading.Lock()
        self._specs: dict[ProgramSpec, int] = {}
        self._encoders: dict[ProgramSpec, DispatchEncoder] = {}
        self._compiling: dict[int, _Acknowledgements] = {}
        self._lost: str | None = None
        self._closing = False
        self._followers: list[_Follower] = []
        self._refused = False
        atexit.register(self._at_exit)
        try:
            self._wait_for_followers(facts, timeout_s)
        except DistributedError as error:
            self.refuse(str(error))
            raise

    # --- start ---------------------------------------------------------------------------------------------

    def _wait_for_followers(self, facts: Facts, timeout_s: float) -> None:
        host, secret = coordinator_host(), secrets.token_bytes(SECRET_BYTES)
        deadline = time.monotonic() + timeout_s
        with listen(host) as sock:
            port = sock.getsockname()[1]
            publish(next_place(), to_json({"host": host, "port": port, "secret": secret.hex()}))
            while missing := set(range(1, self._count)) - {one.process for one in self._followers}:
                late = f"process {', '.join(map(str, sorted(missing)))}"
                left = deadline - time.monotonic()
                if left <= 0:
                    raise LostProcessError(f"{late} did not begin to load the model within {timeout_s:g} s")
                sock.settimeout(min(left, _NOTE_EVERY_S))
                try:
                    connection = accept(sock, secret)
                except TimeoutError:
                    print(f"tpjax: process 0 waits for {late} to begin to load the model", file=sys.stderr)
                    continue
                follower = None if connection is None else _introduced(connection)
                if follower is None or follower.process not in missing:
                    log.warning("a connection to port %d of %s was not one of the processes", port, host)
                    continue
                self._followers.append(follower)
                if wrong := differences(facts, follower.facts["same"], follower.process):
                    raise LostProcessError(f"process {follower.process} is refused: {'; '.join(wrong)}")
                self._listen_to(follower)  # it hears from this process while others are waited for
        self._followers.sort(key=lambda one: one.process)

    def refuse(self, why: str) -> None:
        """Ends the other processes at the start, with a reason; those, too, that have not come so far."""
        self._closing = self._refused = True
        self._tell(why)
        report_failure(why)

    def _tell(self, why: str) -> None:
        """Tells the followers why they end, without waiting for one that reads nothing."""
        for follower in self._followers:
            threading.Thread(target=self._tell_one, args=(follower, why), daemon=True).start()

    def _tell_one(self, follower: _Follower, why: str) -> None:
        with contextlib.suppress(OSError):  # it has gone already
            follower.connection.send(Kind.REFUSED, [why.encode()])

    def gathered(self, name: str) -> list[Any]:
        """Returns what every process has under a name in what may differ, process 0 first."""
        return [self._own[name], *(follower.facts["own"].get(name) for follower in self._followers)]

    def decide(self, decisions: Facts) -> None:
        """Sends what process 0 has chosen for all."""
        self._send(Kind.DECISIONS, [to_json(decisions)])

    # --- what the runner calls -----------------------------------------------------------------------------

    def compile(self, spec: ProgramSpec) -> Callable[[], None]:
        """Starts to compile a program in all other processes; returns what waits for them.

        That raises a ``LostProcessError`` if one of them fails.
        """
        with self._lock:
            number = self._specs.setdefault(spec, len(self._specs))
            waiting = self._compiling[number] = _Acknowledgements({one.process for one in self._followers})
        self._send(Kind.COMPILE, [to_json([number, *spec])])

        def wait() -> None:
            waiting.wait(str(spec))

        return wait

    def dispatch(self, spec: ProgramSpec, calls: Sequence[Sequence[Any]]) -> None:
        """Sends dispatches of a program, each with its host arguments; the caller then runs them here."""
        if (encoder := self._encoders.get(spec)) is None:
            encoder = self._encoders[spec] = DispatchEncoder()
        number = self._specs[spec].to_bytes(4, "little")
        self._send(Kind.DISPATCH, [number, *encoder.encode(calls)])

    def explained(self) -> list[Any]:
        """Returns what each follower says of its stages, plain data; waits for them, who may compile.

        Raises:
            LostProcessError: one of them could not tell, or is lost.
        """
        with self._asking:
            for follower in self._followers:
                follower.explained = Future()
            self._send(Kind.EXPLAIN)
            if self._lost is not None:
                raise LostProcessError(self._lost)
            return [follower.explained.result() for follower in self._followers]

    def allocate(self) -> None:
        """Lets the followers allocate the device state; the caller then does so here."""
        self._send(Kind.ALLOCATE)

    def reset(self) -> None:
        """Lets the followers free the device state."""
        if not self._closing:
            self._send(Kind.RESET)

    def fail(self, reason: str) -> None:
        """Ends all processes, because a dispatch failed here; does not return.

        The reason is usually the loss of another process, which a collective notices first: that is waited
        for.
        """
        deadline = time.monotonic() + SILENCE_S + 5
        if "interrupted" in reason:
            deadline = 0
        while self._lost is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._lose(reason)
        threading.Event().wait()  # the thread that lost it ends the process

    def _at_exit(self) -> None:
        """Ends the followers, if nothing else has; before JAX waits for them."""
        if self._refused:
            os._exit(EXIT_LOST)  # the error has been shown
        self.close()

    def close(self) -> None:
        """Lets the followers end, and waits for them; a second call does nothing."""
        with self._lock:
            if self._closing or self._lost is not None:
                return
            self._closing = True
        self._send(Kind.STOP)
        deadline = time.monotonic() + _LEAVE_S
        late = [
            one.process for one in self._followers if not one.left.wait(max(0.0, deadline - time.monotonic()))
        ]
        for follower in self._followers:
            if follower.pulse is not None:
                follower.pulse.stop()
            follower.connection.close()
        if late:
            leave(f"process {', '.join(map(str, late))} did not end within {_LEAVE_S:g} s")

    # --- frames from the followers -------------------------------------------------------------------------

    def _listen_to(self, follower: _Follower) -> None:
        silent = f"process {follower.process} was lost: it has not been heard of for {SILENCE_S:g} s"
        follower.pulse = Pulse(follower.connection, SILENCE_S, lambda: self._lose(silent))
        name = f"tpjax-from-{follower.process}"
        threading.Thread(target=self._receive, args=(follower,), name=name, daemon=True).start()

    def _receive(self, follower: _Follower) -> None:
        assert follower.pulse is not None
        why = "it ended"
        try:
            while (frame := follower.connection.receive()) is not None:
                follower.pulse.heard = time.monotonic()
                if frame.kind == Kind.LEAVING:
                    follower.left.set()
                    return
                self._handle(follower, frame)
        except (OSError, ValueError, DistributedError) as error:
            why = str(error)
        if not (self._closing or parting()):
            self._lose(f"process {follower.process} was lost: {why}")
        follower.left.set()

    def _handle(self, follower: _Follower, frame: Frame) -> None:
        if frame.kind == Kind.COMPILED:
            number, error = from_json(frame.body)
            self._compiling[number].add(follower.process, error)
        elif frame.kind == Kind.EXPLAINED:
            found, error = from_json(frame.body)
            if error is None:
                follower.explained.set_result(found)
            else:
                why = f"process {follower.process} could not explain its stages: {error}"
                follower.explained.set_exception(LostProcessError(why))
        elif frame.kind == Kind.FAILED:
            self._lose(f"process {follower.process} failed: {bytes(frame.body).decode('utf-8', 'replace')}")

    def _send(self, kind: Kind, body: Sequence[Buffer] = ()) -> None:
        with self._order:  # all followers get all frames in one order
            for follower in self._followers:
                try:
                    follower.connection.send(kind, body)
                except OSError as error:
                    if not self._closing:
                        self._lose(f"process {follower.process} was lost: {error.strerror or error}")

    def _lose(self, reason: str) -> None:
        """Ends all processes, after the streams had time to be answered."""
        with self._lock:
            if self._lost is not None:
                return
            self._lost = reason
        log.error("%s: all processes end", reason)
        for waiting in list(self._compiling.values()):
            waiting.fail(reason)
        for follower in self._followers:
            with contextlib.suppress(InvalidStateError):  # it has answered
                follower.explained.set_exception(LostProcessError(reason))
        threading.Thread(target=self._end, args=(reason,), name="tpjax-end").start()

    def _end(self, reason: str) -> None:
        try:
            self.on_lost(reason)
            time.sleep(_ANSWER_S)
            self._tell(reason)
            time.sleep(_TELL_S)
        finally:
            leave(reason)


class _Acknowledgements:
    """Waits until every follower has compiled a program."""

    def __init__(self, processes: set[int]) -> None:
        self._missing = processes
        self._error: str | None = None
        self._done = threading.Condition()

    def add(self, process: int, error: str | None) -> None:
        with self._done:
            self._missing.discard(process)
            if error is not None:
                self._error = f"process {process}: {error}"
            self._done.notify_all()

    def fail(self, reason: str) -> None:
        with self._done:
            self._error = reason
            self._done.notify_all()

    def wait(self, what: str) -> None:
        with self._done:
            self._done.wait_for(lambda: not self._missing or self._error is not None)
        if self._error is not None:
            raise LostProcessError(f"{what} could not be compiled everywhere: {self._error}")


def _introduced(connection: Connection) -> _Follower | None:
    """Returns the follower at the other end; ``None`` if it does not say who it is."""
    try:
        frame = connection.receive()
        if frame is None or frame.kind != Kind.HELLO:
            return None
        hello = from_json(frame.body)
        return _Follower(int(hello["process"]), connection, hello)
    except (OSError, ValueError, TypeError, KeyError, DistributedError, json.JSONDecodeError):
        return None
