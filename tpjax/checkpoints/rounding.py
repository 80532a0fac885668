"""Rounds weights to 8 bits while they are read: int8 or float8 e4m3, with one scale for each output.

The scale of an output is the largest magnitude among its weights over the largest number of the dtype, so
that no weight is clipped; values are rounded to nearest, ties to even. It is taken over all inputs of the
checkpoint's matrix, whatever part of them a device holds: every tp reads the same numbers.

A process reads the rows of a matrix in full, once. Two cases read more than without rounding: of a
row-parallel matrix, a process that holds a part of the inputs reads the others too; and a matrix that the
file stores input after input (GPT-2's) is read twice, since no part of it before the last has the scales.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from tpjax.checkpoints.assemble import Canonical
from tpjax.checkpoints.blocks import copy_into
from tpjax.checkpoints.source import shown
from tpjax.config import Quantize
from tpjax.errors import CheckpointError
from tpjax.sharding import SCALE_SUFFIX

_DTYPES: dict[Quantize, np.dtype] = {
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
_LARGEST: dict[Quantize, float] = {"int8": 127.0, "fp8": 448.0}
_ROUNDED_ELEMENTS = 1 << 15  # at once: in the cache, and in memory that is not given back in between
_MEASURED_ELEMENTS = 1 << 20  # read at once where scales alone are wanted


class RoundedSource:
    """A checkpoint's tensors by canonical names, some of them rounded, with their scales beside them.

    Args:
        source: the tensors as they are.
        kind: what they are rounded to.
        shapes: outputs and inputs of each tensor ``N`` to be rounded; its scales are the tensor ``N_scale``.
        where: path of the checkpoint in error messages.
    """

    def __init__(
        self, source: Canonical, kind: Quantize, shapes: Mapping[str, tuple[int, ...]], where: Path
    ) -> None:
        self._source = source
        self._kind = kind
        self._shapes = shapes
        self._where = where
        # NaN: not known yet. Threads that find the same rows unknown write the same numbers.
        self._scales = {name: np.full(shape[0], np.nan, np.float32) for name, shape in shapes.items()}
        self._locks = {name: threading.Lock() for name in shapes}

    def itemsize(self, name: str) -> int:
        """Returns the bytes of an element while it is rounded: blocks are as small as those of float32."""
        known = name in self._shapes or self._weight_of(name)
        return 4 if known else self._source.itemsize(name)

    def outer_axis(self, name: str) -> int:
        """Returns the axis along which a tensor is stored slice after slice."""
        return 0 if self._weight_of(name) else self._source.outer_axis(name)

    def read(self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None) -> np.ndarray:
        """Reads a box of a tensor: its rounded values, or its scales.

        Raises:
            CheckpointError: a weight is not a number, or infinite.
        """
        if weight := self._weight_of(name):
            return self._scales_of(weight, index[0])
        if name not in self._shapes:
            return self._source.read(name, index, memory)
        rows, columns = index
        inputs = slice(0, self._shapes[name][1])
        known = self._scales[name][rows]
        if self._source.outer_axis(name) == 1 or not np.isnan(known).any():
            scales = self._scales_of(name, rows)
            values = _float32(self._source.read(name, index))
        else:
            values = _float32(self._source.read(name, (rows, inputs)))
            scales = self._learn(name, rows, _largest(values))
            values = values[:, columns]
        return self._rounded(values, scales, memory)

    def _weight_of(self, name: str) -> str | None:
        """Returns the tensor that a tensor of scales belongs to; ``None`` if it is none."""
        weight = name.removesuffix(SCALE_SUFFIX)
        return weight if weight != name and weight in self._shapes else None

    def _scales_of(self, name: str, rows: slice) -> np.ndarray:
        """Returns the scales of some rows; those not known yet are read for."""
        with self._locks[name]:
            known = self._scales[name]
            if self._source.outer_axis(name) == 1:
                if np.isnan(known[0]):
                    self._learn(name, slice(0, len(known)), self._largest_by_columns(name))
            else:
                unknown = rows.start + np.flatnonzero(np.isnan(known[rows]))
                step = max(1, _MEASURED_ELEMENTS // self._shapes[name][1])
                for start in range(unknown[0], unknown[-1] + 1, step) if unknown.size else ():
                    part = slice(start, min(start + step, int(unknown[-1]) + 1))
                    whole = (part, slice(0, self._shapes[name][1]))
                    self._learn(name, part, _largest(_float32(self._source.read(name, whole))))
            return known[rows]

    def _largest_by_columns(self, name: str) -> np.ndarray:
        """Returns the largest magnitude of each row of a tensor that is stored column after column."""
        outputs, inputs = self._shapes[name]
        step, largest = max(1, _MEASURED_ELEMENTS // outputs), np.zeros(outputs, np.float32)
        for start in range(0, inputs, step):
            box = (slice(0, outputs), slice(start, min(start + step, inputs)))
            np.maximum(largest, _largest(_float32(self._source.read(name, box))), out=largest)
        return largest

    def _learn(self, name: str, rows: slice, largest: np.ndarray) -> np.ndarray:
        """Keeps and returns the scales of rows with these largest magnitudes."""
        if not np.isfinite(largest).all():
            row = rows.start + int(np.flatnonzero(~np.isfinite(largest))[0])
            raise CheckpointError(
                f"{self._where}: tensor {shown(name)} has a weight in row {row} that is no finite number: "
                f"it has no {self._kind} scale"
            )
        scales: np.ndarray = largest / np.float32(_LARGEST[self._kind])
        self._scales[name][rows] = scales
        return scales

    def _rounded(self, values: np.ndarray, scales: np.ndarray, memory: np.ndarray | None) -> np.ndarray:
        dtype = _DTYPES[self._kind]
        # the smallest normal number stands in for the scale of a row of zeros
        inverse = (1 / np.maximum(scales, np.finfo(np.float32).tiny))[:, None]
        if memory is None or (memory.shape, memory.dtype) != (values.shape, dtype):
            memory = np.empty(values.shape, dtype)
        step = max(1, _ROUNDED_ELEMENTS // values.shape[1])
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            scaled = values[rows] * inverse[rows]
            if self._kind == "int8":
                np.copyto(memory[rows], np.rint(scaled, out=scaled), casting="unsafe")
            else:
                np.copyto(memory[rows].view(np.uint8), float8_bits(scaled), casting="unsafe")
        return memory


def float8_bits(values: np.ndarray) -> np.ndarray:
    """Rounds float32 numbers of magnitude up to 448 to float8 e4m3, ties to even.

    ml_dtypes casts 140 million numbers a second, and holds Python's lock: this is as exact, and does not.

    Returns:
        The bits of each number, uint32.
    """
    bits = values.view(np.uint32)
    magnitudes = bits & 0x7FFF_FFFF
    normal = ((magnitudes + 0x7_FFFF + (magnitudes >> 20 & 1)) >> 20) - (127 - 7 << 3)
    subnormal = np.rint(np.abs(values) * 2**9).astype(np.uint32)  # below 2**-6 they are 2**-9 apart
    out: np.ndarray = np.where(magnitudes < 127 - 6 << 23, subnormal, normal) | (bits >> 24 & 0x80)
    return out


def _float32(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.float32:
        return values
    out = np.empty(values.shape, np.float32)
    copy_into(out, values)
    return out


def _largest(values: np.ndarray) -> np.ndarray:
    """Returns the largest magnitude of each row; NaN if a number of the row is."""
    largest: np.ndarray = np.maximum(values.max(axis=1), -values.min(axis=1))
    return largest
