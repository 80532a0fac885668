"""Starts several processes that run one model together: JAX's multi-controller runtime.

Each process has its own devices, on one machine or on several, and process 0 has the coordination service,
through which they find each other. What they run together is :mod:`tpjax.runtime.leader`'s.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from tpjax.errors import DistributedError, LostProcessError

START_TIMEOUT_S = 300.0
_ENDS, _ASKED = "tpjax/ended/", "tpjax/asked/"
_POLL_S = 0.5
_SEEN_S = 1.5  # in which the others have looked
_start_timeout_s = START_TIMEOUT_S  # as asked for
_connected = _joining = _parting = False
_polling = threading.Lock()
_asked_to_end: Callable[[], object] | None = None
_barriers = itertools.count()
_gatherings = itertools.count()
_NOTE_EVERY_S = 10.0
_OURS_FIRST_S = 60  # after its own time limit JAX aborts with a stack trace: ours comes earlier


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Joins the processes that run one model; call it in each of them, before JAX starts.

    Without arguments JAX finds out from the cluster's environment: SLURM, Kubernetes, Open MPI, Cloud TPU.
    Process 0 waits for the others; each ends if they are not all there in time.

    Args:
        coordinator: ``HOST:PORT`` of process 0, which listens on that address alone.
        num_processes: number of processes.
        process_id: number of this one, 0 to ``num_processes`` - 1.
        timeout_s: seconds to wait for all processes, here and when a model begins to load.

    Raises:
        DistributedError: an argument is missing or wrong, no cluster was found, the port is in use, or JAX
            has already started.
    """
    from jax._src import xla_bridge

    global _start_timeout_s, _connected, _joining
    _check(coordinator, num_processes, process_id)
    _start_timeout_s = timeout_s
    if _state().client is not None:
        raise DistributedError("initialize_distributed() was called before, in this process")
    if xla_bridge.backends_are_initialized():
        raise DistributedError("initialize_distributed() comes too late: JAX has already started")
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # the other platforms have their own
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    with _TimeLimit(coordinator, num_processes, process_id, timeout_s):
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=int(timeout_s) + _OURS_FIRST_S,
                coordinator_bind_address=coordinator,
                cluster_detection_method=None if coordinator is None else "deactivate",
            )
        except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
            raise DistributedError(_failure(error, coordinator)) from error
    if _state().num_processes > 1:
        _connected = _joining = True
        threading.Thread(target=_watch, name="tpjax-notices", daemon=True).start()


