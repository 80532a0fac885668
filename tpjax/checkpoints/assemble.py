"""Assembles the devices' slices of parameters from canonical tensors, on all cores.

A tensor is read in blocks, each once for all devices that need a part of it. A block that is stored as one
device keeps it is read straight into its place. Any other is small enough that it stays in a core's cache
until the thread that has read it has copied it, transposed if need be, to all its places.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Generic, Protocol, TypeVar

import numpy as np

from tpjax.checkpoints.blocks import copy_into
from tpjax.sharding import Layout

# Bytes of a block that is copied to its places: at less, the calls cost more than the copies; at more, what
# was read has left the cache before it is copied.
_BLOCK_BYTES = 3 << 19
_IN_PLACE_BYTES = 4 << 20  # of one that is read into its place
_BLOCK_ROWS = 128  # blocks have a multiple of this many rows, as heads and quantised blocks do
_MOST_THREADS = 16  # a few of them use all of a machine's memory bandwidth
# Bytes of the parameters being filled, above which no further one is begun.
_IN_FLIGHT_BYTES = 128 << 20

T = TypeVar("T")


class Canonical(Protocol):
    """Tensors by canonical names."""

    def read(self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None) -> np.ndarray:
        """Reads a box of a tensor, into ``memory`` if that can be done as it is read."""
        ...

    def itemsize(self, name: str) -> int:
        """Returns the bytes of an element in what ``read`` returns."""
        ...

    def outer_axis(self, name: str) -> int:
        """Returns the axis along which a tensor is stored slice after slice."""
        ...


@dataclass(frozen=True)
class Order(Generic[T]):
    """A parameter to be filled.

    Attributes:
        what: identifies the parameter; passed through.
        layout: layout of the parameter.
        parts: the arrays to fill, by their bounds (start, stop) along each axis of the parameter.
        canonical: returns the canonical name of a source of the layout.
    """

    what: T
    layout: Layout
    parts: Mapping[tuple[tuple[int, int], ...], np.ndarray]
    canonical: Callable[[str], str]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True)
class Block:
    """A box of a canonical tensor that is read in one call.

    Attributes:
        name: name of the tensor.
        box: the box.
        places: pairs of a part of the box and the array that it is copied to.
    """

    name: str
    box: tuple[slice, ...]
    places: tuple[tuple[tuple[slice, ...], np.ndarray], ...]

    def move(self, source: Canonical) -> None:
        """Reads the box and copies it to its places; it is read in place if all of it goes to one."""
        shape = tuple(one.stop - one.start for one in self.box)
        whole = next((target for _, target in self.places if target.shape == shape), None)
        values = source.read(self.name, self.box, whole)
        in_place = whole is not None and values.ctypes.data == whole.ctypes.data
        for part, target in self.places:
            if not (in_place and target is whole):
                copy_into(target, values[part])


def fill(orders: Iterable[Order[T]], source: Canonical) -> Iterator[Order[T]]:
    """Fills parameters and yields each once it is complete, in the given order.

    The next of ``orders`` is taken only when there is room for it: at most 128 MiB are being filled besides
    the largest parameter.
    """
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)
    waiting: deque[tuple[Order[T], list[Future[None]]]] = deque()
    with ThreadPoolExecutor(threads, "load") as pool:
        try:
            for order in orders:
                futures = [pool.submit(block.move, source) for block in blocks(order, source)]
                waiting.append((order, futures))
                del order
                while sum(waits.nbytes for waits, _ in waiting) > _IN_FLIGHT_BYTES:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)  # blocks that are left if one has failed


def _finished(order: Order[T], futures: list[Future[None]]) -> Order[T]:
    for future in futures:
        future.result()
    return order


def blocks(order: Order[T], source: Canonical) -> Iterator[Block]:
    """Splits the sources of a parameter into blocks."""
    wanted: dict[str, list[_Place]] = {}
    for bounds, part in order.parts.items():
        for piece in order.layout.pieces(tuple(slice(*bound) for bound in bounds)):
            place = _Place(piece.box, piece.view(part))
            wanted.setdefault(order.canonical(piece.source), []).append(place)
    for name, places in wanted.items():
        yield from _blocks_of(name, places, source)


@dataclass(frozen=True)
class _Place:
    """A box of a canonical tensor and where it goes, with the same axes."""

    box: tuple[slice, ...]
    target: np.ndarray


def _blocks_of(name: str, places: Sequence[_Place], source: Canonical) -> Iterator[Block]:
    axis = source.outer_axis(name)
    edges = sorted({edge for place in places for edge in (place.box[axis].start, place.box[axis].stop)})
    for low, high in pairwise(edges):
        here = [place for place in places if place.box[axis].start <= low and high <= place.box[axis].stop]
        if not here:
            continue
        span = [
            slice(min(one.start for one in slices), max(one.stop for one in slices))
            for slices in zip(*(place.box for place in here), strict=True)
        ]
        across = prod(one.stop - one.start for at, one in enumerate(span) if at != axis)
        in_place = len(here) == 1 and here[0].target.flags.c_contiguous
        most = _IN_PLACE_BYTES if in_place else _BLOCK_BYTES
        rows = max(1, most // max(1, across * source.itemsize(name)))
        rows = rows // _BLOCK_ROWS * _BLOCK_ROWS or rows
        for first in range(low, high, rows):
            span[axis] = slice(first, min(first + rows, high))
            yield Block(name, tuple(span), tuple(_shared(place, span) for place in here))


def _shared(place: _Place, box: Sequence[slice]) -> tuple[tuple[slice, ...], np.ndarray]:
    """Returns the part of a box that a place needs, and the array that it is copied to."""
    common = [
        (max(mine.start, read.start), min(mine.stop, read.stop))
        for mine, read in zip(place.box, box, strict=True)
    ]
    of_box = tuple(slice(a - read.start, b - read.start) for (a, b), read in zip(common, box, strict=True))
    of_target = tuple(
        slice(a - mine.start, b - mine.start) for (a, b), mine in zip(common, place.box, strict=True)
    )
    return of_box, place.target[of_target]
