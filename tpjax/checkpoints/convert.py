"""Converts any checkpoint to an Orbax directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpjax.checkpoints import digests, orbax
from tpjax.checkpoints.gguf import GGUFFile
from tpjax.checkpoints.load import abstract_decoder, check_tensors, open_checkpoint, parameters
from tpjax.mesh import make_mesh


def convert(path: Path, target: Path, dtype: jnp.dtype | None = None) -> None:
    """Writes a checkpoint as an Orbax directory, which appears complete or not at all.

    All weights are in host memory at once: it needs about their size.

    Args:
        path: a Hugging Face directory, a GGUF file or an Orbax directory.
        target: a directory that does not exist yet.
        dtype: dtype of the weights; ``None``: as they are stored; quantised ones are dequantised.

    Raises:
        CheckpointError: the checkpoint is incomplete, or ``target`` exists or cannot be written.
        ConfigError: its architecture is not supported.
    """
    checkpoint = open_checkpoint(path)
    mesh = make_mesh(1)
    declared = parameters(abstract_decoder(checkpoint.config, mesh, jnp.dtype("float32")), mesh)
    check_tensors(checkpoint, declared)
    with orbax.new_directory(target) as directory:
        tensors: dict[str, np.ndarray] = {}
        for parameter in declared:
            for source, shape in parameter.layout.canonical_shapes().items():
                name = parameter.canonical(source)
                values = checkpoint.source.read(name, (slice(None),) * len(shape))
                tensors[name] = values if dtype is None else values.astype(dtype)
        orbax.write(directory, checkpoint.config, tensors)
        if path.is_dir():
            for file in (file for pattern in orbax.TOKENIZER_FILES for file in path.glob(pattern)):
                copy = directory / file.relative_to(path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        else:
            write_vocabulary(GGUFFile(path), directory / orbax.VOCABULARY)
        digests.write_manifest(directory)


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
