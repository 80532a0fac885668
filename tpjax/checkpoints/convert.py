"""Converts any checkpoint to an Orbax directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpjax.checkpoints import digests, orbax
from tpjax.checkpoints.gguf import GGUFFile
from tpjax.checkpoints.load import (
    CanonicalSource,
    abstract_decoder,
    check_tensors,
    open_checkpoint,
    parameters,
)
from tpjax.distributed import barrier, num_processes, process_id
from tpjax.errors import CheckpointError
from tpjax.mesh import AXIS, make_mesh


def convert(path: Path, target: Path, dtype: jnp.dtype | None = None) -> None:
    """Writes a checkpoint as an Orbax directory, which appears complete or not at all.

    All weights are in host memory at once: it needs about their size. Several processes, which all call this,
    share them out over their devices; each reads and writes its own part of every tensor.

    Args:
        path: a Hugging Face directory, a GGUF file or an Orbax directory.
        target: a directory that does not exist yet; several processes have to share its file system.
        dtype: dtype of the weights; ``None``: as they are stored; quantised ones are dequantised.

    Raises:
        CheckpointError: the checkpoint is incomplete, or ``target`` exists or cannot be written.
        ConfigError: its architecture is not supported.
        DistributedError: another process is lost.
    """
    checkpoint = open_checkpoint(path)
    mesh = make_mesh(None if num_processes() > 1 else 1)
    declared = parameters(abstract_decoder(checkpoint.config, mesh, jnp.dtype("float32")), mesh)
    check_tensors(checkpoint, declared)
    with _directory(target) as directory:
        tensors: dict[str, np.ndarray | jax.Array] = {}
        for parameter in declared:
            for source, shape in parameter.layout.canonical_shapes().items():
                name = parameter.canonical(source)
                tensors[name] = _tensor(checkpoint.source, name, shape, dtype, mesh)
        orbax.write(directory, checkpoint.config, tensors)
        if process_id():
            return
        if path.is_dir():
            for file in (file for pattern in orbax.TOKENIZER_FILES for file in path.glob(pattern)):
                copy = directory / file.relative_to(path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        else:
            write_vocabulary(GGUFFile(path), directory / orbax.VOCABULARY)
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


def _tensor(
    source: CanonicalSource, name: str, shape: tuple[int, ...], dtype: jnp.dtype | None, mesh: Mesh
) -> np.ndarray | jax.Array:
    """Reads a tensor; each of several processes reads what its own devices hold of it."""

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        values = source.read(name, index or (slice(None),) * len(shape))
        return values if dtype is None else values.astype(dtype)

    if num_processes() == 1:
        return read(None)
    # along the first axis that the devices divide: jax has no uneven shards
    axis = next((axis for axis, size in enumerate(shape) if size % mesh.size == 0), None)
    spec = PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, AXIS)
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read)


def write_vocabulary(file: GGUFFile, target: Path) -> None:
    """Writes a GGUF file of the tokenizer's metadata alone."""
    from gguf import GGUFValueType, GGUFWriter

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.INT32, float: GGUFValueType.FLOAT32}

    def kind_of(value: Any) -> GGUFValueType:
        return kinds.get(type(value), GGUFValueType.STRING)

    writer = GGUFWriter(target, file.metadata["general.architecture"])
    for key, value in file.metadata.items():
        if not key.startswith("tokenizer.") or value == []:
            continue
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=kind_of(value[0]))
        else:
            writer.add_key_value(key, value, kind_of(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
