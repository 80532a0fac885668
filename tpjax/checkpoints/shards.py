"""Writes a directory of safetensors, shard by shard: one shard is in host memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SHARD_BYTES = 2 << 30
_FORMAT = {"format": "pt"}  # transformers refuses a file that does not say so


def write_shards(directory: Path, tensors: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Writes tensors as ``model.safetensors``, or as shards with ``model.safetensors.index.json``.

    Args:
        directory: an existing directory.
        tensors: groups of tensors that belong into one shard, by name.
    """
    shards: list[dict[str, int]] = []  # the bytes of each tensor
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        save_file(shard, _path(directory, len(shards)), _FORMAT)
        shards.append({name: x.nbytes for name, x in shard.items()})
        shard.clear()

    for group in tensors:
        held = sum(x.nbytes for x in shard.values())
        if shard and held + sum(x.nbytes for x in group.values()) > SHARD_BYTES:
            flush()
        shard.update({name: np.ascontiguousarray(x) for name, x in group.items()})
    flush()
    if len(shards) == 1:
        _path(directory, 0).rename(directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        _path(directory, i).rename(directory / name)
    places = {name: file for file, held in zip(names, shards, strict=True) for name in held}
    index = {
        "metadata": {"total_size": sum(sum(held.values()) for held in shards)},
        "weight_map": places,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _path(directory: Path, number: int) -> Path:
    return directory / f"model-{number + 1:05}.safetensors"
