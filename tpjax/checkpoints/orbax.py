"""Orbax directories: the weights of any other checkpoint under canonical names.

``tpjax convert`` writes one: ``model_config.json`` (the architecture), ``weights/`` (an Orbax pytree of
canonical, unpadded tensors, so that what was converted once loads at every tp) and the tokenizer's own files.
Quantised weights are in it as compressed-tensors stores them, under canonical names.
A GGUF file's vocabulary becomes ``tokenizer.gguf``, a GGUF file without tensors, as llama.cpp's vocabulary
files are. ``MANIFEST.sha256`` has the digest of each: Orbax has no checksums of its own.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tpjax.checkpoints import config_file, digests
from tpjax.checkpoints.config_file import CONFIG_FILE
from tpjax.checkpoints.hub import cache_dir
from tpjax.checkpoints.source import TensorInfo, lookup, to_box
from tpjax.config import ModelConfig
from tpjax.distributed import process_id
from tpjax.errors import CheckpointError
from tpjax.families.config_reader import Fields
from tpjax.families.quantization import Quantization, quantization_of

if TYPE_CHECKING:
    import jax

WEIGHTS, VOCABULARY = "weights", "tokenizer.gguf"
# Small enough that a device's slice is read without its neighbours', large enough for few seeks.
_CHUNK_BYTES = 4 << 20
# A chunk that the slices of two devices need is read once.
_CACHE_BYTES = 64 << 20

# What a tokenizer is read from; the model's config.json may name its end-of-text tokens.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *(
        "added_tokens.json",
        "generation_config.json",
        "config.json",
        "chat_template.jinja",
        "chat_template.json",
    ),
    *("additional_chat_templates/*.jinja", VOCABULARY),
)

_WRITE_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

log = logging.getLogger(__name__)


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
            raise CheckpointError(f"{directory}: has {CONFIG_FILE} and no {WEIGHTS}/")
        with _reported(self._weights):
            found = ocp.PyTreeCheckpointer().metadata(self._weights).item_metadata
            stored = {
                name: TensorInfo(tuple(info.shape), np.dtype(info.dtype)) for name, info in found.items()
            }
        self.tensors: Mapping[str, TensorInfo] = stored
        self._arrays: dict[str, Any] = {}

    def read(
        self, name: str, index: tuple[slice, ...] | None = None, memory: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads a tensor or a box of it; see ``TensorSource.read``."""
        info = lookup(self.tensors, name, self.directory)
        box = tuple(slice(start, stop) for start, stop in to_box(info.shape, index))
        with _reported(self._weights):
            if name not in self._arrays:
                self._arrays[name] = self._open(name)
            return np.ascontiguousarray(self._arrays[name][box].read().result())

    def _open(self, name: str) -> Any:
        import tensorstore

        store = {"driver": "ocdbt", "base": self._weights.as_uri() + "/", "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": store}
        return tensorstore.open(spec, read=True, open=True, context=self._context).result()

    @cached_property
    def _context(self) -> Any:
        import tensorstore

        return tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


def is_orbax(path: Path) -> bool:
    """Returns whether :func:`write` made a directory."""
    return (path / CONFIG_FILE).is_file()


def read_config(path: Path) -> ModelConfig:
    """Reads the architecture of an Orbax directory, after a check of its digest.

    Raises:
        CheckpointError: it is no JSON, of another format, or lacks a field or has one too many.
        ConfigError: a value is not possible.
    """
    if listed := digests.read_manifest(path):
        digests.check(path, {name: listed[name] for name in listed if name == CONFIG_FILE}, _memory())
    return config_file.read_config(path / CONFIG_FILE)


def read_quantization(path: Path) -> Quantization | None:
    """Returns how the weights of an Orbax directory are quantised, ``None`` if they are not.

    Raises:
        ConfigError: not in a way that is known.
    """
    return quantization_of(Fields(config_file.read_quantization(path / CONFIG_FILE)))


