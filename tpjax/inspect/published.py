"""Configurations of the built-in models, whose weights need not be there.

Sizes are those of ``shapes.py``; the rest is each model's ``config.json`` on Hugging Face, of a multimodal
model its text half.
"""

from __future__ import annotations

from typing import Any

from tpjax.checkpoints.hub import ALIASES
from tpjax.config import ModelConfig
from tpjax.families import config_from_hf
from tpjax.inspect.shapes import SHAPES, Shape


def is_published(name: str) -> bool:
    """Whether a name stands for a published model's shape, and not for a checkpoint that can be fetched."""
    return name in SHAPES and name not in ALIASES


def published_config(name: str) -> ModelConfig:
    """The architecture of a built-in model.

    Args:
        name: one of ``SHAPES``.
    """
    shape = SHAPES[name]
    family = max((prefix for prefix in _FAMILIES if name.startswith(prefix)), key=len)
    return config_from_hf({**_sizes(shape), **_FAMILIES[family]})


def _sizes(shape: Shape) -> dict[str, Any]:
    """The fields of ``config.json`` that a shape holds."""
    fields: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
    }
    if shape.window:
        fields["sliding_window"] = shape.window
    if shape.experts:
        fields["n_routed_experts" if shape.latent else "num_local_experts"] = shape.experts.count
        fields["num_experts_per_tok"] = shape.experts.active
        if shape.experts.width != shape.width:  # else the family knows one width only
            fields["moe_intermediate_size"] = shape.experts.width
    if shape.latent is None:
        fields["head_dim"] = shape.head_dim
    else:
        fields |= {
            "q_lora_rank": shape.latent.query_rank,
            "kv_lora_rank": shape.latent.rank,
            "qk_rope_head_dim": shape.latent.rope_dim,
            "qk_nope_head_dim": shape.latent.nope_dim,
            "v_head_dim": shape.latent.value_dim,
        }
    return fields


def _llama(longest: int, theta: float, **rest: Any) -> dict[str, Any]:
    """What Llama and those built like it say besides their sizes."""
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": longest,
        "rope_theta": theta,
        **rest,
    }


def _gemma(model_type: str, longest: int, theta: float, scalar: int, **rest: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": longest,
        "rope_theta": theta,
        "query_pre_attn_scalar": scalar,
        **rest,
    }


def _gemma2(scalar: int = 256) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _gemma("gemma2", 8192, 1e4, scalar, **caps)


def _gemma3(longest: int, scalar: int = 256, **rest: Any) -> dict[str, Any]:
    return _gemma("gemma3_text", longest, 1e6, scalar, rope_local_base_freq=1e4, **rest)


_QWEN: dict[str, Any] = {"rms_norm_eps": 1e-6}
_LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
_LINEAR = {"rope_type": "linear", "factor": 8.0}

# by the start of a name; the longest that fits counts
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama-2-": _llama(4096, 1e4),
    "llama-3-": _llama(8192, 5e5),
    "llama-3.1-": _llama(131_072, 5e5, rope_scaling=_LLAMA31),
    "smollm2-": _llama(8192, 1e5),
    "mistral-": _llama(32_768, 1e4, model_type="mistral"),
    "mixtral-8x7b": _llama(32_768, 1e6, model_type="mixtral"),
    "mixtral-8x22b": _llama(65_536, 1e6, model_type="mixtral"),
    "qwen2.5-": _llama(32_768, 1e6, model_type="qwen2", **_QWEN),
    "qwen3-": _llama(40_960, 1e6, model_type="qwen3", **_QWEN),
    "qwen3-30b-a3b": _llama(40_960, 1e6, model_type="qwen3_moe", norm_topk_prob=True, **_QWEN),
    "qwen3-235b-a22b": _llama(40_960, 1e6, model_type="qwen3_moe", norm_topk_prob=True, **_QWEN),
    "gemma-2-": _gemma2(),
    "gemma-2-27b": _gemma2(144),
    "gemma-3-": _gemma3(131_072, rope_scaling=_LINEAR),
    "gemma-3-270m": _gemma3(32_768),
    "gemma3-270m": _gemma3(32_768),
    "gemma-3-1b": _gemma3(32_768),
    "gemma-3-27b": _gemma3(131_072, 168, rope_scaling=_LINEAR),
    "gpt-oss-": _llama(
        131_072,
        1.5e5,
        model_type="gpt_oss",
        attention_bias=True,
        rope_scaling={**_YARN, "factor": 32.0, "truncate": False},
    ),
    "deepseek-v3": _llama(
        163_840,
        1e4,
        model_type="deepseek_v3",
        rms_norm_eps=1e-6,
        first_k_dense_replace=3,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        rope_scaling={**_YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
}
