"""Runs functions in a worker process with limits on time and memory.

A template is a checkpoint's code applied to a client's text, a schema can make its compiler run long or
overflow its stack (llguidance 1.9 ends the process on a chain of some thousand ``$ref``), and a text of
megabytes takes a tokenizer seconds and hundreds of megabytes. None of that may affect a server or a notebook:
a worker has a memory limit, ends itself at a time limit, can be killed at any moment, and is replaced. The
server's pools of workers are in ``server/worker_pools.py``.

``python -m tpjax.sandbox`` is the worker: it exchanges length-prefixed JSON over stdin and stdout.
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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tpjax import errors
from tpjax.errors import RequestError, TpjaxError

TIME_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 512 << 20  # of address space; Python itself takes a fifth of it
_START_LIMIT_S = 60
# The limit of a job is processor time, since a job waits on a busy machine. A job that sleeps ends at this
# multiple of its limit in wall-clock time.
_WALL_CLOCK_FACTOR = 6
# A sixteenth of the stack of the server's threads: a schema that compiles here compiles there.
_STACK_BYTES = 512 << 10
_LARGE_BYTES = 1 << 20  # after a message of this length the worker releases freed memory
_MAX_ERROR_CHARS = 4096  # callers may show less
NICENESS = 5  # of workers: the model's own threads go first
_ENVIRONMENT = ("PATH", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "LANG", "TZ", "TPJAX_CACHE")
# One thread per library: further stacks and arenas would count against the limit of address space.
_SINGLE = {f"{name}_NUM_THREADS": "1" for name in ("RAYON", "OMP", "OPENBLAS")} | {"MALLOC_ARENA_MAX": "1"}


class TimeLimitError(RequestError):
    """A job exceeded its time limit."""


class Worker:
    """A process that runs one function at a time; it starts with the first and can be killed at any moment.

    Args:
        memory_limit_bytes: limit of its address space.
    """

    def __init__(self, memory_limit_bytes: int = MEMORY_LIMIT_BYTES) -> None:
        self._memory_limit_bytes = memory_limit_bytes
        self._lock = threading.Lock()
        self._killed = self._busy = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def usable(self) -> bool:
        """Whether it can run functions: it has not started yet, or it runs."""
        return not self._killed and (self._process is None or self._process.poll() is None)

    def ask(
        self, function: str, arguments: Mapping[str, Any], what: str, limit_s: float = TIME_LIMIT_S
    ) -> Any:
        """Runs a function and returns its result.

        Args:
            function: ``"package.module:name"``.
            arguments: JSON arguments by name; any mapping or sequence.
            what: name of the job in errors.
            limit_s: seconds of processor time, from the start of the function.

        Raises:
            RequestError: the function exceeded a limit or failed, or the worker was killed.
            TpjaxError: the exception of the function, or the worker does not start.
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
            pass  # the end of the process may show as a broken pipe
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
        """Ends the process, from any thread. A thread that waits for a result gets an error soon."""
        with self._lock:
            self._killed = True
            process = self._process
            if process is None:
                return
            process.kill()
            if self._busy:
                return  # the waiting thread cleans up: ending a large process takes a while
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
                start_new_session=True,  # Ctrl-C is for the parent, which ends the worker
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
    """Runs functions in one worker for all threads of this process; replaces the worker when it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._owner = 0

    def run(
        self, function: str, arguments: Mapping[str, Any], what: str, limit_s: float = TIME_LIMIT_S
    ) -> Any:
        """Runs a function in the worker; see :meth:`Worker.ask`."""
        with self._lock:
            if self._owner != os.getpid():  # after a fork the worker belongs to the parent
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
    """Returns a message, or ``None`` at the end."""
    assert pipe is not None
    size = int.from_bytes(pipe.read(4), "big")
    data = pipe.read(size)
    return data if size and len(data) == size else None


# --- the worker --------------------------------------------------------------------------------------------


def main() -> None:
    """Runs jobs until stdin ends."""
    import resource

    signal.alarm(_START_LIMIT_S)  # the default action of the alarms ends the process
    limit = int(sys.argv[1])
    _give_way()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints is not a result
    signal.alarm(0)
    worker = threading.Thread(target=_work, args=(stdin, stdout))
    worker.start()
    worker.join()


def _give_way() -> None:
    """Lets other processes go first, also those of other sessions: some kernels share cores among these."""
    os.nice(NICENESS)
    with contextlib.suppress(OSError):  # not such a kernel
        for _ in range(5):
            try:
                Path("/proc/self/autogroup").write_text(str(NICENESS))
                return
            except BlockingIOError:  # one process in a tenth of a second may do this
                time.sleep(0.1)


def _work(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    _send(stdout, b"{}")
    while (job := _receive(stdin)) is not None:
        answer = json.dumps(_done(json.loads(job))).encode()
        _send(stdout, answer)
        if len(job) + len(answer) > _LARGE_BYTES:
            del job, answer
            release_memory()


def _done(job: dict[str, Any]) -> dict[str, Any]:
    """Runs a job under two timers, either of which ends the process."""
    what = job["what"]
    try:
        path, _, name = job["function"].partition(":")
        module = importlib.import_module(path)
        function = getattr(module, name)
        for library in getattr(module, "WORKER_IMPORTS", ()):  # not on the clock of the first job
            importlib.import_module(library)
        signal.setitimer(signal.ITIMER_PROF, job["limit_s"])
        signal.setitimer(signal.ITIMER_REAL, job["limit_s"] * _WALL_CLOCK_FACTOR)
        return {"result": function(**job["arguments"])}
    except TpjaxError as error:
        return {"error": str(error)[:_MAX_ERROR_CHARS], "kind": type(error).__name__}
    except MemoryError:
        return {"error": f"{what} needs more memory than it may have", "kind": "RequestError"}
    except Exception as error:  # untrusted code or text: it can fail in any way
        return {"error": f"{what} failed: {type(error).__name__}: {error}"[:500], "kind": "RequestError"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def release_memory() -> None:
    """Returns freed memory to the system: glibc keeps hundreds of megabytes for the next allocation."""
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it, and needs it
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
