"""How a family is described, and the readers of fields that families share.

One module of this folder per lineage reads its ``config.json`` and GGUF metadata into a ``ModelConfig`` and
names its tensors; ``families.py`` gathers them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpjax.config import LayerType, ModelConfig, RopeConfig, check_positive, check_size
from tpjax.errors import ConfigError

_REQUIRED: Any = object()


@dataclass(frozen=True)
class GGUFArchitecture:
    """A GGUF architecture of a family.

    Attributes:
        name: value of ``general.architecture``.
        config: metadata, tensor names and the vocabulary's size, to the configuration.
        layer_names: canonical name to GGUF name of a layer's tensors, without ``layers.N.`` and ``blk.N.``.
        interleaved_rope: rows of q and k are stored for RoPE on pairs (2i, 2i + 1), not halves.
        norm_offset: what the converter added to norm weights.
    """

    name: str
    config: Callable[[GGUFView], ModelConfig]
    layer_names: Mapping[str, str]
    interleaved_rope: bool = False
    norm_offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        model_type: as ``config.json`` has it.
        examples: models of this family, for the README's table.
        config: reads ``config.json``.
        gguf: the GGUF architectures that hold this family.
        ignored: patterns of tensor names that may be in a checkpoint and are not needed.
    """

    model_type: str
    examples: str
    config: Callable[[Fields], ModelConfig]
    gguf: tuple[GGUFArchitecture, ...] = ()
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)


@dataclass
class Fields:
    """The fields of a ``config.json``, read with clear errors.

    Attributes:
        raw: the decoded JSON object.
        where: what the errors call it.
    """

    raw: Mapping[str, Any]
    where: str = "config.json"

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field, or ``default`` where it is absent; ``null`` counts as absent if there is a default."""
        value = self.raw.get(name)
        if value is None and name not in self.raw and default is _REQUIRED:
            raise ConfigError(f"{self.where}: field {name!r} is missing")
        return default if value is None and default is not _REQUIRED else value

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """Like :meth:`get`, for a whole number."""
        value = self.get(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{self.where}: {name}={value!r} is not a whole number")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """Like :meth:`get`, for a number."""
        value = self.get(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{self.where}: {name}={value!r} is not a number")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object; empty where it is absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: {name}={value!r} is not an object")
        return value

    def boolean(self, name: str, default: Any = _REQUIRED) -> Any:
        """Like :meth:`get`, for true or false."""
        value = self.get(name, default)
        if value is not default and not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name}={value!r} is not true or false")
        return value


@dataclass(frozen=True)
class GGUFView:
    """What a GGUF file says of itself, apart from the weights.

    Attributes:
        architecture: prefix of its metadata keys.
        metadata: all keys.
        tensor_shapes: per GGUF tensor name, in [out, in] order.
        rope_divisors: the tensor ``rope_freqs.weight``, if there is one.
    """

    architecture: str
    metadata: Mapping[str, Any]
    tensor_shapes: Mapping[str, tuple[int, ...]]
    rope_divisors: tuple[float, ...] | None = None

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


def rope_of(fields: Fields, default_theta: float) -> RopeConfig:
    """``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (4)."""
    parameters = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")
    theta = parameters.get("rope_theta", fields.number("rope_theta", default_theta))
    return rope_from(parameters, theta)


_ROPE_FIELDS = (
    ("linear", ("factor",)),
    ("llama3", ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
)


def rope_from(parameters: Mapping[str, Any], theta: float) -> RopeConfig:
    """A rotary embedding from its object of parameters."""
    kind: Any = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported")
    wanted = next((names for known, names in _ROPE_FIELDS if known == kind), ())
    missing = [name for name in wanted if parameters.get(name) is None]
    if missing:
        raise ConfigError(f"rope_type={kind!r} needs {', '.join(missing)}")
    check_positive("rope_theta", theta)
    return RopeConfig(theta=float(theta), kind=kind, **{name: parameters[name] for name in wanted})


def sizes_of(fields: Fields) -> dict[str, Any]:
    """The sizes every family names alike."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", None)
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
            "max_position_embeddings": fields.integer("max_position_embeddings", 2048),
        }
    )


def checked(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes, before anything is derived from them."""
    for name, value in sizes.items():
        check_size(name, value)
    return sizes


def all_full(layers: int) -> tuple[LayerType, ...]:
    """Full attention in every layer."""
    kind: LayerType = "full_attention"
    return (kind,) * layers


def activation_of(fields: Fields, name: str, default: str) -> Any:
    """The activation function a field names."""
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    value = fields.get(name, default)
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"config.json: {name}={value!r} is not supported; supported are {', '.join(known)}")
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
    raise ConfigError(f"GGUF rope.scaling.type={kind!r} is not supported: use none or linear")
