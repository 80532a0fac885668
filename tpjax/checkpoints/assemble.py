"""Puts the devices' parts of stored parameters together from canonical tensors, on all cores.

A tensor is read in blocks of a few megabytes, each of them once, whichever devices want some of it; a thread
takes a block from the file to all its places while it is in the processor's cache.
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

_BLOCK_BYTES = 4 << 20
_BLOCK_ROWS = 128  # blocks have a multiple of so many rows, as heads and quantised blocks have
_MOST_THREADS = 16  # a few of them use all of a machine's memory bandwidth
# Of parameters that are being filled. One more may be begun while as much waits.
_IN_FLIGHT_BYTES = 128 << 20

T = TypeVar("T")


class Canonical(Protocol):
    """Tensors by canonical names."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor."""
        ...

    def itemsize(self, name: str) -> int:
        """Bytes of an element, as ``read`` gives it."""
        ...

    def outer_axis(self, name: str) -> int:
        """The axis along which a tensor is stored slice after slice."""
        ...


@dataclass(frozen=True)
class Order(Generic[T]):
    """A parameter that is to be filled.

    Attributes:
        what: whose it is; passed through.
        layout: of the stored parameter.
        parts: the arrays to fill, by the part of the stored parameter each one is.
        canonical: canonical name of a source of the layout.
    """

    what: T
    layout: Layout
    parts: Mapping[tuple[tuple[int, int], ...], np.ndarray]
    canonical: Callable[[str], str]

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True)
class Block:
    """A box of a canonical tensor, read at once.

    Attributes:
        name: of the tensor.
        box: read from it.
        places: which part of what is read goes where.
    """

    name: str
    box: tuple[slice, ...]
    places: tuple[tuple[tuple[slice, ...], np.ndarray], ...]

    def move(self, source: Canonical) -> None:
        """Reads the box and copies it to its places."""
        values = source.read(self.name, self.box)
        for part, target in self.places:
            copy_into(target, values[part])


def fill(orders: Iterable[Order[T]], source: Canonical) -> Iterator[Order[T]]:
    """Fills parameters by and by, and hands each on once it is whole, in the order given.

    ``orders`` is asked for the next one only when there is room for it: at most 128 MiB are being filled
    besides the largest parameter.
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
            pool.shutdown(cancel_futures=True)  # what is left, where something failed


def _finished(order: Order[T], futures: list[Future[None]]) -> Order[T]:
    for future in futures:
        future.result()
    return order


def blocks(order: Order[T], source: Canonical) -> Iterator[Block]:
    """Cuts what a parameter is made of into blocks."""
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
            slice(min(cut.start for cut in cuts), max(cut.stop for cut in cuts))
            for cuts in zip(*(place.box for place in here), strict=True)
        ]
        across = prod(cut.stop - cut.start for at, cut in enumerate(span) if at != axis)
        rows = max(1, _BLOCK_BYTES // max(1, across * source.itemsize(name)))
        rows = rows // _BLOCK_ROWS * _BLOCK_ROWS or rows
        for first in range(low, high, rows):
            span[axis] = slice(first, min(first + rows, high))
            yield Block(name, tuple(span), tuple(_shared(place, span) for place in here))


def _shared(place: _Place, box: Sequence[slice]) -> tuple[tuple[slice, ...], np.ndarray]:
    """What a place takes of a box: which part of it, and where that goes."""
    common = [
        (max(mine.start, read.start), min(mine.stop, read.stop))
        for mine, read in zip(place.box, box, strict=True)
    ]
    of_box = tuple(slice(a - read.start, b - read.start) for (a, b), read in zip(common, box, strict=True))
    of_target = tuple(
        slice(a - mine.start, b - mine.start) for (a, b), mine in zip(common, place.box, strict=True)
    )
    return of_box, place.target[of_target]
