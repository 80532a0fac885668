"""Gemma."""

from __future__ import annotations

from typing import Any

from tpjax.config import LayerType, ModelConfig, RopeConfig, check_positive, check_size
from tpjax.errors import ConfigError
from tpjax.mappings.fields import (
    Family,
    Fields,
    GGUFArchitecture,
    GGUFView,
    activation_of,
    gguf_rope,
    gguf_sizes,
    rope_from,
    sizes_of,
)
from tpjax.mappings.llama import LLAMA_LAYER

_GEMMA3_LAYER = {
    **LLAMA_LAYER,
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
    sizes = sizes_of(Fields({"head_dim": 256, "max_position_embeddings": 131_072, **fields.raw}))
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
        rope=rope_from(full, theta),
        rope_sliding=rope_from(sliding, local_theta),
        layer_types=_every(pattern, sizes["num_layers"]) if types is None else tuple(types),
        window=fields.integer("sliding_window", 4096),
        query_scalar=scalar,
        tied=fields.boolean("tie_word_embeddings", True),
        activation=activation_of(fields, "hidden_activation", "gelu_pytorch_tanh"),
        bias=fields.boolean("attention_bias", False),
    )


def _gguf_gemma3(view: GGUFView) -> ModelConfig:
    sizes = gguf_sizes(view)
    # llama.cpp knows the one model whose queries are not scaled by head_dim (27B) by its depth
    scalar = sizes["hidden_size"] / sizes["num_heads"] if sizes["num_layers"] == 62 else sizes["head_dim"]
    return _gemma3_config(
        sizes,
        eps=view.get("attention.layer_norm_rms_epsilon"),
        rope=gguf_rope(view, 1_000_000.0),
        rope_sliding=RopeConfig(theta=10_000.0),
        layer_types=_every(6, sizes["num_layers"]),
        window=view.get("attention.sliding_window"),
        query_scalar=scalar,
        tied=view.tied,
    )


FAMILIES = (
    Family(
        "gemma3_text",
        "Gemma 3 270M, 1B",
        _gemma3_text,
        gguf=(GGUFArchitecture("gemma3", _gguf_gemma3, _GEMMA3_LAYER, norm_offset=1.0),),
    ),
)
