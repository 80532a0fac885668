"""Dequantises safetensors weights box by box as they are read.

The arithmetic is exact: every product of a stored value and its scale is computed in float32, where a
power-of-two scale loses nothing. For a device's slice only the blocks and scales that it needs are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from tpjax.checkpoints.source import TensorInfo, TensorSource, lookup, shown, to_box
from tpjax.errors import CheckpointError
from tpjax.families.quantization import Quantization

_F32 = np.dtype(np.float32)
_BYTES = np.arange(256, dtype=np.uint8)
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# Values by byte: the look-up converts 540 million values a second, ml_dtypes 170 million.
_E4M3_VALUES = _BYTES.view(_E4M3).astype(_F32)
_SCALE_DTYPES = tuple(map(np.dtype, (_F32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu)))

_FP4_PER_GROUP = 32
_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_VALUES = np.array([*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES)], _F32)
# The two values of a byte, the low half first, in one complex number: one look-up gives both.
_FP4_PAIRS = np.stack([_FP4_VALUES[_BYTES & 15], _FP4_VALUES[_BYTES >> 4]], axis=1).view(np.complex64)[:, 0]


def dequantized(source: TensorSource, quantization: Quantization, where: Path) -> TensorSource:
    """Returns the checkpoint's tensors with quantised ones as float32 of their logical shape.

    Args:
        source: the tensors as they are stored.
        quantization: how they are quantised.
        where: path of the checkpoint in error messages.

    Raises:
        CheckpointError: values and scales do not fit, or one of the two is missing.
    """
    if quantization.method == "fp8":
        return _BlockScaledSource(source, quantization.block, where)
    return _MXFP4Source(source, where)


class _BlockScaledSource:
    """Each float8 tensor ``N`` is multiplied, block by block, by the tensor ``N_scale_inv``.

    Blocks run along the last two axes; those at the lower and right edge may be smaller.
    """

    def __init__(self, source: TensorSource, block: tuple[int, int], where: Path) -> None:
        self._source = source
        self._block = block
        self._where = where
        self._scales = {
            name: f"{name}_scale_inv" for name in source.tensors if f"{name}_scale_inv" in source.tensors
        }
        for name, info in source.tensors.items():
            if name in self._scales or info.dtype == _E4M3:
                self._check(name, info)
        scales = set(self._scales.values())
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(info.shape, _F32) if name in self._scales else info
            for name, info in source.tensors.items()
            if name not in scales
        }

    def _check(self, name: str, info: TensorInfo) -> None:
        tensor = f"{self._where}: tensor {shown(name)}"
        if name not in self._scales:
            raise CheckpointError(f"{tensor} is float8, but {shown(f'{name}_scale_inv')} is missing")
        scales = self._source.tensors[self._scales[name]]
        if len(info.shape) < 2:
            raise CheckpointError(f"{tensor} of shape {list(info.shape)} has no rows and columns to scale")
        if info.dtype != _E4M3 or scales.dtype not in _SCALE_DTYPES:
            raise CheckpointError(
                f"{tensor} of {info.dtype} with scales of {scales.dtype} is not supported: use {_E4M3} with "
                f"scales of {', '.join(map(str, _SCALE_DTYPES))}"
            )
        grid = (-(-size // step) for size, step in zip(info.shape[-2:], self._block, strict=True))
        expected = (*info.shape[:-2], *grid)
        if scales.shape != expected:
            raise CheckpointError(
                f"{tensor} of shape {list(info.shape)} in blocks of {list(self._block)} needs scales of "
                f"shape {list(expected)}, {shown(self._scales[name])} has {list(scales.shape)}"
            )

    def read(
        self, name: str, index: tuple[slice, ...] | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads a tensor or a box of it; see `TensorSource.read`."""
        info = lookup(self.tensors, name, self._where)
        if name not in self._scales:
            return self._source.read(name, index, memory)
        *leading, rows, columns = to_box(info.shape, index)
        box = [slice(*bounds) for bounds in (*leading, rows, columns)]
        values = _E4M3_VALUES[self._source.read(name, tuple(box)).view(np.uint8)]
        height, width = self._block
        first_row, first_column = rows[0] // height, columns[0] // width
        grid = [
            *box[:-2],
            slice(first_row, -(-rows[1] // height)),
            slice(first_column, -(-columns[1] // width)),
        ]
        scales = self._source.read(self._scales[name], tuple(grid)).astype(_F32)
        scales = scales[..., np.arange(*columns) // width - first_column]
        for block in range(scales.shape[-2]):
            # one row of blocks at a time: scales broadcast to the full tensor would double the memory
            start, stop = (max(0, (first_row + block + side) * height - rows[0]) for side in (0, 1))
            values[..., start:stop, :] *= scales[..., block : block + 1, :]
        return values


class _MXFP4Source:
    """Tensors ``N_blocks`` [E, out, groups, 16] and ``N_scales`` [E, out, groups] as ``N`` [E, in, out].

    A byte holds two neighbours along the input axis, and 32 values share the scale ``2**(scale - 127)``. The
    result is transposed, as transformers keeps the experts of gpt-oss.
    """

    def __init__(self, source: TensorSource, where: Path) -> None:
        self._source = source
        self._where = where
        tensors = dict(source.tensors)
        self._quantised = set()
        for stored in source.tensors:
            name = stored.removesuffix("_blocks")
            if name != stored:
                self._quantised.add(name)
                tensors[name] = TensorInfo(self._shape(name), _F32, columns_first=True)
                del tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        self.tensors: Mapping[str, TensorInfo] = tensors

    def _shape(self, name: str) -> tuple[int, ...]:
        blocks, scales = (self._source.tensors.get(f"{name}_{part}") for part in ("blocks", "scales"))
        tensor = f"{self._where}: tensor {shown(f'{name}_blocks')}"
        if blocks is None or scales is None:
            raise CheckpointError(f"{tensor} has no {shown(f'{name}_scales')} beside it")
        if name in self._source.tensors:
            raise CheckpointError(f"{tensor} and {shown(name)} are both there: one of them is to be used")
        if blocks.dtype != np.uint8 or scales.dtype != np.uint8:
            raise CheckpointError(
                f"{tensor} is {blocks.dtype} and its scales {scales.dtype}: both must be uint8"
            )
        if len(blocks.shape) != 4 or blocks.shape[-1] != _FP4_PER_GROUP // 2:
            raise CheckpointError(
                f"{tensor} has shape {list(blocks.shape)}, not [experts, rows, groups, {_FP4_PER_GROUP // 2}]"
            )
        if scales.shape != blocks.shape[:-1]:
            raise CheckpointError(
                f"{tensor} of shape {list(blocks.shape)} needs scales of shape {list(blocks.shape[:-1])}, "
                f"{shown(f'{name}_scales')} has {list(scales.shape)}"
            )
        experts, rows, groups, _ = blocks.shape
        return experts, groups * _FP4_PER_GROUP, rows

    def read(
        self, name: str, index: tuple[slice, ...] | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads a tensor or a box of it; see `TensorSource.read`."""
        info = lookup(self.tensors, name, self._where)
        if name not in self._quantised:
            return self._source.read(name, index, memory)
        experts, inputs, outputs = to_box(info.shape, index)
        first, last = inputs[0] // _FP4_PER_GROUP, -(-inputs[1] // _FP4_PER_GROUP)
        groups = (slice(*experts), slice(*outputs), slice(first, last))
        pairs = _FP4_PAIRS[self._source.read(f"{name}_blocks", groups)]
        exponents = self._source.read(f"{name}_scales", groups).view(ml_dtypes.float8_e8m0fnu)
        values = pairs.view(_F32)
        values *= exponents.astype(_F32)[..., None]
        offset = first * _FP4_PER_GROUP
        rows = values.reshape(*values.shape[:2], last * _FP4_PER_GROUP - offset)
        return np.ascontiguousarray(rows[:, :, inputs[0] - offset : inputs[1] - offset].swapaxes(1, 2))
