"""Canonical tensors that a model keeps in 8 or 4 bits, and how their scales are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tpjax.checkpoints.assemble import Canonical
from tpjax.checkpoints.quantized import Part
from tpjax.layers.weights import WeightFormat
from tpjax.sharding import SCALE_SUFFIX, ZERO_SUFFIX


@dataclass(frozen=True)
class Kept:
    """A canonical tensor [out, in] that is kept in 8 or 4 bits.

    Attributes:
        shape: outputs and inputs.
        kept: its format, thus the inputs that share a scale in the canonical tensor.
        stored_group: inputs that share a scale in the parameter. They may be fewer: the scale of a group that
            a slice or a head cuts is repeated. ``None``: a parameter has one for each output.
    """

    shape: tuple[int, int]
    kept: WeightFormat
    stored_group: int | None

    @property
    def group(self) -> int:
        """Inputs that share a scale in the canonical tensor; the last group may have fewer."""
        return min(self.kept.group or self.shape[1], self.shape[1])

    @property
    def groups(self) -> int:
        """Groups of a row of the canonical tensor."""
        return -(-self.shape[1] // self.group)

    def spread(self, read: Callable[[slice, slice], np.ndarray], index: tuple[slice, ...]) -> np.ndarray:
        """Reads a box of scales or zero points as the parameter has them.

        Args:
            read: returns those of some rows and groups of the canonical tensor.
            index: rows, and groups of ``stored_group`` inputs.
        """
        if self.stored_group is None:
            return read(index[0], slice(0, 1))[:, 0]
        rows, wanted = index
        groups = np.arange(wanted.start, wanted.stop) * self.stored_group // self.group
        part = read(rows, slice(int(groups[0]), int(groups[-1]) + 1))
        return part if part.shape[1] == len(groups) else part[:, groups - groups[0]]


def weight_of(name: str) -> tuple[str, str]:
    """Splits the name of a tensor of scales or zero points into the weight's and the suffix, else ``""``."""
    for suffix in (SCALE_SUFFIX, ZERO_SUFFIX):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


class CanonicalParts(Canonical, Protocol):
    """Tensors by canonical names, and the parts of those that are stored in 8 or 4 bits."""

    def read_part(self, name: str, part: Part, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a box [out, in] of values, or [out, groups] of scales or zero points."""
        ...


class StoredSource:
    """A checkpoint's tensors by canonical names, some of them as they are stored in 8 or 4 bits.

    Args:
        source: the tensors.
        kept: those that are kept ``N``; their scales are ``N_scale``, their zero points ``N_zero_point``.
    """

    def __init__(self, source: CanonicalParts, kept: Mapping[str, Kept]) -> None:
        self._source, self._quantized = source, kept

    def itemsize(self, name: str) -> int:
        """Returns the bytes of an element while it is read."""
        return 4 if weight_of(name)[0] in self._quantized else self._source.itemsize(name)

    def outer_axis(self, name: str) -> int:
        """Returns the axis along which a tensor is stored slice after slice."""
        weight, suffix = weight_of(name)
        return self._source.outer_axis(weight if suffix and weight in self._quantized else name)

    def read(self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None) -> np.ndarray:
        """Reads a box of a tensor: as it is, or its stored values, scales or zero points."""
        weight, suffix = weight_of(name)
        if suffix and weight in self._quantized:
            part: Part = "scales" if suffix == SCALE_SUFFIX else "zeros"
            return self._quantized[weight].spread(
                lambda rows, groups: self._source.read_part(weight, part, (rows, groups)), index
            )
        if name in self._quantized:
            return self._source.read_part(name, "values", index)
        return self._source.read(name, index, memory)
