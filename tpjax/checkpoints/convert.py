"""Converts any checkpoint to an Orbax directory, or a Hugging Face directory to a quantised one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpjax.checkpoints import compressed_tensors, digests, orbax
from tpjax.checkpoints.canonical import CanonicalSource
from tpjax.checkpoints.gguf import GGUFFile
from tpjax.checkpoints.kept import Kept
from tpjax.checkpoints.load import check_tensors, quantized_tensors
from tpjax.checkpoints.opening import Checkpoint, open_checkpoint
from tpjax.checkpoints.parameters import Parameter, abstract_decoder, parameters
from tpjax.checkpoints.rounding import RoundedSource
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
from tpjax.checkpoints.shards import write_shards
from tpjax.checkpoints.source import TensorSource, shown
from tpjax.config import Quantize, check_choice
from tpjax.distributed import barrier, num_processes, process_id
from tpjax.errors import CheckpointError, ConfigError
from tpjax.layers.weights import FORMATS
from tpjax.mesh import AXIS, make_mesh

TargetFormat: TypeAlias = Literal["orbax", "safetensors"]

_HEAD = "lm_head"


def convert(
    path: Path,
    target: Path,
    dtype: jnp.dtype | None = None,
    quantize: Quantize | None = None,
    target_format: TargetFormat = "orbax",
) -> None:
    """Writes a checkpoint as another directory, which appears complete or not at all and loads at any tp.

    An Orbax directory has canonical tensors, and all of them are in host memory at once. A directory of
    safetensors has the names and the configuration of the Hugging Face directory that it is made of, with
    weights quantised as compressed-tensors has them, and is written shard by shard, by one process. Several,
    which all call this, share an Orbax directory out over their devices: each reads and writes its own part
    of every tensor, but rounds whole ones.

    Args:
        path: a Hugging Face directory, a GGUF file or an Orbax directory; the first for ``safetensors``.
        target: a directory that does not exist yet; several processes have to share its file system.
        dtype: dtype of the weights that are not quantised; ``None``: as they are stored. Those of a quantised
            checkpoint are dequantised.
        quantize: what the weights of attention, MLPs and experts are rounded to, as by ``LLM``; ``None``:
            they are not.
        target_format: ``orbax`` or ``safetensors``.

    Raises:
        CheckpointError: the checkpoint is incomplete, or ``target`` exists or cannot be written.
        ConfigError: its architecture is not supported, it is quantised already, or cannot be written so.
        LostProcessError: another process is lost.
    """
    check_choice("target_format", target_format, TargetFormat)
    if target_format == "safetensors" and quantize is None:
        raise ConfigError("target_format='safetensors' needs quantize: int8, fp8 or int4")
    checkpoint = open_checkpoint(path)
    checkpoint.check_quantize(quantize)
    mesh = make_mesh(None if num_processes() > 1 else 1)
    declared = parameters(abstract_decoder(checkpoint.config, mesh, jnp.dtype("float32"), quantize), mesh)
    check_tensors(checkpoint, declared)
    kept = {name: compressed_tensors.canonical(one) for name, one in quantized_tensors(declared).items()}
    in_files = _in_files(checkpoint, kept) if target_format == "safetensors" else {}
    with _directory(target) as directory:
        if not process_id():
            _copy_tokenizer(path, directory)  # first: weights take hours
        if target_format == "orbax":
            tensors = _canonical_tensors(checkpoint, declared, kept, dtype, mesh)
            settings = None if quantize is None else compressed_tensors.settings_of(FORMATS[quantize])
            orbax.write(directory, checkpoint.config, tensors, settings)
        if process_id():
            return
        if target_format == "safetensors" and quantize is not None:
            _write_safetensors(path, directory, in_files, quantize, dtype)
        digests.write_manifest(directory)


@contextmanager
def _directory(target: Path) -> Iterator[Path]:
    """Yields the folder that becomes ``target``: process 0 creates and renames it, the others wait for it."""
    if not process_id():
        with orbax.new_directory(target) as directory:
            if num_processes() > 1:
                barrier()
            yield directory
        return
    barrier()
    directory = orbax.partial_of(target)
    if not directory.is_dir():
        raise CheckpointError(
            f"process {process_id()} does not see {directory}: all have to share the target's file system"
        )
    yield directory


def _canonical_tensors(
    checkpoint: Checkpoint,
    declared: list[Parameter],
    kept: Mapping[str, Kept],
    dtype: jnp.dtype | None,
    mesh: Mesh,
) -> dict[str, np.ndarray | jax.Array]:
    """Reads every tensor that the model needs, rounded if it is kept in 8 or 4 bits."""
    rounded = RoundedSource(checkpoint.source, kept, checkpoint.path)
    tensors: dict[str, np.ndarray | jax.Array] = {}
    for parameter in (one for one in declared if not one.is_scales):
        for source, shape in parameter.layout.canonical_shapes().items():
            name = parameter.canonical(source)
            if name not in kept:
                read = partial(_read, checkpoint.source, name, dtype)
                tensors[name] = _sharded(read, shape, mesh)
                continue
            for stored, values in compressed_tensors.rounded_tensors(rounded, name, kept[name]).items():
                narrow = values.astype(np.int32) if values.dtype == np.int64 else values  # jax has no int64
                tensors[stored] = _sharded(narrow.__getitem__, narrow.shape, mesh)
    return tensors


def _read(
    source: CanonicalSource, name: str, dtype: jnp.dtype | None, index: tuple[slice, ...]
) -> np.ndarray:
    values = source.read(name, index)
    return values if dtype is None else values.astype(dtype)


def _sharded(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], mesh: Mesh
) -> np.ndarray | jax.Array:
    """Reads a tensor; each of several processes reads what its own devices hold of it."""
    whole = (slice(None),) * len(shape)
    if num_processes() == 1:
        return read(whole)
    # along the first axis that the devices divide: jax has no uneven shards
    axis = next((axis for axis, size in enumerate(shape) if size % mesh.size == 0), None)
    spec = PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, AXIS)
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), lambda index: read(index or whole))


def _copy_tokenizer(path: Path, directory: Path) -> None:
    """Copies what a tokenizer is read from, and the model's ``config.json``."""
    if path.is_file():
        write_vocabulary(GGUFFile(path), directory / orbax.VOCABULARY)
        return
    for file in (file for pattern in orbax.TOKENIZER_FILES for file in path.glob(pattern)):
        copy = directory / file.relative_to(path)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