def check_files(directory: Path) -> None:
    """Compares every file of a converted directory with its manifest, if it has one.

    A file is read again only after it has changed. Files that the manifest does not list change no weight; a
    warning names those that tpjax reads nevertheless.

    Raises:
        CheckpointError: a file is missing or is not what was written; the message names it.
    """
    listed = digests.read_manifest(directory)
    if listed is None:
        log.warning(
            "%s has no %s: its weights are not checked; convert it again to have one",
            directory,
            digests.MANIFEST,
        )
        return
    digests.check(directory, listed, _memory())
    for file in (file for pattern in TOKENIZER_FILES for file in directory.glob(pattern)):
        if file.relative_to(directory).as_posix() not in listed:
            log.warning("%s is used, and was not there when the directory was written", file)


def _memory() -> Path:
    return cache_dir() / "checked"


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields a folder beside ``target``, which is renamed to it if the block succeeds and is removed if not.

    A lock beside ``target`` keeps two processes from writing it. The system releases the lock of a process
    that is killed, and the next one removes what that one left.

    Raises:
        CheckpointError: ``target`` exists, another process is writing it, or nothing can be written there.
    """
    try:
        _check_absent(target)
        if os.path.lexists(target.parent) and not target.parent.is_dir():
            raise CheckpointError(f"{target}: cannot be written: {target.parent} is not a directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            _check_absent(target)
            partial = partial_of(target)
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            try:
                partial.mkdir()
                yield partial
                partial.rename(target)
            finally:
                _remove(partial)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from error


def partial_of(target: Path) -> Path:
    """Returns the folder that :func:`new_directory` yields."""
    return target.with_name(f".{target.name}.partial")


def _remove(partial: Path) -> None:
    """Removes a folder, though threads of Orbax whose write failed may create files there for a moment."""
    for _ in range(50):
        if not partial.exists():
            return
        shutil.rmtree(partial, ignore_errors=True)
        time.sleep(0.1)


def _check_absent(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists: name a directory that does not")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not path.exists():  # nobody holds the lock: the file could not be created
            raise CheckpointError(f"{target}: cannot be written: {path.parent} takes no files") from None
        raise CheckpointError(f"{target} is being written by another process") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: a process that has opened it sees that it is gone
        lock.release()


def write(
    directory: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray | jax.Array],
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes architecture and weights into an existing directory.

    Args:
        directory: the directory.
        config: the architecture.
        tensors: by canonical name, in canonical shape. Several processes call this with the same sharded
            arrays, and each writes its own shards.
        quantization: how weights are quantised, as ``config.json`` has it; ``None``: they are not.
    """
    import orbax.checkpoint as ocp

    if not process_id():
        config_file.write_config(directory, config, quantization)
    chunks = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in tensors}
    with _write_errors(directory), ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((directory / WEIGHTS).absolute(), dict(tensors), save_args=chunks)


@contextmanager
def _write_errors(directory: Path) -> Iterator[None]:
    """Converts what Orbax raises, logs and prints if a file cannot be written to an ``OSError``."""
    absl, hook = logging.getLogger("absl"), sys.unraisablehook
    level = absl.level
    absl.setLevel(logging.CRITICAL)  # it logs the traceback of each of its threads

    def leave_out_closed_loops(raised: sys.UnraisableHookArgs) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            hook(raised)

    sys.unraisablehook = leave_out_closed_loops
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        # The hook stays: tensorstore prints one such error for each of its writes that ends only now; and
        # asyncio logs the same failure once more for each write that nobody waits for any longer.
        logging.getLogger("asyncio").addFilter(lambda record: str(directory) not in record.getMessage())
        # The system's reason is somewhere in a longer text, whose form changes from version to version.
        reasons = (os.strerror(code) for code in _WRITE_ERRORS)
        said = next((text for text in reasons if text in str(error)), " ".join(str(error).split())[:200])
        raise OSError(0, said, str(directory)) from error
    else:
        sys.unraisablehook = hook
    finally:
        absl.setLevel(level)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: Orbax cannot read it: {said}") from error
