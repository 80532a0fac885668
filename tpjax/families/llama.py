"""Llama and what is built like it: Mistral, Granite, OLMo 2, SmolLM3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tpjax.config import ModelConfig, brief
from tpjax.errors import ConfigError
from tpjax.families.config_reader import (
    Fields,
    activation_of,
    full_attention_in_all_layers,
    layer_types_of,
    sizes_of,
    window_in_all_layers,
)
from tpjax.families.family import Family, GGUFArchitecture
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
    fields: Fields, *, context: int = 2048, default_head_dim: int | None = None, **differences: Any
) -> ModelConfig:
    """What most families share with Llama, by Llama's field names.

    Args:
        fields: of the configuration.
        context: ``max_position_embeddings`` where the configuration leaves it out.
        default_head_dim: ``head_dim`` likewise; ``None``: what the heads share of the hidden size.
        **differences: fields of ``ModelConfig`` that the family sets otherwise.
    """
    sizes = sizes_of(fields, context=context, head_dim=default_head_dim)
    shared: dict[str, Callable[[], Any]] = {
        "norm_eps": lambda: fields.number("rms_norm_eps", 1e-6),
        "rope": lambda: rope_of(fields, sizes["max_position_embeddings"]),
        "layer_types": lambda: full_attention_in_all_layers(sizes["num_layers"]),
        "tie_word_embeddings": lambda: fields.boolean("tie_word_embeddings", False),
        "activation": lambda: activation_of(fields, "hidden_act", "silu"),
        "query_scale": lambda: sizes["head_dim"] ** -0.5,
    }
    read = {name: of() for name, of in shared.items() if name not in differences}
    return ModelConfig(**{**sizes, **read, **differences})


def _biases(fields: Fields) -> dict[str, bool]:
    bias = fields.boolean("attention_bias", False)
    return {"attention_bias": bias, "attention_out_bias": bias}


def _llama(fields: Fields) -> ModelConfig:
    fields.require("rope_interleaved", False)
    return llama_like(
        fields, model_type="llama", mlp_bias=fields.boolean("mlp_bias", False), **_biases(fields)
    )


def _mistral(fields: Fields) -> ModelConfig:
    window = fields.nullable("sliding_window", 4096)  # null means no window, absent the default
    windows = window_in_all_layers(window, fields.integer("num_hidden_layers"))
    return llama_like(fields, model_type="mistral", **windows)


def _granite(fields: Fields) -> ModelConfig:
    scaling = fields.number("logits_scaling", 1.0)
    return llama_like(
        fields,
        model_type="granite",
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        query_scale=fields.number("attention_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1 / scaling if scaling else 0.0,
        mlp_bias=fields.boolean("mlp_bias", False),
        **_biases(fields),
    )


def _olmo2(fields: Fields) -> ModelConfig:
    return llama_like(
        fields,
        model_type="olmo2",
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        block="post",
        qk_norm="projection",
        **_biases(fields),
    )


def _smollm3(fields: Fields) -> ModelConfig:
    layers = fields.integer("num_hidden_layers")
    interval = fields.integer("no_rope_layer_interval", 4)
    rotate = fields.get("no_rope_layers", None)  # 1 where a layer rotates, its name notwithstanding
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
    return llama_like(
        fields,
        model_type="smollm3",
        context=32_768,
        rope=rope_of(fields, context, 2_000_000.0),
        rope_layers=tuple(bool(flag) for flag in rotate),
        layer_types=types,
        sliding_window=window,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        mlp_bias=fields.boolean("mlp_bias", False),
        **_biases(fields),
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
    return ModelConfig(
        model_type="llama",
        **sizes,
        norm_eps=view.get("attention.layer_norm_rms_epsilon"),
        rope=gguf_rope(view, 10_000.0),
        layer_types=full_attention_in_all_layers(sizes["num_layers"]),
        tie_word_embeddings=view.tied,
        query_scale=sizes["head_dim"] ** -0.5,
        attention_bias="blk.0.attn_q.bias" in view.tensor_shapes,
        attention_out_bias="blk.0.attn_output.bias" in view.tensor_shapes,
        mlp_bias="blk.0.ffn_up.bias" in view.tensor_shapes,
    )


def _gguf_llama_modules(config: ModelConfig) -> Mapping[str, TensorMapping]:
    return {
        **GGUF_LAYER,
        "self_attn.q_proj": interleaved("attn_q", config.num_heads, config.head_dim),
        "self_attn.k_proj": interleaved("attn_k", config.num_kv_heads, config.head_dim),
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
