"""``model_config.json``: the architecture in an Orbax directory, field by field, as tpjax has it.

Format 2 has an object for each group of fields. Format 1, which is still read, has one for all of them, and
the names that they had in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError, ConfigError
from tpjax.old_spellings import KEYWORDS

CONFIG_FILE = "model_config.json"
_FORMAT = 2
_QUANTIZATION = "quantization_config"

# group -> {name of a field in format 1: its name in the group}
_FORMAT_1: dict[str, dict[str, str]] = {
    "attention": {
        **{name: name for name in ("num_heads", "num_kv_heads", "head_dim", "query_scale", "qk_norm")},
        **{name: name for name in ("layer_types", "sliding_window", "latent")},
        "attn_softcap": "softcap",
        "attention_bias": "bias",
        "attention_out_bias": "out_bias",
        "attention_sinks": "sinks",
    },
    "rope": {"rope": "full", "rope_sliding": "sliding", "rope_layers": "layers", "rotary_dim": "rotary_dim"},
    "mlp": {
        "intermediate_size": "intermediate_size",
        "gated_mlp": "gated",
        "activation": "activation",
        "mlp_bias": "bias",
    },
    "norm": {"norm": "kind", "norm_eps": "eps", "norm_bias": "bias", "norm_offset": "offset"},
}

T = TypeVar("T")


def write_config(directory: Path, config: ModelConfig, quantization: Mapping[str, Any] | None = None) -> None:
    """Writes the architecture into an existing directory.

    Args:
        directory: the directory.
        config: the architecture.
        quantization: how weights are quantised, as ``config.json`` has it; ``None``: they are not.
    """
    settings = {} if quantization is None else {_QUANTIZATION: quantization}
    text = json.dumps({"format": _FORMAT, **settings, **asdict(config)}, indent=1)
    (directory / CONFIG_FILE).write_text(text + "\n")


def read_quantization(file: Path) -> dict[str, Any]:
    """Returns an object with the ``quantization_config`` of a file, or ``{}`` if it has none."""
    raw = json.loads(file.read_text())
    return {_QUANTIZATION: raw[_QUANTIZATION]} if _QUANTIZATION in raw else {}


def read_config(file: Path) -> ModelConfig:
    """Reads the architecture.

    Raises:
        CheckpointError: the file is no JSON, of another format, or lacks a field or has one too many.
        ConfigError: a value is not possible.
    """
    try:
        raw = json.loads(file.read_text())
        version = raw.pop("format")
        raw.pop(_QUANTIZATION, None)
        if version not in (1, _FORMAT):
            raise CheckpointError(f"{file}: is of format {version!r}; this tpjax reads 1 and {_FORMAT}")
        return _decoded(ModelConfig, _grouped(raw) if version == 1 else raw)
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{file}: is not a configuration of tpjax: {error!r}") from error


def _grouped(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of format 1 in the groups of format 2."""
    groups = {
        group: {new: raw.pop(old) for old, new in names.items() if old in raw}
        for group, names in _FORMAT_1.items()
    }
    if raw.get("moe"):
        new, values = KEYWORDS["expert_sharding"]
        moe = dict(raw["moe"])
        if "expert_sharding" in moe:
            value = moe.pop("expert_sharding")
            moe[new] = values.get(value, value)
        raw["moe"] = moe
    return {**raw, **groups}


def _decoded(kind: type[T], raw: dict[str, Any]) -> T:
    """Builds a configuration from JSON: nested ones from objects, tuples from arrays."""
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
