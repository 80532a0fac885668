"""Starts several processes that run one model together: JAX's multi-controller runtime.

Each process has its own devices, on one machine or on several, and process 0 has the coordination service,
through which they find each other. What they run together is :mod:`tpjax.runtime.leader`'s.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import sys
import threading
import time
from typing import Any

from tpjax.errors import DistributedError

START_TIMEOUT_S = 300.0
_FAILURES = "tpjax/failed/"
_POLL_S = 0.5
_start_timeout_s = START_TIMEOUT_S  # as asked for
_joining = threading.Event()
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

    global _start_timeout_s
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
        _joining.set()
        threading.Thread(target=_watch, name="tpjax-failures", daemon=True).start()


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
    if num_processes() > 1:
        import jax

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
    """Tells the other processes, which may wait for this one, that it will not come: they end."""
    publish(f"{_FAILURES}{process_id()}", f"process {process_id()} failed: {why}".encode())


def joining(now: bool) -> None:
    """Says whether this process waits for others, and thus ends if one of them reports a failure."""
    (_joining.set if now else _joining.clear)()


def is_joining() -> bool:
    """Whether this process has not met the others for a model yet."""
    return _joining.is_set()


def _watch() -> None:
    """Ends the process when another reports a failure: nothing interrupts JAX, which waits for it."""
    while True:
        _joining.wait()
        if (client := _state().client) is None:  # the processes have parted
            return
        reports = [value for _, value in client.key_value_dir_get_bytes(_FAILURES)]
        if reports and _joining.is_set():
            print(f"tpjax: error: {reports[0].decode()}", file=sys.stderr, flush=True)
            os._exit(1)
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
        DistributedError: one has not come in time, or is lost.
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
        DistributedError: one has not come in time, or is lost.
    """
    from jax.errors import JaxRuntimeError

    if num_processes() == 1:
        return
    name = f"tpjax/barrier/{next(_barriers)}"
    try:
        _state().client.wait_at_barrier(name, timeout_in_ms=int(1000 * start_timeout_s()))
    except JaxRuntimeError as error:
        raise DistributedError(f"the other processes did not come: {str(error).splitlines()[0]}") from error


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
    """Says that a block waits, and ends the process if it does for too long: nothing interrupts JAX."""

    def __init__(
        self, coordinator: str | None, processes: int | None, process: int | None, timeout_s: float
    ) -> None:
        self._where = coordinator or "the cluster's coordinator"
        self._count, self._process, self._timeout_s = processes, process, timeout_s
        self._done = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, name="tpjax-start", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._done.set()

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
