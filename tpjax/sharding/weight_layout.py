"""How a stored parameter is put together from the tensors of a checkpoint.

A sharding is written once, where a parameter is declared; everything else reads it back from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

# Of the names of tensors that belong to a quantised one, as in compressed-tensors.
SCALE_SUFFIX, ZERO_SUFFIX = "_scale", "_zero_point"


def pad_to_multiple(size: int, of: int) -> int:
    """Returns the smallest multiple of ``of`` that is at least ``size``."""
    return -(-size // of) * of


def width_per_device(width: int, tp: int) -> int:
    """Returns the features of an MLP's width F that each of ``tp`` devices holds, zeros included.

    Its share is rounded up to a multiple of 128, or of as large a power of two below as adds at most a 64th:
    a share that is odd would leave each input of a quantised weight a scale of its own.
    """
    share = -(-width // tp)
    units = (unit for unit in (128, 64, 32, 16, 8, 4, 2) if pad_to_multiple(share, unit) * 64 <= share * 65)
    return pad_to_multiple(share, next(units, 1))


@dataclass(frozen=True)
class Segment:
    """A run of rows of a canonical tensor.

    Attributes:
        source: name of the canonical tensor.
        start: first of its rows.
        size: rows.
        offset: index of the first of them in the stored array.
    """

    source: str
    start: int
    size: int
    offset: int


@dataclass(frozen=True)
class Content:
    """What a part of a stored array holds, in elements.

    Attributes:
        held: canonical elements, each counted where it is stored first.
        copied: replicas of canonical elements that are stored elsewhere too.
        zeros: padding.
    """

    held: int
    copied: int
    zeros: int


@dataclass(frozen=True)
class Piece:
    """A box of a canonical tensor and its place in a part of a stored array.

    Attributes:
        source: name of the canonical tensor.
        box: a slice per axis of the canonical tensor, with start and stop.
        target: its index in the part; a number for an axis that the canonical tensor does not have.
        transposed: the canonical tensor is [out, in], the part [in, out].
    """

    source: str
    box: tuple[slice, ...]
    target: tuple[slice | int, ...]
    transposed: bool

    def view(self, part: np.ndarray) -> np.ndarray:
        """Returns the view of the part that the piece fills, in the order of the canonical axes."""
        filled = part[self.target]
        return filled.T if self.transposed else filled


@dataclass(frozen=True)
class WeightLayout:
    """How one stored parameter is put together from canonical (checkpoint) tensors.

    A stored parameter may be transposed, padded with zeros and fused from several tensors. Along ``axis`` it
    is a sequence of segments; everything else is zero. Checkpoints stay canonical: tensors are padded and
    fused while they are loaded.

    Attributes:
        shape: stored shape.
        axis: stored axis the segments run along.
        segments: rows of canonical tensors and their offsets along ``axis``.
        transposed: the canonical tensor is [out, in], as Hugging Face keeps it, and the stored one [in, out].
        sizes: size of each canonical tensor along ``axis``.
    """

    shape: tuple[int, ...]
    axis: int
    segments: tuple[Segment, ...]
    sizes: tuple[tuple[str, int], ...]
    transposed: bool = False

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each canonical tensor."""
        shapes = {}
        for source, size in self.sizes:
            shape = tuple(size if axis == self.axis else n for axis, n in enumerate(self.shape))
            shapes[source] = shape[::-1] if self.transposed else shape
        return shapes

    def per_output(self, inputs: int) -> WeightLayout:
        """Returns the layout of one number for each output of a weight: of tensors named ``<source>_scale``.

        Args:
            inputs: stored axis of the inputs, 0 or 1; the numbers are laid out as the other axis is.
        """
        outputs = self.shape[1 - inputs]
        if self.axis == inputs:
            ((source, _),) = self.sizes
            return tensor_layout(source + SCALE_SUFFIX, (outputs,))
        segments = tuple(replace(one, source=one.source + SCALE_SUFFIX) for one in self.segments)
        sizes = tuple((source + SCALE_SUFFIX, size) for source, size in self.sizes)
        return WeightLayout((outputs,), 0, segments, sizes)

    def per_group(self, inputs: int, group: int, suffix: str) -> WeightLayout:
        """Returns the layout of tensors ``<source><suffix>``: one number for each output and group.

        Args:
            inputs: stored axis of the inputs.
            group: inputs that share a number, from :meth:`stored_group`.
            suffix: of the tensors' names.
        """
        by = group if self.axis == inputs else 1
        return WeightLayout(
            tuple(size // group if axis == inputs else size for axis, size in enumerate(self.shape)),
            self.axis,
            tuple(
                Segment(one.source + suffix, one.start // by, one.size // by, one.offset // by)
                for one in _joined(self.segments)
            ),
            tuple((source + suffix, size // by) for source, size in self.sizes),
            self.transposed,
        )

    def stored_group(self, inputs: int, group: int | None, parts: int) -> int:
        """Returns how many stored inputs in a row share a scale, so that nothing cuts them.

        Args:
            inputs: stored axis of the inputs.
            group: inputs that share a scale in the canonical tensor; ``None``: all.
            parts: devices that the inputs are sharded over.

        Returns:
            The largest such number that divides ``group``, a device's slice and every segment; without
            ``group``, the last two.
        """
        edges = [self.shape[inputs] // parts]
        if self.axis == inputs:
            edges += [size for _, size in self.sizes]
            for one in _joined(self.segments):
                edges += [one.start, one.size, one.offset]
        whole = math.gcd(*edges)
        alone = parts == 1 and self.axis != inputs
        return whole if group is None or (alone and group >= whole) else math.gcd(group, whole)

    def swapped(self) -> WeightLayout:
        """Returns the layout of the transpose of a matrix."""
        return replace(self, shape=self.shape[::-1], axis=1 - self.axis, transposed=not self.transposed)

    def read(
        self,
        read: Callable[[str, tuple[slice, ...]], np.ndarray],
        index: tuple[slice, ...],
        dtype: np.dtype,
    ) -> np.ndarray:
        """Builds the part ``index`` of the stored array; reads no canonical element outside of that part.

        Args:
            read: ``read(source, index)`` returns that slice of a canonical tensor.
            index: one slice per stored axis, as ``jax.make_array_from_callback`` passes it.
            dtype: dtype of the result.
        """
        return _read(self, read, index, dtype)

    def pieces(self, index: tuple[slice, ...]) -> list[Piece]:
        """Lists the boxes of canonical tensors that the part ``index`` of the stored array is made of."""
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        low, high = bounds[self.axis]
        found = []
        for segment in _joined(self.segments):
            first, last = max(segment.offset, low), min(segment.offset + segment.size, high)
            if first >= last:
                continue
            source = [slice(start, stop) for start, stop in bounds]
            offset = segment.start - segment.offset
            source[self.axis] = slice(first + offset, last + offset)
            target = [slice(0, stop - start) for start, stop in bounds]
            target[self.axis] = slice(first - low, last - low)
            box = tuple(source[::-1] if self.transposed else source)
            found.append(Piece(segment.source, box, tuple(target), self.transposed))
        return found

    def content(self, index: tuple[slice, ...]) -> Content:
        """Counts the elements of the part ``index`` of the stored array."""
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        low, high = bounds.pop(self.axis)
        other = math.prod(stop - start for start, stop in bounds)
        held = copied = 0
        seen: set[tuple[str, int]] = set()
        for segment in self.segments:
            inside = max(0, min(segment.offset + segment.size, high) - max(segment.offset, low))
            if (segment.source, segment.start) in seen:
                copied += inside
            else:
                held += inside
            seen.add((segment.source, segment.start))
        return Content(held * other, copied * other, (high - low - held - copied) * other)

    @property
    def padding(self) -> int:
        """Stored elements that are zeros, or replicas of canonical elements stored elsewhere too."""
        content = self.content((slice(None),) * len(self.shape))
        return content.copied + content.zeros


@dataclass(frozen=True)
class StackedLayout:
    """Parameters of equal layout, stacked along a new first axis: one per expert.

    Attributes:
        one: layout of each; ``{}`` in the names of its canonical tensors stands for the index.
        count: number of parameters.
    """

    one: WeightLayout
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape."""
        return (self.count, *self.one.shape)

    def content(self, index: tuple[slice, ...]) -> Content:
        """See :meth:`WeightLayout.content`."""
        one, count = self.one.content(index[1:]), len(range(self.count)[index[0]])
        return Content(count * one.held, count * one.copied, count * one.zeros)

    @property
    def padding(self) -> int:
        """See :attr:`WeightLayout.padding`."""
        return self.count * self.one.padding

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :meth:`WeightLayout.canonical_shapes`."""
        return {
            source.format(number): shape
            for number in range(self.count)
            for source, shape in self.one.canonical_shapes().items()
        }

    def per_output(self, inputs: int) -> StackedLayout:
        """See :meth:`WeightLayout.per_output`; ``inputs`` is 1 or 2 here."""
        return StackedLayout(self.one.per_output(inputs - 1), self.count)

    def per_group(self, inputs: int, group: int, suffix: str) -> StackedLayout:
        """See :meth:`WeightLayout.per_group`; ``inputs`` is 1 or 2 here."""
        return StackedLayout(self.one.per_group(inputs - 1, group, suffix), self.count)

    def stored_group(self, inputs: int, group: int | None, parts: int) -> int:
        """See :meth:`WeightLayout.stored_group`; ``inputs`` is 1 or 2 here."""
        return self.one.stored_group(inputs - 1, group, parts)

    def read(
        self,
        read: Callable[[str, tuple[slice, ...]], np.ndarray],
        index: tuple[slice, ...],
        dtype: np.dtype,
    ) -> np.ndarray:
        """See :meth:`WeightLayout.read`."""
        return _read(self, read, index, dtype)

    def pieces(self, index: tuple[slice, ...]) -> list[Piece]:
        """See :meth:`WeightLayout.pieces`."""
        one = self.one.pieces(index[1:])
        return [
            replace(piece, source=piece.source.format(number), target=(place, *piece.target))
            for place, number in enumerate(range(self.count)[index[0]])
            for piece in one
        ]


Layout: TypeAlias = WeightLayout | StackedLayout


def _read(
    layout: Layout,
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    index: tuple[slice, ...],
    dtype: np.dtype,
) -> np.ndarray:
    out = np.zeros([len(range(size)[part]) for part, size in zip(index, layout.shape, strict=True)], dtype)
    for piece in layout.pieces(index):
        piece.view(out)[...] = read(piece.source, piece.box)
    return out


def _joined(segments: tuple[Segment, ...]) -> list[Segment]:
    """Joins each segment that continues its predecessor in both the canonical tensor and the stored array."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        ends = None if last is None else (last.source, last.start + last.size, last.offset + last.size)
        if last is not None and ends == (segment.source, segment.start, segment.offset):
            joined[-1] = replace(last, size=last.size + segment.size)
        else:
            joined.append(segment)
    return joined


def tensor_layout(
    source: str, shape: tuple[int, ...], *, padded: int | None = None, axis: int = 0
) -> WeightLayout:
    """Returns the layout of one tensor in canonical order, zero-padded along ``axis`` to ``padded``."""
    stored = tuple(padded if padded and i == axis else n for i, n in enumerate(shape))
    return WeightLayout(stored, axis, (Segment(source, 0, shape[axis], 0),), ((source, shape[axis]),))


def column_layout(
    width: int, segments: list[Segment], sizes: dict[str, int], *, in_features: int | None
) -> WeightLayout:
    """Returns the layout of a weight [width, in], or of a bias [width] if ``in_features`` is None."""
    shape = (width,) if in_features is None else (width, in_features)
    return WeightLayout(shape, 0, tuple(segments), tuple(sizes.items()))


def row_layout(
    width: int, segments: list[Segment], sizes: dict[str, int], *, out_features: int
) -> WeightLayout:
    """Returns the layout of a row-parallel weight [out, width]."""
    return WeightLayout((out_features, width), 1, tuple(segments), tuple(sizes.items()))
