"""How a family is described, and the readers of fields that families share.

One module of this folder per lineage reads its ``config.json`` and GGUF metadata into a ``ModelConfig`` and
names its tensors; ``families.py`` gathers them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tpjax.config import (
    MAX_EXPERTS,
    MAX_HEADS,
    MAX_INTEGER,
    MAX_LAYERS,
    SIZES,
    LayerType,
    ModelConfig,
    RopeConfig,
    RopeKind,
    brief,
    check_choice,
    check_most,
    check_positive,
    check_size,
)
from tpjax.errors import ConfigError
from tpjax.families.unread import IGNORED_FIELDS, NUMERIC, ROPE_NUMERIC, settle

log = logging.getLogger(__name__)

_REQUIRED: Any = object()

# Fields that count what a Python object is made for, before anything else is known of the model.
_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), MAX_LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), MAX_HEADS),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), MAX_EXPERTS
    ),
}


@dataclass(frozen=True, eq=False)
class TensorMapping:
    """Where a checkpoint keeps a tensor.

    Attributes:
        name: of the module or tensor in the checkpoint.
        rows: for each of our rows, which stored row it is; ``None``: the same.
        size: stored rows, where ``rows`` is given.
        transposed: stored as [in, out].
        heads: stored as [heads, head_dim], while ours has one axis; ``None``: not.
        offset: stored values have this much added.
        place: stored in a stack of like tensors, at this place of its first axis; ``None``: not.
        count: tensors of that stack.
    """

    name: str
    rows: np.ndarray | None = None
    size: int = 0
    transposed: bool = False
    heads: int | None = None
    offset: float = 0.0
    place: int | None = None
    count: int = 0

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The stored tensor's shape, from ours."""
        if self.heads is not None:
            return (self.heads, ours[0] // self.heads)
        stored = ours if self.rows is None else (self.size, *ours[1:])
        stored = stored[::-1] if self.transposed else stored
        return stored if self.place is None else (self.count, *stored)


def slices(name: str, sizes: Sequence[int], *, transposed: bool = False) -> list[TensorMapping]:
    """Tensors of so many rows that are stored one after another as one."""
    starts = np.cumsum([0, *sizes])
    return [
        TensorMapping(name, np.arange(start, start + size), int(starts[-1]), transposed)
        for start, size in zip(starts, sizes, strict=False)
    ]


def fused_qkv_by_head(name: str, heads: int, head_dim: int) -> list[TensorMapping]:
    """Query, key and value, stored head by head: the first head's query, key and value, then the second's."""
    rows = np.arange(heads * 3 * head_dim).reshape(heads, 3, head_dim)
    return [TensorMapping(name, rows[:, part].reshape(-1), rows.size) for part in range(3)]


def interleaved(name: str, heads: int, head_dim: int, *, by_head: bool = False) -> TensorMapping:
    """Rows of queries or keys made for rotary pairs (2i, 2i + 1), read in the order (i, i + head_dim / 2)."""
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    return TensorMapping(name, rows, rows.size, heads=heads if by_head else None)


@dataclass(frozen=True)
class WeightMap:
    """What a checkpoint calls the model's tensors; whatever is not mentioned has its canonical name.

    Attributes:
        modules: where a module's tensors are kept, by canonical name, without ``layers.N.``; or a single
            tensor, by its whole name.
        layers: the list of layers.
        prefixes: what stands before the model's tensors, and before ``lm_head``; the first pair that fits.
        ignored: patterns of tensor names that may be in a checkpoint and are not needed.
    """

    modules: Mapping[str, TensorMapping] = field(default_factory=dict)
    layers: str = "layers"
    prefixes: tuple[tuple[str, str], ...] = (("model.", ""),)
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)

    def locate(self, canonical: str, prefix: tuple[str, str] = ("", "")) -> TensorMapping:
        """The stored tensor of a canonical name, ``layers.0.mlp.up_proj.weight`` say."""
        parts = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(\w+)", canonical)
        assert parts is not None, canonical
        layer, module, kind = parts.groups()
        stored = self.modules.get(f"{module}.{kind}")
        if stored is None:
            stored = self.modules.get(module, TensorMapping(module))
            stored = replace(stored, name=f"{stored.name}.{kind}")
        path = stored.name if layer is None else f"{self.layers}.{layer}.{stored.name}"
        return replace(stored, name=f"{prefix[module == 'lm_head']}{path}")


