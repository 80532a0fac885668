"""What each model family calls things: Hugging Face and GGUF configurations and weight names.

To add a family: a function from its ``config.json`` to ``ModelConfig``, and an entry in ``FAMILIES``; where
it exists as GGUF, also the architecture's metadata and tensor names. Everything after this module knows
only ``ModelConfig`` and canonical weight names, which are Hugging Face's without the ``model.`` prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpjax.config import LayerType, ModelConfig, RopeConfig, check_positive, check_size
from tpjax.errors import ConfigError

_REQUIRED: Any = object()

# Fields that change what the model computes, and the values under which they change nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "add_cross_attention": (None, False),
}


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


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a decoded ``config.json``, as transformers 4 or 5 wrote it.

    Raises:
        ConfigError: the family, or a field's value, is not supported, or a field is missing or malformed.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"config.json holds a {type(raw).__name__}, not an object")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"model_type={model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    for name, inert in _INERT.items():
        if raw.get(name) not in inert:
            raise ConfigError(f"config.json: {name}={raw[name]!r} is not supported")
    return FAMILIES[model_type].config(Fields(raw))


def config_from_gguf(view: GGUFView) -> ModelConfig:
    """Reads a GGUF file's metadata.

    Raises:
        ConfigError: the architecture is not supported, or a key is missing.
    """
    return gguf_architecture(view.architecture).config(view)


def gguf_architecture(name: str) -> GGUFArchitecture:
    """The architecture of that name.

    Raises:
        ConfigError: there is none.
    """
    known = {gguf.name: gguf for family in FAMILIES.values() for gguf in family.gguf}
    if name not in known:
        raise ConfigError(f"GGUF architecture {name!r} is not supported; supported are {', '.join(known)}")
    return known[name]


def hf_name(canonical: str) -> str:
    """Name of a tensor in a Hugging Face checkpoint."""
    return canonical if canonical.startswith("lm_head.") else f"model.{canonical}"


def gguf_name(canonical: str, architecture: GGUFArchitecture) -> str:
    """Name of a tensor in a GGUF file."""
    top = {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if canonical in top:
        return top[canonical]
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", canonical)
    if layer is None or layer[2] not in architecture.layer_names:
        raise ConfigError(f"GGUF architecture {architecture.name!r} has no tensor for {canonical!r}")
    return f"blk.{layer[1]}.{architecture.layer_names[layer[2]]}.{layer[3]}"


# --- rotary embeddings -------------------------------------------------------------------------------------


def _rope(fields: Fields, default_theta: float) -> RopeConfig:
    """``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (4)."""
    parameters = fields.mapping("rope_parameters") or fields.mapping("rope_scaling")
    theta = parameters.get("rope_theta", fields.number("rope_theta", default_theta))
    return _rope_from(parameters, theta)


_ROPE_FIELDS = (
    ("linear", ("factor",)),
    ("llama3", ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")),
)


def _rope_from(parameters: Mapping[str, Any], theta: float) -> RopeConfig:
    kind: Any = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported")
    wanted = next((names for known, names in _ROPE_FIELDS if known == kind), ())
    missing = [name for name in wanted if parameters.get(name) is None]
    if missing:
        raise ConfigError(f"rope_type={kind!r} needs {', '.join(missing)}")
    check_positive("rope_theta", theta)
    return RopeConfig(theta=float(theta), kind=kind, **{name: parameters[name] for name in wanted})


# --- llama, mistral ----------------------------------------------------------------------------------------

_LLAMA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _sizes(fields: Fields) -> dict[str, Any]:
    """The sizes every family names alike."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", None)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise ConfigError(f"num_attention_heads={heads} is not a divisor of hidden_size={hidden}")
        head_dim = hidden // heads
    return _checked(
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


def _checked(sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes, before anything is derived from them."""
    for name, value in sizes.items():
        check_size(name, value)
    return sizes


def _all_full(layers: int) -> tuple[LayerType, ...]:
    kind: LayerType = "full_attention"
    return (kind,) * layers


def _activation(fields: Fields, name: str, default: str) -> Any:
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    value = fields.get(name, default)
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"config.json: {name}={value!r} is not supported; supported are {', '.join(known)}")
    return known[value]


def _llama(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields)
    bias = fields.boolean("attention_bias", False)
    return ModelConfig(
        model_type="llama",
        **sizes,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, 10_000.0),
        layer_types=_all_full(sizes["num_layers"]),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        activation=_activation(fields, "hidden_act", "silu"),
        query_scale=sizes["head_dim"] ** -0.5,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def _mistral(fields: Fields) -> ModelConfig:
    sizes = _sizes(fields)
    window = fields.raw.get("sliding_window", 4096)  # null means no window, absent the default
    kind: LayerType = "full_attention" if window is None else "sliding_attention"
    return ModelConfig(
        model_type="mistral",
        **sizes,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, 10_000.0),
        layer_types=(kind,) * sizes["num_layers"],
        sliding_window=window,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        activation=_activation(fields, "hidden_act", "silu"),
        query_scale=sizes["head_dim"] ** -0.5,
    )


def _gguf_sizes(view: GGUFView) -> dict[str, Any]:
    hidden, heads = view.get("embedding_length"), view.get("attention.head_count")
    _checked({"hidden_size": hidden, "num_heads": heads})
    return _checked(
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


def _gguf_rope(view: GGUFView, default_theta: float) -> RopeConfig:
    theta = view.get("rope.freq_base", default_theta)
    check_positive("rope.freq_base", theta)
    kind = view.get("rope.scaling.type", "none")
    if kind == "none":
        return RopeConfig(theta=theta, divisors=view.rope_divisors)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=float(view.get("rope.scaling.factor")))
    raise ConfigError(f"GGUF rope.scaling.type={kind!r} is not supported: use none or linear")


def _gguf_llama(view: GGUFView) -> ModelConfig:
    if view.get("expert_count", 0):
        raise ConfigError(f"GGUF expert_count={view.get('expert_count')} is not supported: dense models only")
    sizes = _gguf_sizes(view)
    if view.get("rope.dimension_count", sizes["head_dim"]) != sizes["head_dim"]:
        raise ConfigError(
            f"GGUF rope.dimension_count={view.get('rope.dimension_count')} differs from "
            f"head_dim={sizes['head_dim']}: partial rotary embeddings are not supported"
        )
    return ModelConfig(
        model_type="llama",
        **sizes,
        rms_norm_eps=view.get("attention.layer_norm_rms_epsilon"),
        rope=_gguf_rope(view, 10_000.0),
        layer_types=_all_full(sizes["num_layers"]),
        tie_word_embeddings=view.tied,
        query_scale=sizes["head_dim"] ** -0.5,
        attention_bias="blk.0.attn_q.bias" in view.tensor_shapes,
        attention_out_bias="blk.0.attn_output.bias" in view.tensor_shapes,
        mlp_bias="blk.0.ffn_up.bias" in view.tensor_shapes,
    )


# --- gemma 3 -----------------------------------------------------------------------------------------------

_GEMMA3_LAYER = {
    **_LLAMA_LAYER,
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _every(pattern: int, layers: int) -> tuple[LayerType, ...]:
    """Sliding layers with a full one every ``pattern``."""
    return tuple("full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers))


def _gemma3_config(
    sizes: dict[str, Any],
    *,
    eps: float,
    rope: RopeConfig,
    rope_sliding: RopeConfig,
    layer_types: tuple[LayerType, ...],
    window: int,
    query_scalar: float,
    tied: bool,
    activation: Any = "gelu_tanh",
    bias: bool = False,
) -> ModelConfig:
    return ModelConfig(
        model_type="gemma3_text",
        **sizes,
        rms_norm_eps=eps,
        rope=rope,
        rope_sliding=rope_sliding,
        layer_types=layer_types,
        sliding_window=window,
        tie_word_embeddings=tied,
        activation=activation,
        qk_norm=True,
        sandwich_norms=True,
        norm_offset=1.0,
        embedding_scale=sizes["hidden_size"] ** 0.5,
        query_scale=query_scalar**-0.5,
        attention_bias=bias,
        attention_out_bias=bias,
    )


def _gemma3_text(fields: Fields) -> ModelConfig:
    sizes = _sizes(Fields({"head_dim": 256, "max_position_embeddings": 131_072, **fields.raw}))
    parameters = fields.mapping("rope_parameters")
    if parameters.get("rope_type"):
        raise ConfigError("config.json: rope_parameters of gemma3_text is given per layer type")
    per_type = Fields(parameters, "config.json: rope_parameters")
    full = per_type.mapping("full_attention") or fields.mapping("rope_scaling")
    sliding = per_type.mapping("sliding_attention")
    theta = full.get("rope_theta", fields.number("rope_theta", 1_000_000.0))
    local_theta = sliding.get("rope_theta", fields.number("rope_local_base_freq", 10_000.0))
    types = fields.get("layer_types", None)
    if types is not None and not isinstance(types, list | tuple):
        raise ConfigError(f"config.json: layer_types={types!r} is not a list")
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    check_size("sliding_window_pattern", pattern)
    scalar = fields.number("query_pre_attn_scalar", 256)
    check_positive("query_pre_attn_scalar", scalar)
    return _gemma3_config(
        sizes,
        eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope_from(full, theta),
        rope_sliding=_rope_from(sliding, local_theta),
        layer_types=_every(pattern, sizes["num_layers"]) if types is None else tuple(types),
        window=fields.integer("sliding_window", 4096),
        query_scalar=scalar,
        tied=fields.boolean("tie_word_embeddings", True),
        activation=_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        bias=fields.boolean("attention_bias", False),
    )


def _gguf_gemma3(view: GGUFView) -> ModelConfig:
    sizes = _gguf_sizes(view)
    # llama.cpp knows the one model whose queries are not scaled by head_dim (27B) by its depth
    scalar = sizes["hidden_size"] / sizes["num_heads"] if sizes["num_layers"] == 62 else sizes["head_dim"]
    return _gemma3_config(
        sizes,
        eps=view.get("attention.layer_norm_rms_epsilon"),
        rope=_gguf_rope(view, 1_000_000.0),
        rope_sliding=RopeConfig(theta=10_000.0),
        layer_types=_every(6, sizes["num_layers"]),
        window=view.get("attention.sliding_window"),
        query_scalar=scalar,
        tied=view.tied,
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "Llama 2, 3, 3.1, 3.2; SmolLM2; TinyLlama",
            _llama,
            gguf=(GGUFArchitecture("llama", _gguf_llama, _LLAMA_LAYER, interleaved_rope=True),),
        ),
        Family("mistral", "Mistral 7B", _mistral),
        Family(
            "gemma3_text",
            "Gemma 3 270M, 1B",
            _gemma3_text,
            gguf=(GGUFArchitecture("gemma3", _gguf_gemma3, _GEMMA3_LAYER, norm_offset=1.0),),
        ),
    )
}
