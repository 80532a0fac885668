"""The one-axis device mesh, and faking CPU devices safely.

Nothing here starts a JAX backend until :func:`make_mesh` or :func:`ensure_devices` is called, so
``import tpjax`` leaves the choice of devices open.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from tpjax.distributed import allow_transfers, num_processes, process_id, time_limit
from tpjax.errors import DeviceError

if TYPE_CHECKING:
    import jax

AXIS = "tp"
_MOST_STAGES = 1024  # a model may have as many layers

_COUNT_FLAG = "--xla_force_host_platform_device_count"
_COUNT_PATTERN = re.compile(rf"{_COUNT_FLAG}=(\d+)")

# jax 0.10.2 runs all faked devices on one thread pool, sized by the number of cores. Each device can hold two
# of its threads while it waits for the others in a collective; with fewer threads than that the last device
# finds none, the collective never completes, and XLA aborts after 40 s. NPROC sets the size. Measured on two
# cores, 4,000 asynchronous steps: with 2 threads per device all finish, with one thread fewer all hang. More
# threads cost time, since every product is then split into more pieces.
_POOL_THREADS_PER_DEVICE = 2
# What tells JAX how it allocates a GPU's memory, and the share that it may have if none does.
_MEMORY_SETTINGS = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
_MEMORY_SHARE = "0.9"
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


def describe_tp(tp: int | Sequence[int]) -> str:
    """Returns ``2`` for stages of two devices each, ``3,1`` for one of three devices and one of one."""
    each = (tp,) if isinstance(tp, int) else tp
    return str(each[0]) if len(set(each)) == 1 else ",".join(map(str, each))


def describe_layout(tp: int | Sequence[int], dp: int = 1, pp: int = 1) -> str:
    """Returns ``tp=2``; of several replicas and stages ``dp=4 × pp=2 × tp=2``, or ``pp=2 × tp=3,1``."""
    meshes = "".join(f"{name}={n} × " for name, n in (("dp", dp), ("pp", pp)) if n > 1)
    return f"{meshes}tp={describe_tp(tp)}"


def make_stage_meshes(
    tp: int | Sequence[int] | None = None, dp: int = 1, pp: int = 1
) -> list[list[jax.sharding.Mesh]]:
    """Returns meshes ``("tp",)`` over disjoint devices, the first ones first: for each replica its stages'.

    Of several processes each has one stage or more, in their order, and a stage has devices of one.

    Args:
        tp: number of devices of each mesh, or of each of the stages; ``None`` shares all devices out.
        dp: number of replicas.
        pp: number of pipeline stages of a replica.

    Raises:
        DeviceError: if fewer than ``tp`` times ``pp`` times ``dp`` devices are present, or that many do not
            divide them and ``tp`` is not given; or it is given for another number of stages; or there are
            several processes and several replicas, or a process without a stage, or one with too few devices
            for its stage.
    """
    import jax

    check_dp(dp)
    check_pp(pp)
    _allow_transfers(pp)
    devices = start_jax()
    _check_one_process(dp, jax.process_count())
    each = _shared_out(len(devices), dp, pp) if tp is None else devices_of_stages(tp, pp)
    if sum(each) * dp > len(devices):
        raise DeviceError(_too_few(each, dp, devices))
    if pp > 1 and jax.process_count() > 1:
        stages = _within_processes(each, devices)
    else:
        stages = [devices[start:stop] for start, stop in pairwise(accumulate(each * dp, initial=0))]
        if dp == 1:
            _check_no_idle_process(each[0], devices)
    meshes = [
        jax.make_mesh((len(own),), (AXIS,), devices=own, axis_types=(jax.sharding.AxisType.Auto,))
        for own in stages
    ]
    return [meshes[at : at + pp] for at in range(0, dp * pp, pp)]


def make_own_mesh(tp: int) -> jax.sharding.Mesh:
    """Returns a mesh ``("tp",)`` over the first ``tp`` devices of this process.

    Raises:
        DeviceError: it has fewer.
    """
    import jax

    own = jax.local_devices()
    if tp > len(own):
        raise DeviceError(f"tp={tp} needs {tp} devices of process {process_id()}, which has {len(own)}")
    return jax.make_mesh((tp,), (AXIS,), devices=own[:tp], axis_types=(jax.sharding.AxisType.Auto,))


def devices_of_stages(tp: int | Sequence[int], pp: int) -> tuple[int, ...]:
    """Returns the number of devices of each pipeline stage.

    Args:
        tp: of each, or of all alike.
        pp: number of stages.

    Raises:
        DeviceError: a number of devices is not one, or there is another number of them than of stages.
    """
    check_pp(pp)
    if not isinstance(tp, Sequence):
        check_tp(tp)
        return (tp,) * pp
    for one in tp:
        check_tp(one)
    if len(tp) != pp:
        raise DeviceError(f"tp={','.join(map(str, tp))} is of {len(tp)} stages, but pp={pp}")
    return tuple(tp)


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
            raise DeviceError(_too_few((count,), 1, jax.devices(), started=True))
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if not _COUNT_PATTERN.search(flags):
        os.environ["XLA_FLAGS"] = f"{flags} {_COUNT_FLAG}={count}".strip()
    elif _faked() < count:
        os.environ["XLA_FLAGS"] = _COUNT_PATTERN.sub(f"{_COUNT_FLAG}={count}", flags)
    guard_rendezvous()


def ensure_devices(tp: int | Sequence[int], dp: int = 1, pp: int = 1) -> None:
    """Makes sure that the devices of ``dp`` replicas of ``pp`` stages of ``tp`` devices exist.

    If the only device is a CPU they are faked, with a line on stderr. Of several processes each fakes its
    part.

    Args:
        tp: number of devices of each mesh, or of each of the stages.
        dp: number of replicas.
        pp: number of pipeline stages of a replica.

    Raises:
        DeviceError: if there are too few devices and they cannot be faked.
    """
    each = devices_of_stages(tp, pp)
    check_dp(dp)
    _allow_transfers(pp)
    count = sum(each) * dp
    _check_one_process(dp, num_processes())
    if not _backend_started():
        if count > _MAX_FAKED and dp * pp > 1:
            raise DeviceError(
                f"{_meshes(each, dp)} are {count} devices, over {_MAX_FAKED}, the most that a CPU can fake"
            )
        # touches the CPU backend only: accelerators ignore both variables
        fake_devices(_of_a_process(each, dp))
        import jax

        start_jax()
        if count > 1 and jax.default_backend() == "cpu" and not process_id():
            print(f"tpjax: the only device is a CPU: faking {jax.device_count()} devices", file=sys.stderr)
    import jax

    if count > len(jax.devices()):
        raise DeviceError(_too_few(each, dp, jax.devices(), started=True))


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
    if isinstance(pp, bool) or not isinstance(pp, int) or not 1 <= pp <= _MOST_STAGES:
        raise DeviceError(f"pp={pp!r} is not a whole number of pipeline stages, 1 to {_MOST_STAGES}")


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


def _shared_out(count: int, dp: int, pp: int) -> tuple[int, ...]:
    """Returns the devices of each stage where ``count`` of them are shared out evenly."""
    tp, rest = divmod(count, dp * pp)
    tp = max(1, tp)
    if rest and count > dp * pp:
        layout = f"dp={dp}" if pp == 1 else f"pp={pp}" if dp == 1 else f"dp={dp} times pp={pp}"
        every = f", tp={describe_tp([tp + (i < rest) for i in range(pp)])} all" if dp == 1 else ""
        used = tp * dp * pp
        raise DeviceError(
            f"{count} devices are not a multiple of {layout}: tp={tp} would use {used} of them{every}"
        )
    return (tp,) * pp


def _of_a_process(each: Sequence[int], dp: int) -> int:
    """Returns the devices that each process fakes for stages of so many devices."""
    processes = num_processes()
    if len(each) == 1 or processes == 1:
        return -(-sum(each) * dp // processes)
    return sum(sorted(each)[-len(each) // processes :])  # whichever stages it has


def _within_processes(each: Sequence[int], devices: list[jax.Device]) -> list[list[jax.Device]]:
    """Returns the devices of each stage, all of one process.

    A process has as many stages as its devices are enough for, or fewer if otherwise a later one had none.
    """
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    processes, at, used, stages = list(by_process.items()), 0, 0, []
    for number, tp in enumerate(each):
        later, left = len(processes) - at - 1, len(each) - number
        if used and later and (used + tp > len(processes[at][1]) or left <= later):
            at, used = at + 1, 0
        process, own = processes[at]
        if used + tp > len(own):
            raise DeviceError(
                f"{_meshes(each, 1)}: stage {number + 1} needs {tp} device{'s' * (tp > 1)} of one process, "
                f"but process {process} has {len(own) - used} left of {len(own)}"
            )
        stages.append(own[used : used + tp])
        used += tp
    if at + 1 < len(processes):
        raise DeviceError(
            f"{_meshes(each, 1)} leave process {processes[at + 1][0]} without a device: the "
            f"{len(processes)} processes have {len(devices)}; use more stages, or fewer processes"
        )
    return stages


def _check_no_idle_process(tp: int, devices: list[jax.Device]) -> None:
    """Checks that a mesh of the first ``tp`` devices has some of each process."""
    used = {device.process_index for device in devices[:tp]}
    if idle := {device.process_index for device in devices} - used:
        raise DeviceError(
            f"tp={tp} leaves process {min(idle)} without a device: the {num_processes()} "
            f"processes have {len(devices)}; use tp={len(devices)}, or fewer processes"
        )


def start_jax() -> list[jax.Device]:
    """Starts JAX, unless it has started, and returns its devices.

    Of a GPU's memory it may take nine tenths then, if the environment says nothing about that: by itself it
    takes three quarters, and models that fit a GPU would not load.
    """
    import jax

    told = _backend_started() or any(name in os.environ for name in _MEMORY_SETTINGS)
    try:
        if not told:
            os.environ[_MEMORY_SETTINGS[0]] = _MEMORY_SHARE
        with time_limit():
            return jax.devices()
    finally:
        if not told:  # another process may be told by another of the names, and JAX takes only one
            os.environ.pop(_MEMORY_SETTINGS[0], None)


def _backend_started() -> bool:
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge  # no public call tells this without starting the backend

    return bool(xla_bridge.backends_are_initialized())


def _too_few(each: Sequence[int], dp: int, devices: list[jax.Device], *, started: bool = False) -> str:
    kind, needed, meshes = devices[0].platform.upper(), sum(each) * dp, len(each) * dp
    layout = f"tp={needed} needs {needed}" if meshes == 1 else f"{_meshes(each, dp)} need {needed}"
    message = f"{layout} devices, but JAX sees {len(devices)} ({kind})"
    if kind != "CPU":
        fewer = f"pp={len(devices)}" if dp == 1 and len(each) > 1 else f"dp={len(devices) // len(each) or 1}"
        fitting = f"tp={len(devices) // meshes}" if len(devices) >= meshes else fewer
        return f"{message}; use {fitting} or fewer"
    when = "; JAX has already started" if started or _backend_started() else ""
    return f"{message}{when}: call tpjax.fake_devices({needed}) before the first use of JAX"


def _meshes(each: Sequence[int], dp: int) -> str:
    """Describes the meshes of a layout with several."""
    stages = f"pp={len(each)} stages of tp={describe_tp(each)}"
    return stages if dp == 1 else f"dp={dp} replicas of {stages if len(each) > 1 else f'tp={each[0]}'}"
