"""Reads Hugging Face checkpoint directories: ``model.safetensors``, or an index and its shards.

The format is eight bytes of little-endian header length, a JSON header, and the tensors' bytes
(https://huggingface.co/docs/safetensors, "Format"). Headers are checked here, then once more by the
safetensors library; the bytes are read here, because the library's numpy side has no float8 and maps
the file. Pickle checkpoints are never opened: unpickling one runs code of its author's choosing.
"""

import json
import logging
import os
from collections.abc import Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tpjax.checkpoints.source import TensorInfo, lookup, open_regular, read_box, read_exactly, shown, to_box
from tpjax.errors import CheckpointError

log = logging.getLogger(__name__)

# A header of 100,000 tensors is about 12 MB; parsing beyond this bound takes seconds.
MAX_JSON_BYTES = 32 * 1024 * 1024
_MAX_AXES = 8
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BF16": ml_dtypes.bfloat16,
        "BOOL": np.bool_,
        "C64": np.complex64,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "I8": np.int8,
        "U16": np.uint16,
        "U32": np.uint32,
        "U64": np.uint64,
        "U8": np.uint8,
    }.items()
}


class _Entry(NamedTuple):
    """Where a tensor's bytes are: ``path`` from byte ``start`` of the file."""

    path: Path
    start: int
    info: TensorInfo


