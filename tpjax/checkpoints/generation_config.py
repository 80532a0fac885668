"""``generation_config.json``: a checkpoint's defaults for sampling, and the tokens that end its text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpjax.errors import CheckpointError, ConfigError, RequestError
from tpjax.sampling_params import NEUTRAL, SamplingParams

FILE = "generation_config.json"


def sampling_defaults(path: Path, source: str | os.PathLike[str] = "auto") -> dict[str, float]:
    """Returns the default sampling parameters of a checkpoint, by their names in ``SamplingParams``.

    As in vLLM, ``do_sample`` is not read: if neither a request nor the file sets a temperature, it is 1.
    The file's limits on lengths are not read either.

    Args:
        path: the checkpoint; only a directory has such a file.
        source: ``auto``: the checkpoint's own file; ``none``: no defaults; else another directory or file.

    Raises:
        CheckpointError: the file is not valid, or one of its values is not possible.
        ConfigError: ``source`` names no file.
    """
    if source == "none":
        return {}
    file = path / FILE
    if source != "auto":
        file = Path(source)
        file = file / FILE if file.is_dir() else file
        if not file.is_file():
            raise ConfigError(
                f"generation_config={os.fspath(source)!r} is not auto, none, or a file: no {file}"
            )
    raw = read_object(file)
    defaults = {name: raw[name] for name in NEUTRAL if raw.get(name) is not None}
    top_k = defaults.get("top_k")
    if isinstance(top_k, float) and top_k.is_integer():  # some write 50.0
        defaults["top_k"] = int(top_k)
    elif top_k == -1:  # all tokens, in vLLM
        defaults["top_k"] = 0
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise CheckpointError(f"{file}: {error}; generation_config='none' ignores it") from error
    return defaults


def eos_ids(directory: Path) -> frozenset[int]:
    """Returns the tokens that end a text: those of generation_config.json, or else of config.json."""
    config = read_object(directory / "config.json")
    text_config = config.get("text_config")
    candidates = (
        (directory / FILE, read_object(directory / FILE)),
        (directory / "config.json", config),
        (directory / "config.json", text_config if isinstance(text_config, dict) else {}),
    )
    return next((frozenset(ids) for file, part in candidates if (ids := list(_ids(part, file)))), frozenset())


def _ids(config: dict[str, Any], file: Path) -> Iterator[int]:
    value = config.get("eos_token_id")
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        if type(one) is not int or one < 0:
            raise CheckpointError(f"{file}: eos_token_id={value!r} is no id or list of ids")
        yield one


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; an empty one if there is no file.

    Raises:
        CheckpointError: the file is not valid JSON, or holds another value.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
