"""The one-axis device mesh, and faking CPU devices safely.

Nothing here starts a JAX backend until :func:`make_mesh` or :func:`ensure_devices` is called, so
``import tpjax`` leaves the choice of devices open.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

from tpjax.distributed import num_processes, process_id
from tpjax.errors import DeviceError

if TYPE_CHECKING:
    import jax

AXIS = "tp"

_COUNT_FLAG = "--xla_force_host_platform_device_count"
_COUNT_PATTERN = re.compile(rf"{_COUNT_FLAG}=(\d+)")

# jax 0.10.2 runs all faked devices on one thread pool, sized by the number of cores. Each device can hold two
# of its threads while it waits for the others in a collective; with fewer threads than that the last device
# finds none, the collective never completes, and XLA aborts after 40 s. NPROC sets the size. Measured on two
# cores, 4,000 asynchronous steps: with 2 threads per device all finish, with one thread fewer all hang. More
# threads cost time, since every product is then split into more pieces.
_POOL_THREADS_PER_DEVICE = 2
_MAX_FAKED = 64  # each takes memory and threads: with many more JAX does not start


def make_mesh(tp: int | None = None) -> jax.sharding.Mesh:
    """Returns the mesh ``("tp",)`` over the first ``tp`` devices, with automatic sharding propagation.

    Args:
        tp: number of devices; ``None`` takes all of them.

    Raises:
        DeviceError: if fewer than ``tp`` devices are present, or a process has none of them.
    """
    return make_meshes(tp)[0]


def make_meshes(tp: int | None = None, dp: int = 1) -> list[jax.sharding.Mesh]:
    """Returns a mesh ``("tp",)`` for each of ``dp`` replicas, over disjoint devices, the first ones first.

    Args:
        tp: number of devices of each; ``None`` shares all devices out.
        dp: number of replicas.

    Raises:
        DeviceError: if fewer than ``tp`` times ``dp`` devices are present, or ``dp`` does not divide them
            and ``tp`` is not given, or there are several processes and several replicas.
    """
    import jax

    check_dp(dp)
    if dp > 1 and jax.process_count() > 1:
        raise DeviceError(
            f"dp={dp} replicas run in one process, but there are {jax.process_count()}: "
            f"start each replica by itself"
        )
    devices = jax.devices()
    if tp is None:
        tp = max(1, len(devices) // dp)
        if tp * dp < len(devices):
            raise DeviceError(
                f"{len(devices)} devices are not a multiple of dp={dp}: tp={tp} would use {tp * dp} of them"
            )
    check_tp(tp)
    if tp * dp > len(devices):
        raise DeviceError(_too_few(tp, dp, devices))
    if dp == 1:
        _check_processes(tp, devices)
    return [
        jax.make_mesh((tp,), (AXIS,), devices=devices[at : at + tp], axis_types=(jax.sharding.AxisType.Auto,))
        for at in range(0, tp * dp, tp)
    ]


def fake_devices(count: int) -> None:
    """Makes JAX's CPU backend present ``count`` devices; call it before JAX starts.

    Sets ``XLA_FLAGS`` and ``NPROC`` for this process. A larger count already in ``XLA_FLAGS`` is kept.

    Raises:
        DeviceError: if JAX has already started with fewer devices, or ``count`` is over 64.
    """
    check_tp(count)
    if count > _MAX_FAKED:
        raise DeviceError(f"tp={count} is over {_MAX_FAKED}, the most devices that a CPU can fake")
    if _backend_started():
        import jax

        if len(jax.devices()) < count:
            raise DeviceError(_too_few(count, 1, jax.devices(), started=True))
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if not _COUNT_PATTERN.search(flags):
        os.environ["XLA_FLAGS"] = f"{flags} {_COUNT_FLAG}={count}".strip()
    elif _faked() < count:
        os.environ["XLA_FLAGS"] = _COUNT_PATTERN.sub(f"{_COUNT_FLAG}={count}", flags)
    guard_rendezvous()


def ensure_devices(tp: int, dp: int = 1) -> None:
    """Makes sure that ``dp`` times ``tp`` devices exist.

    If the only device is a CPU they are faked, with a line on stderr.

    Of several processes each fakes its part.

    Raises:
        DeviceError: if there are too few devices and they cannot be faked.
    """
    check_tp(tp)
    check_dp(dp)
    if not _backend_started():
        if tp * dp > _MAX_FAKED and dp > 1:
            raise DeviceError(
                f"dp={dp} replicas of tp={tp} are {tp * dp} devices, over {_MAX_FAKED}, the most that a CPU "
                "can fake"
            )
        # touches the CPU backend only: accelerators ignore both variables
        fake_devices(-(-tp * dp // num_processes()))
        import jax

        if tp * dp > 1 and jax.default_backend() == "cpu" and not process_id():
            print(f"tpjax: the only device is a CPU: faking {jax.device_count()} devices", file=sys.stderr)
    import jax

    if tp * dp > len(jax.devices()):
        raise DeviceError(_too_few(tp, dp, jax.devices(), started=True))


def guard_rendezvous() -> None:
    """Sizes the CPU client's thread pool so that faked devices cannot deadlock in a collective.

    Does nothing when no devices are faked or the pool is large enough. Called when tpjax is imported, so
    that a user who only set ``XLA_FLAGS`` is safe too.
    """
    count = _faked()
    needed = _POOL_THREADS_PER_DEVICE * count
    if count > 1 and _pool_threads() < needed:
        os.environ["NPROC"] = str(needed)


def _faked() -> int:
    """Returns the devices that ``XLA_FLAGS`` asks for; if the flag is repeated, the last one counts."""
    counts = _COUNT_PATTERN.findall(os.environ.get("XLA_FLAGS", ""))
    return int(counts[-1]) if counts else 1


def _pool_threads() -> int:
    chosen = os.environ.get("NPROC", "")
    return int(chosen) if chosen.isdigit() else os.cpu_count() or 1


def check_tp(tp: int) -> None:
    """Raises a ``DeviceError`` unless ``tp`` is a number of devices."""
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1:
        raise DeviceError(f"tp={tp!r} is not a whole number of devices, 1 or more")


def check_dp(dp: int) -> None:
    """Raises a ``DeviceError`` unless ``dp`` is a number of replicas."""
    if isinstance(dp, bool) or not isinstance(dp, int) or dp < 1:
        raise DeviceError(f"dp={dp!r} is not a whole number of replicas, 1 or more")


def _check_processes(tp: int, devices: list[jax.Device]) -> None:
    """Checks that each process has some of the first ``tp`` devices: all of them run every program."""
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:tp]}
    if idle:
        raise DeviceError(
            f"tp={tp} leaves process {min(idle)} without a device: the {num_processes()} processes have "
            f"{len(devices)}; use tp={len(devices)}, or fewer processes"
        )


def _backend_started() -> bool:
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge  # no public call tells this without starting the backend

    return bool(xla_bridge.backends_are_initialized())


def _too_few(tp: int, dp: int, devices: list[jax.Device], *, started: bool = False) -> str:
    kind, needed = devices[0].platform.upper(), tp * dp
    layout = f"tp={tp} needs {tp}" if dp == 1 else f"dp={dp} replicas of tp={tp} need {needed}"
    message = f"{layout} devices, but JAX sees {len(devices)} ({kind})"
    if kind != "CPU":
        fitting = f"tp={len(devices) // dp}" if len(devices) >= dp else f"dp={len(devices)}"
        return f"{message}; use {fitting} or fewer"
    when = "; JAX has already started" if started or _backend_started() else ""
    return f"{message}{when}: call tpjax.fake_devices({needed}) before the first use of JAX"
