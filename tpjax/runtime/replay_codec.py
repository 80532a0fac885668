"""Host arguments of dispatches as bytes: only what the other end does not have already.

Between two decode steps a block table changes in a few places of thousands, and sampling parameters not at
all: both ends keep each program's last arguments, and a 32-bit word that equals the last one is not sent. Of
masks every word may change, but grammars are in few states: both ends also keep the last rows of wide arrays,
and a row that equals one of them is sent as its number. Shapes and dtypes are not sent: every process knows
its programs. Several dispatches of one program, as those that upload masks, are encoded together.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tpjax.runtime.channel import Buffer

_COUNT = struct.Struct("<I")  # dispatches
_LEAF = struct.Struct("<i")  # words that changed, or one of:
_WHOLE = -1
_ROWS = -2  # the rows of all dispatches together
_NEW = -1  # a row that follows
_SMALL_BYTES = 256  # sent whole: to compare it takes longer
_WIDE_BYTES = 1024  # a row of so many is worth its number
_KEPT_ROWS = 256


class DispatchEncoder:
    """Encodes the arguments of one program's dispatches, in order."""

    def __init__(self) -> None:
        self._leaves: list[_LeafEncoder] | None = None

    def encode(self, calls: Sequence[Sequence[Any]]) -> list[Buffer]:
        """Returns the arguments of dispatches as buffers; they may share memory with the arguments."""
        each = [[np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(arguments)] for arguments in calls]
        if self._leaves is None:
            self._leaves = [_LeafEncoder(array) for array in each[0]]
        parts: list[Buffer] = [_COUNT.pack(len(calls))]
        for leaf, arrays in zip(self._leaves, zip(*each, strict=True), strict=True):
            parts += leaf.encode(arrays)
        return parts


