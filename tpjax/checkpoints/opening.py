"""Opens a checkpoint: names, shapes and the configuration are read, no weight is."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpjax.checkpoints import agreement, digests, orbax
from tpjax.checkpoints.canonical import ENDS, CanonicalSource
from tpjax.checkpoints.quantized import dequantized
from tpjax.checkpoints.safetensors import MAX_JSON_BYTES, SafetensorsCheckpoint, has_weights
from tpjax.checkpoints.source import TensorSource, shown
from tpjax.config import MAX_WIDTH, ExpertParallel, ModelConfig, Quantize, check_choice
from tpjax.errors import CheckpointError, ConfigError
from tpjax.families.config_reader import Fields
from tpjax.families.family import GGUFArchitecture
from tpjax.families.gguf_metadata import GGUFView
from tpjax.families.quantization import (
    HF_QUANT_CONFIG,
    Quantization,
    modelopt_quantization,
    quantization_of,
)
from tpjax.families.registry import FAMILIES, config_from_gguf, config_from_hf, gguf_architecture
from tpjax.families.tensor_names import WeightMap
from tpjax.layers.weights import (
    FormatOf,
)

if TYPE_CHECKING:
    from tpjax.checkpoints.gguf import GGUFFile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: only names, shapes and the configuration have been read.

    Attributes:
        path: the directory or file.
        config: the architecture.
        source: the tensors, by canonical names.
        quantization: how its weights are quantised by its configuration; ``None``: they are not, or it is a
            GGUF file, in which each tensor has a format of its own.
    """

    path: Path
    config: ModelConfig
    source: CanonicalSource
    quantization: Quantization | None = None

    def with_expert_parallel(self, expert_parallel: ExpertParallel) -> Checkpoint:
        """Returns the same checkpoint with :meth:`ModelConfig.with_expert_parallel` applied."""
        return replace(self, config=self.config.with_expert_parallel(expert_parallel))

    def check_quantize(self, quantize: Quantize | None, quantize_head: bool = False) -> None:
        """Checks that weights can be quantised while they are loaded.

        Raises:
            ConfigError: ``quantize`` is not known, the checkpoint's weights are quantised already, or
                ``quantize_head`` would change nothing.
        """
        check_stored(self.path, self.quantization, self.source.format_of, quantize, quantize_head)


def check_quantize(quantize: Quantize | None) -> None:
    """Raises a ``ConfigError`` unless ``quantize`` is ``None`` or known."""
    if quantize is not None:
        check_choice("quantize", quantize, Quantize)


