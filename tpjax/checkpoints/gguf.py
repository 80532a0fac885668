"""Reads GGUF files: metadata decoded, tensors dequantised to float32 a block of rows at a time.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed
here rather than by ``gguf.GGUFReader``, which trusts every count in the file and takes seconds over a
large vocabulary; the arithmetic of each quantisation comes from the ``gguf`` package.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from tpjax.checkpoints import gguf_parts
from tpjax.checkpoints.source import (
    Box,
    TensorInfo,
    array_for,
    lookup,
    open_regular,
    read_box,
    shown,
    split_box,
    to_box,
)
from tpjax.errors import CheckpointError

# Every type that gguf.quants can dequantise; an older gguf package may lack the last ones.
SUPPORTED_TYPES: tuple[str, ...] = tuple(
    name
    for name in (
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K"),
        *("Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
    )
    if name in GGMLQuantizationType.__members__
)
_KINDS = {kind.value: kind for kind in GGMLQuantizationType}
_VERSIONS = (2, 3)  # these differ only in that 3 allows big-endian files
_MAX_AXES = 4
_MAX_PARTS = 0xFFFF  # of a split model: the keys are 16 bits wide, names have five digits
# Values in all metadata arrays together; gemma 3's vocabulary of 262,144 tokens takes about 800,000.
MAX_METADATA_VALUES = 4 * 1024 * 1024
# Elements dequantised at once. gguf.quants makes several temporaries of this size: at 128k elements they
# stay in the cache and are reused by malloc, 2 to 4 times as fast as full tensors.
_CHUNK_ELEMENTS = 128 * 1024

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, struct.Struct] = {
    code: struct.Struct("<" + letter)
    for code, letter in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}.items()
} | {code: struct.Struct("<" + letter) for code, letter in {10: "Q", 11: "q", 12: "d"}.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# The least bytes that one entry can take: an empty name and a one-byte value; an empty name and one axis.
_MIN_PAIR_BYTES, _MIN_TENSOR_BYTES = 13, 32


class _Tensor(NamedTuple):
    """A tensor as its file's header describes it; ``start`` counts from the file's beginning once placed."""

    path: Path
    info: TensorInfo
    kind: GGMLQuantizationType
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of all elements along the last axis."""
        block_size, type_size = GGML_QUANT_SIZES[self.kind]
        return self.info.shape[-1] // block_size * type_size

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return prod(self.info.shape[:-1]) * self.row_bytes