@dataclass(frozen=True)
class GGUFArchitecture:
    """A GGUF architecture of a family.

    Attributes:
        name: value of ``general.architecture``.
        config: metadata, tensor names and the vocabulary's size, to the configuration.
        modules: what the file calls a layer's modules, as in :class:`WeightMap`.
    """

    name: str
    config: Callable[[GGUFView], ModelConfig]
    modules: Callable[[ModelConfig], Mapping[str, TensorMapping]]

    def names(self, config: ModelConfig) -> WeightMap:
        """What the file calls the model's tensors."""
        top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        stored = {**{name: TensorMapping(gguf) for name, gguf in top.items()}, **self.modules(config)}
        ignored = (r"rope_(freqs|factors_long|factors_short)\.weight",)
        return WeightMap(stored, layers="blk", prefixes=(("", ""),), ignored=ignored)


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        model_type: as ``config.json`` has it.
        examples: models of this family, for the README's table.
        config: reads ``config.json``.
        names: what a checkpoint calls the model's tensors.
        gguf: the GGUF architectures that hold this family.
    """

    model_type: str
    examples: str
    config: Callable[[Fields], ModelConfig]
    names: Callable[[ModelConfig], WeightMap] = lambda config: WeightMap()
    gguf: tuple[GGUFArchitecture, ...] = ()


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

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field, or ``default`` where it is absent; ``null`` counts as absent if there is a default."""
        self.read.add(name)
        value = self.raw.get(name)
        if value is None and name not in self.raw and default is _REQUIRED:
            raise ConfigError(f"{self.where}: field {name!r} is missing")
        return default if value is None and default is not _REQUIRED else value

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
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

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
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
        settle(self.where, {k: v for k, v in self.raw.items() if k not in self.read}, inert, numeric)

    def boolean(self, name: str, default: Any = _REQUIRED) -> Any:
        """Like :meth:`get`, for true or false."""
        value = self.get(name, default)
        if value is not default and not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name}={brief(value)} is not true or false")
        return value


@dataclass(frozen=True)
class GGUFView:
    """What a GGUF file says of itself, apart from the weights.

    Attributes:
        architecture: prefix of its metadata keys.
        metadata: all keys.
        tensor_shapes: per GGUF tensor name, in [out, in] order.
        rope_divisors: the tensor ``rope_freqs.weight``, or ``rope_factors_short.weight``, if there is one.
        rope_long_divisors: the tensor ``rope_factors_long.weight``, if there is one.
    """

    architecture: str
    metadata: Mapping[str, Any]
    tensor_shapes: Mapping[str, tuple[int, ...]]
    rope_divisors: tuple[float, ...] | None = None
    rope_long_divisors: tuple[float, ...] | None = None

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The architecture's value of that name."""
        key = f"{self.architecture}.{name}"
        value = self.metadata.get(key, default)
        if value is _REQUIRED:
            raise ConfigError(f"the GGUF file has no metadata {key!r}")
        return value

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        if "token_embd.weight" not in self.tensor_shapes:
            raise ConfigError("the GGUF file has no tensor 'token_embd.weight'")
        return self.tensor_shapes["token_embd.weight"][0]

    @property
    def tied(self) -> bool:
        """Whether the vocabulary projection is the embedding."""
        return "output.weight" not in self.tensor_shapes


