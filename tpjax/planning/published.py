"""Published models, each by the ``config.json`` it was published with.

``published.json`` maps the name used on the command line to the Hugging Face id and the fields of that
``config.json`` that describe the architecture (of a multimodal model, its text half). The built-in aliases
are among them, so that planning downloads nothing.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tpjax.checkpoints.declared import declared_formats
from tpjax.checkpoints.hub import ALIASES, resolve
from tpjax.checkpoints.opening import check_stored, read_config, read_quantization
from tpjax.config import ModelConfig, Quantize
from tpjax.errors import CheckpointError, DownloadError
from tpjax.families.quantization import Quantization
from tpjax.families.registry import config_from_hf
from tpjax.layers.weights import FormatOf
from tpjax.runtime.counts import stored_bytes


@cache
def _published() -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = json.loads(
        files("tpjax.planning").joinpath("published.json").read_text()
    )
    return models


def published_names() -> tuple[str, ...]:
    """Returns the names of the published models."""
    return tuple(_published())


def hub_id(name: str) -> str:
    """Returns the Hugging Face id of a published model."""
    return str(_published()[name]["id"])


def is_published(name: str) -> bool:
    """Whether a name stands for a published architecture, and not for a checkpoint that can be fetched."""
    return name in _published() and name not in ALIASES


@cache
def published_config(name: str) -> ModelConfig:
    """Returns the architecture of a published model.

    Args:
        name: one of :func:`published_names`.
    """
    return config_from_hf(_published()[name]["config"])


def check_name(model: str) -> None:
    """Checks that a name may be one of a configuration: a published model's, a path, or a hub id.

    Raises:
        CheckpointError: it is not; the message has published models of similar names.
    """
    names = published_names()
    path = Path(model).expanduser()
    if model in names or "/" in model or path.exists() or path.suffix in (".json", ".gguf"):
        return
    close = difflib.get_close_matches(model, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the built-in ones are {', '.join(names)}"
    raise CheckpointError(f"{model!r} is neither a checkpoint nor a built-in model; {hint}")


def resolve_configuration(model: str) -> Path:
    """Returns the path of a model's configuration: of a Hugging Face id ``config.json`` alone is downloaded.

    Raises:
        CheckpointError: as :func:`tpjax.checkpoints.hub.resolve`.
        DownloadError: it cannot be downloaded; the message names the published model of that id, if there is
            one.
    """
    try:
        return resolve(model, configuration=True)
    except DownloadError as error:
        known = next((name for name in published_names() if hub_id(name).lower() == model.lower()), None)
        if known is None:
            raise
        raise DownloadError(f"{error}; {known!r} is the same architecture, and needs no file") from error


@dataclass(frozen=True)
class KnownModel:
    """A model that is known by its configuration.

    Attributes:
        name: in reports.
        config: the architecture.
        quantization: how its configuration says that weights are quantised; ``None``: they are not.
        format_of: how canonical tensors are stored in 8 or 4 bits; ``None``: none are.
    """

    name: str
    config: ModelConfig
    quantization: Quantization | None = None
    format_of: FormatOf | None = None

    @property
    def stored_bytes(self) -> float | None:
        """Mean bytes of an element of the layers' matrices, scales included; ``None``: not 8 or 4 bits."""
        stored = None if self.format_of is None else stored_bytes(self.config, self.format_of)
        return stored if stored is not None and stored < 2 else None  # a GGUF file may have other types only

    def check_quantize(self, quantize: Quantize | None, quantize_head: bool) -> None:
        """Checks how weights are to be kept, as :meth:`Checkpoint.check_quantize` does."""
        check_stored(self.name, self.quantization, self.format_of, quantize, quantize_head)


def find_model(model: str) -> KnownModel:
    """Finds a published model, a local checkpoint or config.json, or a hub id: its ``config.json`` is enough.

    Raises:
        CheckpointError: ``model`` is none of these, or not a checkpoint.
        DownloadError: the configuration cannot be downloaded.
        ConfigError: the architecture is not supported.
    """
    if is_published(model):
        return KnownModel(model, published_config(model))
    path = Path(model).expanduser()
    name = path.name if path.exists() else model
    found = resolve_configuration(model)
    config = read_config(found)
    quantization = None if found.suffix.lower() == ".gguf" else read_quantization(found)
    return KnownModel(name, config, quantization, declared_formats(found, config))


def find_config(model: str) -> tuple[str, ModelConfig]:
    """Returns name and architecture of what :func:`find_model` finds, and of a built-in alias."""
    known = find_named(model)
    return known.name, known.config


def find_named(model: str) -> KnownModel:
    """Finds a model as :func:`find_model` does, a built-in alias without its weights.

    Raises:
        CheckpointError: there is none; the message has published models of similar names.
    """
    if model in _published():
        return KnownModel(model, published_config(model))
    check_name(model)
    return find_model(model)
