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
from tpjax.checkpoints.source import shown
from tpjax.errors import CheckpointError

_ROUNDED_ELEMENTS = 1 << 15  # at once: in the cache, and in memory that is not given back in between
_MEASURED_ELEMENTS = 1 << 20  # read at once where scales alone are wanted
_FLOAT8_FACTORS = np.exp2(np.arange(8, dtype=np.float32) / 8)
_SAMPLED = 128  # weights of an output by which one of these is chosen, where not all are in memory at once
_TINY = np.finfo(np.float32).tiny  # stands in for the scale of zeros
_EXPONENT = np.uint32(0xFF << 23)  # of a float32
_LEAST_NORMAL = np.uint32(127 - 6 << 23)  # 2**-6: the smallest e4m3 with four digits
_DIGITS = np.uint32(20 << 23)  # float32 has 23 digits behind the first, e4m3 three
_SPLIT = np.float32((1 << 20) + 1)
_BIAS = np.uint32((127 + 20 - 6) << 3)  # the exponent 2**-6 * 2**20, before that of e4m3's subnormal numbers


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
        """Finds the scale of each row of a tensor that is stored column after column."""
        one = self._quantized[name]
        outputs, inputs = one.shape
        step, every = max(1, _MEASURED_ELEMENTS // outputs), -(-inputs // _SAMPLED)
        most, least = np.zeros((2, outputs), np.float32)
        some = []
        for start in range(0, inputs, step):
            box = (slice(0, outputs), slice(start, min(start + step, inputs)))
            values = _float32(self._source.read(name, box))
            np.maximum(most, values.max(axis=1), out=most)
            np.minimum(least, values.min(axis=1), out=least)
            some.append(values[:, -start % every :: every])
        scales = _grid(one).scales_of(most, least, np.concatenate(some, axis=1)).astype(one.kept.scales)
        self._keep(name, slice(0, outputs), slice(0, 1), scales[:, None])

    def _learn(self, name: str, rows: slice, groups: slice, values: np.ndarray) -> np.ndarray:
        """Finds, keeps and returns the scales of some rows and groups with these values."""
        one = self._quantized[name]
        if short := -values.shape[1] % one.group:  # the last group: zeros change no scale
            values = np.pad(values, ((0, 0), (0, short)))
        grouped = values.reshape(-1, one.group)
        scales = np.empty(len(grouped), one.kept.scales)
        step = max(1, _ROUNDED_ELEMENTS // one.group)
        for start in range(0, len(grouped), step):
            part = grouped[start : start + step]
            with np.errstate(invalid="ignore"):  # of weights that are no numbers
                found = _grid(one).scales_of(part.max(axis=1), part.min(axis=1), part)
            scales[start : start + step] = found
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
    """int8 or int4 and how weights are rounded to them.

    None is clipped but, in int4, the opposite of the largest magnitude, by up to one step.

    SmolLM2-135M's perplexity (``scripts/perplexity.py``, windows of 512) is 0.6 ± 0.2% over that of the
    weights as they are in int8, and as much with a scale for each 128 inputs (0.5 ± 0.2%); on a text of six
    times the length it is 0.1 ± 0.1%. In int4 it is 34 ± 2%, and no choice of scales that needs no data comes
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

    def scales_of(self, most: np.ndarray, least: np.ndarray, some: np.ndarray) -> np.ndarray:
        """Returns the scales of groups.

        Args:
            most: largest number of each group.
            least: smallest.
            some: some of the numbers of each: they play no part.
        """
        if -self.least > self.largest:
            return np.where(most > -least, most, least) / np.float32(self.least)
        return np.maximum(most, -least) / np.float32(self.largest)

    def nearest(self, scaled: np.ndarray) -> np.ndarray:
        """Returns the nearest of the numbers; overwrites ``scaled``."""
        np.rint(scaled, out=scaled)
        if -self.least == self.largest:  # scales are float32: none is beyond the largest
            return scaled
        return np.clip(scaled, self.least, self.largest, out=scaled)


class _Float8:
    """float8 e4m3 and how weights are rounded to it.

    The scale is one of eight, up to twice that which makes the largest magnitude of an output 448: the one
    with the least squared error, since how far numbers are apart depends on where powers of two fall. Of
    normally distributed weights the error differs by 1.3% at most, but of those that come from a file of 4
    bits by 14%: SmolLM2-135M's perplexity on help texts is 0.3 ± 0.2% over that of its weights as they are
    then, 1.7 ± 0.2% by the first scale, and no less if 128 weights of an output choose.
    """

    name, largest = "fp8", 448
    dtype, bits = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.uint8)

    def scales_of(self, most: np.ndarray, least: np.ndarray, some: np.ndarray) -> np.ndarray:
        """Returns the scales of groups.

        Args:
            most: largest number of each group.
            least: smallest.
            some: numbers of each group by whose errors a scale is chosen.
        """
        first, magnitudes = np.maximum(most, -least) / np.float32(self.largest), np.abs(some)
        scales = first * _FLOAT8_FACTORS[:, None]
        errors = np.stack([_squared_errors(magnitudes, each) for each in scales])
        return scales[errors.argmin(axis=0), np.arange(len(first))]

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


def _squared_errors(magnitudes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the squared error of rows of ``magnitudes``, rounded to float8 e4m3 by their scales.

    Numbers are split by Veltkamp's product after four binary digits. Below 2**-6 e4m3 has fewer: of weights
    that small in their output, errors do not count.
    """
    scaled = magnitudes * _inverse(scales)[:, None]
    product = scaled * _SPLIT
    rest = product - scaled
    product -= rest  # the first four digits
    product -= scaled
    errors: np.ndarray = np.einsum("gi,gi->g", product, product) * scales**2
    return errors


def float8_bits(values: np.ndarray) -> np.ndarray:
    """Rounds float32 numbers of magnitude up to 448 to float8 e4m3, ties to even.

    A number is added to 2**20 times its power of two, where float32 numbers are as far apart as e4m3's are
    at the number: the addition rounds. Below 2**-6 e4m3's are 2**-9 apart. ml_dtypes casts 140 million
    numbers a second, and holds Python's lock: this is as exact, and does not.

    Returns:
        The bits of each number, uint32.
    """
    sums, powers = np.abs(values), values.view(np.uint32) & _EXPONENT
    np.maximum(powers, _LEAST_NORMAL, out=powers)
    powers += _DIGITS
    sums += powers.view(np.float32)
    out = sums.view(np.uint32)
    out -= powers  # digits: 8 to 16, fewer below 2**-6; 16 is the next power of two
    powers >>= 20
    powers -= _BIAS  # in front of three digits
    out += powers
    signs = values.view(np.uint32) >> 24
    signs &= 0x80
    out |= signs
    return out


def _float32(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.float32:
        return values
    out = np.empty(values.shape, np.float32)
    copy_into(out, values)
    return out
