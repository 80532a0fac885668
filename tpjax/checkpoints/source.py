"""What every checkpoint reader offers, and the byte-level reading they share.

A reader lists its tensors at once and reads any box of one of them on demand. Files are read with
`seek` and `readinto`, or mapped for as long as a block is looked at, never left memory-mapped: a mapped page
counts as resident memory until it is unmapped, so a mapped checkpoint ends up in memory whole. This module
knows nothing of file formats.
"""

import mmap
import os
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
# Boxes below this many bytes are copied rather than mapped: a system call more costs as much.
_LEAST_MAPPED_BYTES = 64 * 1024
_MAP_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # all pages at once
# The largest buffer used to read through the unwanted bytes between short runs.
_BUFFER_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor.

    Attributes:
        shape: as numpy and torch see it: `[out, in]` for a linear layer.
        dtype: what `TensorSource.read` returns, which for a quantised tensor is float32.
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

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads one tensor, or the box of it that `index` cuts out.

        Args:
            name: a key of `tensors`.
            index: slices of step 1, one per leading axis; axes left out, like None, are read whole.

        Returns:
            A new contiguous array, equal to `full[index]`, of the dtype that `tensors` gives.

        Raises:
            CheckpointError: the tensor does not exist, or the file changed since it was opened.
            IndexError: `index` has more axes than the tensor, or a step other than 1.
        """
        ...


def shown(name: str) -> str:
    """Quotes a name from a file so that an error stays one short printable line."""
    return f"{name!a}" if len(name) <= 120 else f"{name[:120]!a}... ({len(name)} characters)"


def lookup(tensors: Mapping[str, TensorInfo], name: str, where: Path) -> TensorInfo:
    """Returns the tensor's entry, or raises a `CheckpointError` that names the checkpoint."""
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
    """Fills the contiguous array `out` with the file's bytes from `offset` on.

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
    if any(cut.step not in (None, 1) for cut in index):
        raise IndexError(f"only slices of step 1 can be read, got {index}")
    whole = (slice(None),) * (len(shape) - len(index))
    resolved = (cut.indices(size)[:2] for cut, size in zip(index + whole, shape, strict=True))
    return tuple((start, max(start, stop)) for start, stop in resolved)


def extents(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def split_box(box: Box, limit: int) -> Iterator[Box]:
    """Cuts a box, in row-major order, into boxes of at most `limit` elements."""
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
    file: FileIO, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, box: Box
) -> np.ndarray:
    """Reads a box of a row-major array that starts at byte `offset` of the file.

    Unwanted bytes are skipped, except gaps too short for the disk to notice.

    Returns:
        A contiguous array of shape `extents(box)`.

    Raises:
        CheckpointError: the file is shorter than the array.
    """
    out = np.empty(extents(box), dtype)
    if out.size == 0:
        return out
    # Up to the last axis that is cut, each index is a run of its own; from there on bytes are contiguous.
    cut = max((axis for axis, size in enumerate(shape) if out.shape[axis] != size), default=0)
    pitch = prod(shape[cut:]) * dtype.itemsize
    gap = pitch - prod(out.shape[cut:]) * dtype.itemsize
    if cut == 0 or gap >= _SEEK_GAP_BYTES or pitch > _BUFFER_BYTES:
        _read_runs(file, path, offset, shape, box, cut, out)
    else:
        _read_through(file, path, offset, shape, box, cut, out)
    return out


def view_box(
    file: FileIO, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, box: Box
) -> np.ndarray | None:
    """A box of a row-major array as a read-only view of the file itself, which is mapped until it is dropped.

    It saves a copy. Whoever gets it must be quick: a file that is cut short meanwhile kills the process.

    Returns:
        The view; None where it would reach over much that is not wanted, or the file cannot be mapped.

    Raises:
        CheckpointError: the file is shorter than the array.
    """
    sizes = extents(box)
    lead = next((axis for axis, size in enumerate(sizes) if size != 1), len(sizes))
    rows, columns = sizes[lead : lead + 1], sizes[lead + 1 :]
    pitch = prod(shape[lead + 1 :]) * dtype.itemsize
    partial = columns != shape[lead + 1 :]
    gap = pitch - prod(columns) * dtype.itemsize
    if not rows or prod(sizes) * dtype.itemsize < _LEAST_MAPPED_BYTES or gap >= _SEEK_GAP_BYTES:
        return None
    if offset % dtype.itemsize or (partial and len(columns) != 1):
        return None
    starts = tuple(start for start, _ in box)
    first = offset + _flat(starts[: lead + 1], (0,) * (lead + 1), shape[: lead + 1]) * pitch
    wanted = rows[0] * pitch
    size = os.fstat(file.fileno()).st_size
    if size < first + wanted:
        raise CheckpointError(f"{path}: ended at byte {size} where tensor data runs to {first + wanted}")
    skipped = first % mmap.ALLOCATIONGRANULARITY
    try:
        data = mmap.mmap(file.fileno(), skipped + wanted, _MAP_FLAGS, mmap.PROT_READ, offset=first - skipped)
    except OSError:  # not every file system maps files
        return None
    whole = np.frombuffer(data, dtype, wanted // dtype.itemsize, skipped)
    view = whole.reshape((1,) * lead + rows + shape[lead + 1 :])
    return view[..., slice(*box[-1])] if partial else view


def _read_runs(
    file: FileIO, path: Path, offset: int, shape: tuple[int, ...], box: Box, cut: int, out: np.ndarray
) -> None:
    """Seeks to each run of `out[i, j, ...]`, one index per axis before `cut`, and reads it in place."""
    starts = tuple(start for start, _ in box)
    skip = starts[cut] * prod(shape[cut + 1 :]) if shape else 0
    for at in np.ndindex(out.shape[:cut]):
        first = _flat(starts[:cut], at, shape[:cut]) * prod(shape[cut:]) + skip
        read_exactly(file, offset + first * out.itemsize, out[(*at, ...)], path)


def _read_through(
    file: FileIO, path: Path, offset: int, shape: tuple[int, ...], box: Box, cut: int, out: np.ndarray
) -> None:
    """Reads whole rows of the axis before `cut` through a small buffer and keeps the columns asked for."""
    starts = tuple(start for start, _ in box)
    pitch = prod(shape[cut:])
    rows = min(out.shape[cut - 1], max(1, _BUFFER_BYTES // (pitch * out.itemsize)))
    buffer = np.empty((rows, *shape[cut:]), out.dtype)
    for at in np.ndindex(out.shape[: cut - 1]):
        for row in range(0, out.shape[cut - 1], rows):
            target = out[at][row : row + rows]
            first = _flat(starts[:cut], (*at, row), shape[:cut]) * pitch
            filled = buffer[: len(target)]
            read_exactly(file, offset + first * out.itemsize, filled, path)
            target[...] = filled[:, slice(*box[cut])]


def _flat(starts: tuple[int, ...], at: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The row-major position in an array of `shape` of the element `at` places beyond `starts`."""
    position = 0
    for start, i, size in zip(starts, at, shape, strict=True):
        position = position * size + start + i
    return position