def allow_transfers() -> None:
    """Lets JAX move arrays to the devices of other processes; call it before JAX starts.

    Each process then listens, on a free port, at the address at which it reaches process 0.
    """
    import jax

    coordinator = coordinator_host()
    family = socket.getaddrinfo(coordinator, 1, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect((coordinator, 1))  # sends nothing: it only finds the way there
        host = way.getsockname()[0]
    with socket.socket(family) as free:  # JAX tells the others the port that it is given, so 0 will not do
        free.bind((host, 0))
        port = free.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    jax.config.update("jax_cross_host_transfer_socket_address", f"{shown}:{port}")
    jax.config.update("jax_cross_host_transport_addresses", f"{shown}:0")


def shut_down() -> None:
    """Leaves the other processes, and waits until all do; before a process ends other than by itself."""
    global _parting
    if num_processes() > 1:
        import jax

        with _polling:
            _parting = True
        jax.distributed.shutdown()


def num_processes() -> int:
    """Returns the number of processes, without starting JAX."""
    return int(_state().num_processes) if "jax" in sys.modules else 1


def process_id() -> int:
    """Returns the number of this process, without starting JAX."""
    return int(_state().process_id) if "jax" in sys.modules else 0


def start_timeout_s() -> float:
    """Returns the seconds to wait for all processes."""
    return _start_timeout_s


def coordinator_host() -> str:
    """Returns the host of process 0, as the processes know it."""
    return _split(_state().coordinator_address)[0]


def publish(name: str, value: bytes) -> None:
    """Stores a value in the coordination service, for all processes."""
    _state().client.key_value_set_bytes(name, value, allow_overwrite=True)


def report_failure(why: str) -> None:
    """Ends the other processes with status 1, because this one cannot go on.

    In process 0, which has the store that they look in, it waits until they have.

    Args:
        why: what they print.
    """
    _report(1, why)


def report_end(why: str) -> None:
    """Ends the other processes as :func:`report_failure`, with status 0: one of them was asked to end."""
    _report(0, why)


def _report(status: int, why: str) -> None:
    global _parting
    if _parting:
        return
    _parting = True
    publish(f"{_ENDS}{process_id()}", f"{status}{why}".encode())
    if process_id() == 0:
        time.sleep(_SEEN_S)


def await_notice() -> None:
    """Waits as long as it may take to see what another process has reported, which ends this one."""
    time.sleep(_SEEN_S)


def parting() -> bool:
    """Whether this process has ended the others: that they go is no loss."""
    return _parting


def ask_to_end() -> None:
    """Asks process 0 to end all processes, when what runs has ended: a signal asks this one to end."""
    publish(f"{_ASKED}{process_id()}", b"")


def when_asked_to_end(end: Callable[[], object]) -> None:
    """Sets what process 0 does when another process asks it to end all; it is called once, on any thread."""
    global _asked_to_end
    _asked_to_end = end


def joining(now: bool) -> None:
    """Says whether this process has not met the others for the model that it loads."""
    global _joining
    _joining = now


def is_joining() -> bool:
    """Whether this process has not met the others for a model yet."""
    return _joining


def _watch() -> None:
    """Looks for what another process has reported, and ends this one: nothing interrupts JAX, which may wait.

    In process 0, it also looks for who asks it to end.
    """
    from jax.errors import JaxRuntimeError

    asked = False
    while True:
        with _polling:
            if _parting or (client := _state().client) is None:
                return
            try:
                ends = client.key_value_dir_get_bytes(_ENDS)
                asks = [] if process_id() or asked else client.key_value_dir_get_bytes(_ASKED)
            except JaxRuntimeError:  # the processes part
                return
        if ends:
            status, why = ends[0][1][:1], ends[0][1][1:].decode()
            print(f"tpjax: {why}" if status == b"0" else f"tpjax: error: {why}", file=sys.stderr, flush=True)
            os._exit(int(status))
        if asks:
            asked = True
            time.sleep(_POLL_S)  # a launcher signals all processes at once: the own signal comes first
            number = asks[0][0].removeprefix(_ASKED)
            print(f"tpjax: process {number} was asked to end: all end", file=sys.stderr, flush=True)
            if _asked_to_end is not None:
                _asked_to_end()
        time.sleep(_POLL_S)


def stored(name: str) -> bytes | None:
    """Returns the value that some process has published under a name, or ``None``."""
    from jax.errors import JaxRuntimeError

    try:
        return bytes(_state().client.key_value_try_get_bytes(name))
    except JaxRuntimeError:
        return None


def time_limit() -> contextlib.AbstractContextManager[None]:
    """Says, in one of several processes, that a block waits for the others; ends the process if for too long.

    For what JAX waits in without a message, such as its own start, in which it collects the devices of all.
    """
    if num_processes() == 1:
        return contextlib.nullcontext()
    return _TimeLimit(_state().coordinator_address, num_processes(), process_id(), _start_timeout_s)


def gather(value: bytes) -> list[bytes]:
    """Returns what each process gives, in the order of their numbers; all call it equally often.

    Raises:
        LostProcessError: one has not come in time, or is lost.
    """
    if num_processes() == 1:
        return [value]
    name = f"tpjax/gathered/{next(_gatherings)}"
    publish(f"{name}/{process_id()}", value)
    barrier()
    return [stored(f"{name}/{number}") or b"" for number in range(num_processes())]


def barrier() -> None:
    """Waits until all processes have come here; all call it equally often. One alone does not wait.

    Raises:
        LostProcessError: one has not come in time, or is lost.
    """
    from jax.errors import JaxRuntimeError

    if num_processes() == 1:
        return
    name = f"tpjax/barrier/{next(_barriers)}"
    try:
        _state().client.wait_at_barrier(name, timeout_in_ms=int(1000 * start_timeout_s()))
    except JaxRuntimeError as error:
        raise LostProcessError(f"the other processes did not come: {str(error).splitlines()[0]}") from error


def _state() -> Any:
    """Returns what JAX knows of the processes: no public call has its store."""
    from jax._src import distributed

    return distributed.global_state


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        return
    if missing:
        raise DistributedError(
            f"{' and '.join(missing)} missing: give all three of {', '.join(given)}, or none"
        )
    assert coordinator is not None and num_processes is not None and process_id is not None
    _split(coordinator)
    if num_processes < 1:
        raise DistributedError(f"num_processes={num_processes} is less than 1")
    if not 0 <= process_id < num_processes:
        raise DistributedError(
            f"process_id={process_id} is not one of num_processes={num_processes}: 0 to {num_processes - 1}"
        )


def _split(address: str) -> tuple[str, int]:
    """Returns host and port of an address."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\[\]\s]+):([0-9]{1,5})", address)
    if found is None or not 0 < int(found[2]) < 1 << 16:
        raise DistributedError(f"coordinator={address!r} is not HOST:PORT, such as 10.0.0.1:29500")
    return found[1].strip("[]"), int(found[2])


def _failure(error: Exception, coordinator: str | None) -> str:
    line = next(iter(str(error).splitlines()), type(error).__name__)
    if (coordinator is None and "should be defined" in line) or "must be defined" in line:
        return (
            "no cluster was found in the environment (SLURM, Kubernetes, Open MPI, Cloud TPU): give the "
            "coordinator's HOST:PORT, the number of processes and this process's number"
        )
    return f"the processes could not be joined: {line}"


class _TimeLimit(contextlib.AbstractContextManager[None]):
    """Says that a block waits, and ends the process if it does for too long, or at a signal.

    Nothing interrupts JAX: a handler in Python would run when it returns.
    """

    def __init__(
        self, coordinator: str | None, processes: int | None, process: int | None, timeout_s: float
    ) -> None:
        self._where = coordinator or "the cluster's coordinator"
        self._count, self._process, self._timeout_s = processes, process, timeout_s
        self._done = threading.Event()
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self._main:  # the bytes that arrive are the numbers of signals
            self._signals, self._written = socket.socketpair()
            for end in (self._signals, self._written):
                end.setblocking(False)
            self._before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._heed_signals, name="tpjax-signals", daemon=True).start()
        threading.Thread(target=self._watch, name="tpjax-start", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._main:
            signal.set_wakeup_fd(self._before)
            self._written.close()

    def _heed_signals(self) -> None:
        with self._signals:
            while select.select([self._signals], [], []) and (numbers := self._signals.recv(1)):
                if numbers[0] in (signal.SIGINT, signal.SIGTERM) and not self._done.is_set():
                    if _connected:
                        report_end(f"process {process_id()} was asked to end: all end")
                    os._exit(128 + numbers[0])

    def _watch(self) -> None:
        start = time.monotonic()
        others = "the others" if self._count is None else f"all {self._count} processes"
        who = "this process" if self._process is None else f"process {self._process}"
        while not self._done.wait(min(_NOTE_EVERY_S, self._timeout_s)):
            waited = time.monotonic() - start
            if waited < self._timeout_s:
                limit = f"{waited:.0f} of {self._timeout_s:g} s"
                print(f"tpjax: {who} waits for {others} at {self._where} ({limit})", file=sys.stderr)
                continue
            print(
                f"tpjax: error: {others} were not at {self._where} within {self._timeout_s:g} s: is each "
                "started, with the same coordinator and number, and are the ports between the machines open?",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # starting again may help
