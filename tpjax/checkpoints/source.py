"""The interface of checkpoint readers, and the byte-level reading that they share.

A reader lists its tensors at once and reads any box of one of them on demand. Files are read with
``seek`` and ``readinto``, never left memory-mapped: a mapped page counts as resident memory until it is
unmapped, so that all of a mapped checkpoint ends up in memory. This module knows nothing of file formats.
"""

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from tpjax.errors import CheckpointError

# One (start, stop) pair per axis.
Box: TypeAlias = tuple[tuple[int, int], ...]

# Bytes between two wanted runs above which seeking over them beats reading through them. The kernel
# reads ahead about this much anyway, and a seek and a read cost as much as copying some kilobytes.
_SEEK_GAP_BYTES = 32 * 1024
# The largest buffer used to read through the unwanted bytes between short runs.
_BUFFER_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor.

    Attributes:
        shape: shape in numpy and torch: ``[out, in]`` for a linear layer.
        dtype: dtype of what ``TensorSource.read`` returns: float32 for a quantised tensor.
        columns_first: the last axis of a matrix is stored slice after slice, not the one before it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    columns_first: bool = field(default=False, compare=False)


class TensorSource(Protocol):
    """A checkpoint whose tensors can be listed at once and read box by box."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint by its stored name."""
        ...

    def read(
        self, name: str, index: tuple[slice, ...] | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads one tensor, or the box of it that ``index`` selects.

        Args:
            name: a key of ``tensors``.
            index: slices of step 1, one per leading axis; axes left out, and None, are read in full.
            memory: an array for the result, which is read straight into it if that can be done: if it is
                contiguous and of the result's shape and dtype, and the reader computes nothing.

        Returns:
            A contiguous array, equal to ``full[index]``, of the dtype that ``tensors`` gives: ``memory``, or
            a new one.

        Raises:
            CheckpointError: the tensor does not exist, or the file changed since it was opened.
            IndexError: ``index`` has more axes than the tensor, or a step other than 1.
        """
        ...


def shown(name: str) -> str:
    """Quotes a name from a file so that an error stays one short printable line."""
    return f"{name!a}" if len(name) <= 120 else f"{name[:120]!a}... ({len(name)} characters)"


def lookup(tensors: Mapping[str, TensorInfo], name: str, where: Path) -> TensorInfo:
    """Returns the tensor's entry, or raises a ``CheckpointError`` that names the checkpoint."""
    if name not in tensors:
        raise CheckpointError(f"{where}: no tensor {shown(name)} among its {len(tensors)} tensors")
    return tensors[name]


def open_regular(path: Path) -> tuple[FileIO, int]:
    """Opens a file for unbuffered reading.

    Returns:
        The open file and its size in bytes.

    Raises:
        CheckpointError: it is absent, unreadable, or not a regular file (opening a pipe would hang).
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        return FileIO(path), status.st_size
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def read_exactly(file: FileIO, offset: int, out: np.ndarray, path: Path) -> None:
    """Fills the contiguous array ``out`` with the file's bytes from ``offset`` on.

    Raises:
        CheckpointError: the file ends first, or cannot be read.
    """
    target = out.reshape(-1).view(np.uint8).data
    wanted, done = len(target), 0
    try:
        file.seek(offset)
        while done < wanted:
            count = file.readinto(target[done:])  # the kernel gives at most 2 GiB at a time
            if not count:
                raise CheckpointError(
                    f"{path}: ended at byte {offset + done} where tensor data runs to {offset + wanted}"
                )
            done += count
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def to_box(shape: tuple[int, ...], index: tuple[slice, ...] | None) -> Box:
    """Resolves an index against a shape, with numpy's rules for negative and overlong bounds.

    Raises:
        IndexError: more slices than axes, or a step other than 1.
    """
    index = () if index is None else index
    if len(index) > len(shape):
        raise IndexError(f"{len(index)} slices for a tensor of {len(shape)} axes")
    if any(part.step not in (None, 1) for part in index):
        raise IndexError(f"only slices of step 1 can be read, got {index}")
    rest = (slice(None),) * (len(shape) - len(index))
    resolved = (part.indices(size)[:2] for part, size in zip(index + rest, shape, strict=True))
    return tuple((start, max(start, stop)) for start, stop in resolved)


def extents(box: Box) -> tuple[int, ...]:
    """Returns the shape of a box."""
    return tuple(stop - start for start, stop in box)


def array_for(box: Box, dtype: np.dtype, memory: np.ndarray | None) -> np.ndarray:
    """Returns ``memory`` if it can hold a box's values contiguously, otherwise a new array."""
    shape = extents(box)
    if memory is not None and (memory.shape, memory.dtype) == (shape, dtype) and memory.flags.c_contiguous:
        return memory
    return np.empty(shape, dtype)


def split_box(box: Box, limit: int) -> Iterator[Box]:
    """Splits a box, in row-major order, into boxes of at most ``limit`` elements."""
    if not box:
        yield box
        return
    (start, stop), rest = box[0], box[1:]
    inner = max(1, prod(extents(rest)))
    step = max(1, limit // inner)
    for low in range(start, stop, step):
        head = (low, min(low + step, stop))
        for tail in split_box(rest, limit) if inner > limit else (rest,):
            yield (head, *tail)


def read_box(
    file: FileIO,
    path: Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    box: Box,
    memory: np.ndarray | None = None,
) -> np.ndarray:
    """Reads a box of a row-major array that starts at byte ``offset`` of the file.

    Unwanted bytes are skipped, except gaps too short for the disk to notice.

    Returns:
        A contiguous array of shape ``extents(box)``: ``memory`` if it fits, see ``TensorSource.read``.

    Raises:
        CheckpointError: the file is shorter than the array.
    """
    out = array_for(box, dtype, memory)
    if out.size == 0:
        return out
    # Up to the last axis that is not read in full, each index is a run of its own; after it, bytes follow
    # each other.
    axis = max((i for i, size in enumerate(shape) if out.shape[i] != size), default=0)
    pitch = prod(shape[axis:]) * dtype.itemsize
    gap = pitch - prod(out.shape[axis:]) * dtype.itemsize
    if axis == 0 or gap >= _SEEK_GAP_BYTES or pitch > _BUFFER_BYTES:
        _read_runs(file, path, offset, shape, box, axis, out)
    else:
        _read_through(file, path, offset, shape, box, axis, out)
    return out


def _read_runs(
    file: FileIO, path: Path, offset: int, shape: tuple[int, ...], box: Box, axis: int, out: np.ndarray
) -> None:
    """Seeks to each run of ``out[i, j, ...]``, one index per axis before ``axis``, and reads it in place."""
    starts = tuple(start for start, _ in box)
    skip = starts[axis] * prod(shape[axis + 1 :]) if shape else 0
    for at in np.ndindex(out.shape[:axis]):
        first = _flat(starts[:axis], at, shape[:axis]) * prod(shape[axis:]) + skip
        read_exactly(file, offset + first * out.itemsize, out[(*at, ...)], path)


def _read_through(
    file: FileIO, path: Path, offset: int, shape: tuple[int, ...], box: Box, axis: int, out: np.ndarray
) -> None:
    """Reads full rows of the axis before ``axis`` through a small buffer and keeps the selected columns."""
    starts = tuple(start for start, _ in box)
    pitch = prod(shape[axis:])
    rows = min(out.shape[axis - 1], max(1, _BUFFER_BYTES // (pitch * out.itemsize)))
    buffer = np.empty((rows, *shape[axis:]), out.dtype)
    for at in np.ndindex(out.shape[: axis - 1]):
        for row in range(0, out.shape[axis - 1], rows):
            target = out[at][row : row + rows]
            first = _flat(starts[:axis], (*at, row), shape[:axis]) * pitch
            filled = buffer[: len(target)]
            read_exactly(file, offset + first * out.itemsize, filled, path)
            target[...] = filled[:, slice(*box[axis])]


def _flat(starts: tuple[int, ...], at: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Returns the row-major position, in an array of ``shape``, of the element at ``starts + at``."""
    position = 0
    for start, i, size in zip(starts, at, shape, strict=True):
        position = position * size + start + i
    return position
