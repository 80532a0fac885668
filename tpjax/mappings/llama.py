"""Llama and what is built like it."""

from __future__ import annotations

from tpjax.config import LayerType, ModelConfig
from tpjax.errors import ConfigError
from tpjax.mappings.fields import (
    Family,
    Fields,
    GGUFArchitecture,
    GGUFView,
    activation_of,
    all_full,
    gguf_rope,
    gguf_sizes,
    rope_of,
    sizes_of,
)

LLAMA_LAYER = {
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


def _llama(fields: Fields) -> ModelConfig:
    sizes = sizes_of(fields)
    bias = fields.boolean("attention_bias", False)
    return ModelConfig(
        model_type="llama",
        **sizes,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope_of(fields, 10_000.0),
        layer_types=all_full(sizes["num_layers"]),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        activation=activation_of(fields, "hidden_act", "silu"),
        query_scale=sizes["head_dim"] ** -0.5,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def _mistral(fields: Fields) -> ModelConfig:
    sizes = sizes_of(fields)
    window = fields.raw.get("sliding_window", 4096)  # null means no window, absent the default
    kind: LayerType = "full_attention" if window is None else "sliding_attention"
    return ModelConfig(
        model_type="mistral",
        **sizes,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope_of(fields, 10_000.0),
        layer_types=(kind,) * sizes["num_layers"],
        sliding_window=window,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        activation=activation_of(fields, "hidden_act", "silu"),
        query_scale=sizes["head_dim"] ** -0.5,
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
        rms_norm_eps=view.get("attention.layer_norm_rms_epsilon"),
        rope=gguf_rope(view, 10_000.0),
        layer_types=all_full(sizes["num_layers"]),
        tie_word_embeddings=view.tied,
        query_scale=sizes["head_dim"] ** -0.5,
        attention_bias="blk.0.attn_q.bias" in view.tensor_shapes,
        attention_out_bias="blk.0.attn_output.bias" in view.tensor_shapes,
        mlp_bias="blk.0.ffn_up.bias" in view.tensor_shapes,
    )


FAMILIES = (
    Family(
        "llama",
        "Llama 2, 3, 3.1, 3.2; SmolLM2; TinyLlama",
        _llama,
        gguf=(GGUFArchitecture("llama", _gguf_llama, LLAMA_LAYER, interleaved_rope=True),),
    ),
    Family("mistral", "Mistral 7B", _mistral),
)
