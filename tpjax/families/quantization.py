"""Reads how a checkpoint's weights are quantised from ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tpjax.config import brief, check_size
from tpjax.errors import ConfigError
from tpjax.families.config_reader import Fields
from tpjax.families.unread import QUANTIZATION_NUMERIC

METHODS = ("fp8", "mxfp4")

# Which tensors are quantised, and the scales' dtype, are read off the tensors themselves.
_SEEN_IN_TENSORS = frozenset(
    {"dequantize", "ignored_layers", "modules_to_convert", "modules_to_not_convert", "scale_fmt"}
)

_BITSANDBYTES_SWITCHES = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's weights are quantised. They are dequantised while they are loaded.

    Attributes:
        method: ``fp8`` (float8 e4m3 with a scale per block: DeepSeek-V3 report, section 3.3) or ``mxfp4``
            (OCP Microscaling Formats 1.0: 32 values of FP4 e2m1 with a scale of e8m0).
        block: ``fp8``: rows and columns that share a scale.
    """

    method: Literal["fp8", "mxfp4"]
    block: tuple[int, int] = (128, 128)

    @property
    def described(self) -> str:
        """Names the format, for an error message."""
        if self.method == "mxfp4":
            return "MXFP4, 4 bits with a scale for 32 values"
        return f"float8 with a scale for each block of {self.block[0]} × {self.block[1]}"


def quantization_of(fields: Fields) -> Quantization | None:
    """Reads ``quantization_config``; returns ``None`` if there is none.

    Raises:
        ConfigError: the method, or a setting that changes what the bytes mean, is not supported.
    """
    settings = fields.section("quantization_config")
    if not settings.raw:
        return None
    method = settings.get("quant_method")
    if method == "bitsandbytes" and not any(settings.get(name, False) for name in _BITSANDBYTES_SWITCHES):
        return None  # switched off: transformers loads plain weights then
    if method == "mxfp4":
        settings.finish(_SEEN_IN_TENSORS, QUANTIZATION_NUMERIC)
        return Quantization("mxfp4")
    if method != "fp8":
        raise ConfigError(
            f"{settings.where}: quant_method={brief(method)} is not supported; "
            f"supported are {', '.join(METHODS)}"
        )
    # a static scheme has scales of the activations too; the others define what a stored byte means
    for name, known in (("activation_scheme", "dynamic"), ("fmt", "e4m3"), ("expert_dtype", "fp8")):
        value = settings.get(name, known)
        if value != known:
            raise ConfigError(f"{settings.where}: {name}={brief(value)} is not supported: use {known}")
    block = settings.nullable("weight_block_size", [128, 128])
    if not isinstance(block, list | tuple) or len(block) != 2:
        raise ConfigError(
            f"{settings.where}: weight_block_size={brief(block)} is not supported: use two sizes"
        )
    for size in block:
        check_size("weight_block_size", size)
    settings.finish(_SEEN_IN_TENSORS, QUANTIZATION_NUMERIC)
    return Quantization("fp8", (block[0], block[1]))