def rope_of(
    fields: Fields,
    context: int,
    default_theta: float = 10_000.0,
    default: Mapping[str, Any] | None = None,
) -> RopeConfig:
    """The rotary embedding of a family whose heads rotate whole; see :func:`partial_rope_of`."""
    rope, share = partial_rope_of(fields, context, default_theta, default=default)
    if share != 1:
        raise ConfigError(f"{fields.where}: partial_rotary_factor={share} is not supported")
    return rope


def partial_rope_of(
    fields: Fields,
    context: int,
    default_theta: float = 10_000.0,
    default_share: float = 1.0,
    default: Mapping[str, Any] | None = None,
) -> tuple[RopeConfig, float]:
    """The rotary embedding, and the share of a head's dimensions that rotate.

    From ``rope_parameters`` (transformers 5), or ``rope_theta``, ``partial_rotary_factor`` and
    ``rope_scaling`` (4). Where a file has both objects, the older one is all that counts, as in transformers.

    Args:
        fields: of the configuration.
        context: ``max_position_embeddings``.
        default_theta: where the configuration leaves it out.
        default_share: likewise.
        default: the object of a family that has a scaling where the configuration has no object.
    """
    parameters = rope_section(fields)
    if default is not None and not parameters.raw:
        parameters = Fields(default, parameters.where)
    theta = parameters.number("rope_theta", fields.number("rope_theta", default_theta))
    share = fields.number("partial_rotary_factor", default_share)
    share = parameters.number("partial_rotary_factor", share)
    # Phi-3 keeps it beside the parameters
    original = fields.integer("original_max_position_embeddings", None)
    return rope_from(parameters, theta, context, original), share


def rope_section(fields: Fields) -> Fields:
    """The object that describes the rotary embedding; none where there is none.

    transformers 5 takes ``rope_scaling`` where a file has both, whole: not even the base of the other counts.
    """
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    if new.raw and old.raw and new.raw != old.raw:
        log.warning("%s: rope_scaling is used, rope_parameters beside it is not", fields.where)
    return old if old.raw else new