class SafetensorsCheckpoint:
    """A directory with ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.

    If both exist, the single file is read, as in transformers. Only headers are read at first. If several
    shards have a tensor, the one in the shard that the index names counts; if it names none of them, they
    must be equal to be read. Other disagreements of index and shards are named in a warning: a tensor that
    the model needs and no shard has is reported when it is asked for.

    Attributes:
        directory: the checkpoint's directory.
        tensors: every tensor of every shard, listed in the index or not.
        unlisted: names of tensors that the index does not list.
    """

    def __init__(self, directory: Path) -> None:
        """Reads and checks the index and every header.

        Raises:
            CheckpointError: nothing there can be read, or an index or header is wrong or truncated.
        """
        self.directory = Path(directory)
        self._entries: dict[str, _Entry] = {}
        self._copies: dict[str, _Entry] = {}  # tensors in two shards, neither named by the index
        self._stale: list[str] = []  # tensors in two shards, one of them named by the index
        index = _read_index(self.directory)
        for shard in [_SINGLE] if index is None else sorted(set(index.values())):
            self._add(_read_header(self.directory / shard), index or {})
        self._compare_with(index or {})
        self.tensors: Mapping[str, TensorInfo] = {name: e.info for name, e in self._entries.items()}
        self.unlisted = frozenset(self.tensors.keys() - index.keys() if index else ())

    def read(
        self, name: str, index: tuple[slice, ...] | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads a tensor or a box of it; see ``TensorSource.read``."""
        info = lookup(self.tensors, name, self.directory)
        entry = self._entries[name]
        values = _read_entry(entry, index, memory)
        other = self._copies.get(name)
        if other is not None and (
            other.info != info or _read_entry(other, index).tobytes() != values.tobytes()
        ):
            raise CheckpointError(
                f"{entry.path}: tensor {shown(name)} is also in {other.path.name}, with other values, "
                "and the index names neither"
            )
        return values

    def _add(self, entries: dict[str, _Entry], index: Mapping[str, str]) -> None:
        for name, entry in entries.items():
            first = self._entries.setdefault(name, entry)
            if first is entry:
                continue
            listed = index.get(name)
            if listed not in (first.path.name, entry.path.name):
                self._copies[name] = first
            else:
                self._stale.append(name)
                self._copies.pop(name, None)
            if listed != first.path.name:  # the last one if none is listed, as in transformers
                self._entries[name] = entry

    def _compare_with(self, index: Mapping[str, str]) -> None:
        """Logs a warning that names where the index and the shards disagree."""
        where = self.directory / _INDEX
        absent = [name for name in index if name not in self._entries]
        if absent:
            log.warning("%s: no shard has %s", where, _some(absent))
        if self._stale:
            log.warning("%s: another shard than it says has a second %s", where, _some(self._stale))
        moved = [name for name, e in self._entries.items() if index.get(name, e.path.name) != e.path.name]
        if moved:
            log.warning("%s: another shard than it says has %s", where, _some(moved))


def _some(names: list[str]) -> str:
    more = len(names) - 5
    return ", ".join(map(shown, names[:5])) + (f" and {more} more" if more > 0 else "")


def _read_entry(
    entry: _Entry, index: tuple[slice, ...] | None, memory: np.ndarray | None = None
) -> np.ndarray:
    box = to_box(entry.info.shape, index)
    file, _ = open_regular(entry.path)
    with file:
        return read_box(file, entry.path, entry.start, entry.info.shape, entry.info.dtype, box, memory)


def has_weights(directory: Path) -> bool:
    """Returns whether a directory has what :class:`SafetensorsCheckpoint` reads."""
    return any(os.path.exists(directory / name) for name in (_SINGLE, _INDEX))


def _read_index(directory: Path) -> dict[str, str] | None:
    """Returns the index's map from tensor to shard, or None if ``model.safetensors`` is to be read."""
    if os.path.exists(directory / _SINGLE):  # unlike Path.exists, never raises
        return None
    path = directory / _INDEX
    if not os.path.exists(path):
        raise CheckpointError(_explain_absence(directory))
    file, size = open_regular(path)
    with file:
        index = _parse_json(_read_bytes(file, path, 0, size), path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no 'weight_map' from tensor names to shard files")
    for name, shard in weight_map.items():
        _check_shard_name(name, shard, path)
    shards = set(weight_map.values())
    missing = sorted(shard for shard in shards if not os.path.exists(directory / shard))
    if missing:
        few = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(f"{path}: {len(missing)} of {len(shards)} shards are missing: {few}")
    return weight_map


def _check_shard_name(name: str, shard: Any, path: Path) -> None:
    """A shard lies beside its index; any other path could lead out of the checkpoint."""
    if not isinstance(shard, str):
        raise CheckpointError(f"{path}: the shard of tensor {shown(name)} is not a file name")
    if not shard.endswith(".safetensors") or not shard.isprintable() or set(shard) & set('/\\:"'):
        raise CheckpointError(
            f"{path}: tensor {shown(name)} is placed in {shown(shard)}, "
            "which is not the plain name of a .safetensors file"
        )


def _explain_absence(directory: Path) -> str:
    """Returns an error that says what a directory without safetensors weights holds instead."""
    if not directory.is_dir():
        return f"{directory}: not a directory" if directory.exists() else f"{directory}: does not exist"
    strays = sorted(path.name for path in directory.glob("*.safetensors"))
    if strays:
        return f"{directory}: has {strays[0]} but neither {_SINGLE} nor {_INDEX}"
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return (
            f"{directory}: has only pickle weights ({pickles[0]}), which can run code and are never opened; "
            "convert to safetensors if you trust them, with transformers: "
            "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET)"
        )
    return f"{directory}: has no weights: neither {_SINGLE} nor {_INDEX}"


def _read_header(path: Path) -> dict[str, _Entry]:
    """Reads and checks one file's header.

    Raises:
        CheckpointError: the header is not one, or does not describe exactly the bytes that follow it.
    """
    file, size = open_regular(path)
    with file:
        if size < 8:
            raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file")
        prefix = _read_bytes(file, path, 0, 8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise CheckpointError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")
        if length > size - 8:
            raise CheckpointError(f"{path}: header says it has {length} bytes, file has {size - 8} after it")
        header = _parse_json(_read_bytes(file, path, 8, length), path)
    header.pop("__metadata__", None)
    start = 8 + length
    entries, spans = {}, []
    for name, value in header.items():
        info, first, last = _parse_entry(name, value, path)
        entries[name] = _Entry(path, start + first, info)
        spans.append((first, last, name))
    _check_coverage(spans, start, size, path)
    _check_with_library(path)
    return entries


def _parse_entry(name: str, value: Any, path: Path) -> tuple[TensorInfo, int, int]:
    """Checks one tensor's header entry; returns its info and the span of its bytes."""
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is not described by an object")
    code, shape, span = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(
            f"{where} has dtype {shown(str(code))}; supported are {', '.join(sorted(_DTYPES))}"
        )
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise CheckpointError(f"{where} has a shape that is not a list of at most {_MAX_AXES} sizes")
    if not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise CheckpointError(f"{where} has data_offsets that are not a start and an end")
    # Zero sizes are legal, but numpy wants the product of the others to fit all the same.
    if prod(size for size in shape if size) * _DTYPES[code].itemsize >= 2**63:
        raise CheckpointError(f"{where} has shape {shape}, more bytes than can be addressed")
    expected, actual = prod(shape) * _DTYPES[code].itemsize, span[1] - span[0]
    if expected != actual:
        raise CheckpointError(
            f"{where} of dtype {code} and shape {shape} takes {expected} bytes, "
            f"its data_offsets give {actual}"
        )
    return TensorInfo(tuple(shape), _DTYPES[code]), span[0], span[1]


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_coverage(spans: list[tuple[int, int, str]], start: int, size: int, path: Path) -> None:
    """The tensors must tile the bytes after the header: no overlap, no hole, nothing missing or left."""
    end, previous = 0, ""
    for first, last, name in sorted(spans):
        if first < end:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} begins at byte {first} of the data, "
                f"before {shown(previous)} ends at byte {end}"
            )
        if first > end:
            raise CheckpointError(f"{path}: bytes {end} to {first} of the data belong to no tensor")
        end, previous = last, name
    if start + end != size:
        kind = "truncated: " if start + end > size else ""
        raise CheckpointError(f"{path}: {kind}header says {start + end} bytes, file has {size}")


def _check_with_library(path: Path) -> None:
    """Checks the header again with the reference implementation; reads no tensor."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None


def _read_bytes(file: FileIO, path: Path, offset: int, count: int) -> bytes:
    if count > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: JSON of {count} bytes, at most {MAX_JSON_BYTES} are read")
    data = np.empty(count, np.uint8)
    read_exactly(file, offset, data, path)
    return data.tobytes()


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        CheckpointError: it is not one, nests too deeply, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{path}: key {shown(key)} appears twice in its JSON")
            result[key] = value
        return result

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8 and overlong integers
        raise CheckpointError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: JSON is not an object")
    return value
