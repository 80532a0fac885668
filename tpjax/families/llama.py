"""Llama and what is built like it: Mistral, Granite, OLMo 2, SmolLM3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpjax.config import ModelConfig, RopeConfig, brief, check_size
from tpjax.errors import ConfigError
from tpjax.families.config_reader import (
    Fields,
    activation_of,
    attention_biases,
    layer_types_of,
    sizes_of,
    window_in_all_layers,
)
from tpjax.families.family import Family, GGUFArchitecture, model_config
from tpjax.families.gguf_metadata import GGUFView, gguf_sizes
from tpjax.families.rope_variants import gguf_rope, rope_of
from tpjax.families.tensor_names import TensorMapping, interleaved

GGUF_LAYER = {
    "input_layernorm": TensorMapping("attn_norm"),
    "self_attn.q_proj": TensorMapping("attn_q"),
    "self_attn.k_proj": TensorMapping("attn_k"),
    "self_attn.v_proj": TensorMapping("attn_v"),
    "self_attn.o_proj": TensorMapping("attn_output"),
    "post_attention_layernorm": TensorMapping("ffn_norm"),
    "mlp.gate_proj": TensorMapping("ffn_gate"),
    "mlp.up_proj": TensorMapping("ffn_up"),
    "mlp.down_proj": TensorMapping("ffn_down"),
}


def llama_like(
    fields: Fields,
    *,
    context: int = 2048,
    default_head_dim: int | None = None,
    attention: Mapping[str, Any] | None = None,
    rope: RopeConfig | None = None,
    mlp: Mapping[str, Any] | None = None,
    norm: Mapping[str, Any] | None = None,
    **model: Any,
) -> ModelConfig:
    """Reads what most families share with Llama, by Llama's field names, unless the family has set it.

    Args:
        fields: fields of ``config.json``.
        context: default of ``max_position_embeddings``, tokens.
        default_head_dim: default of ``head_dim``; ``None``: ``hidden_size`` over the number of heads.
        attention: fields of ``AttentionConfig`` that the family sets.
        rope: the rotary embedding; ``None``: as Llama's.
        mlp: fields of ``MLPConfig`` that the family sets.
        norm: fields of ``NormConfig`` that the family sets.
        **model: other fields of ``ModelConfig`` that the family sets.

    Raises:
        ConfigError: a field is missing, malformed or contradicts another.
    """
    sizes = sizes_of(fields, context=context, head_dim=default_head_dim)
    mlp, norm = dict(mlp or {}), dict(norm or {})
    # a field counts as known only if its family reads it: what is set already must not be read here
    if "eps" not in norm:
        norm["eps"] = fields.number("rms_norm_eps", 1e-6)
    if rope is None:
        rope = RopeConfig(full=rope_of(fields, sizes["max_position_embeddings"]))
    if "tie_word_embeddings" not in model:
        model["tie_word_embeddings"] = fields.boolean("tie_word_embeddings", False)
    if "activation" not in mlp:
        mlp["activation"] = activation_of(fields, "hidden_act", "silu")
    return model_config(sizes, attention=attention or {}, rope=rope, mlp=mlp, norm=norm, **model)


def _mlp_bias(fields: Fields) -> dict[str, bool]:
    return {"bias": fields.boolean("mlp_bias", False)}


def _llama(fields: Fields) -> ModelConfig:
    fields.require("rope_interleaved", False)
    return llama_like(fields, model_type="llama", attention=attention_biases(fields), mlp=_mlp_bias(fields))


def _mistral(fields: Fields) -> ModelConfig:
    window = fields.nullable("sliding_window", 4096)  # null means no window, absent the default
    windows = window_in_all_layers(window, fields.integer("num_hidden_layers"))
    return llama_like(fields, model_type="mistral", attention=windows)


def _granite(fields: Fields) -> ModelConfig:
    scaling = fields.number("logits_scaling", 1.0)
    return llama_like(
        fields,
        model_type="granite",
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        attention={"query_scale": fields.number("attention_multiplier", 1.0), **attention_biases(fields)},
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1 / scaling if scaling else 0.0,
        mlp=_mlp_bias(fields),
    )


def _olmo2(fields: Fields) -> ModelConfig:
    return llama_like(
        fields,
        model_type="olmo2",
        attention={"qk_norm": "projection", **attention_biases(fields)},
        norm={"eps": fields.number("rms_norm_eps", 1e-5)},
        block="post",
    )


def _smollm3(fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    interval = fields.integer("no_rope_layer_interval", 4)
    check_size("no_rope_layer_interval", interval)
    rotate = fields.get("no_rope_layers", None)  # 1 if a layer rotates, in spite of the name
    if rotate is None:
        rotate = [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(rotate, list | tuple) or any(flag not in (0, 1) for flag in rotate):
        raise ConfigError(f"{fields.where}: no_rope_layers={brief(rotate)} is not a list of 0 and 1")
    window = fields.integer("sliding_window", None)
    windowed = fields.boolean("use_sliding_window", False) and window is not None
    types = layer_types_of(
        fields, tuple("sliding_attention" if windowed and not flag else "full_attention" for flag in rotate)
    )
    context = fields.integer("max_position_embeddings", 32_768)
    fields.read |= {"max_window_layers"}  # Qwen's: here no_rope_layers says which layers have a window
    return llama_like(
        fields,
        model_type="smollm3",
        context=32_768,
        attention={"layer_types": types, "sliding_window": window, **attention_biases(fields)},
        rope=RopeConfig(
            full=rope_of(fields, context, 2_000_000.0), layers=tuple(bool(flag) for flag in rotate)
        ),
        mlp=_mlp_bias(fields),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
    )


def gguf_llama_like(
    view: GGUFView,
    *,
    attention: Mapping[str, Any],
    rope: RopeConfig | None = None,
    mlp: Mapping[str, Any] | None = None,
    **model: Any,
) -> ModelConfig:
    """Reads what most GGUF architectures share with Llama; the rest is set as in :func:`llama_like`."""
    return model_config(
        gguf_sizes(view),
        attention=attention,
        rope=rope or RopeConfig(full=gguf_rope(view, 10_000.0)),
        mlp=mlp or {},
        norm={"eps": view.get("attention.layer_norm_rms_epsilon")},
        tie_word_embeddings=view.tied,
        **model,
    )


def _gguf_llama(view: GGUFView) -> ModelConfig:
    if view.get("expert_count", 0):
        raise ConfigError(f"GGUF expert_count={view.get('expert_count')} is not supported: dense models only")
    sizes = gguf_sizes(view)
    if view.get("rope.dimension_count", sizes["head_dim"]) != sizes["head_dim"]:
        raise ConfigError(
            f"GGUF rope.dimension_count={view.get('rope.dimension_count')} differs from "
            f"head_dim={sizes['head_dim']}: partial rotary embeddings are not supported"
        )
    return gguf_llama_like(
        view,
        model_type="llama",
        attention={
            "bias": "blk.0.attn_q.bias" in view.tensor_shapes,
            "out_bias": "blk.0.attn_output.bias" in view.tensor_shapes,
        },
        mlp={"bias": "blk.0.ffn_up.bias" in view.tensor_shapes},
    )


def _gguf_llama_modules(config: ModelConfig) -> Mapping[str, TensorMapping]:
    attention = config.attention
    return {
        **GGUF_LAYER,
        "self_attn.q_proj": interleaved("attn_q", attention.num_heads, attention.head_dim),
        "self_attn.k_proj": interleaved("attn_k", attention.num_kv_heads, attention.head_dim),
    }


FAMILIES = (
    Family(
        "llama",
        "Llama 2, 3, 3.1, 3.2; SmolLM2; TinyLlama",
        _llama,
        gguf=(GGUFArchitecture("llama", _gguf_llama, _gguf_llama_modules),),
    ),
    Family("mistral", "Mistral 7B", _mistral),
    Family("smollm3", "SmolLM3", _smollm3),
    Family("olmo2", "OLMo 2", _olmo2),
    Family("granite", "Granite 3.0 to 3.3", _granite),
)
