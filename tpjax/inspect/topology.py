"""Describes chips that are not here to a compiler, so that it can compile programs ahead of time.

TPU programs need ``libtpu``, GPU programs JAX's CUDA plugin and ``ptxas``. Neither touches a device.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tpjax.errors import ConfigError
from tpjax.hardware import HARDWARE, SHORT_NAMES, Hardware
from tpjax.inspect.accelerators import has_tpu
from tpjax.inspect.packages import installed_version
from tpjax.mesh import AXIS, check_dp, check_pp, describe_tp, devices_of_stages

TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # axes of the chip grid
# chips of a full pod: beyond it, the compiler aborts the process
_POD = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
# further libtpu versions that were tried and work, by jax version
_ALSO_FITS = {"0.12.0.1": ("0.0.51",)}
_PTXAS = {12: "nvidia-cuda-nvcc-cu12", 13: "nvidia-cuda-nvcc"}  # package that has it, by version of CUDA
_LOADING = threading.Lock()  # two threads that load a compiler at once get an error from JAX
_CORES_PER_DEVICE = {"v4": {"chip_config_name": "megacore"}}  # else libtpu shows v4's two cores apart
# Without a TPU, libtpu need not ask the metadata server of the cloud, and complains of what it then does not
# know of this machine. Programs are the same whatever these say.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclass(frozen=True)
class _GPU:
    """What XLA has to know of a GPU before it compiles; figures from the descriptions in XLA."""

    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    shared_memory: int
    shared_memory_optin: int
    l2_bytes: int
    clock_ghz: float
    memory_bytes: int
    bandwidth: int

    def target(self, name: str) -> str:
        """Returns a ``GpuTargetConfigProto`` in text form."""
        major, minor = self.capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{name}"
            dnn_version_info {{ major: 9 minor: 10 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_memory}
              shared_memory_per_block_optin: {self.shared_memory_optin}
              l2_cache_size: {self.l2_bytes} clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory_bytes} memory_bandwidth: {self.bandwidth}
            }}"""


GPUS = {
    "a100-80gb": _GPU((8, 0), 108, 64, 167936, 166912, 41943040, 1.41, 85100068864, 2039040000000),
    "h100-sxm": _GPU((9, 0), 132, 128, 233472, 232448, 52428800, 1.98, 84942979072, 3352320000000),
    "h200": _GPU((9, 0), 132, 128, 233472, 232448, 52428800, 1.98, 151397597184, 4800000000000),
    "b200": _GPU((10, 0), 148, 128, 233472, 232448, 132644864, 1.965, 191514411008, 7672320000000),
}


@dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are wired.

    Attributes:
        name: its name, such as ``v5e:2x4``.
        hardware: figures of the chip.
        grid: chips along each axis; for GPUs a single number.
    """

    name: str
    hardware: Hardware
    grid: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU; otherwise it is a GPU."""
        return self.hardware.name in TPUS

    @property
    def devices_per_chip(self) -> int:
        """Number of JAX devices in a chip, which share its memory."""
        return self.hardware.devices_per_chip

    @property
    def memory_bytes(self) -> int:
        """Memory of one device."""
        return int(self.hardware.device.memory_bytes)

    def devices_of_meshes(self, tp: int | Sequence[int] | None, dp: int = 1, pp: int = 1) -> tuple[int, ...]:
        """Returns the devices of each stage of a replica.

        Args:
            tp: devices of a stage, or of each; ``None``: all are shared out.
            dp: replicas.
            pp: pipeline stages of a replica.

        Raises:
            DeviceError: ``tp`` does not say the devices of so many stages.
            ConfigError: the meshes do not fit the devices.
        """
        check_dp(dp)
        check_pp(pp)
        count, meshes = math.prod(self.grid) * self.devices_per_chip, dp * pp
        named = f"dp={dp}" if pp == 1 else f"pp={pp}" if dp == 1 else f"dp={dp} times pp={pp}"
        if tp is None and count % meshes:
            raise ConfigError(f"the {count} devices of {self.name} are not a multiple of {named}")
        each = devices_of_stages(count // meshes if tp is None else tp, pp)
        if (needed := sum(each) * dp) > count:
            if meshes == 1:
                raise ConfigError(f"tp={needed} is more than the {count} devices of {self.name}")
            stages = f"pp={pp} stages of tp={describe_tp(each)}" if pp > 1 else f"tp={each[0]}"
            layout = stages if dp == 1 else f"dp={dp} replicas of {stages}"
            raise ConfigError(f"{layout} are {needed} devices, more than the {count} of {self.name}")
        return each

    def mesh(self, tp: int | None = None) -> Mesh:
        """Makes the mesh ``("tp",)`` over the first ``tp`` devices: see :meth:`meshes`."""
        return self.meshes(tp)[0]

    def meshes(self, tp: int | Sequence[int] | None = None, pp: int = 1) -> list[Mesh]:
        """Makes meshes ``("tp",)`` of ``tp`` devices for pipeline stages, over the first devices.

        Programs can be compiled for them, not run.

        Raises:
            ConfigError: there are fewer devices, the extra is missing or does not fit this JAX, or the
                installed compiler cannot target these chips.
        """
        each = self.devices_of_meshes(tp, 1, pp)
        devices = self._tpus() if self.is_tpu else self._gpus()
        return [
            Mesh(np.array(devices[start:stop]), (AXIS,), axis_types=(AxisType.Auto,))
            for start, stop in pairwise(accumulate(each, initial=0))
        ]

    def _tpus(self) -> list[jax.Device]:
        check_extra("tpu")
        if not has_tpu():
            for name, value in _WITHOUT_TPU.items():
                os.environ.setdefault(name, value)
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no lock against other processes
        options: dict[str, Any] = dict(_CORES_PER_DEVICE.get(self.hardware.name, {}))
        if math.prod(self.grid) % 4 or any(length % 2 for length in self.grid[:2]):
            # a host has 2x2 chips unless told otherwise: let one host have all of them
            options["chips_per_host_bounds"] = [*self.grid, *[1] * (3 - len(self.grid))]
        layout = "x".join(map(str, self.grid))
        return _describe(self.name, "tpu", f"{self.hardware.name}:{layout}", options)

    def _gpus(self) -> list[jax.Device]:
        check_extra("gpu")
        options = {
            "topology": f"1x1x{self.grid[0]}",
            "target_config": GPUS[self.hardware.name].target(self.hardware.name),
        }
        return _describe(self.name, "cuda", "", options)


def parse_topology(text: str) -> Topology:
    """Reads ``v5e:2x4`` or ``h200:8``.

    Raises:
        ConfigError: the chip is unknown (the message lists the known ones), or the grid does not fit it.
    """
    name, _, grid = text.partition(":")
    name = SHORT_NAMES.get(name, name)
    if name not in TPUS and name not in GPUS:
        shown = [*TPUS, *[short for short, long in SHORT_NAMES.items() if long in GPUS], "h200", "b200"]
        raise ConfigError(f"topology {text!r} is not known; known chips are {', '.join(shown)}")
    axes = TPUS.get(name, 1)
    if not re.fullmatch(r"[1-9]\d{0,3}" + r"x[1-9]\d{0,3}" * (axes - 1), grid):
        example = f"{name}:{'x'.join(['2', '4', '4'][:axes]) if axes > 1 else 8}"
        what = f"a grid of {axes} axes" if axes > 1 else "a number of chips"
        raise ConfigError(f"topology {text!r}: {grid!r} is not {what}, such as {example}")
    found = Topology(text, HARDWARE[name], tuple(map(int, grid.split("x"))))
    if (chips := math.prod(found.grid)) > _POD.get(name, chips):
        raise ConfigError(f"topology {text!r} has {chips} chips, but a pod of {name} has {_POD[name]}")
    return found


def check_extra(kind: str) -> None:
    """Checks that the compiler for ``tpu`` or ``gpu`` programs is installed and fits this JAX.

    Raises:
        ConfigError: it is missing or does not fit; the message says what to install.
    """
    if problem := extra_problem(kind):
        raise ConfigError(problem)


def extra_problem(kind: str) -> str | None:
    """Says why ``tpu`` or ``gpu`` programs cannot be compiled here, and what to install; else ``None``."""
    if kind == "tpu":
        wanted = _wanted_libtpu()
        install = f"pip install 'libtpu{'==' + wanted if wanted else ''}'"
        found = installed_version("libtpu")
        if found is None:
            return f"compiling TPU programs needs libtpu: {install}"
        also = _ALSO_FITS.get(jax.__version__, ())
        if wanted and not f"{found}.".startswith(wanted.removesuffix("*")) and found not in also:
            return f"libtpu {found} does not fit jax {jax.__version__}: {install}"
        return None
    cuda = 13 if installed_version("jax-cuda13-plugin") else 12
    plugins, ptxas = (f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt"), _PTXAS[cuda]
    named = " ".join(f"{package}=={jax.__version__}" for package in plugins)
    install = f"pip install --no-deps {named} {ptxas}"
    for package in plugins:
        found = installed_version(package)
        if found is None:
            return f"compiling GPU programs needs {package}: {install}"
        if found != jax.__version__:
            return f"{package} {found} does not fit jax {jax.__version__}: {install}"
    if installed_version(ptxas) is None:
        return f"compiling GPU programs needs ptxas, of {ptxas}: {install}"
    return None


def _describe(name: str, platform: str, topology_name: str, options: dict[str, Any]) -> list[jax.Device]:
    from jax.experimental import topologies

    jax.devices()  # registers the plugins
    try:
        with _LOADING:
            described = topologies.get_topology_desc(
                platform=platform, topology_name=topology_name, **options
            )
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"the installed compiler cannot target topology {name!r}: {reason}") from error
    return list(described.devices)


def _wanted_libtpu() -> str | None:
    """Returns the libtpu that jax was built with, such as ``0.0.42.*``, from its extra ``tpu``."""
    for requirement in importlib.metadata.requires("jax") or ():
        if found := re.match(r"libtpu\s*==\s*([\d.*]+)", requirement):
            return found[1]
    return None
