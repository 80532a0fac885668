"""Qwen 2 to 3, dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpjax.config import LayerType, ModelConfig
from tpjax.families.config_reader import Fields, attention_biases, layer_types_of
from tpjax.families.family import Family, GGUFArchitecture
from tpjax.families.gguf_metadata import GGUFView
from tpjax.families.llama import GGUF_LAYER, gguf_llama_like, llama_like
from tpjax.families.tensor_names import TensorMapping


def windows_of(fields: Fields) -> dict[str, Any]:
    """Reads layer types and window: the first ``max_window_layers`` layers see everything, if any has one."""
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
    return llama_like(
        fields, model_type="qwen2", context=32_768, attention={"bias": True, **windows_of(fields)}
    )


def _qwen3(fields: Fields) -> ModelConfig:
    fields.read |= {"use_qk_norm"}  # they always are
    return llama_like(
        fields,
        model_type="qwen3",
        context=32_768,
        default_head_dim=128,
        attention={"qk_norm": "head", **attention_biases(fields), **windows_of(fields)},
    )


def gguf_qwen(view: GGUFView, *, attention: Mapping[str, Any] | None = None, **model: Any) -> ModelConfig:
    """Reads what Qwen's GGUF architectures share; the family sets the rest as in ``llama_like``."""
    bias = "blk.0.attn_q.bias" in view.tensor_shapes
    return gguf_llama_like(view, attention={"bias": bias, **(attention or {})}, **model)


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
                lambda view: gguf_qwen(view, model_type="qwen3", attention={"qk_norm": "head"}),
                lambda config: {**GGUF_LAYER, **GGUF_QK_NORMS},
            ),
        ),
    ),
)
