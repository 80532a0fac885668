"""How tensors are cut over the mesh: the named specs, the head plan, and the layout of stored weights.

A sharding is written once, where a parameter is declared; everything else reads it back from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from tpjax.errors import ConfigError
from tpjax.mesh import AXIS

if TYPE_CHECKING:
    Leaf: TypeAlias = jax.Array
else:  # of a tree that a program takes or returns: on devices, or still (or again) on the host
    Leaf = jax.Array | np.ndarray

REPLICATED = P()
COLUMN = P(None, AXIS)  # [in, out]: each device computes some outputs; no collective
ROW = P(None, AXIS)  # [out, in]: each device sums over some inputs; one all-reduce follows
VOCAB = P(AXIS, None)  # [V, D]: each device holds some tokens' rows
HEAD_ROWS = P(AXIS, None)  # [H * out, in]: each device projects to its heads; no collective
BIAS = P(AXIS)  # [out] of a column-parallel product
PARTIAL_SUMS = P(AXIS)  # [tp, ...]: each device's part of a sum
SEQUENCE_PARALLEL = P(None, AXIS, None)  # [B, S, D]: a residual of which each device holds some positions
LOGITS = P(None, AXIS)  # [B, V]
HEADS = P(None, None, AXIS, None, None)  # [B, S, K, queries per group, h]
PAGES = P(None, AXIS, None, None)  # [pages, K, page_size, h]


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Fixes the layout of ``x`` at this point of the program; the partitioner moves data as needed."""
    return jax.lax.with_sharding_constraint(x, spec)


def reduce_partials(shares: jax.Array, spec: P) -> jax.Array:
    """Sums each device's share [tp, ...] and fixes the layout of the sum: that is what moves data.

    In the dtype of the shares: ``jnp.sum`` adds bfloat16 up as float32, and GPUs would then move that.
    """
    return constrain(jax.lax.reduce_sum(shares, (0,)), spec)


def pad_to_multiple(size: int, of: int) -> int:
    """The smallest multiple of ``of`` that is at least ``size``."""
    return -(-size // of) * of


@dataclass(frozen=True)
class HeadPlan:
    """Which attention heads each device computes, for any ``tp``.

    Heads are arranged in *slots*: a slot is one KV head with up to ``group_size`` of the query heads that
    read it. Every device has ``slots_per_device`` slots, so shapes are equal everywhere. Where tp does not
    divide the KV heads, a KV head may fill several slots (it is replicated and its queries are split), and
    slots or query places may stay empty (zero weights, and zero rows in ``o_proj``, keep that exact).

    Among all such arrangements the plan takes the one with the fewest weights per device, then the
    smallest cache.

    Attributes:
        num_heads: query heads H of the checkpoint.
        num_kv_heads: KV heads K of the checkpoint; divides H.
        tp: devices, 1 to 64.
    """

    num_heads: int
    num_kv_heads: int
    tp: int

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "tp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is less than 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} is not a divisor of num_heads={self.num_heads}"
            )

    @cached_property
    def group_size(self) -> int:
        """Query places per slot."""
        return self._shape[0]

    @cached_property
    def slots_per_device(self) -> int:
        """KV heads per device, replicas and empty slots included."""
        return self._shape[1]

    @property
    def num_slots(self) -> int:
        """KV heads over all devices, replicas and empty slots included: the K of the cache and of qkv."""
        return self.tp * self.slots_per_device

    @property
    def num_padded_heads(self) -> int:
        """Query places over all devices."""
        return self.num_slots * self.group_size

    @cached_property
    def slots(self) -> tuple[tuple[int | None, tuple[int | None, ...]], ...]:
        """For each slot: its KV head and its query heads; ``None`` marks an empty place."""
        per_group = self.num_heads // self.num_kv_heads
        filled: list[tuple[int | None, tuple[int | None, ...]]] = []
        for kv_head in range(self.num_kv_heads):
            first = kv_head * per_group
            for start in range(0, per_group, self.group_size):
                heads = range(first + start, first + min(start + self.group_size, per_group))
                filled.append((kv_head, (*heads, *[None] * (self.group_size - len(heads)))))
        empty = (None, (None,) * self.group_size)
        return (*filled, *[empty] * (self.num_slots - len(filled)))

    @property
    def query_padding(self) -> float:
        """Extra attention-head FLOPs, as a fraction of the checkpoint's."""
        return self.num_padded_heads / self.num_heads - 1

    @property
    def kv_padding(self) -> float:
        """Extra KV-cache bytes over all devices, as a fraction of the checkpoint's."""
        return self.num_slots / self.num_kv_heads - 1

    @cached_property
    def _shape(self) -> tuple[int, int]:
        per_group = self.num_heads // self.num_kv_heads

        def cost(group_size: int) -> tuple[int, int]:
            slots = math.ceil(self.num_kv_heads * math.ceil(per_group / group_size) / self.tp)
            # per slot: q and o of each query place, and one k and one v, each hidden_size x head_dim
            return slots * (2 * group_size + 2), slots

        group_size = min(range(1, per_group + 1), key=lambda g: (*cost(g), -g))
        return group_size, cost(group_size)[1]