# --- safetensors -------------------------------------------------------------------------------------------


def _in_files(checkpoint: Checkpoint, kept: Mapping[str, Kept]) -> dict[str, Kept]:
    """Returns the stored tensors that canonical ones are read from.

    Raises:
        ConfigError: the checkpoint is no Hugging Face directory, or has weights in another order.
    """
    path = checkpoint.path
    if path.is_file() or orbax.is_orbax(path):
        kind = "a GGUF file" if path.is_file() else "an Orbax directory"
        raise ConfigError(
            f"{path} is {kind}: only a Hugging Face directory can be written as safetensors; "
            "target_format='orbax' takes any"
        )
    found = {}
    for name, one in kept.items():
        at = checkpoint.source.locate(name)
        stored = checkpoint.source.stored[at.name].shape
        if at.transposed or at.place is not None or len(stored) != 2:
            raise ConfigError(
                f"{path}: tensor {shown(at.name)} of shape {list(stored)} is not stored as a matrix "
                "[out, in], as compressed-tensors has it: use target_format='orbax'"
            )
        found[at.name] = compressed_tensors.canonical(one, stored)
    return found


def _write_safetensors(
    path: Path, directory: Path, kept: Mapping[str, Kept], quantize: Quantize, dtype: jnp.dtype | None
) -> None:
    """Writes shards and ``config.json``; tensors that the model does not need are copied."""
    files = SafetensorsCheckpoint(path)
    rounded = RoundedSource(_Stored(files), kept, path)

    def tensors() -> Iterator[Mapping[str, np.ndarray]]:
        for name, info in files.tensors.items():
            if name in kept:
                yield compressed_tensors.rounded_tensors(rounded, name, kept[name])
            else:
                values = files.read(name)
                cast = dtype is not None and jnp.issubdtype(info.dtype, jnp.floating)
                yield {name: values.astype(dtype) if cast else values}

    write_shards(directory, tensors())
    matrices = (name for name, info in files.tensors.items() if len(info.shape) == 2 and name not in kept)
    modules = {name.removesuffix(".weight") for name in matrices if name.endswith(".weight")}
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = compressed_tensors.settings_of(
        FORMATS[quantize], sorted({*modules, _HEAD})
    )
    if dtype is not None:
        settings["torch_dtype" if "torch_dtype" in settings else "dtype"] = jnp.dtype(dtype).name
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


@dataclass(frozen=True)
class _Stored:
    """Tensors by their stored names, for :class:`RoundedSource`."""

    files: TensorSource

    def read(self, name: str, index: tuple[slice, ...], memory: np.ndarray | None = None) -> np.ndarray:
        return self.files.read(name, index, memory)

    def itemsize(self, name: str) -> int:
        return self.files.tensors[name].dtype.itemsize

    def outer_axis(self, name: str) -> int:
        return 0


# --- the vocabulary of a GGUF file -------------------------------------------------------------------------


_INTEGERS = ("INT32", "UINT32", "INT64", "UINT64")


def write_vocabulary(file: GGUFFile, target: Path) -> None:
    """Writes a GGUF file of the tokenizer's metadata alone."""
    from gguf import GGUFValueType, GGUFWriter

    def kind_of(values: list[Any]) -> GGUFValueType:
        """Returns the first type that holds all values: the file's own types are not known any more."""
        if isinstance(values[0], bool):
            return GGUFValueType.BOOL
        if isinstance(values[0], int):
            fits = (name for name in _INTEGERS if _holds(np.iinfo(name.lower()), values))
            return GGUFValueType[next(fits)]
        if isinstance(values[0], float):
            with np.errstate(over="ignore"):
                same = np.array_equal(np.array(values, np.float32), np.array(values), equal_nan=True)
            return GGUFValueType.FLOAT32 if same else GGUFValueType.FLOAT64
        return GGUFValueType.STRING

    writer = GGUFWriter(target, file.metadata["general.architecture"])
    for key, value in file.metadata.items():
        if not key.startswith("tokenizer.") or value == []:
            continue
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=kind_of(value))
        else:
            writer.add_key_value(key, value, kind_of([value]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def _holds(kind: np.iinfo[Any], values: list[int]) -> bool:
    return int(kind.min) <= min(values) and max(values) <= int(kind.max)
