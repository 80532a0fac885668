"""Published models, each by the ``config.json`` it was published with.

``published.json`` maps the name used on the command line to the Hugging Face id and the fields of that
``config.json`` that describe the architecture (of a multimodal model, its text half). The built-in aliases
are among them, so that planning downloads nothing.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tpjax.checkpoints.hub import ALIASES, resolve
from tpjax.checkpoints.load import read_config
from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError
from tpjax.families.registry import config_from_hf


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


def find_config(model: str) -> tuple[str, ModelConfig]:
    """Returns name and architecture of a published model, a local checkpoint or config.json, or a hub id.

    From Hugging Face, only ``config.json`` is downloaded.

    Raises:
        CheckpointError: ``model`` is none of these, or not a checkpoint.
        DownloadError: the configuration cannot be downloaded.
        ConfigError: the architecture is not supported.
    """
    if model in _published():
        return model, published_config(model)
    check_name(model)
    path = Path(model).expanduser()
    name = path.name if path.exists() else model
    return name, read_config(resolve(model, configuration=True))
