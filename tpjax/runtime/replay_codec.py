"""Host arguments of a dispatch as bytes: only what the other end does not have already.

Between two decode steps a block table changes in a few places of thousands, and sampling parameters not at
all: both ends keep each program's last arguments, and a 32-bit word that equals the last one is not sent. Of
masks every word may change, but grammars are in few states: both ends also keep the last rows of wide arrays,
and a row that equals one of them is sent as its number. Shapes and dtypes are not sent: every process knows
its programs.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tpjax.runtime.channel import Buffer

_LEAF = struct.Struct("<i")  # words that changed, or one of:
_WHOLE = -1
_ROWS = -2
_NEW = -1  # a row that follows
_WIDE_BYTES = 1024  # a row of so many is worth its number
_KEPT_ROWS = 256


class Encoder:
    """Encodes the arguments of one program's dispatches, in order."""

    def __init__(self) -> None:
        self._leaves: list[_LeafEncoder] | None = None

    def encode(self, arguments: Sequence[Any]) -> list[Buffer]:
        """Returns the arguments as buffers; they may share memory with the arguments."""
        arrays = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(arguments)]
        if self._leaves is None:
            self._leaves = [_LeafEncoder(array) for array in arrays]
        return [part for leaf, array in zip(self._leaves, arrays, strict=True) for part in leaf.encode(array)]


class Decoder:
    """Decodes what an :class:`Encoder` of the same program wrote.

    Args:
        arguments: arguments of the program's shapes and dtypes.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        leaves, self._tree = jax.tree.flatten(arguments)
        self._leaves = [_LeafDecoder(np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves]

    def decode(self, body: memoryview) -> tuple[Any, ...]:
        """Returns the arguments.

        Raises:
            ValueError: they do not fit the program.
        """
        at, arrays = 0, []
        for leaf in self._leaves:
            array, at = leaf.decode(body, at)
            arrays.append(array)
        if at != len(body):
            raise ValueError(f"a dispatch has {len(body)} bytes, but its program takes {at}")
        arguments: tuple[Any, ...] = jax.tree.unflatten(self._tree, arrays)
        return arguments


class _LeafEncoder:
    def __init__(self, array: np.ndarray) -> None:
        self._last: np.ndarray | None = None
        self._rows = _Rows.of(array)
        self._by_rows = False  # whether the last array was sent so: this one is tried so first

    def encode(self, array: np.ndarray) -> list[Buffer]:
        words, before = _words(array), self._last
        self._last = words
        if self._rows is not None and self._by_rows:
            return self._encode_rows(words)
        if before is not None and words.dtype == np.uint32:
            (changed,) = np.nonzero(words != before)
            if 4 * len(changed) < len(words):
                places, values = changed.astype(np.uint32), words[changed]
                return [_LEAF.pack(len(changed)), places.data.cast("B"), values.data.cast("B")]
        if self._rows is not None and before is not None:
            return self._encode_rows(words)
        return [_LEAF.pack(_WHOLE), words.data.cast("B")]

    def _encode_rows(self, words: np.ndarray) -> list[Buffer]:
        assert self._rows is not None
        rows = words.reshape(-1, self._rows.words)
        numbers = self._rows.find(rows)
        new = rows[numbers == _NEW]
        self._rows.keep(new)
        self._by_rows = 2 * len(new) <= len(rows)
        return [_LEAF.pack(_ROWS), numbers.data.cast("B"), new.reshape(-1).data.cast("B")]


class _LeafDecoder:
    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._last = np.zeros(shape, dtype)
        self._rows = _Rows.of(self._last)

    def decode(self, body: memoryview, at: int) -> tuple[np.ndarray, int]:
        """Returns the array that starts at a byte, and where the next one does."""
        (count,) = _LEAF.unpack_from(body, at)
        at += _LEAF.size
        # a program may still read the last one
        array = self._last.copy() if count >= 0 else np.empty_like(self._last)
        self._last = array
        words = _words(array)
        if count == _WHOLE:
            words[:] = np.frombuffer(body, words.dtype, len(words), at)
            return array, at + words.nbytes
        if count == _ROWS and self._rows is not None:
            return array, self._decode_rows(body, at, words.reshape(-1, self._rows.words))
        if not 0 <= count <= len(words):
            raise ValueError(f"{count} words of {len(words)} changed")
        places = np.frombuffer(body, np.uint32, count, at)
        words[places] = np.frombuffer(body, np.uint32, count, at + places.nbytes)
        return array, at + 2 * places.nbytes

    def _decode_rows(self, body: memoryview, at: int, rows: np.ndarray) -> int:
        assert self._rows is not None
        numbers = np.frombuffer(body, np.int32, len(rows), at)
        at += numbers.nbytes
        is_new = numbers == _NEW
        new = np.frombuffer(body, np.uint32, is_new.sum() * rows.shape[1], at).reshape(-1, rows.shape[1])
        rows[~is_new] = self._rows.kept[numbers[~is_new]]
        rows[is_new] = new
        self._rows.keep(new)
        return at + new.nbytes


class _Rows:
    """The last ``_KEPT_ROWS`` rows that were sent whole; both ends keep the same.

    Args:
        words: 32-bit words of a row.
    """

    def __init__(self, words: int) -> None:
        self.words = words
        self.kept = np.zeros((_KEPT_ROWS, words), np.uint32)
        self._sums = [0] * _KEPT_ROWS
        self._by_sum: dict[int, int] = {0: 0}
        self._next = 0

    @classmethod
    def of(cls, array: np.ndarray) -> _Rows | None:
        """Returns what keeps rows of such arrays; ``None`` if they are not several, or narrow."""
        row_bytes = array.nbytes // len(array) if array.ndim == 2 and len(array) > 1 else 0
        return cls(row_bytes // 4) if row_bytes >= _WIDE_BYTES and not row_bytes % 4 else None

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Returns the number of each row, int32; ``_NEW``: it is not kept."""
        found = [self._by_sum.get(one, _NEW) for one in rows.sum(axis=1, dtype=np.uint32).tolist()]
        numbers = np.array(found, np.int32)
        numbers[(self.kept[numbers] != rows).any(axis=1)] = _NEW  # a sum alone proves nothing
        return numbers

    def keep(self, rows: np.ndarray) -> None:
        """Keeps rows in the places of the oldest."""
        for row, total in zip(rows, rows.sum(axis=1, dtype=np.uint32).tolist(), strict=True):
            number, self._next = self._next, (self._next + 1) % _KEPT_ROWS
            if self._by_sum.get(self._sums[number]) == number:
                del self._by_sum[self._sums[number]]
            self.kept[number], self._sums[number], self._by_sum[total] = row, total, number


def _words(array: np.ndarray) -> np.ndarray:
    """Views an array as a vector of 32-bit words, or of bytes if it is not a whole number of words."""
    return array.reshape(-1).view(np.uint8 if array.nbytes % 4 else np.uint32)
