"""``tpjax doctor``: versions, devices, settings, caches and memory, and what looks wrong with them."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpjax._version import __version__
from tpjax.checkpoints import hub
from tpjax.inspect import accelerators
from tpjax.inspect.packages import installed_version
from tpjax.mesh import start_jax

if TYPE_CHECKING:
    from rich.console import RenderableType

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "gguf",
    "tokenizers",
    "sentencepiece",
    "huggingface_hub",
    "transformers",
    "torch",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "jax-cuda12-pjrt",
    "nvidia-cuda-nvcc-cu12",
)
_OPTIONAL = _PACKAGES[_PACKAGES.index("transformers") :]
_SETTINGS = re.compile(r"(XLA|JAX|HF|TPJAX|TPU|CUDA|LIBTPU)_\w+|NPROC|XDG_CACHE_HOME|HUGGING_FACE_HUB_TOKEN")
_SECRETS = re.compile(r"TOKEN|SECRET|PASSWORD|KEY")
_CREDENTIALS = re.compile(r"//[^/@\s]+@")  # in an address: //user:password@host
_LITTLE_MEMORY_BYTES = 2 << 30
_LITTLE_DISK_BYTES = 1 << 30


def examine() -> dict[str, Any]:
    """Returns everything ``tpjax doctor`` shows as plain data; starts JAX. Sizes are in bytes."""
    packages = {name: installed_version(name) for name in _PACKAGES}
    devices = _devices()
    memory = _memory()
    return {
        "tpjax": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": {"os": platform.platform(), "machine": platform.machine(), "cores": os.cpu_count()},
        "packages": packages,
        "devices": devices,
        "attention": _attention(devices["platform"]),
        "environment": _environment(),
        "memory": memory,
        "caches": _caches(),
        "topologies": _topologies(),
        "warnings": _warnings(packages, devices, memory),
    }


def render(facts: dict[str, Any]) -> RenderableType:
    """Renders what :func:`examine` found as a table, followed by warnings."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="tpjax doctor", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, escape(value))
    warnings = [f"[yellow]warning:[/] {escape(line)}" for line in facts["warnings"]]
    return Group(table, *(warnings or ["[green]nothing looks wrong[/]"]))


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    devices, memory, system = facts["devices"], facts["memory"], facts["system"]
    versions = [f"{name} {version}" for name, version in facts["packages"].items() if version]
    rows = [
        ("tpjax", facts["tpjax"]),
        ("Python", f"{facts['python']['version']}  {facts['python']['executable']}"),
        ("system", f"{system['os']}, {system['cores']} cores"),
        ("packages", ", ".join(versions)),
        ("devices", _device_line(devices)),
        *[("attention", line) for line in facts["attention"]],
        ("memory", f"{_size(memory['available_bytes'])} available of {_size(memory['total_bytes'])}"),
    ]
    rows += [
        (f"{kind} programs", problem or "can be compiled here (explain --topology)")
        for kind, problem in facts["topologies"].items()
    ]
    rows += [(name, value) for name, value in facts["environment"].items()]
    for cache in facts["caches"]:
        holds = f"  ({', '.join(cache['models'])})" if cache["models"] else ""
        rows.append((cache["name"], f"{cache['path']}  {_size(cache['bytes'])}{holds}"))
    return rows


def _device_line(devices: dict[str, Any]) -> str:
    if devices["error"]:
        return f"JAX did not start: {devices['error']}"
    memory = f", {_size(devices['memory_bytes'])} each" if devices["memory_bytes"] else ""
    faked = " (faked)" if devices["faked"] else ""
    return f"{devices['count']} x {devices['kind']}{faked}, platform {devices['platform']}{memory}"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    for unit in ("bytes", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"


def _devices() -> dict[str, Any]:
    """Describes the devices of JAX, or the first line of the error if it did not start."""
    found = {"platform": None, "count": 0, "kind": None, "memory_bytes": None, "faked": False, "error": None}
    try:
        import jax

        start_jax()
        devices = jax.local_devices()
        stats = devices[0].memory_stats() or {}
    except (ImportError, RuntimeError, AssertionError, OSError) as error:
        return {**found, "error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    return {
        "platform": devices[0].platform,
        "count": len(devices),
        "kind": devices[0].device_kind,
        "memory_bytes": stats.get("bytes_limit"),
        "faked": devices[0].platform == "cpu" and len(devices) > 1,
        "error": None,
    }


def _attention(platform: str | None) -> list[str]:
    """Says what computes attention unless asked otherwise, and what checks of the kernel found here."""
    if platform is None:
        return []
    import jax

    from tpjax.attention import KernelShape, Verdict, choose_backend
    from tpjax.attention.selftest import verdicts
    from tpjax.runtime.limits import PAGE_SIZE

    # Llama-3-8B's: what other models have can keep a kernel from them
    usual = KernelShape(8, 4, 128, 128, False, (None,), None, False, PAGE_SIZE, "bfloat16")
    device = jax.local_devices()[0]
    auto = str(choose_backend("auto", device, usual))
    right = Verdict(device.device_kind, 0.0, 0.0, 0.0, 0.0)
    if choose_backend("auto", device, usual, lambda: right).is_kernel:
        auto = f"{device.platform} where a model's first start finds it right and no slower, else xla"
    kept = verdicts(hub.cache_dir() / "attention", device)
    return [f"auto: {auto}", *(f"checked: {what}: {verdict}" for what, verdict in kept)]


def _environment() -> dict[str, str]:
    """Returns the variables that JAX, XLA, Hugging Face and tpjax read, without secrets."""
    chosen = sorted(name for name in os.environ if _SETTINGS.fullmatch(name))
    if accelerators.chosen_platforms is not None:
        chosen.remove("JAX_PLATFORMS")  # the user did not set it
    return {
        name: "(set)" if _SECRETS.search(name) else _CREDENTIALS.sub("//***@", os.environ[name])
        for name in chosen
    }


def _memory() -> dict[str, int | None]:
    """Returns the memory of the machine, if the system tells."""
    total = available = None
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        meminfo = Path("/proc/meminfo").read_text()
        if found := re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE):
            available = int(found[1]) * 1024
    except (OSError, ValueError, AttributeError):
        pass
    return {"total_bytes": total, "available_bytes": available}


