"""Keeps JAX from starting plugins for chips that are not there, which print tracebacks and warnings.

``tpjax explain --topology`` needs such plugins, for their compilers only. Nothing here imports JAX.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import pkgutil
import sys
from types import ModuleType

_NVIDIA = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvmap")  # the last two: WSL, Jetson
_TPU = ("/dev/accel0", "/dev/vfio/0")
_GOOGLE_PCI_VENDOR = "0x1ae0"
_PLATFORMS = "JAX_PLATFORMS"

# what leave_out_absent() has set JAX_PLATFORMS to; None: nothing
chosen_platforms: str | None = None


def has_nvidia_gpu() -> bool:
    """Whether the machine has an NVIDIA GPU."""
    return any(map(os.path.exists, _NVIDIA))


def has_tpu() -> bool:
    """Whether the machine has a TPU."""
    return any(map(os.path.exists, _TPU)) or _GOOGLE_PCI_VENDOR in map(
        _first_line, glob.glob("/sys/bus/pci/devices/*/vendor")
    )


def leave_out_absent(*, compilers: bool = False) -> None:
    """Sets ``JAX_PLATFORMS=cpu`` and hides CUDA plugins, if all plugins are for chips that are not there.

    Does nothing if ``JAX_PLATFORMS`` asks for more than the CPU, there are other plugins, or the machine has
    such a chip. To be called before JAX is imported.

    Args:
        compilers: whether the plugins are needed for their compilers: they are not hidden then.
    """
    global chosen_platforms
    if os.environ.get(_PLATFORMS, "cpu") != "cpu" or has_nvidia_gpu() or has_tpu():
        return
    plugins = _jax_plugins()
    if not all(name.startswith("xla_cuda") for name in plugins) or not (plugins or _is_installed("libtpu")):
        return
    if _PLATFORMS not in os.environ:
        chosen_platforms = os.environ[_PLATFORMS] = "cpu"
    for name in plugins if not compilers else ():
        # JAX loads CUDA plugins even for the CPU alone, and has no switch for that
        idle = ModuleType(f"jax_plugins.{name}")
        idle.initialize = lambda: None  # type: ignore[attr-defined]
        sys.modules[idle.__name__] = idle
        sys.modules[name.replace("xla", "jax") + "_plugin"] = None  # type: ignore[assignment]  # not importable


def _jax_plugins() -> list[str]:
    """Lists the plugins in the namespace package in which JAX looks for them."""
    spec = importlib.util.find_spec("jax_plugins")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return [module.name for module in pkgutil.iter_modules(folders)]


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _first_line(file: str) -> str:
    try:
        with open(file) as lines:
            return lines.readline().strip()
    except OSError:
        return ""
