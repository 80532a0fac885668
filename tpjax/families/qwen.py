"""Qwen 2 to 3, dense."""

from __future__ import annotations

from typing import Any

from tpjax.config import LayerType, ModelConfig
from tpjax.families.config_reader import Fields, full_attention_in_all_layers, layer_types_of
from tpjax.families.family import Family, GGUFArchitecture
from tpjax.families.gguf_metadata import GGUFView, gguf_sizes
from tpjax.families.llama import GGUF_LAYER, llama_like
from tpjax.families.rope_variants import gguf_rope
from tpjax.families.tensor_names import TensorMapping


def windows_of(fields: Fields) -> dict[str, Any]:
    """Layer types and window: the first ``max_window_layers`` layers see everything, if any has a window."""
    layers = fields.integer("num_hidden_layers")
    window = fields.nullable("sliding_window", 4096)
    first = fields.integer("max_window_layers", 28)
    windowed = fields.boolean("use_sliding_window", False) and window is not None
    default: tuple[LayerType, ...] = tuple(
        "sliding_attention" if windowed and layer >= first else "full_attention" for layer in range(layers)
    )
    return {
        "layer_types": layer_types_of(fields, default),
        "sliding_window": window if windowed else None,
    }


def _qwen2(fields: Fields) -> ModelConfig:
    fields.require("use_mrope", False)
    return llama_like(fields, model_type="qwen2", context=32_768, attention_bias=True, **windows_of(fields))


def _qwen3(fields: Fields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    return llama_like(
        fields,
        model_type="qwen3",
        context=32_768,
        default_head_dim=128,
        qk_norm="head",
        attention_bias=bias,
        attention_out_bias=bias,
        **windows_of(fields),
    )


def gguf_qwen(view: GGUFView, **differences: Any) -> ModelConfig:
    """What Qwen's GGUF architectures have in common, and fields of ``ModelConfig`` that one sets itself."""
    sizes = gguf_sizes(view)
    return ModelConfig(
        **sizes,
        norm_eps=view.get("attention.layer_norm_rms_epsilon"),
        rope=gguf_rope(view, 10_000.0),
        layer_types=full_attention_in_all_layers(sizes["num_layers"]),
        tie_word_embeddings=view.tied,
        query_scale=sizes["head_dim"] ** -0.5,
        attention_bias="blk.0.attn_q.bias" in view.tensor_shapes,
        **differences,
    )


GGUF_QK_NORMS = {
    "self_attn.q_norm": TensorMapping("attn_q_norm"),
    "self_attn.k_norm": TensorMapping("attn_k_norm"),
}

FAMILIES = (
    Family(
        "qwen2",
        "Qwen2, Qwen2.5",
        _qwen2,
        gguf=(
            GGUFArchitecture(
                "qwen2", lambda view: gguf_qwen(view, model_type="qwen2"), lambda config: GGUF_LAYER
            ),
        ),
    ),
    Family(
        "qwen3",
        "Qwen3 0.6B to 32B",
        _qwen3,
        gguf=(
            GGUFArchitecture(
                "qwen3",
                lambda view: gguf_qwen(view, model_type="qwen3", qk_norm="head"),
                lambda config: {**GGUF_LAYER, **GGUF_QK_NORMS},
            ),
        ),
    ),
)
