"""Canonical tensors that a model keeps in 8 or 4 bits, and how their scales are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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