def check_stored(
    where: str | Path,
    quantization: Quantization | None,
    format_of: FormatOf | None,
    quantize: Quantize | None,
    quantize_head: bool,
) -> None:
    """Checks how weights are to be kept against how they are stored: see :meth:`Checkpoint.check_quantize`.

    Args:
        where: the model in error messages.
        quantization: how its configuration says that it is quantised.
        format_of: how it stores canonical tensors.
        quantize: what weights are to be rounded to.
        quantize_head: whether embedding and head are to be quantised.

    Raises:
        ConfigError: the two do not go together.
    """
    check_quantize(quantize)
    if quantize is not None and quantization is not None:
        raise ConfigError(
            f"quantize={quantize!r} would round weights that are quantised already: {where} has them "
            f"as {quantization.described}, and rounding those to {quantize} would lose more of the "
            "original: use quantize=None, which computes with exactly what is stored"
        )
    if quantize_head and quantize is None and not (format_of and any(map(format_of, ENDS))):
        raise ConfigError(
            "quantize_head=True keeps embedding and head as quantize says or as they are stored: "
            f"quantize=None, and {where} does not store them in 8 or 4 bits"
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a Hugging Face directory, an Orbax directory or a GGUF file.

    Raises:
        CheckpointError: it is missing, incomplete or malformed.
        ConfigError: its architecture is not supported.
    """
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path} is neither a directory nor a .gguf file")
        from tpjax.checkpoints.gguf import GGUFFile  # of a package that is imported where it is needed
        from tpjax.checkpoints.gguf_blocks import GGUFBlocks

        file = GGUFFile(path)
        architecture = gguf_architecture(str(file.metadata.get("general.architecture")))
        config = config_from_gguf(_gguf_view(file, architecture))
        names = architecture.names(config)
        if (
            not config.tie_word_embeddings
        ):  # the format has no such field, and some files hold the embedding twice
            tied = replace(config, tie_word_embeddings=True)
            config = config if CanonicalSource(file, names, tied).has_other_head() else tied
        return _opened(path, config, GGUFBlocks(file), names)
    if orbax.is_orbax(path):
        orbax.check_files(path)
        config, quantization = orbax.read_config(path), orbax.read_quantization(path)
        return _opened_stored(path, config, orbax.OrbaxCheckpoint(path), WeightMap(), quantization)
    return _open_safetensors(path, *_read_hf_config(path))


def _open_safetensors(path: Path, raw: Mapping[str, Any], config: ModelConfig) -> Checkpoint:
    if digests.has_manifest(path):  # `tpjax convert` wrote it
        orbax.check_files(path)
    stored = SafetensorsCheckpoint(path)
    if (path / "adapter_config.json").is_file():
        log.warning("%s: the adapter beside the weights, adapter_config.json, is not applied", path)
    names = FAMILIES[config.model_type].names(config)
    return _opened_stored(path, config, stored, names, _quantization(path, raw), stored.unlisted)


def _opened_stored(
    path: Path,
    config: ModelConfig,
    files: TensorSource,
    names: WeightMap,
    quantization: Quantization | None,
    unlisted: frozenset[str] = frozenset(),
) -> Checkpoint:
    """Builds the checkpoint of tensors that may be quantised as a configuration says."""
    if quantization is not None:
        files = dequantized(files, quantization, path)
    return replace(_opened(path, config, files, names, unlisted), quantization=quantization)


def _opened(
    path: Path,
    config: ModelConfig,
    files: TensorSource,
    names: WeightMap,
    unlisted: frozenset[str] = frozenset(),
) -> Checkpoint:
    """Builds the checkpoint; a stored head that differs from the embedding unties them."""
    source = CanonicalSource(files, names, config, unlisted)
    agreement.check_sizes(path, config, files.tensors, source.layer)
    if config.tie_word_embeddings and source.has_other_head():
        log.warning(
            "%s: the configuration ties lm_head to the embedding, but another is stored: that is used", path
        )
        config = replace(config, tie_word_embeddings=False)
        source = CanonicalSource(files, names, config, unlisted)
    return Checkpoint(path, config, source)


def read_config(path: Path) -> ModelConfig:
    """Reads the architecture alone: from a directory, a ``config.json``, or a GGUF file.

    If there are weights beside it that cannot be opened, the configuration alone counts.
    """
    if orbax.is_orbax(path):
        return orbax.read_config(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return open_checkpoint(path).config
    raw, config = _read_hf_config(path)
    if config.tie_word_embeddings and path.is_dir() and has_weights(path):
        try:
            return _open_safetensors(path, raw, config).config
        except CheckpointError as error:
            log.info("%s: planned by its configuration alone: %s", path, error)
    return config


def read_quantization(path: Path) -> Quantization | None:
    """Returns how the weights of a directory, or of a bare ``config.json``, are quantised, if they are."""
    if orbax.is_orbax(path):
        return orbax.read_quantization(path)
    return _quantization(path, _read_json(path))


def _quantization(path: Path, raw: Mapping[str, Any]) -> Quantization | None:
    """Reads how weights are quantised from ``config.json``, else from ModelOpt's file beside it."""
    found = quantization_of(Fields(raw))
    beside = (path if path.is_dir() else path.parent) / HF_QUANT_CONFIG
    if found is not None or not beside.is_file():
        return found
    settings = _decoded(beside)
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{beside}: a {type(settings).__name__} is not an object")
    return modelopt_quantization(Fields(settings, str(beside)))


def _read_hf_config(path: Path) -> tuple[Mapping[str, Any], ModelConfig]:
    """Returns ``config.json`` of a directory, or a file like it, as it is and as a configuration."""
    raw = _read_json(path)
    try:
        return raw, config_from_hf(raw)
    except ConfigError as error:
        file, message = path / "config.json" if path.is_dir() else path, str(error)
        raise ConfigError(f"{file}: {message.removeprefix('config.json: ')}") from error


def _read_json(path: Path) -> Any:
    """Returns the decoded ``config.json`` of a directory, or of a file."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json")
    return _decoded(file)


def _decoded(file: Path) -> Any:
    """Returns a decoded JSON file."""
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file}: JSON of {size} bytes, at most {MAX_JSON_BYTES} are read")

    def consistent(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values and values[key] != value:
                raise CheckpointError(f"{file}: key {shown(key)} appears twice, with two values")
            values[key] = value
        return values

    try:
        return json.loads(file.read_text(), object_pairs_hook=consistent)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error


def _gguf_view(file: GGUFFile, architecture: GGUFArchitecture) -> GGUFView:
    def divisors(*names: str) -> tuple[float, ...] | None:
        name = next((name for name in names if name in file.tensors), None)
        if name is None:
            return None
        shape = file.tensors[name].shape
        if len(shape) != 1 or shape[0] > MAX_WIDTH:
            raise ConfigError(f"{file.path}: tensor {name} of shape {list(shape)} is not a list of divisors")
        return tuple(float(x) for x in file.read(name))

    return GGUFView(
        architecture.name,
        file.metadata,
        {name: info.shape for name, info in file.tensors.items()},
        divisors("rope_freqs.weight", "rope_factors_short.weight"),
        divisors("rope_factors_long.weight"),
    )
