"""Orbax directories: what any other checkpoint becomes once it has been read, under canonical names.

``tpjax convert`` writes one: `model_config.json` (the architecture), `weights/` (an Orbax pytree of
canonical, unpadded tensors, so that what was converted once loads at every tp) and the tokenizer's own files.
A GGUF file's vocabulary becomes `tokenizer.gguf`, a GGUF file without tensors, as llama.cpp's vocabulary
files are.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np

from tpjax.checkpoints.source import TensorInfo, lookup, to_box
from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError, ConfigError

CONFIG, WEIGHTS, VOCABULARY = "model_config.json", "weights", "tokenizer.gguf"
_FORMAT = 1
# Small enough that a device's slice is read without its neighbours', large enough for few seeks.
_CHUNK_BYTES = 4 << 20
# Chunks that two devices' slices share are read once.
_CACHE_BYTES = 64 << 20

T = TypeVar("T")


class OrbaxCheckpoint:
    """The weights of an Orbax directory.

    Attributes:
        directory: the directory.
        tensors: every tensor by its canonical name.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the list of tensors.

        Raises:
            CheckpointError: there are no weights, or Orbax cannot read them.
        """
        import orbax.checkpoint as ocp

        self.directory = directory
        self._weights = (directory / WEIGHTS).absolute()
        if not self._weights.is_dir():
            raise CheckpointError(f"{directory}: has {CONFIG} and no {WEIGHTS}/")
        with _reported(self._weights):
            found = ocp.PyTreeCheckpointer().metadata(self._weights).item_metadata
            stored = {
                name: TensorInfo(tuple(info.shape), np.dtype(info.dtype)) for name, info in found.items()
            }
        self.tensors: Mapping[str, TensorInfo] = stored

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a tensor or a box of it; see `TensorSource.read`."""
        import tensorstore

        info = lookup(self.tensors, name, self.directory)
        box = tuple(slice(start, stop) for start, stop in to_box(info.shape, index))
        store = {"driver": "ocdbt", "base": self._weights.as_uri() + "/", "path": f"{name}/"}
        with _reported(self._weights):
            array = tensorstore.open(
                {"driver": "zarr", "kvstore": store}, read=True, open=True, context=self._context
            ).result()
            return np.ascontiguousarray(array[box].read().result())

    @cached_property
    def _context(self) -> Any:
        import tensorstore

        return tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


def is_orbax(path: Path) -> bool:
    """Whether a directory is one that :func:`write` made."""
    return (path / CONFIG).is_file()


def read_config(path: Path) -> ModelConfig:
    """The architecture in an Orbax directory.

    Raises:
        CheckpointError: it is no JSON, of another format, or lacks a field or has one too many.
        ConfigError: a value is not possible.
    """
    file = path / CONFIG
    try:
        raw = json.loads(file.read_text())
        version = raw.pop("format")
        if version != _FORMAT:
            raise CheckpointError(f"{file}: is of format {version!r}; this tpjax reads {_FORMAT}")
        return _decoded(ModelConfig, raw)
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"{file}: is not a configuration of tpjax: {error!r}") from error


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name when the block ends well, and goes when it does not.

    Raises:
        CheckpointError: ``target`` exists, or nothing can be written there.
    """
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists: name a directory that does not")
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(directory: Path, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes architecture and weights into an existing directory.

    Args:
        directory: the directory.
        config: the architecture.
        tensors: by canonical name, in canonical shape.
    """
    import orbax.checkpoint as ocp

    (directory / CONFIG).write_text(json.dumps({"format": _FORMAT, **asdict(config)}, indent=1) + "\n")
    chunks = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in tensors}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((directory / WEIGHTS).absolute(), dict(tensors), save_args=chunks)


def _decoded(kind: type[T], raw: dict[str, Any]) -> T:
    """A configuration from JSON: objects where its fields are configurations too, tuples for arrays."""
    hints = get_type_hints(kind)
    declared = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if wrong := sorted(declared ^ set(raw)):
        raise CheckpointError(f"{kind.__name__} and the file do not both have {', '.join(wrong)}")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        nested = next((part for part in (hints[name], *get_args(hints[name])) if is_dataclass(part)), None)
        if isinstance(value, dict) and nested is not None:
            value = _decoded(nested, value)  # type: ignore[arg-type]
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: Orbax cannot read it: {said}") from error
