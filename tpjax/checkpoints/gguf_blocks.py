"""GGUF tensors of the types Q8_0 and Q4_0, read as they are stored: 32 inputs of an output share a scale."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from tpjax.checkpoints.gguf import GGUFFile
from tpjax.checkpoints.quantized import Part, check_scales
from tpjax.checkpoints.source import TensorInfo, shown, to_box
from tpjax.errors import CheckpointError
from tpjax.layers.weights import WeightFormat

_BLOCK = 32  # inputs
_FLOATS = ("F32", "F16", "BF16", "F64")
_SCALE_BYTES = 2  # of the float16 that a block begins with
_FORMATS = {
    "Q8_0": WeightFormat(jnp.dtype(jnp.int8), _BLOCK, jnp.dtype(jnp.float16)),
    "Q4_0": WeightFormat(jnp.dtype(jnp.int4), _BLOCK, jnp.dtype(jnp.float16)),
}


class GGUFBlocks:
    """The tensors of a GGUF file: dequantised, and some of them as they are stored.

    Attributes:
        tensors: those of the file.
        formats: the format of each tensor that :meth:`read_part` reads.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.tensors: Mapping[str, TensorInfo] = file.tensors
        kinds = {name: file.quantization(name) for name, info in file.tensors.items() if len(info.shape) > 1}
        self.formats: Mapping[str, WeightFormat] = {
            name: _FORMATS[kind] for name, kind in kinds.items() if kind in _FORMATS
        }

    def read(
        self, name: str, index: tuple[slice, ...] | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads a tensor or a box of it, dequantised; see ``TensorSource.read``.

        Raises:
            CheckpointError: it has no finite number where it is quantised: a scale is none.
        """
        values = self._file.read(name, index, memory)
        if self._file.quantization(name) in _FLOATS or np.isfinite(values).all():
            return values
        bounds = to_box(self.tensors[name].shape, index)
        first = np.argwhere(~np.isfinite(values))[0]
        place = [start + int(at) for (start, _), at in zip(bounds, first, strict=True)]
        raise CheckpointError(
            f"{self._file.file_of(name)}: tensor {shown(name)} has a scale that is no finite number: "
            f"the value at {place} is {values[tuple(first)]}"
        )

    def read_part(self, name: str, part: Part, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a box of stored values or of scales; see ``QuantizedSource.read_part``."""
        *lead, columns = index
        if part == "scales":
            blocks = self._file.read_blocks(name, index)
            scales = np.ascontiguousarray(blocks[..., :_SCALE_BYTES]).view(np.float16)[..., 0]
            check_scales(scales, index, f"{self._file.file_of(name)}: tensor {shown(name)}")
            return scales
        groups = slice(columns.start // _BLOCK, -(-columns.stop // _BLOCK))
        blocks = self._file.read_blocks(name, (*lead, groups))
        stored = blocks[..., _SCALE_BYTES:]
        if self._file.quantization(name) == "Q4_0":  # the first half of a block has the low bits
            stored = np.concatenate([stored & 15, stored >> 4], axis=-1) - np.uint8(8)
        values = stored.view(np.int8).reshape(*blocks.shape[:-2], -1)
        first = groups.start * _BLOCK
        return values[..., columns.start - first : columns.stop - first]
