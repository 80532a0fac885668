"""How weights are kept in 8 or 4 bits, as a configuration alone says: no tensor is there to tell."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from tpjax.checkpoints import orbax
from tpjax.checkpoints.canonical import ENDS
from tpjax.checkpoints.opening import open_checkpoint, read_quantization
from tpjax.checkpoints.skipped import matcher_of
from tpjax.config import ModelConfig
from tpjax.families.quantization import Quantization
from tpjax.families.registry import FAMILIES
from tpjax.families.tensor_names import WeightMap
from tpjax.layers.weights import FormatOf, WeightFormat

_BF16, _F16, _F32 = (jnp.dtype(kind) for kind in (jnp.bfloat16, jnp.float16, jnp.float32))
_E4M3, _E2M1 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float4_e2m1fn)


def declared_formats(path: Path, config: ModelConfig) -> FormatOf | None:
    """Returns how canonical tensors of a checkpoint, or of a bare ``config.json``, are kept.

    Args:
        path: a directory or a file that :func:`tpjax.checkpoints.opening.read_config` takes.
        config: its architecture.

    Returns:
        ``None`` if they are not quantised.

    Raises:
        ConfigError: as :func:`formats_of`.
    """
    if path.suffix.lower() == ".gguf":
        return open_checkpoint(path).source.format_of
    quantization = read_quantization(path)
    if quantization is None:
        return None
    names = WeightMap() if orbax.is_orbax(path) else FAMILIES[config.model_type].names(config)
    return formats_of(quantization, names)


def formats_of(quantization: Quantization, names: WeightMap) -> FormatOf:
    """Returns how canonical tensors are kept that are quantised in one way.

    Dtypes of scales, which no configuration has, are those that the formats' own tools write. Embedding and
    head count as not quantised, as nearly everywhere.

    Args:
        quantization: the way.
        names: the checkpoint's names.

    Raises:
        ConfigError: an expression for modules that are quantised, or are not, is none.
    """
    kept, is_skipped = _format_of(quantization), matcher_of(quantization.skipped)
    is_target = matcher_of(quantization.targets or ("re:",))

    def format_of(canonical: str) -> WeightFormat | None:
        if canonical in ENDS or (quantization.method == "mxfp4" and ".experts." not in canonical):
            return None
        module = names.locate(canonical, names.prefixes[0]).name.removesuffix(".weight")
        return kept if is_target(module) and not is_skipped(module) else None

    return format_of


def _format_of(quantization: Quantization) -> WeightFormat:
    group = quantization.block[1] if quantization.block is not None and quantization.block_given else None
    integer = jnp.dtype(jnp.int4 if quantization.bits == 4 else jnp.int8)
    match quantization.method:
        case "fp8" | "fbgemm_fp8":
            return WeightFormat(_E4M3, group, _F32)
        case "modelopt":
            exponents = quantization.block == (1, 32)
            return WeightFormat(
                _E4M3 if quantization.bits == 8 else _E2M1, group, _BF16 if exponents else _F32
            )
        case "mxfp4":
            return WeightFormat(_E2M1, group, _BF16)
        case "gptq" | "awq":
            return WeightFormat(integer, group, _F16, zeros=True)
        case "compressed-tensors":
            values = integer if not quantization.is_float else _E4M3 if quantization.bits == 8 else _E2M1
            wide = group is None or (values == _E2M1 and group == 16)
            return WeightFormat(values, group, _F32 if wide else _BF16, quantization.zeros)
