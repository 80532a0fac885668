"""The one-axis device mesh, and faking CPU devices safely.

Nothing here starts a JAX backend until :func:`make_mesh` or :func:`ensure_devices` is called, so
``import tpjax`` leaves the choice of devices open.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

from tpjax.distributed import allow_transfers, num_processes, process_id, time_limit
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
    """Returns a mesh ``("tp",)`` for each of ``dp`` replicas: :func:`make_stage_meshes` with one stage."""
    return [mesh for (mesh,) in make_stage_meshes(tp, dp)]


def make_stage_meshes(tp: int | None = None, dp: int = 1, pp: int = 1) -> list[list[jax.sharding.Mesh]]:
    """Returns meshes ``("tp",)`` over disjoint devices, the first ones first: for each replica its stages'.

    Args:
        tp: number of devices of each mesh; ``None`` shares all devices out.
        dp: number of replicas.
        pp: number of pipeline stages of a replica. Of several processes each has one stage or more.

    Raises:
        DeviceError: if fewer than ``tp`` times ``pp`` times ``dp`` devices are present, or that many do not
            divide them and ``tp`` is not given; or there are several processes and several replicas, or a
            stage with devices of two, or a process without a stage.
    """
    import jax

    check_dp(dp)
    check_pp(pp)
    _allow_transfers(pp)
    with time_limit():
        devices = jax.devices()
    _check_one_process(dp, jax.process_count())
    if tp is None:
        tp = max(1, len(devices) // (dp * pp))
        if tp * dp * pp < len(devices):
            layout = f"dp={dp}" if pp == 1 else f"pp={pp}" if dp == 1 else f"dp={dp} times pp={pp}"
            raise DeviceError(
                f"{len(devices)} devices are not a multiple of {layout}: "
                f"tp={tp} would use {tp * dp * pp} of them"
            )
    check_tp(tp)
    if tp * dp * pp > len(devices):
        raise DeviceError(_too_few(tp, dp, devices, pp=pp))
    if dp == 1:
        _check_processes(tp, devices, pp)
    meshes = [
        jax.make_mesh((tp,), (AXIS,), devices=devices[at : at + tp], axis_types=(jax.sharding.AxisType.Auto,))
        for at in range(0, tp * dp * pp, tp)
    ]
    return [meshes[at : at + pp] for at in range(0, dp * pp, pp)]


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


def ensure_devices(tp: int, dp: int = 1, pp: int = 1) -> None:
    """Makes sure that ``dp`` times ``pp`` times ``tp`` devices exist.

    If the only device is a CPU they are faked, with a line on stderr.

    Of several processes each fakes its part.

    Raises:
        DeviceError: if there are too few devices and they cannot be faked.
    """
    check_tp(tp)
    check_dp(dp)
    check_pp(pp)
    _allow_transfers(pp)
    count = tp * dp * pp
    _check_one_process(dp, num_processes())
    if not _backend_started():
        if count > _MAX_FAKED and dp * pp > 1:
            raise DeviceError(
                f"{_meshes(tp, dp, pp)} are {count} devices, over {_MAX_FAKED}, the most that a CPU can fake"
            )
        # touches the CPU backend only: accelerators ignore both variables
        fake_devices(-(-count // num_processes()))
        import jax

        with time_limit():
            jax.devices()
        if count > 1 and jax.default_backend() == "cpu" and not process_id():
            print(f"tpjax: the only device is a CPU: faking {jax.device_count()} devices", file=sys.stderr)
    import jax

    if count > len(jax.devices()):
        raise DeviceError(_too_few(tp, dp, jax.devices(), started=True, pp=pp))


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


def check_pp(pp: int) -> None:
    """Raises a ``DeviceError`` unless ``pp`` is a number of pipeline stages."""
    if isinstance(pp, bool) or not isinstance(pp, int) or pp < 1:
        raise DeviceError(f"pp={pp!r} is not a whole number of pipeline stages, 1 or more")


def is_local(mesh: jax.sharding.Mesh) -> bool:
    """Returns whether this process has devices of a mesh; an only process has all, described ones too."""
    import jax

    return jax.process_count() == 1 or bool(mesh.local_devices)


def absent_array(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, sharding: jax.sharding.NamedSharding
) -> jax.Array:
    """Returns an array that is on devices of other processes alone, as this process knows it."""
    import jax

    return jax.make_array_from_single_device_arrays(shape, sharding, [], dtype=dtype)


def _allow_transfers(pp: int) -> None:
    """Lets arrays move between the processes of a pipeline's stages."""
    if pp > 1 and num_processes() > 1 and not _backend_started():
        allow_transfers()


def _check_one_process(dp: int, processes: int) -> None:
    """Raises a ``DeviceError`` for several replicas in several processes."""
    if dp > 1 and processes > 1:
        raise DeviceError(
            f"dp={dp} replicas run in one process, but there are {processes}: start each replica by itself"
        )


def _check_processes(tp: int, devices: list[jax.Device], pp: int = 1) -> None:
    """Checks that each process has a device, and that a stage of several has those of one process."""
    used = [device.process_index for device in devices[: tp * pp]]
    if idle := {device.process_index for device in devices} - set(used):
        layout, remedy = f"tp={tp}", f"tp={len(devices)}, or fewer processes"
        if pp > 1:
            layout, remedy = f"pp={pp} stages of tp={tp}", "more of either, or fewer processes"
        raise DeviceError(
            f"{layout} leave{'s' * (pp == 1)} process {min(idle)} without a device: the {num_processes()} "
            f"processes have {len(devices)}; use {remedy}"
        )
    for stage in range(pp if pp > 1 else 0):
        if len(owners := sorted(set(used[stage * tp : (stage + 1) * tp]))) > 1:
            raise DeviceError(
                f"pp={pp} stages of tp={tp}: stage {stage + 1} would have devices of processes {owners[0]} "
                f"and {owners[1]}, but a stage is of one process: use a tp that divides a process's devices"
            )


def _backend_started() -> bool:
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge  # no public call tells this without starting the backend

    return bool(xla_bridge.backends_are_initialized())


def _too_few(tp: int, dp: int, devices: list[jax.Device], *, started: bool = False, pp: int = 1) -> str:
    kind, needed = devices[0].platform.upper(), tp * dp * pp
    layout = f"tp={tp} needs {tp}" if dp * pp == 1 else f"{_meshes(tp, dp, pp)} need {needed}"
    message = f"{layout} devices, but JAX sees {len(devices)} ({kind})"
    if kind != "CPU":
        meshes = dp * pp
        fewer = f"pp={len(devices)}" if dp == 1 and pp > 1 else f"dp={len(devices) // pp or 1}"
        fitting = f"tp={len(devices) // meshes}" if len(devices) >= meshes else fewer
        return f"{message}; use {fitting} or fewer"
    when = "; JAX has already started" if started or _backend_started() else ""
    return f"{message}{when}: call tpjax.fake_devices({needed}) before the first use of JAX"


def _meshes(tp: int, dp: int, pp: int) -> str:
    """Describes the meshes of a layout with several."""
    stages = f"pp={pp} stages of tp={tp}"
    return stages if dp == 1 else f"dp={dp} replicas of {f'tp={tp}' if pp == 1 else stages}"