@dataclass(frozen=True)
class Segment:
    """A run of ``size`` rows of a canonical tensor, from ``start``, stored from position ``at`` on."""

    source: str
    start: int
    size: int
    at: int


@dataclass(frozen=True)
class Content:
    """What a part of a stored array holds, in elements.

    Attributes:
        held: canonical elements, each counted where it is stored first.
        copied: repetitions of canonical elements that are stored elsewhere too.
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
        target: where it goes in the part; a number stands for an axis the canonical tensor has not.
        transposed: the canonical tensor is [out, in], the part [in, out].
    """

    source: str
    box: tuple[slice, ...]
    target: tuple[slice | int, ...]
    transposed: bool

    def of(self, part: np.ndarray) -> np.ndarray:
        """The piece's place in the part, as a view in the order of the canonical axes."""
        view = part[self.target]
        return view.T if self.transposed else view


@dataclass(frozen=True)
class WeightLayout:
    """How one stored parameter is put together from canonical (checkpoint) tensors.

    A stored parameter may be transposed, padded with zeros and fused from several tensors; along ``axis``
    it is a sequence of segments, everything not covered is zero. Checkpoints never see this: padding and
    fusing happen at load.

    Attributes:
        shape: stored shape.
        axis: stored axis the segments run along.
        segments: what is stored where.
        transposed: the canonical tensor is [out, in], as Hugging Face keeps it, and the stored one [in, out].
        sizes: canonical size along the segments' axis, per source.
    """

    shape: tuple[int, ...]
    axis: int
    segments: tuple[Segment, ...]
    sizes: tuple[tuple[str, int], ...]
    transposed: bool = False

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each source tensor as the checkpoint holds it."""
        shapes = {}
        for source, size in self.sizes:
            shape = tuple(size if axis == self.axis else n for axis, n in enumerate(self.shape))
            shapes[source] = shape[::-1] if self.transposed else shape
        return shapes

    def read(
        self,
        read: Callable[[str, tuple[slice, ...]], np.ndarray],
        index: tuple[slice, ...],
        dtype: np.dtype,
    ) -> np.ndarray:
        """Builds the part ``index`` of the stored array, reading no more of the sources than that part.

        Args:
            read: ``read(source, index)`` gives that slice of a canonical tensor.
            index: one slice per stored axis, as ``jax.make_array_from_callback`` passes it.
            dtype: of the result.
        """
        return _read(self, read, index, dtype)

    def pieces(self, index: tuple[slice, ...]) -> list[Piece]:
        """Which boxes of canonical tensors the part ``index`` of the stored array is put together from."""
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        low, high = bounds[self.axis]
        found = []
        for segment in _joined(self.segments):
            first, last = max(segment.at, low), min(segment.at + segment.size, high)
            if first >= last:
                continue
            source = [slice(start, stop) for start, stop in bounds]
            offset = segment.start - segment.at
            source[self.axis] = slice(first + offset, last + offset)
            target = [slice(0, stop - start) for start, stop in bounds]
            target[self.axis] = slice(first - low, last - low)
            box = tuple(source[::-1] if self.transposed else source)
            found.append(Piece(segment.source, box, tuple(target), self.transposed))
        return found

    def content(self, index: tuple[slice, ...]) -> Content:
        """What the part ``index`` of the stored array holds."""
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        low, high = bounds.pop(self.axis)
        other = math.prod(stop - start for start, stop in bounds)
        held = copied = 0
        seen: set[tuple[str, int]] = set()
        for segment in self.segments:
            inside = max(0, min(segment.at + segment.size, high) - max(segment.at, low))
            if (segment.source, segment.start) in seen:
                copied += inside
            else:
                held += inside
            seen.add((segment.source, segment.start))
        return Content(held * other, copied * other, (high - low - held - copied) * other)

    @property
    def padding(self) -> int:
        """TensorMapping elements that no canonical element fills for the first time: zeros and replicas."""
        content = self.content((slice(None),) * len(self.shape))
        return content.copied + content.zeros


@dataclass(frozen=True)
class StackedLayout:
    """Parameters of like layout, stacked along a new first axis: one per expert.

    Attributes:
        one: layout of each; in its sources' names, ``{}`` stands for the number.
        count: how many.
    """

    one: WeightLayout
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """TensorMapping shape."""
        return (self.count, *self.one.shape)

    def content(self, index: tuple[slice, ...]) -> Content:
        """As :meth:`WeightLayout.content`."""
        one, count = self.one.content(index[1:]), len(range(self.count)[index[0]])
        return Content(count * one.held, count * one.copied, count * one.zeros)

    @property
    def padding(self) -> int:
        """As :attr:`WeightLayout.padding`."""
        return self.count * self.one.padding

    def canonical_shapes(self) -> dict[str, tuple[int, ...]]:
        """As :meth:`WeightLayout.canonical_shapes`."""
        return {
            source.format(number): shape
            for number in range(self.count)
            for source, shape in self.one.canonical_shapes().items()
        }

    def read(
        self,
        read: Callable[[str, tuple[slice, ...]], np.ndarray],
        index: tuple[slice, ...],
        dtype: np.dtype,
    ) -> np.ndarray:
        """As :meth:`WeightLayout.read`."""
        return _read(self, read, index, dtype)

    def pieces(self, index: tuple[slice, ...]) -> list[Piece]:
        """As :meth:`WeightLayout.pieces`."""
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
        piece.of(out)[...] = read(piece.source, piece.box)
    return out


def _joined(segments: tuple[Segment, ...]) -> list[Segment]:
    """The segments, those that continue their predecessor in source and stored array joined to it."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        ends = None if last is None else (last.source, last.start + last.size, last.at + last.size)
        if last is not None and ends == (segment.source, segment.start, segment.at):
            joined[-1] = replace(last, size=last.size + segment.size)
        else:
            joined.append(segment)
    return joined


def tensor_layout(
    source: str, shape: tuple[int, ...], *, padded: int | None = None, axis: int = 0
) -> WeightLayout:
    """One tensor as it is, zero-padded along ``axis`` to ``padded``."""
    stored = tuple(padded if padded and i == axis else n for i, n in enumerate(shape))
    return WeightLayout(stored, axis, (Segment(source, 0, shape[axis], 0),), ((source, shape[axis]),))


def column_layout(
    width: int, segments: list[Segment], sizes: dict[str, int], *, in_features: int | None
) -> WeightLayout:
    """A column-parallel product's weight [in, width], or its bias [width] where ``in_features`` is None."""
    shape = (width,) if in_features is None else (in_features, width)
    return WeightLayout(
        shape, len(shape) - 1, tuple(segments), tuple(sizes.items()), transposed=in_features is not None
    )


def row_layout(
    width: int, segments: list[Segment], sizes: dict[str, int], *, out_features: int
) -> WeightLayout:
    """A row-parallel product's weight [out, width]."""
    return WeightLayout((out_features, width), 1, tuple(segments), tuple(sizes.items()))
