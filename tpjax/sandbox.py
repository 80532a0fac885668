"""Runs functions in a process of their own, with limits on time and memory.

A template is a checkpoint's code over a client's text, a schema can make its compiler run long or overflow
its stack (llguidance 1.9 ends the process on a chain of some thousand ``$ref``), and a text of megabytes
takes a tokenizer seconds and hundreds of megabytes. None of it may touch the process that serves or a
notebook's: a worker has a memory limit, ends itself at a time limit, can be killed at any moment, and is
replaced.

``python -m tpjax.sandbox`` is the worker: on stdin and stdout, JSON with its length before it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tpjax import errors
from tpjax.errors import RequestError, TpjaxError

TIME_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 512 << 20  # of address space; Python itself takes a fifth of it
_START_LIMIT_S = 60
# Processor time is what a job is held to: on a busy machine it waits through no fault of its own. A job that
# sleeps ends at a multiple of that.
_PATIENCE = 6
# A sixteenth of what the server's threads have: what compiles here compiles there.
_STACK_BYTES = 512 << 10
_LARGE_BYTES = 1 << 20  # after a message this long the worker gives freed memory back
_MAX_ERROR_CHARS = 4096  # who asks may show less
_NICENESS = 5  # the model's own threads go first
_ENVIRONMENT = ("PATH", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "LANG", "TZ", "TPJAX_CACHE")
# One thread each: others' stacks and arenas would count against the limit of address space.
_SINGLE = {f"{name}_NUM_THREADS": "1" for name in ("RAYON", "OMP", "OPENBLAS")} | {"MALLOC_ARENA_MAX": "1"}


class TimeLimitError(RequestError):
    """A job took longer than it may."""


class Worker:
    """A process that runs one function at a time; it starts with the first and may be killed at any moment.

    Args:
        memory_limit_bytes: of its address space.
    """

    def __init__(self, memory_limit_bytes: int = MEMORY_LIMIT_BYTES) -> None:
        self._memory_limit_bytes = memory_limit_bytes
        self._lock = threading.Lock()
        self._killed = self._busy = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def usable(self) -> bool:
        """Whether it may be asked: it has not started yet, or runs."""
        return not self._killed and (self._process is None or self._process.poll() is None)

    def ask(
        self, function: str, arguments: Mapping[str, Any], what: str, limit_s: float = TIME_LIMIT_S
    ) -> Any:
        """Runs a function and waits for what it returns.

        Args:
            function: ``"package.module:name"``.
            arguments: by name; JSON, with any mapping or sequence.
            what: names the job in errors.
            limit_s: seconds of processor time; the clock starts when the function does.

        Raises:
            RequestError: it is over a limit, failed, or the worker was killed.
            TpjaxError: what the function raised, or the worker does not start.
        """
        try:
            job = {"function": function, "arguments": arguments, "limit_s": limit_s, "what": what}
            data = json.dumps(job, default=_plain).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{what} takes JSON only: {error}") from error
        with self._lock:
            self._busy = True
        answer, killed = None, False
        try:
            process = self._started(what)
            _send(process.stdin, data)
            answer = _receive(process.stdout)
        except OSError:
            pass  # the end of the process shows as a broken pipe as well
        finally:
            with self._lock:
                self._busy, killed = False, self._killed
            if answer is None or killed:
                self.kill()
        if answer is None or killed:
            raise RequestError(f"{what} was stopped") if killed else self._why(what, limit_s)
        message = json.loads(answer)
        if "error" in message:
            raise getattr(errors, message["kind"])(message["error"])
        return message["result"]

    def kill(self) -> None:
        """Ends the process; from any thread, whatever it is doing. A thread that asks meets the end soon."""
        with self._lock:
            self._killed = True
            process = self._process
            if process is None:
                return
            process.kill()
            if self._busy:
                return  # the thread that asks clears up: taking a large process down takes a while
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()

    def _started(self, what: str) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._killed:
                raise BrokenPipeError
            if self._process is not None:
                return self._process
            own = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            paths = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "tpjax.sandbox", str(self._memory_limit_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**own, **_SINGLE, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
                start_new_session=True,  # Ctrl-C is for whoever asked, and ends the worker then
            )
        if _receive(process.stdout) is None:
            if self._killed:
                raise BrokenPipeError
            raise TpjaxError(f"the process for {what} does not start")
        return process

    def _why(self, what: str, limit_s: float) -> RequestError:
        status = self._process.returncode if self._process else None
        if status in (-signal.SIGPROF, -signal.SIGALRM):
            return TimeLimitError(f"{what} took over {limit_s:g} s")
        return RequestError(f"{what} needs more memory than it may have")


class Sandbox:
    """One worker for all threads of this process, replaced when it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._owner = 0

    def run(
        self, function: str, arguments: Mapping[str, Any], what: str, limit_s: float = TIME_LIMIT_S
    ) -> Any:
        """Runs a function in the worker; see :meth:`Worker.ask`."""
        with self._lock:
            if self._owner != os.getpid():  # a fork has the parent's worker, which is not its to talk to
                self._worker, self._owner = None, os.getpid()
            if self._worker is None or not self._worker.usable:
                self.close()
                self._worker = Worker()
            return self._worker.ask(function, arguments, what, limit_s)

    def close(self) -> None:
        """Ends the worker."""
        if self._worker is not None and self._owner == os.getpid():
            self._worker.kill()


sandbox = Sandbox()
atexit.register(sandbox.close)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _send(pipe: IO[bytes] | None, data: bytes) -> None:
    assert pipe is not None
    pipe.write(len(data).to_bytes(4, "big") + data)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> bytes | None:
    """A message, or ``None`` at the end."""
    assert pipe is not None
    size = int.from_bytes(pipe.read(4), "big")
    data = pipe.read(size)
    return data if size and len(data) == size else None


# --- the worker --------------------------------------------------------------------------------------------


def main() -> None:
    """Answers until stdin ends."""
    import resource

    signal.alarm(_START_LIMIT_S)  # unless it is told otherwise, the process ends at its alarms
    limit = int(sys.argv[1])
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints is no answer
    signal.alarm(0)
    worker = threading.Thread(target=_work, args=(stdin, stdout))
    worker.start()
    worker.join()


def _work(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    _send(stdout, b"{}")
    while (job := _receive(stdin)) is not None:
        answer = json.dumps(_done(json.loads(job))).encode()
        _send(stdout, answer)
        if len(job) + len(answer) > _LARGE_BYTES:
            del job, answer
            give_memory_back()


def _done(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a job between its alarms, of which either ends the process."""
    what = job["what"]
    try:
        module, _, name = job["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        signal.setitimer(signal.ITIMER_PROF, job["limit_s"])
        signal.setitimer(signal.ITIMER_REAL, job["limit_s"] * _PATIENCE)
        return {"result": function(**job["arguments"])}
    except TpjaxError as error:
        return {"error": str(error)[:_MAX_ERROR_CHARS], "kind": type(error).__name__}
    except MemoryError:
        return {"error": f"{what} needs more memory than it may have", "kind": "RequestError"}
    except Exception as error:  # it is somebody else's code over somebody's text
        return {"error": f"{what} failed: {type(error).__name__}: {error}"[:500], "kind": "RequestError"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def give_memory_back() -> None:
    """Returns what was freed to the system: glibc keeps it, by the hundred megabytes, for the next time."""
    with contextlib.suppress(AttributeError, OSError):  # glibc alone has it, and needs it
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