class DispatchDecoder:
    """Decodes what an :class:`DispatchEncoder` of the same program wrote.

    Args:
        arguments: arguments of the program's shapes and dtypes.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        leaves, self._tree = jax.tree.flatten(arguments)
        self._leaves = [_LeafDecoder(np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves]

    def decode(self, body: memoryview) -> list[tuple[Any, ...]]:
        """Returns the arguments of each dispatch.

        Raises:
            ValueError: they do not fit the program.
        """
        (count,), at, leaves = _COUNT.unpack_from(body), _COUNT.size, []
        for leaf in self._leaves:
            arrays, at = leaf.decode(body, at, count)
            leaves.append(arrays)
        if at != len(body):
            raise ValueError(f"a dispatch has {len(body)} bytes, but its program takes {at}")
        return [jax.tree.unflatten(self._tree, arrays) for arrays in zip(*leaves, strict=True)]


class _LeafEncoder:
    def __init__(self, array: np.ndarray) -> None:
        self._last: np.ndarray | None = None
        self._rows = _Rows.of(array)
        self._by_rows = False  # whether the last array was sent so: this one is tried so first

    def encode(self, arrays: Sequence[np.ndarray]) -> list[Buffer]:
        if self._rows is not None and (self._by_rows or len(arrays) > 1):
            return self._encode_rows(arrays)
        return [part for array in arrays for part in self._encode(array)]

    def _encode(self, array: np.ndarray) -> list[Buffer]:
        words, before = _words(array), self._last
        if words.nbytes <= _SMALL_BYTES:
            return [_LEAF.pack(_WHOLE), words.data.cast("B")]
        self._last = words
        if before is not None and words.dtype == np.uint32:
            (changed,) = np.nonzero(words != before)
            if 4 * len(changed) < len(words):
                places, values = changed.astype(np.uint32), words[changed]
                return [_LEAF.pack(len(changed)), places.data.cast("B"), values.data.cast("B")]
        if self._rows is not None and before is not None:
            return self._encode_rows([array])
        return [_LEAF.pack(_WHOLE), words.data.cast("B")]

    def _encode_rows(self, arrays: Sequence[np.ndarray]) -> list[Buffer]:
        assert self._rows is not None
        self._last = _words(arrays[-1])
        each = [self._rows.view(array) for array in arrays]
        numbers, is_new = self._rows.find(each)
        self._by_rows = 2 * is_new.sum() <= len(is_new)
        parts: list[Buffer] = [_LEAF.pack(_ROWS), numbers.data.cast("B")]
        if is_new.any():
            new = np.concatenate(each)[is_new]
            self._rows.keep(new)
            parts.append(new.reshape(-1).data.cast("B"))
        return parts


class _LeafDecoder:
    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._last = np.zeros(shape, dtype)
        self._rows = _Rows.of(self._last)

    def decode(self, body: memoryview, at: int, count: int) -> tuple[list[np.ndarray], int]:
        """Returns the arrays of ``count`` dispatches, which start at a byte, and where the next leaf does."""
        if count and self._rows is not None and _LEAF.unpack_from(body, at)[0] == _ROWS:
            arrays, at = self._decode_rows(body, at + _LEAF.size, count)
            self._last = arrays[-1]
            return list(arrays), at
        each = []
        for _ in range(count):
            self._last, at = self._decode(body, at)
            each.append(self._last)
        return each, at

    def _decode(self, body: memoryview, at: int) -> tuple[np.ndarray, int]:
        (count,) = _LEAF.unpack_from(body, at)
        at += _LEAF.size
        # a program may still read the last one
        array = self._last.copy() if count >= 0 else np.empty_like(self._last)
        words = _words(array)
        if count == _WHOLE:
            words[:] = np.frombuffer(body, words.dtype, len(words), at)
            return array, at + words.nbytes
        if not 0 <= count <= len(words):
            raise ValueError(f"{count} words of {len(words)} changed")
        places = np.frombuffer(body, np.uint32, count, at)
        words[places] = np.frombuffer(body, np.uint32, count, at + places.nbytes)
        return array, at + 2 * places.nbytes

    def _decode_rows(self, body: memoryview, at: int, count: int) -> tuple[np.ndarray, int]:
        """Returns the arrays of all dispatches, one after the other."""
        assert self._rows is not None
        arrays = np.empty((count, *self._last.shape), self._last.dtype)
        rows = self._rows.view(arrays)
        numbers = np.frombuffer(body, np.int32, len(rows), at)
        at += numbers.nbytes
        if not _NEW <= numbers.min() <= numbers.max() < _KEPT_ROWS:
            raise ValueError(f"rows {numbers.min()} to {numbers.max()} of {_KEPT_ROWS} are kept")
        np.take(self._rows.kept, numbers, axis=0, out=rows, mode="wrap")  # without a check of its own
        if (is_new := numbers == _NEW).any():
            new = np.frombuffer(body, rows.dtype, is_new.sum() * rows.shape[1], at).reshape(-1, rows.shape[1])
            rows[is_new] = new
            self._rows.keep(new)
            at += new.nbytes
        return arrays, at


class _Rows:
    """The last ``_KEPT_ROWS`` rows that were sent whole; both ends keep the same.

    Args:
        row_bytes: bytes of a row.
    """

    def __init__(self, row_bytes: int) -> None:
        self._dtype = np.dtype(np.uint32 if row_bytes % 8 else np.uint64)  # of the words that are compared
        self._words = row_bytes // self._dtype.itemsize
        self.kept = np.zeros((_KEPT_ROWS, self._words), self._dtype)
        self._sums = [0] * _KEPT_ROWS
        self._by_sum: dict[int, int] = {0: 0}
        self._next = 0

    @classmethod
    def of(cls, array: np.ndarray) -> _Rows | None:
        """Returns what keeps rows of such arrays; ``None`` if they are not several, or narrow."""
        row_bytes = array.nbytes // len(array) if array.ndim == 2 and len(array) > 1 else 0
        return cls(row_bytes) if row_bytes >= _WIDE_BYTES and not row_bytes % 4 else None

    def view(self, array: np.ndarray) -> np.ndarray:
        """Views an array, or several in one, as rows of words."""
        return array.reshape(-1).view(self._dtype).reshape(-1, self._words)

    def find(self, each: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the number of each row, int32, ``_NEW`` if it is not kept, and which are not.

        Args:
            each: rows, array by array: a small one stays in the processor's cache.
        """
        sums = [total for rows in each for total in self._sum(rows)]
        numbers = np.array([self._by_sum.get(total, _NEW) for total in sums], np.int32)
        at = 0
        for rows in each:
            found = numbers[at : at + len(rows)]
            found[(self.kept[found] != rows).any(axis=1)] = _NEW  # a sum alone proves nothing
            at += len(rows)
        return numbers, numbers == _NEW

    def keep(self, rows: np.ndarray) -> None:
        """Keeps rows in the places of the oldest."""
        for row, total in zip(rows, self._sum(rows), strict=True):
            number, self._next = self._next, (self._next + 1) % _KEPT_ROWS
            if self._by_sum.get(self._sums[number]) == number:
                del self._by_sum[self._sums[number]]
            self.kept[number], self._sums[number], self._by_sum[total] = row, total, number

    def _sum(self, rows: np.ndarray) -> list[int]:
        sums: list[int] = rows.sum(axis=1, dtype=self._dtype).tolist()
        return sums


def _words(array: np.ndarray) -> np.ndarray:
    """Views an array as a vector of 32-bit words, or of bytes if it is not a whole number of words."""
    return array.reshape(-1).view(np.uint8 if array.nbytes % 4 else np.uint32)