def _caches() -> list[dict[str, Any]]:
    """Lists the cache folders of tpjax, of JAX if it is elsewhere, and of Hugging Face."""
    from huggingface_hub import constants

    own = hub.cache_dir()
    folders = [(f"cache: {folder.name}", folder) for folder in _subfolders(own)] or [("cache", own)]
    if elsewhere := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folders.append(("cache: JAX", Path(elsewhere)))
    folders.append(("cache: Hugging Face", Path(constants.HF_HUB_CACHE)))
    models = [name for name in hub.ALIASES if hub.is_cached(name)]
    return [
        {
            "name": name,
            "path": str(path),
            "bytes": _folder_bytes(path),
            "models": models if path == own / "models" else _hub_models(path),
        }
        for name, path in folders
    ]


def _cache_problems() -> list[str]:
    """Warns of cache folders that cannot be written, or have little room."""
    from huggingface_hub import constants

    elsewhere = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folders = [hub.cache_dir(), Path(constants.HF_HUB_CACHE), *([Path(elsewhere)] if elsewhere else [])]
    problems = []
    for folder in folders:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            problems.append(f"cache folder {folder} cannot be made: {there} is not a directory")
        elif not os.access(there, os.W_OK | os.X_OK):
            problems.append(f"cache folder {folder} cannot be written: no permission for {there}")
        elif (free := shutil.disk_usage(there).free) < _LITTLE_DISK_BYTES:
            problems.append(f"cache folder {folder}: only {_size(free)} are free on its disk")
    return problems


def _topologies() -> dict[str, str | None]:
    """Says for each kind of chip why ``explain --topology`` cannot compile; ``None`` if it can."""
    try:
        from tpjax.inspect.topology import extra_problem
    except ImportError as error:  # JAX itself
        return {"TPU": str(error), "GPU": str(error)}
    return {"TPU": extra_problem("tpu"), "GPU": extra_problem("gpu")}


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _folder_bytes(folder: Path) -> int:
    """Returns the bytes of the files in a folder. Links are not followed, so that blobs count once."""
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(parent, file)).st_size
            except OSError:
                continue  # removed meanwhile
    return total


def _hub_models(folder: Path) -> list[str]:
    """Lists the repository ids in a Hugging Face cache, whose subfolders are named models--org--name."""
    names = [path.name.split("--") for path in _subfolders(folder)]
    return ["/".join(parts[1:]) for parts in names if parts[0] == "models"]


def _warnings(packages: dict[str, Any], devices: dict[str, Any], memory: dict[str, int | None]) -> list[str]:
    warnings = [f"JAX did not start: {devices['error']}"] if devices["error"] else []
    for name, version in packages.items():
        if version is None and name not in _OPTIONAL:
            warnings.append(f"{name} is not installed: reinstall tpjax")
    if devices["platform"] == "cpu":
        warnings += _unused_accelerators()
    if importlib.util.find_spec("pip") is None:
        warnings.append("this Python has no pip, so `tpjax pull` cannot fetch: run `python -m ensurepip`")
    available = memory["available_bytes"]
    if available is not None and available < _LITTLE_MEMORY_BYTES:
        warnings.append(f"only {_size(available)} of memory are available")
    return warnings + _cache_problems()


def _unused_accelerators() -> list[str]:
    """Warns of accelerators that JAX does not use, nearly always because an extra is missing."""
    warnings = []
    if accelerators.has_nvidia_gpu():
        warnings.append("there is an NVIDIA GPU, but JAX runs on the CPU: pip install 'tpjax[cuda]'")
    if accelerators.has_tpu():
        warnings.append("there is a TPU, but JAX runs on the CPU: pip install 'tpjax[tpu]'")
    return warnings