class GGUFFile:
    """A GGUF file, versions 2 and 3, little-endian, or the parts that it is the first of.

    Attributes:
        path: the file.
        metadata: every key with its value as str, int, float, bool or a list of one of these; of the first
            part.
        tensors: every tensor by its GGUF name, numpy-order shape, always float32.
    """

    def __init__(self, path: Path) -> None:
        """Reads and checks the headers; no tensor is read.

        Raises:
            CheckpointError: a file is not GGUF, is truncated or inconsistent, or has a tensor of a type that
                cannot be dequantised; a part is missing, or it is not the first that is named.
        """
        self.path = Path(path)
        header = _header(self.path)
        self.metadata: dict[str, Any] = header.metadata
        self._tensors = header.tensors
        if header.parts > 1:
            self._tensors = _tensors_of_parts(self.path, header)
        self.tensors: Mapping[str, TensorInfo] = {name: t.info for name, t in self._tensors.items()}

    def quantization(self, name: str) -> str:
        """Returns the ggml name of the tensor's stored type, such as ``"Q4_K"`` or ``"F32"``."""
        lookup(self.tensors, name, self.path)
        return self._tensors[name].kind.name

    def file_of(self, name: str) -> Path:
        """Returns the file that has the tensor."""
        return self._tensors[name].path

    def read(
        self, name: str, index: tuple[slice, ...] | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads a tensor or a box of it, dequantised to float32; see ``TensorSource.read``.

        Only the rows asked for are read, and of each row only the quantisation blocks that the columns
        touch (but for gaps too short for the disk to notice). Temporaries stay under a few megabytes.
        """
        info = lookup(self.tensors, name, self.path)
        tensor = self._tensors[name]
        block_size = GGML_QUANT_SIZES[tensor.kind][0]
        box = to_box(info.shape, index)
        out = array_for(box, info.dtype, memory)
        if out.size == 0:
            return out
        *lead, (first, last) = box
        # The last axis counted in blocks: full blocks are read, then cropped to the selected columns.
        blocks = (*lead, (first // block_size, -(-last // block_size)))
        file, _ = open_regular(tensor.path)
        with file:
            for part in split_box(blocks, max(1, _CHUNK_ELEMENTS // block_size)):
                *rows, (low, high) = part
                values = _dequantize(self._blocks(file, tensor, part), tensor.kind)
                start, stop = max(first, low * block_size), min(last, high * block_size)
                place = (slice(a - o, b - o) for (a, b), (o, _) in zip(rows, lead, strict=True))
                out[(*place, slice(start - first, stop - first))] = values[
                    ..., start - low * block_size : stop - low * block_size
                ]
        return out

    def read_blocks(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads quantisation blocks as they are stored.

        Args:
            name: name of the tensor.
            index: a slice for each axis; along the last, blocks are counted.

        Returns:
            The bytes of each block along a new last axis, uint8.
        """
        tensor = self._tensors[name]
        file, _ = open_regular(tensor.path)
        with file:
            raw = self._blocks(file, tensor, tuple((one.start, one.stop) for one in index))
        return raw.reshape(*raw.shape[:-1], -1, GGML_QUANT_SIZES[tensor.kind][1])

    def _blocks(self, file: FileIO, tensor: _Tensor, box: Box) -> np.ndarray:
        """Reads the bytes of a box whose last axis counts blocks."""
        type_size = GGML_QUANT_SIZES[tensor.kind][1]
        *rows, (low, high) = box
        shape = (*tensor.info.shape[:-1], tensor.row_bytes)
        in_bytes = (*rows, (low * type_size, high * type_size))
        return read_box(file, tensor.path, tensor.start, shape, np.dtype(np.uint8), in_bytes)


def _dequantize(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Dequantises uint8 ``[..., bytes]`` to float32 ``[..., elements]``."""
    # As one long row: gguf.quants loops in Python over groups of 16 rows.
    with np.errstate(all="ignore"):  # a file may have infinite scales
        return dequantize(raw.reshape(1, -1), kind).reshape(*raw.shape[:-1], -1)


def _header(path: Path) -> _Header:
    """Reads the header of one file."""
    file, size = open_regular(path)
    with file:
        if size < 24:
            raise CheckpointError(f"{path}: {size} bytes is too short for a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(path, data)


def _tensors_of_parts(first: Path, header: _Header) -> dict[str, _Tensor]:
    """Returns the tensors of all parts of a model, by the rules of llama.cpp's loader.

    Args:
        first: path of the first part.
        header: its header.
    """
    count, names = header.parts, gguf_parts.names_of(first.name)
    if header.part != 1:
        shown_name = f", {names[0]}" if gguf_parts.number_of(first.name) == (header.part, count) else ""
        raise CheckpointError(
            f"{first}: is part {header.part} of {count} of a split model: give the first{shown_name}"
        )
    if gguf_parts.number_of(first.name) != (1, count):
        raise CheckpointError(
            f"{first}: is part 1 of {count} of a split model, and the others are found by its name, which "
            f"must end with -00001-of-{count:05}.gguf"
        )
    paths = [first.with_name(name) for name in names]
    absent = [path for path in paths if not path.exists()]
    if absent:
        raise CheckpointError(
            f"{first}: is part 1 of {count} of a split model, of which {count - len(absent)} are there: "
            f"{absent[0].name} is missing"
        )
    tensors = dict(header.tensors)
    for number, path in enumerate(paths[1:], 2):
        part = _header(path)
        if (part.part, part.parts) != (number, count):
            raise CheckpointError(
                f"{path}: says that it is part {part.part} of {part.parts}, its name says {number} of {count}"
            )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {shown(name)} is in {tensors[name].path.name} too")
            tensors[name] = tensor
    said = header.metadata.get("split.tensors.count")
    if said != len(tensors):
        raise CheckpointError(
            f"{first}: split.tensors.count is {said!a:.40}, the {count} parts have {len(tensors)} tensors"
        )
    return tensors


class _Header:
    """Parses and checks everything before the tensors' bytes.

    Each count and length is compared with the bytes that are left before anything is allocated for it.

    Attributes:
        metadata: see ``GGUFFile``.
        tensors: the file's own.
        part: which part of a split model it is, from 1.
        parts: how many there are.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0
        self._values_left = MAX_METADATA_VALUES
        tensor_count, pair_count = self._preamble()
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string("a metadata key")
            if key in self.metadata:
                raise self._error(f"metadata key {shown(key)} appears twice")
            self.metadata[key] = self._value(key, self._unpack(_U32, shown(key)))
        self.part, self.parts = self._split()
        self.tensors: dict[str, _Tensor] = {}
        for _ in range(tensor_count):
            name = self._string("a tensor name")
            if name in self.tensors:
                raise self._error(f"tensor {shown(name)} appears twice")
            self.tensors[name] = self._tensor(f"tensor {shown(name)}")
        self._place_tensors()

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {message}")

    def _preamble(self) -> tuple[int, int]:
        """Checks magic, version and counts; returns the counts of tensors and of metadata pairs."""
        magic, version, tensor_count, pair_count = struct.unpack_from("<4sIQQ", self._data)
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if magic == b"FUGG" or (magic == b"GGUF" and version not in _VERSIONS and swapped in _VERSIONS):
            raise self._error("is a big-endian GGUF file; only little-endian ones are supported")
        if magic == b"vers":
            raise self._error("is a Git LFS pointer, not the model; run `git lfs pull`")
        if magic != b"GGUF":
            raise self._error(f"is not a GGUF file: begins with {magic!r}, not b'GGUF'")
        if version not in _VERSIONS:
            raise self._error(f"is GGUF version {version}; versions 2 and 3 are supported")
        self._at = 24
        self._check_count(pair_count, _MIN_PAIR_BYTES, "metadata pairs")
        self._check_count(tensor_count, _MIN_TENSOR_BYTES, "tensors")
        return tensor_count, pair_count

    def _check_count(self, count: int, least_bytes: int, what: str) -> None:
        left = len(self._data) - self._at
        if count > left // least_bytes:
            raise self._error(f"says it has {count} {what}, the {left} bytes left hold {left // least_bytes}")

    def _unpack(self, form: struct.Struct, what: str) -> Any:
        if self._at + form.size > len(self._data):
            raise self._error(
                f"truncated: {what} needs bytes up to {self._at + form.size}, file has {len(self._data)}"
            )
        (value,) = form.unpack_from(self._data, self._at)
        self._at += form.size
        return value

    def _string(self, what: str) -> str:
        return self._strings(1, what)[0]

    def _strings(self, count: int, what: str) -> list[str]:
        """Reads ``count`` strings: most of the time that opening a file with a large vocabulary takes."""
        data, at, end = self._data, self._at, len(self._data)
        result = []
        for _ in range(count):
            begin = at + 8
            at = begin + int.from_bytes(data[at:begin], "little")
            if at > end:
                raise self._error(
                    f"{what} says it has {at - begin} bytes, file has {max(0, end - begin)} left"
                )
            try:
                result.append(data[begin:at].decode())
            except UnicodeDecodeError as error:
                raise self._error(f"{what} at byte {begin} is not UTF-8: {error.reason}") from None
        self._at = at
        return result

    def _value(self, key: str, code: int) -> Any:
        """Reads one metadata value of the type that ``code`` stands for."""
        if code == _STRING:
            return self._string(f"metadata {shown(key)}")
        if code == _ARRAY:
            return self._array(key)
        if code not in _SCALARS:
            raise self._error(f"metadata {shown(key)} has unknown type {code}; types 0 to 12 are known")
        return self._unpack(_SCALARS[code], shown(key))

    def _array(self, key: str) -> list[Any]:
        what = f"metadata {shown(key)}"
        code, count = self._unpack(_U32, what), self._unpack(_U64, what)
        if code == _ARRAY:
            raise self._error(f"{what} is an array of arrays, which no reader supports")
        if code != _STRING and code not in _SCALARS:
            raise self._error(f"{what} is an array of unknown type {code}; types 0 to 12 are known")
        self._check_count(count, 8 if code == _STRING else _SCALARS[code].size, f"elements in {what}")
        self._values_left -= count
        if self._values_left < 0:
            total = MAX_METADATA_VALUES - self._values_left
            raise self._error(f"{what} brings the arrays to {total} values, at most {MAX_METADATA_VALUES}")
        if code == _STRING:
            return self._strings(count, what)
        form = _SCALARS[code]
        begin, self._at = self._at, self._at + count * form.size
        return list(struct.unpack(f"<{count}{form.format[1:]}", self._data[begin : self._at]))

    def _split(self) -> tuple[int, int]:
        """Returns which part of a split model it is, and of how many; the key counts from 0."""
        parts, part = self.metadata.get("split.count", 1), self.metadata.get("split.no", 0)
        for key, value, most in (("split.count", parts, _MAX_PARTS), ("split.no", part, _MAX_PARTS - 1)):
            if type(value) is not int or not 0 <= value <= most:
                raise self._error(f"{key} is {value!a:.40}, not a whole number up to {most}")
        return part + 1, max(parts, 1)

    def _tensor(self, what: str) -> _Tensor:
        """Reads one tensor's description; its start still counts from the beginning of the data."""
        axes = self._unpack(_U32, what)
        if not 1 <= axes <= _MAX_AXES:
            raise self._error(f"{what} has {axes} axes, must be 1 to {_MAX_AXES}")
        shape = tuple(self._unpack(_U64, what) for _ in range(axes))[::-1]
        code, start = self._unpack(_U32, what), self._unpack(_U64, what)
        kind = _KINDS.get(code)
        if kind is None or kind.name not in SUPPORTED_TYPES:
            stored = f"{kind.name if kind else 'unknown'} ({code})"
            raise self._error(f"{what} has type {stored}; supported are {', '.join(SUPPORTED_TYPES)}")
        if 0 in shape or prod(shape) >= 2**61:
            raise self._error(f"{what} has shape {shape}: sizes must be positive, their product below 2**61")
        block_size, _ = GGML_QUANT_SIZES[kind]
        if shape[-1] % block_size:
            raise self._error(
                f"{what} has rows of {shape[-1]}, not a multiple of the {block_size} in a {kind.name} block"
            )
        return _Tensor(self._path, TensorInfo(shape, np.dtype(np.float32)), kind, start)

    def _place_tensors(self) -> None:
        """Converts starts to file offsets, and checks that tensors are aligned, apart and inside the file."""
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!a:.40}, not a power of two")
        base, size = -(-self._at // alignment) * alignment, len(self._data)
        end, previous = base, ""
        for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].start):
            what, start = f"tensor {shown(name)}", base + tensor.start
            if start % alignment:
                raise self._error(f"{what} starts at byte {start}, not a multiple of {alignment}")
            if start < end:
                raise self._error(
                    f"{what} starts at byte {start}, before {shown(previous)} ends at byte {end}"
                )
            end, previous = start + tensor.stored_bytes, name
            if end > size:
                raise self._error(f"truncated: {what} needs bytes {start} to {end}, file has {size}")
            self.tensors[name] = tensor._replace(start=start)
