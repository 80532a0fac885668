"""Rounds weights to 8 or 4 bits while they are read.

int8 and float8 e4m3 have one scale for each output, int4 one for each 128 inputs of an output. A scale is
taken over all its inputs in the checkpoint's matrix, whatever part of them a device holds: every tp reads the
same numbers. Values are rounded to nearest, ties to even.

A process reads the rows of a matrix in full, once. Two cases read more than without rounding: of a
row-parallel matrix with a scale for each output, a process that holds a part of the inputs reads the others
too; and such a matrix that the file stores input after input (GPT-2's) is read twice, since no part of it
before the last has the scales. Scales are kept until the last are loaded: 2 bytes for 128 weights of int4.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from tpjax.checkpoints.assemble import Canonical
from tpjax.checkpoints.blocks import copy_into
from tpjax.checkpoints.kept import Kept, weight_of
from tpjax.checkpoints.quantized import E4M3_VALUES
from tpjax.checkpoints.source import shown
from tpjax.errors import CheckpointError

_ROUNDED_ELEMENTS = 1 << 15  # at once: in the cache, and in memory that is not given back in between
_MEASURED_ELEMENTS = 1 << 20  # read at once where scales alone are wanted
_FLOAT8_FACTORS = np.exp2(np.arange(8, dtype=np.float32) / 8)
_TINY = np.finfo(np.float32).tiny  # stands in for the scale of zeros


class RoundedSource:
    """A checkpoint's tensors by canonical names, some of them rounded, with their scales beside them.

    Args:
        source: the tensors as they are.
        kept: the tensors ``N`` to be rounded; the scales of each are the tensor ``N_scale``.
        where: path of the checkpoint in error messages.
    """

    def __init__(self, source: Canonical, kept: Mapping[str, Kept], where: Path) -> None:
        self._source = source
        self._quantized = kept
        self._where = where
        # NaN: not known yet. Threads that find the same rows unknown write the same numbers.
        self._scales = {
            name: np.full((one.shape[0], one.groups), np.nan, one.kept.scales) for name, one in kept.items()
        }
        self._locks = {name: threading.Lock() for name in kept}

    def itemsize(self, name: str) -> int:
        """Returns the bytes of an element while it is rounded: blocks are as small as those of float32."""
        return 4 if weight_of(name)[0] in self._quantized else self._source.itemsize(name)

    def outer_axis(self, name: str) -> int:
        """Returns the axis along which a tensor is stored slice after slice."""
        weight, suffix = weight_of(name)
        return 0 if suffix and weight in self._quantized else self._source.outer_axis(name)

    def read(self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None) -> np.ndarray:
        """Reads a box of a tensor: its rounded values, or its scales.

        Raises:
            CheckpointError: a weight is not a number, or infinite.
        """
        weight, suffix = weight_of(name)
        if suffix and weight in self._quantized:
            return self._quantized[weight].spread(
                lambda rows, groups: self._scales_of(weight, rows, groups), index
            )
        if name not in self._quantized:
            return self._source.read(name, index, memory)
        one, (rows, columns) = self._quantized[name], index
        groups = slice(columns.start // one.group, -(-columns.stop // one.group))
        known = self._scales[name][rows, groups]
        if self._twice(name) or not np.isnan(known).any():
            known = self._scales_of(name, rows, groups)
            values = _float32(self._source.read(name, index))
        else:
            values = self._whole_groups(name, rows, groups)
            known = self._learn(name, rows, groups, values)
            first = groups.start * one.group
            values = values[:, columns.start - first : columns.stop - first]
        return self._rounded(one, values, columns.start - groups.start * one.group, known, memory)

    def _twice(self, name: str) -> bool:
        """Whether a tensor is read for its scales, and again for its values."""
        return self._source.outer_axis(name) == 1 and self._quantized[name].groups == 1

    def _whole_groups(self, name: str, rows: slice, groups: slice) -> np.ndarray:
        one = self._quantized[name]
        columns = slice(groups.start * one.group, min(groups.stop * one.group, one.shape[1]))
        return _float32(self._source.read(name, (rows, columns)))

    def _scales_of(self, name: str, rows: slice, groups: slice) -> np.ndarray:
        """Returns the scales of some rows and groups; those not known yet are read for."""
        with self._locks[name]:
            known = self._scales[name]
            if self._twice(name):
                if np.isnan(known[0, 0]):
                    self._learn_by_columns(name)
            else:
                unknown = rows.start + np.flatnonzero(np.isnan(known[rows, groups]).any(axis=1))
                width = (groups.stop - groups.start) * self._quantized[name].group
                step = max(1, _MEASURED_ELEMENTS // width)
                for start in range(unknown[0], unknown[-1] + 1, step) if unknown.size else ():
                    part = slice(start, min(start + step, int(unknown[-1]) + 1))
                    self._learn(name, part, groups, self._whole_groups(name, part, groups))
            return known[rows, groups]

    def _learn_by_columns(self, name: str) -> None:
        """Finds the scale of each row of a tensor that is stored column after column: none is clipped."""
        outputs, inputs = self._quantized[name].shape
        step, largest = max(1, _MEASURED_ELEMENTS // outputs), np.zeros(outputs, np.float32)
        for start in range(0, inputs, step):
            box = (slice(0, outputs), slice(start, min(start + step, inputs)))
            np.maximum(largest, np.abs(_float32(self._source.read(name, box))).max(axis=1), out=largest)
        self._keep(
            name, slice(0, outputs), slice(0, 1), largest[:, None] / _grid(self._quantized[name]).largest
        )

    def _learn(self, name: str, rows: slice, groups: slice, values: np.ndarray) -> np.ndarray:
        """Finds, keeps and returns the scales of some rows and groups with these values."""
        one = self._quantized[name]
        if short := -values.shape[1] % one.group:  # the last group: zeros change no scale
            values = np.pad(values, ((0, 0), (0, short)))
        grouped = values.reshape(-1, one.group)
        scales = np.empty(len(grouped), one.kept.scales)
        step = max(1, _ROUNDED_ELEMENTS // one.group)
        for start in range(0, len(grouped), step):
            part = slice(start, start + step)
            with np.errstate(invalid="ignore"):  # of weights that are no numbers
                scales[part] = _grid(one).scales_of(grouped[part], one.kept.scales)
        return self._keep(name, rows, groups, scales.reshape(values.shape[0], -1))

    def _keep(self, name: str, rows: slice, groups: slice, scales: np.ndarray) -> np.ndarray:
        finite = np.isfinite(scales.astype(np.float32)).all(axis=1)
        if not finite.all():
            row = rows.start + int(np.flatnonzero(~finite)[0])
            raise CheckpointError(
                f"{self._where}: tensor {shown(name)} has a weight in row {row} that is no finite number: "
                f"it has no {_grid(self._quantized[name]).name} scale"
            )
        self._scales[name][rows, groups] = scales
        return scales

    def _rounded(
        self, one: Kept, values: np.ndarray, offset: int, scales: np.ndarray, memory: np.ndarray | None
    ) -> np.ndarray:
        """Rounds a box of values that begins ``offset`` columns into the first group of ``scales``."""
        grid = _grid(one)
        if memory is None or (memory.shape, memory.dtype) != (values.shape, grid.dtype):
            memory = np.empty(values.shape, grid.dtype)
        inverse = _inverse(scales.astype(np.float32))
        step = max(1, _ROUNDED_ELEMENTS // values.shape[1])
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            factors = inverse[rows]
            if factors.shape[1] > 1:
                factors = np.repeat(factors, one.group, axis=1)[:, offset : offset + values.shape[1]]
            np.copyto(memory[rows].view(grid.bits), grid.nearest(values[rows] * factors), casting="unsafe")
        return memory


class _Integers:
    """int8 or int4 and how weights are rounded to them: none is clipped.

    SmolLM2-135M's perplexity (``scripts/perplexity.py``, windows of 512) is 0.6 ± 0.2% over that of the
    weights as they are in int8, and as much with a scale for each 128 inputs (0.5 ± 0.2%); on a text of six
    times the length it is 0.0 ± 0.1%. In int4 it is 34 ± 2%, and no choice of scales that needs no data comes
    near 8%: those with the least sum of cubed errors 34%, of fourth powers 40%, of squares weighted by the
    norm before 55%. With zero points too: 30%, by cubes 28%, as llama.cpp finds them 45%, by half-quadratic
    quantisation (HQQ) 57%. Smaller groups do more: 25% with 64 inputs, 18% with 32.

    Args:
        name: in messages.
        least: the smallest number used; where it has no opposite, the largest magnitude gets it.
        largest: the largest.
    """

    dtype = bits = np.dtype(np.int8)

    def __init__(self, name: str, least: int, largest: int) -> None:
        self.name, self.least, self.largest = name, least, largest

    def scales_of(self, groups: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Returns the scale of each row of ``groups``."""
        largest, least = groups.max(axis=1), groups.min(axis=1)
        if -self.least > self.largest:
            scales: np.ndarray = np.where(largest > -least, largest, least) / np.float32(self.least)
        else:
            scales = np.maximum(largest, -least) / np.float32(self.largest)
        return scales.astype(dtype)

    def nearest(self, scaled: np.ndarray) -> np.ndarray:
        """Returns the nearest of the numbers; overwrites ``scaled``."""
        np.rint(scaled, out=scaled)
        if -self.least == self.largest:  # scales are float32: none is beyond the largest
            return scaled
        return np.clip(scaled, self.least, self.largest, out=scaled)


