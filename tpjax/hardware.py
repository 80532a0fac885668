"""The chips that ``plan`` knows: published figures with their sources, and the fractions of them reached.

Fractions are fitted per class of hardware, never per measurement; ``scripts/validate_plan.py`` compares them
with published measurements.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpjax.errors import ConfigError
from tpjax.interconnect import ICI, Interconnect, NVLink

log = logging.getLogger(__name__)

# Elements that rows of an array in the memory of a platform are padded to a multiple of; elsewhere none.
LANES = {"tpu": 128}
# The runtime, its programs and fragmentation take the rest.
USABLE_MEMORY = 0.92
MOST_CHIPS = 65_536  # beyond any machine that is one mesh


@dataclass(frozen=True)
class Efficiency:
    """Fractions reached of the published figures, and fixed costs that no figure covers.

    Attributes:
        weights: fraction of the memory bandwidth when reading 16-bit weights.
        low_precision_weights: fraction of ``weights`` when reading 8-bit weights, which are widened.
        cache: fraction of the memory bandwidth when reading keys and values.
        compute: fraction of the bfloat16 peak.
        low_precision_compute: fraction of the float8 peak.
        layer_us: norms, rotary embedding and launches of a decoder layer.
        expert_us: routing in a layer with experts, in addition.
        step_us: sampling, and host work between two steps.
        token_us: norms, rotary embedding and activations of a layer, per prompt token; 0 on accelerators,
            which overlap them with products.
        row_us: the same per row that decodes, and what its attention takes beyond reading the cache.
    """

    weights: float
    low_precision_weights: float
    cache: float
    compute: float
    low_precision_compute: float
    layer_us: float
    expert_us: float
    step_us: float = 0.0
    token_us: float = 0.0
    row_us: float = 0.0


# Fitted to gpt-fast's A100 table (Llama-2, Llama-3.1 and Mixtral, tp 1 to 8, bfloat16 and int8): its int8
# kernels reach 86% of the bandwidth of its bfloat16 ones, and a layer costs 45 microseconds at every size.
# Compute fractions: first-token latencies of TensorRT-LLM 0.5 on A100 (float16) and H100 (float8).
_GPU = Efficiency(
    weights=0.80,
    low_precision_weights=0.86,
    cache=0.80,
    compute=0.67,
    low_precision_compute=0.45,
    layer_us=45.0,
    expert_us=15.0,
)
# Fitted to jax-llm-examples' Llama-3.1-70B table (v5e-16): one static program, whose layers cost nothing that
# is not traffic or collectives, and which reads 8-bit weights as fast as 16-bit ones. Mixtures: fitted to its
# DeepSeek-R1 table (v5e-64), where sorting tokens by expert and back dominates.
_TPU_PROGRAM = Efficiency(
    weights=0.96,
    low_precision_weights=1.0,
    cache=0.96,
    compute=0.65,
    low_precision_compute=0.65,
    layer_us=0.0,
    expert_us=290.0,
)
# Fitted at once to one static program (jax-llm, Qwen3-32B, v6e-8) and to sglang-jax's Qwen3 tables (v6e-4;
# mixtures: v6e-16). The latencies in those are means over whole responses: they contain the prompts of others
# that ran in between, and what that server adds to each token (``scripts/measured_engines.py``). Taken for
# decode steps, they had made the cache look half as fast as the memory, and large batches too slow.
_TPU_V6E = Efficiency(
    weights=0.75,
    low_precision_weights=1.0,
    cache=0.82,
    compute=0.60,
    low_precision_compute=0.60,
    layer_us=41.0,
    expert_us=75.0,
    step_us=400.0,
)


@dataclass(frozen=True)
class Hardware:
    """One kind of chip. Where JAX counts several devices in a chip, :attr:`device` has the figures of one.

    Attributes:
        name: name for ``--hardware``.
        memory_bytes: memory of one chip.
        bandwidth_bytes_s: memory bandwidth.
        flops: bfloat16 FLOPs a second; multiply and add count as two.
        low_precision_flops: float8 FLOPs a second; ``None`` if not native: float8 weights are then widened
            and multiplied as bfloat16. int8 always means weights only.
        interconnect: links between chips.
        efficiency: fractions of these figures that are reached.
        source: source of the figures.
        shared: whether the chips are faked on one machine, and share its bandwidth and cores.
        devices_per_chip: devices that JAX counts in one chip, which share its memory equally.
        products: measured seconds of a product per float32 weight element, by the tokens it has: (tokens,
            seconds), ascending. Empty: bandwidth and rate tell it, whichever takes longer.
    """

    name: str
    memory_bytes: float
    bandwidth_bytes_s: float
    flops: float
    low_precision_flops: float | None
    interconnect: Interconnect
    efficiency: Efficiency
    source: str
    shared: bool = False
    devices_per_chip: int = 1
    products: tuple[tuple[float, float], ...] = ()

    @property
    def platform(self) -> str:
        """What JAX calls the kind of device: ``cpu``, ``tpu`` or ``gpu``."""
        return "cpu" if self.shared else "tpu" if isinstance(self.interconnect, ICI) else "gpu"

    @property
    def device(self) -> Hardware:
        """The figures of one device."""
        part = self.devices_per_chip
        return replace(
            self,
            memory_bytes=self.memory_bytes / part,
            bandwidth_bytes_s=self.bandwidth_bytes_s / part,
            flops=self.flops / part,
            low_precision_flops=self.low_precision_flops and self.low_precision_flops / part,
            devices_per_chip=1,
        )

    @property
    def usable_bytes(self) -> float:
        """Memory that a model may use."""
        return USABLE_MEMORY * self.memory_bytes


_NVIDIA = "NVIDIA data sheet, dense figures, "
_BOOK = "How to Scale Your Model, chapter 2, and Google Cloud's page of "

HARDWARE: dict[str, Hardware] = {
    chip.name: chip
    for chip in (
        Hardware(
            "a100-80gb",
            80e9,
            2039e9,
            312e12,
            None,
            NVLink(300e9),
            _GPU,
            # limited to 330 W, gpt-fast's saw 1700 GB/s at best: 83%; a decode step reaches 80% either way
            _NVIDIA + "A100 80GB SXM",
        ),
        Hardware("h100-sxm", 80e9, 3350e9, 989e12, 1979e12, NVLink(450e9), _GPU, _NVIDIA + "H100 SXM"),
        Hardware("h200", 141e9, 4800e9, 989e12, 1979e12, NVLink(450e9), _GPU, _NVIDIA + "H200 SXM"),
        Hardware("b200", 180e9, 8000e9, 2250e12, 4500e12, NVLink(900e9), _GPU, _NVIDIA + "DGX B200"),
        Hardware(
            "l40s",
            48e9,
            864e9,
            362e12,
            733e12,
            NVLink(32e9, latency_us=15.0, ring_us=20.0, direct=False),
            _GPU,
            _NVIDIA + "L40S (PCIe 4.0 ×16)",
        ),
        Hardware("v4", 32e9, 1228e9, 275e12, None, ICI(45e9, 3, 4), _TPU_PROGRAM, _BOOK + "TPU v4"),
        Hardware("v5e", 16e9, 819e9, 197e12, None, ICI(45e9, 2, 16), _TPU_PROGRAM, _BOOK + "TPU v5e"),
        Hardware("v5p", 95e9, 2765e9, 459e12, None, ICI(90e9, 3, 4), _TPU_PROGRAM, _BOOK + "TPU v5p"),
        Hardware("v6e", 32e9, 1640e9, 918e12, None, ICI(90e9, 2, 16), _TPU_V6E, _BOOK + "TPU v6e"),
        Hardware(
            "tpu7x",
            192e9,
            7380e9,
            2307e12,
            4614e12,
            # "six times faster than a 1D ICI link": Google Cloud's page of TPU7x, dual-chiplet architecture
            ICI(100e9, 3, 4, devices_per_chip=2, die_bytes_s=600e9),
            _TPU_V6E,
            _BOOK + "TPU7x",
            devices_per_chip=2,
        ),
    )
}
SHORT_NAMES = {"a100": "a100-80gb", "h100": "h100-sxm"}
# JAX's names of TPUs (jax/_src/pallas/mosaic/tpu_info.py), and how those of NVIDIA's GPUs begin
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
_GPU_KINDS = {
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
}


def known_device(kind: str) -> Hardware | None:
    """Returns the figures of one device by what JAX calls it; ``None`` if they are not known.

    Args:
        kind: ``jax.Device.device_kind``, such as ``TPU v5 lite`` or ``NVIDIA H100 80GB HBM3``.
    """
    name = _TPU_KINDS.get(kind)
    if name is None:
        name = next((name for start, name in _GPU_KINDS.items() if kind.startswith(start)), None)
    return None if name is None else HARDWARE[name].device


def parse_hardware(text: str, file: Path | None = None) -> tuple[Hardware, int]:
    """Reads ``NAME:CHIPS``; without ``:CHIPS`` it is one chip. ``v5e:2x4``, as a topology, is 8 chips.

    Args:
        text: the value of ``--hardware``.
        file: file with further chips, see :func:`load_hardware`.

    Raises:
        ConfigError: the name is unknown (the message lists the known ones), or the number of chips invalid.
    """
    name, colon, count = text.partition(":")
    known = {**HARDWARE, **(load_hardware(file) if file else {})}
    name = name if name in known else SHORT_NAMES.get(name, name)
    if name not in known:
        names = ", ".join([*SHORT_NAMES, *known])
        raise ConfigError(f"hardware {name!r} is not known; known are {names}; --hardware-file adds others")
    sides = count.split("x") if isinstance(known[name].interconnect, ICI) else [count]
    if colon and not all(re.fullmatch("[0-9]{1,9}", side) and int(side) for side in sides):
        raise ConfigError(f"--hardware {text}: {count!r} is not a whole number of chips, 1 or more")
    chips = math.prod(map(int, sides)) if colon else 1
    if chips > MOST_CHIPS:
        raise ConfigError(f"--hardware {text}: {chips} chips are over {MOST_CHIPS}")
    return known[name], chips


_FIGURES = ("memory_gb", "bandwidth_gb_s", "bf16_tflops")
_LINKS = ("nvlink", "pcie", "ici-2d", "ici-3d")
_FIELDS = (*_FIGURES, "fp8_tflops", "link", "link_gb_s", "like", "efficiency")


def load_hardware(file: Path) -> dict[str, Hardware]:
    """Reads chips from a JSON or TOML file: an object per chip, under its name.

    ``like`` names a known chip, whose figures are the defaults. Without it ``memory_gb``, ``bandwidth_gb_s``,
    ``bf16_tflops``, ``link`` (``nvlink``, ``pcie``, ``ici-2d`` or ``ici-3d``) and ``link_gb_s`` (one
    direction: all links of a GPU together, or one ICI link) are required. ``fp8_tflops`` is for chips that
    multiply float8. ``efficiency`` may hold any field of :class:`Efficiency`.

    Raises:
        ConfigError: the file cannot be read, has an unknown field, or lacks a required one.
    """
    try:
        text = file.read_text()
        chips = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is neither JSON nor TOML: {error}") from error
    if not isinstance(chips, dict) or not all(isinstance(chip, dict) for chip in chips.values()):
        raise ConfigError(f"{file} does not hold an object per chip, under its name")
    return {name: _chip(f"{file}: {name}", name, figures) for name, figures in chips.items()}


def _chip(where: str, name: str, figures: Mapping[str, Any]) -> Hardware:
    for field in figures:
        if field not in _FIELDS:
            raise ConfigError(f"{where}: unknown field {field!r}; known are {', '.join(_FIELDS)}")
    like = str(figures.get("like", ""))
    base = HARDWARE.get(SHORT_NAMES.get(like, like))
    if "like" in figures and base is None:
        raise ConfigError(f"{where}: like={like!r} is not known; known are {', '.join(HARDWARE)}")
    if base is None:
        missing = [field for field in (*_FIGURES, "link", "link_gb_s") if field not in figures]
        if missing:
            raise ConfigError(f"{where}: {missing[0]!r} is missing, and there is no 'like'")

    def figure(field: str, unit: float, default: float | None) -> Any:
        if field not in figures:
            return default
        return _positive(where, field, figures[field]) * unit

    link = figures.get("link")
    if link not in (None, *_LINKS):
        raise ConfigError(f"{where}: link={link!r} is not known; known are {', '.join(_LINKS)}")
    wires: Interconnect = base.interconnect if base else NVLink(0.0)
    rate = figure("link_gb_s", 1e9, getattr(wires, "link_bytes_s", None))
    if link is not None:
        kinds: dict[str, Interconnect] = {
            "nvlink": NVLink(rate),
            "pcie": NVLink(rate, latency_us=15.0, ring_us=20.0, direct=False),
            "ici-2d": ICI(rate, 2, 16),
            "ici-3d": ICI(rate, 3, 4),
        }
        wires = kinds[link]
    elif isinstance(wires, NVLink | ICI):
        wires = replace(wires, link_bytes_s=rate)
    usual = base.efficiency if base else (_TPU_PROGRAM if isinstance(wires, ICI) else _GPU)
    return Hardware(
        name,
        figure("memory_gb", 1e9, base.memory_bytes if base else None),
        figure("bandwidth_gb_s", 1e9, base.bandwidth_bytes_s if base else None),
        figure("bf16_tflops", 1e12, base.flops if base else None),
        figure("fp8_tflops", 1e12, base.low_precision_flops if base else None),
        wires,
        replace(usual, **_fractions(where, figures.get("efficiency", {}))),
        where,
    )


def _fractions(where: str, given: Any) -> dict[str, float]:
    known = list(Efficiency.__dataclass_fields__)
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: efficiency={given!r} is not an object")
    fractions = {}
    for field, value in given.items():
        name = _renamed(where, field)
        if name not in known:
            raise ConfigError(f"{where}: unknown efficiency {field!r}; known are {', '.join(known)}")
        fractions[name] = _positive(where, field, value, zero=name.endswith("_us"))
    return fractions


def _renamed(where: str, field: str) -> str:
    """Returns the new name of a field of ``efficiency``; old names work for one release, with a warning."""
    new = field.replace("narrow_", "low_precision_")
    if new != field:
        log.warning("%s: efficiency %s is now called %s", where, field, new)
    return new


_LEAST_FIGURE, _MOST_FIGURE = 1e-9, 1e15  # of anything, in its unit: further ones are slips


def _positive(where: str, field: str, value: Any, *, zero: bool = False) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and (_LEAST_FIGURE <= value <= _MOST_FIGURE or (zero and value == 0))):
        raise ConfigError(
            f"{where}: {field}={repr(value)[:40]} is not a positive number, "
            f"{_LEAST_FIGURE:g} to {_MOST_FIGURE:g}"
        )
    return float(value)
