"""Reads the fields of a ``config.json`` that families share, with clear errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from tpjax.config import (
    MAX_EXPERTS,
    MAX_HEADS,
    MAX_INTEGER,
    MAX_LAYERS,
    SIZES,
    LayerType,
    brief,
    check_most,
    check_size,
)
from tpjax.errors import ConfigError
from tpjax.families.unread import IGNORED_FIELDS, NUMERIC, check_unread

REQUIRED: Any = object()

# Limits of fields that count Python objects to be made (layers, heads, experts).
_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), MAX_LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), MAX_HEADS),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), MAX_EXPERTS
    ),
}


@dataclass
class Fields:
    """The fields of a ``config.json``; methods raise a ``ConfigError`` about one that is missing or wrong.

    Attributes:
        raw: the decoded JSON object.
        where: its name in error messages.
        read: names of the fields that have been read.
    """

    raw: Mapping[str, Any]
    where: str = "config.json"
    read: set[str] = field(default_factory=set)

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """Returns a field, or ``default`` if it is absent; ``null`` counts as absent if there is a default.

        Raises:
            ConfigError: the field is absent and has no default.
        """
        self.read.add(name)
        value = self.raw.get(name)
        if value is None and name not in self.raw and default is REQUIRED:
            raise ConfigError(f"{self.where}: field {name!r} is missing")
        return default if value is None and default is not REQUIRED else value

    def integer(self, name: str, default: Any = REQUIRED) -> Any:
        """Returns a whole number, with :meth:`get`'s defaults."""
        value = self.get(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not a whole number")
        if value is not default:
            most = _COUNTS.get(name, MAX_INTEGER)
            check_most(f"{self.where}: {name}", value, most)
            if value < -most:
                raise ConfigError(f"{self.where}: {name}={brief(value)} is below {-most}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """Returns a finite number, with :meth:`get`'s defaults."""
        value = self.get(name, default)
        if value is not default and not is_number(value):
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not a number that a float can hold")
        return value

    def section(self, name: str) -> Fields:
        """Returns the fields of a nested object; none if it is absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not an object")
        return Fields(value, f"{self.where}: {name}")

    def numbers(self, name: str) -> tuple[float, ...]:
        """Returns a list of finite numbers."""
        value = self.get(name)
        if not isinstance(value, list | tuple) or not all(map(is_number, value)):
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not a list of numbers")
        return tuple(float(x) for x in value)

    def nullable(self, name: str, default: Any) -> Any:
        """Returns a field: ``None`` if it is ``null``, ``default`` if it is absent."""
        self.read.add(name)
        return self.raw.get(name, default)

    def require(self, name: str, *supported: Any) -> None:
        """Raises a ``ConfigError`` unless a field is absent or has a supported value."""
        value = self.get(name, None)
        if value is not None and value not in supported:
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not supported")

    def finish(self, ignored: frozenset[str] = IGNORED_FIELDS, numeric: frozenset[str] = NUMERIC) -> None:
        """Checks the fields that nobody has read, by the rule of :mod:`tpjax.families.unread`.

        Raises:
            ConfigError: a field could change what the model computes.
        """
        check_unread(self.where, {k: v for k, v in self.raw.items() if k not in self.read}, ignored, numeric)

    def boolean(self, name: str, default: Any = REQUIRED) -> Any:
        """Returns true or false, with :meth:`get`'s defaults."""
        value = self.get(name, default)
        if value is not default and not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not true or false")
        return value


def is_number(value: object) -> bool:
    """Returns whether a value is a finite number, and below 2**63 if it is a whole one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def sizes_of(fields: Fields, *, context: int = 2048, head_dim: int | None = None) -> dict[str, Any]:
    """Reads the sizes that have the same name in every family.

    Args:
        fields: fields of ``config.json``.
        context: default of ``max_position_embeddings``, tokens.
        head_dim: default of ``head_dim``; ``None``: ``hidden_size`` over the number of heads.

    Returns:
        Sizes by their names in ``ModelConfig`` and its groups.

    Raises:
        ConfigError: a size is missing, malformed or out of range.
    """
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", head_dim)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise ConfigError(f"num_attention_heads={heads} is not a divisor of hidden_size={hidden}")
        head_dim = hidden // heads
    return checked_sizes(
        {
            "vocab_size": fields.integer("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": fields.integer("intermediate_size"),
            "num_layers": fields.integer("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": fields.integer("num_key_value_heads", heads),
            "head_dim": head_dim,
            "max_position_embeddings": fields.integer("max_position_embeddings", context),
        }
    )


def checked_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns the sizes after a check of each, before anything is derived from them."""
    for name, value in sizes.items():
        check_size(name, value, SIZES.get(name, MAX_INTEGER))
    return sizes


def layer_types_of(fields: Fields, default: Sequence[LayerType]) -> tuple[LayerType, ...]:
    """Reads ``layer_types``; ``default`` is what the other fields of an older file amount to."""
    types = fields.get("layer_types", default)
    if not isinstance(types, list | tuple):
        raise ConfigError(f"{fields.where}: layer_types={brief(types)} is not a list")
    return tuple(types)


def full_attention_every(pattern: int, layers: int) -> tuple[LayerType, ...]:
    """Returns layer types: every ``pattern``-th layer has full attention, the others a sliding window."""
    check_size("sliding_window_pattern", pattern)
    return tuple("full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers))


def full_attention_in_all_layers(layers: int) -> tuple[LayerType, ...]:
    """Returns layer types: full attention in every layer."""
    kind: LayerType = "full_attention"
    return (kind,) * layers


def window_in_all_layers(window: int | None, num_layers: int) -> dict[str, Any]:
    """Returns settings of ``AttentionConfig`` if all layers have the same window, in tokens, or none."""
    kind: LayerType = "full_attention" if window is None else "sliding_attention"
    return {"sliding_window": window, "layer_types": (kind,) * num_layers}


def attention_biases(fields: Fields, default: bool = False) -> dict[str, bool]:
    """Reads ``attention_bias`` as settings of ``AttentionConfig``: biases of q, k, v and of ``o_proj``."""
    bias = fields.boolean("attention_bias", default)
    return {"bias": bias, "out_bias": bias}


def num_experts_of(fields: Fields) -> int:
    """Reads the number of experts, under the name published files have or the one transformers 5 writes."""
    count: int = fields.integer("num_local_experts", fields.integer("num_experts", None))
    if count is None:
        raise ConfigError(f"{fields.where}: field 'num_experts' is missing")
    fields.require("num_experts", count)
    return count


def activation_of(fields: Fields, name: str, default: str) -> Any:
    """Reads the name of an activation function."""
    known = {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "relu": "relu",
    }
    value = fields.get(name, default)
    if not isinstance(value, str) or value not in known:
        raise ConfigError(
            f"config.json: {name}={brief(value)} is not supported; supported are {', '.join(known)}"
        )
    return known[value]