def rope_from(parameters: Fields, theta: float, context: int, original: int | None = None) -> RopeConfig:
    """A rotary embedding from its object of parameters.

    Args:
        parameters: the object.
        theta: base.
        context: ``max_position_embeddings``.
        original: context of the pre-training, where the configuration has it beside the parameters.
    """
    parameters.read.update({"rope_theta", "partial_rotary_factor", "type"})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "su":
        kind = "longrope"  # its name in the first Phi-3 files
    check_choice("rope_type", kind, RopeKind)
    wanted = _ROPE_FIELDS.get(kind, ())
    missing = [name for name in wanted if parameters.get(name, None) is None]
    if missing:
        raise ConfigError(f"rope_type={brief(kind)} needs {', '.join(missing)}")
    inside = parameters.integer("original_max_position_embeddings", context)
    check_positive("rope_theta", theta)
    values: dict[str, Any] = {"theta": float(theta), "kind": kind}
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        values["factor"] = parameters.get("factor")
    if kind == "llama3":
        values |= {name: parameters.get(name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = inside if original is None else original
    if kind == "dynamic":
        values["original_max_position_embeddings"] = context  # as transformers has it
    if kind == "yarn":
        for name in ("attn_factor", "extrapolation_factor"):
            parameters.require(name, 1)  # vLLM reads them
        values |= {
            "beta_fast": parameters.number("beta_fast", 32),
            "beta_slow": parameters.number("beta_slow", 1),
            "truncate": parameters.boolean("truncate", True),
            "attention_factor": _yarn_attention_factor(parameters),
        }
    if kind == "longrope":
        values |= {
            "divisors": parameters.numbers("short_factor"),
            "long_divisors": parameters.numbers("long_factor"),
            "attention_factor": longrope_attention_factor(
                parameters.number("attention_factor", None),
                parameters.number("factor", context / values["original_max_position_embeddings"]),
                values["original_max_position_embeddings"],
            ),
        }
    parameters.finish(numeric=ROPE_NUMERIC)
    return RopeConfig(**values)


_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


def _yarn_attention_factor(parameters: Fields) -> float:
    """Section 3.4 of the YaRN paper; DeepSeek gives the coefficients of two such terms."""

    def term(coefficient: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0

    factor = parameters.number("factor")
    given = parameters.number("attention_factor", None)
    coefficients = [parameters.number(name, 0) for name in ("mscale", "mscale_all_dim")]
    check_positive("rope factor", factor)
    if given is not None:
        return given
    return term(coefficients[0]) / term(coefficients[1]) if all(coefficients) else term(1.0)


def longrope_attention_factor(given: float | None, factor: float, original: int) -> float:
    """Section 3.3 of the LongRoPE paper, unless the configuration gives it."""
    if given is not None or factor <= 1:
        return 1.0 if given is None else given
    return math.sqrt(1 + math.log(factor) / math.log(original))


def layer_types_of(fields: Fields, default: Sequence[LayerType]) -> tuple[LayerType, ...]:
    """``layer_types``, or what an older file's other fields make of it."""
    types = fields.get("layer_types", default)
    if not isinstance(types, list | tuple):
        raise ConfigError(f"{fields.where}: layer_types={brief(types)} is not a list")
    return tuple(types)


def every(pattern: int, layers: int) -> tuple[LayerType, ...]:
    """Sliding layers with a full one every ``pattern``."""
    check_size("sliding_window_pattern", pattern)
    return tuple("full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers))


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
    return checked(
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


def checked(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes, before anything is derived from them."""
    for name, value in sizes.items():
        check_size(name, value, SIZES.get(name, MAX_INTEGER))
    return sizes


def all_full(layers: int) -> tuple[LayerType, ...]:
    """Full attention in every layer."""
    kind: LayerType = "full_attention"
    return (kind,) * layers


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


def gguf_sizes(view: GGUFView) -> dict[str, Any]:
    """The sizes every GGUF architecture names alike."""
    hidden, heads = view.get("embedding_length"), view.get("attention.head_count")
    checked({"hidden_size": hidden, "num_heads": heads})
    return checked(
        {
            "vocab_size": view.vocab_size,
            "hidden_size": hidden,
            "intermediate_size": view.get("feed_forward_length"),
            "num_layers": view.get("block_count"),
            "num_heads": heads,
            "num_kv_heads": view.get("attention.head_count_kv", heads),
            "head_dim": view.get("attention.key_length", hidden // heads),
            "max_position_embeddings": view.get("context_length"),
        }
    )


def gguf_rope(view: GGUFView, default_theta: float) -> RopeConfig:
    """The rotary embedding of a GGUF file's metadata."""
    theta = view.get("rope.freq_base", default_theta)
    check_positive("rope.freq_base", theta)
    kind = view.get("rope.scaling.type", "none")
    if kind == "none":
        return RopeConfig(theta=theta, divisors=view.rope_divisors)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=float(view.get("rope.scaling.factor")))
    if kind == "yarn":
        # llama.cpp multiplies what it is given by its own term, which converters divide out before
        factor = float(view.get("rope.scaling.factor"))
        given = float(view.get("rope.scaling.attn_factor", view.get("rope.scaling.yarn_attn_factor", 1.0)))
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_max_position_embeddings=view.get(
                "rope.scaling.original_context_length", view.get("context_length")
            ),
            beta_fast=float(view.get("rope.scaling.yarn_beta_fast", 32.0)),
            beta_slow=float(view.get("rope.scaling.yarn_beta_slow", 1.0)),
            attention_factor=given * (0.1 * math.log(factor) + 1),
        )
    raise ConfigError(f"GGUF rope.scaling.type={brief(kind)} is not supported: use none, linear or yarn")
