"""Writes weights of 8 or 4 bits as the library compressed-tensors stores them.

vLLM and transformers read that layout, and so does :mod:`tpjax.checkpoints.quantized`
(https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpjax.checkpoints.kept import Kept
from tpjax.checkpoints.rounding import RoundedSource
from tpjax.layers.weights import WeightFormat, dtype_bits
from tpjax.sharding import SCALE_SUFFIX

PACKED_SUFFIX, SHAPE_SUFFIX = "_packed", "_shape"
_WORD_BITS = 32


def settings_of(kept: WeightFormat, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the ``quantization_config`` of weights of one format, without zero points.

    Integers are ``pack-quantized``, also those of 8 bits: as ``int-quantized`` vLLM would want activations
    of 8 bits too.

    Args:
        kept: the format.
        ignored: the linear layers that are not quantised.
    """
    weights = {
        "num_bits": dtype_bits(kept.values),
        "type": "float" if _is_float(kept) else "int",
        "strategy": "channel" if kept.group is None else "group",
        "group_size": kept.group,
        "symmetric": True,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if _is_float(kept) else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(ignored),
    }


def rounded_tensors(source: RoundedSource, name: str, one: Kept) -> dict[str, np.ndarray]:
    """Rounds a tensor [out, in] and returns the tensors that are stored for it.

    Args:
        source: rounds the tensor.
        name: its name.
        one: its shape and format; ``stored_group`` is that of :func:`canonical`.
    """
    rows, columns = (slice(0, size) for size in one.shape)
    values = source.read(name, (rows, columns))
    of_scales = (rows,) if one.stored_group is None else (rows, slice(0, one.groups))
    scales = source.read(name + SCALE_SUFFIX, of_scales).reshape(one.shape[0], -1)
    if _is_float(one.kept):
        return {name: values, name + SCALE_SUFFIX: scales}
    return {
        name + PACKED_SUFFIX: _packed(values, dtype_bits(one.kept.values)),
        name + SCALE_SUFFIX: scales,
        name + SHAPE_SUFFIX: np.array(one.shape, np.int64),
    }


def canonical(one: Kept, shape: tuple[int, ...] | None = None) -> Kept:
    """Returns the same weight, or one of another shape in its format, with the scales of whole groups."""
    one = one if shape is None else replace(one, shape=(shape[0], shape[1]))
    return replace(one, stored_group=None if one.kept.group is None else one.group)


def _is_float(kept: WeightFormat) -> bool:
    return bool(jnp.issubdtype(kept.values, jnp.floating))


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Adds half their range to integers [out, in], and packs them into words of 32 bits, the first lowest."""
    count = _WORD_BITS // bits
    rows, columns = values.shape
    numbers = np.zeros((rows, -(-columns // count) * count), np.uint8)
    np.add(values.view(np.uint8), np.uint8(1 << bits - 1), out=numbers[:, :columns])  # modulo 256
    if bits == 4:
        numbers = numbers[:, ::2] | numbers[:, 1::2] << 4
    return np.ascontiguousarray(numbers).view("<i4")
