"""A follower's end: it runs what process 0 sends, in that order, and has no requests of its own."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tpjax.distributed import await_notice, process_id, stored
from tpjax.errors import DistributedError, LostProcessError
from tpjax.runtime.channel import Frame, Kind, connect
from tpjax.runtime.limits import ChunkShape
from tpjax.runtime.processes import (
    EXIT_LOST,
    FOLLOWER_SILENCE_S,
    Facts,
    Pulse,
    from_json,
    leave,
    next_place,
    to_json,
)
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.replay_codec import DispatchDecoder

if TYPE_CHECKING:
    from tpjax.runtime.runner import Runner

log = logging.getLogger(__name__)

_POLL_S = 0.1
_LEAVE_S = 8.0  # less than process 0 waits


class Follower:
    """Connects to process 0 and replays its dispatches.

    Args:
        facts: what every process must agree on.
        own: what may differ.
        timeout_s: seconds to wait for process 0.

    Raises:
        LostProcessError: process 0 cannot be reached.
    """

    def __init__(self, facts: Facts, own: Facts, timeout_s: float) -> None:
        where = _place(next_place(), timeout_s)
        try:
            self._connection = connect(where["host"], where["port"], bytes.fromhex(where["secret"]))
        except LostProcessError:
            await_notice()  # process 0 may have refused another process, and gone
            raise
        self._process = process_id()
        self._pulse = Pulse(self._connection, FOLLOWER_SILENCE_S, self._silent)
        self._decisions: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._dispatches: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._specs: dict[int, ProgramSpec] = {}
        self._decoders: dict[int, DispatchDecoder] = {}
        self._runner: Runner | None = None
        self._explain: Callable[[], Facts] | None = None
        self._decided = False
        self._loaded = threading.Event()
        self._finished = threading.Event()
        self._compilations: set[int] = set()
        hello = {"process": self._process, "same": dict(facts), "own": dict(own)}
        self._connection.send(Kind.HELLO, [to_json(hello)])
        threading.Thread(target=self._receive, name="tpjax-from-0", daemon=True).start()

    def decisions(self) -> dict[str, Any]:
        """Returns what process 0 has chosen for all; waits for it.

        Raises:
            LostProcessError: process 0 refuses this process.
        """
        frame = self._decisions.get()
        if frame.kind == Kind.REFUSED:
            atexit.register(os._exit, EXIT_LOST)  # JAX would wait for the others
            raise LostProcessError(_text(frame))
        decisions: dict[str, Any] = from_json(frame.body)
        return decisions

    def follow(self, runner: Runner | None, explain: Callable[[], Facts] | None = None) -> None:
        """Replays dispatches until process 0 has no more; a second call returns at once.

        If one fails, or process 0 is lost, this process ends at once, with a message.

        Args:
            runner: runs them; ``None``: there will be none.
            explain: describes the stages of this process, when process 0 asks.
        """
        if self._finished.is_set():
            return
        self._runner, self._explain = runner, explain
        self._loaded.set()
        try:
            while (frame := self._dispatches.get()).kind != Kind.STOP:
                self._replay(frame)
        except Exception as error:
            log.exception("a dispatch failed")
            self.fail(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        self._finished.set()
        self._pulse.stop()
        self._connection.send(Kind.LEAVING)
        self._connection.close()

    def tell(self, why: str) -> None:
        """Tells process 0 why this process cannot go on."""
        atexit.register(os._exit, EXIT_LOST)  # JAX would wait for the others
        with contextlib.suppress(OSError):  # it has gone already
            self._connection.send(Kind.FAILED, [why.encode()])

    def fail(self, why: str) -> None:
        """Tells process 0 why this process cannot go on, and ends it."""
        self.tell(why)
        leave(f"process {self._process} failed: {why}")

    @property
    def compiling(self) -> bool:
        """Whether a thread compiles a program."""
        return bool(self._compilations)

    def _replay(self, frame: Frame) -> None:
        runner = self._runner
        assert runner is not None
        match frame.kind:
            case Kind.DISPATCH:
                number = int.from_bytes(frame.body[:4], "little")
                spec = self._specs[number]
                if (decoder := self._decoders.get(number)) is None:
                    decoder = self._decoders[number] = DispatchDecoder(
                        runner.programs.program(spec).arguments
                    )
                for arguments in decoder.decode(frame.body[4:]):
                    runner.dispatch(spec, *arguments)
            case Kind.ALLOCATE:
                _ = runner.state
            case Kind.RESET:
                runner.reset()

    def _receive(self) -> None:
        try:
            while (frame := self._connection.receive()) is not None:
                self._pulse.heard = time.monotonic()
                match frame.kind:
                    case Kind.DECISIONS:
                        self._decided = True
                        self._decisions.put(frame)
                    case Kind.REFUSED:
                        if self._decided:
                            leave(_text(frame))
                        self._decisions.put(frame)
                        return
                    case Kind.COMPILE:
                        threading.Thread(target=self._compile, args=(frame,), daemon=True).start()
                    case Kind.EXPLAIN:
                        threading.Thread(target=self._answer, daemon=True).start()
                    case Kind.STOP:
                        self._dispatches.put(frame)
                        threading.Thread(target=self._end, daemon=True).start()
                        return
                    case Kind.DISPATCH | Kind.ALLOCATE | Kind.RESET:
                        self._dispatches.put(frame)
        except (OSError, ValueError, DistributedError) as error:
            log.error("from process 0: %s", error)
        leave(f"process {self._process} lost process 0: it ended")

    def _compile(self, frame: Frame) -> None:
        number, kind, batch, chunks, greedy, blocks = from_json(frame.body)
        spec = ProgramSpec(kind, batch, None if chunks is None else ChunkShape(*chunks), greedy, blocks)
        self._specs[number] = spec
        self._compilations.add(number)
        self._loaded.wait()
        assert self._runner is not None
        error = None
        try:
            self._runner.programs.get(spec)
        except Exception as failure:
            log.exception("%s could not be compiled", spec)
            error = f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
        self._compilations.discard(number)
        try:
            self._connection.send(Kind.COMPILED, [to_json([number, error])])
        except OSError:  # it has gone already: the thread that receives sees it
            return

    def _answer(self) -> None:
        self._loaded.wait()
        found: Facts | None = None
        error = None
        try:
            assert self._explain is not None
            found = self._explain()
        except Exception as failure:
            log.exception("the stages of this process could not be explained")
            error = f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
        with contextlib.suppress(OSError):  # it has gone already: the thread that receives sees it
            self._connection.send(Kind.EXPLAINED, [to_json([found, error])])

    def _end(self) -> None:
        if not self._finished.wait(_LEAVE_S):
            leave(f"process {self._process} did not finish what process 0 had sent")

    def _silent(self) -> None:
        why = f"it has not been heard of for {FOLLOWER_SILENCE_S:g} s"
        leave(f"process {self._process} lost process 0: {why}")


def _place(name: str, timeout_s: float) -> dict[str, Any]:
    """Returns where process 0 listens; waits until it does."""
    deadline = time.monotonic() + timeout_s
    while (found := stored(name)) is None:
        if time.monotonic() > deadline:
            raise LostProcessError(f"process 0 did not begin to load the model within {timeout_s:g} s")
        time.sleep(_POLL_S)
    place: dict[str, Any] = from_json(memoryview(found))
    return place


def _text(frame: Frame) -> str:
    return bytes(frame.body).decode("utf-8", "replace")