class _Float8:
    """float8 e4m3 and how weights are rounded to it.

    The scale is one of eight, up to twice that which makes the largest magnitude of an output 448: the
    one with the least squared error, since how far numbers are apart depends on where a power of two falls.
    SmolLM2-135M's perplexity is 1.0% over that of the weights as they are then, 2.4% by the first scale.
    """

    name, largest = "fp8", 448
    dtype, bits = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.uint8)

    def scales_of(self, groups: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Returns the scale of each row of ``groups``."""
        first = np.maximum(groups.max(axis=1), -groups.min(axis=1)) / np.float32(self.largest)
        best, error = first.astype(dtype), np.full(len(groups), np.inf, np.float32)
        for factor in _FLOAT8_FACTORS:
            scales = (first * factor).astype(dtype)
            wide = scales.astype(np.float32)[:, None]
            apart = E4M3_VALUES[self.nearest(groups * _inverse(wide)).astype(np.uint8)] * wide - groups
            squares = np.einsum("gi,gi->g", apart, apart)
            better = squares < error
            best[better], error[better] = scales[better], squares[better]
        return best

    def nearest(self, scaled: np.ndarray) -> np.ndarray:
        """Returns the bits of the nearest numbers."""
        return float8_bits(scaled)


_GRIDS: dict[str, _Integers | _Float8] = {
    "int8": _Integers("int8", -127, 127),
    "int4": _Integers("int4", -8, 7),
    "float8_e4m3fn": _Float8(),
}


def _grid(one: Kept) -> _Integers | _Float8:
    return _GRIDS[one.kept.values.name]


def _inverse(scales: np.ndarray) -> np.ndarray:
    """Returns 1 / scales; those of zeros, and so small that they have none, get that of a tiny number."""
    return 1 / np.where(np.abs(scales) < _TINY, _TINY, scales)


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
