"""Reads the fields of a ``config.json`` that families share, with clear errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

# Fields that count what a Python object is made for, before anything else is known of the model.
_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), MAX_LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), MAX_HEADS),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), MAX_EXPERTS
    ),
}


@dataclass
class Fields:
    """The fields of a ``config.json``, read with clear errors.

    Attributes:
        raw: the decoded JSON object.
        where: what the errors call it.
        read: names that have been asked for.
    """

    raw: Mapping[str, Any]
    where: str = "config.json"
    read: set[str] = field(default_factory=set)

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The field, or ``default`` where it is absent; ``null`` counts as absent if there is a default."""
        self.read.add(name)
        value = self.raw.get(name)
        if value is None and name not in self.raw and default is REQUIRED:
            raise ConfigError(f"{self.where}: field {name!r} is missing")
        return default if value is None and default is not REQUIRED else value

    def integer(self, name: str, default: Any = REQUIRED) -> Any:
        """Like :meth:`get`, for a whole number."""
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
        """Like :meth:`get`, for a number."""
        value = self.get(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not a number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not a number that a float can hold")
        return value

    def section(self, name: str) -> Fields:
        """An object's fields; none where it is absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not an object")
        return Fields(value, f"{self.where}: {name}")

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers."""
        value = self.get(name)
        if not isinstance(value, list | tuple) or any(
            isinstance(x, bool) or not isinstance(x, int | float) or abs(x) >= 2**63 for x in value
        ):
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not a list of numbers")
        return tuple(float(x) for x in value)

    def nullable(self, name: str, default: Any) -> Any:
        """The field, ``None`` where it is ``null``, ``default`` where it is absent."""
        self.read.add(name)
        return self.raw.get(name, default)

    def require(self, name: str, *supported: Any) -> None:
        """Refuses a field unless it is absent or has a supported value."""
        value = self.get(name, None)
        if value is not None and value not in supported:
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not supported")

    def finish(self, inert: frozenset[str] = IGNORED_FIELDS, numeric: frozenset[str] = NUMERIC) -> None:
        """Settles what nobody has read, by the rule of :mod:`tpjax.families.unread`.

        Raises:
            ConfigError: a field could change what the model computes.
        """
        check_unread(self.where, {k: v for k, v in self.raw.items() if k not in self.read}, inert, numeric)

    def boolean(self, name: str, default: Any = REQUIRED) -> Any:
        """Like :meth:`get`, for true or false."""
        value = self.get(name, default)
        if value is not default and not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not true or false")
        return value


def sizes_of(fields: Fields, *, context: int = 2048, head_dim: int | None = None) -> dict[str, Any]:
    """The sizes every family names alike.

    Args:
        fields: of the configuration.
        context: ``max_position_embeddings`` where the configuration leaves it out.
        head_dim: likewise; ``None``: what the heads share of the hidden size.
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
    """The sizes, before anything is derived from them."""
    for name, value in sizes.items():
        check_size(name, value, SIZES.get(name, MAX_INTEGER))
    return sizes


def layer_types_of(fields: Fields, default: Sequence[LayerType]) -> tuple[LayerType, ...]:
    """``layer_types``, or what an older file's other fields make of it."""
    types = fields.get("layer_types", default)
    if not isinstance(types, list | tuple):
        raise ConfigError(f"{fields.where}: layer_types={brief(types)} is not a list")
    return tuple(types)


def full_attention_every(pattern: int, layers: int) -> tuple[LayerType, ...]:
    """Sliding layers with a full one every ``pattern``."""
    check_size("sliding_window_pattern", pattern)
    return tuple("full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers))


def full_attention_in_all_layers(layers: int) -> tuple[LayerType, ...]:
    """Full attention in every layer."""
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
    """The activation function a field names."""
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
