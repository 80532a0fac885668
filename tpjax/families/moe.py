"""Mixtures of experts: Mixtral, Qwen 2 and 3, gpt-oss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tpjax.config import LayerType, ModelConfig, MoEConfig, brief, check_size
from tpjax.errors import ConfigError
from tpjax.families.fields import (
    Family,
    Fields,
    GGUFArchitecture,
    GGUFView,
    TensorMapping,
    WeightMap,
    gguf_sizes,
    layer_types_of,
    rope_of,
)
from tpjax.families.llama import GGUF_LAYER, llama_like
from tpjax.families.qwen import GGUF_QK_NORMS, gguf_qwen

_PARTS = ("gate_proj", "up_proj", "down_proj")


def _read_training(fields: Fields) -> None:
    """Fields of the router's training."""
    fields.read |= {"router_aux_loss_coef", "output_router_logits", "router_jitter_noise"}


def _count(fields: Fields) -> int:
    """Experts, under the name published files have, or the one transformers 5 writes."""
    count: int = fields.integer("num_local_experts", fields.integer("num_experts", None))
    if count is None:
        raise ConfigError(f"{fields.where}: field 'num_experts' is missing")
    fields.require("num_experts", count)
    return count


def _windows(fields: Fields) -> dict[str, Any]:
    """One window for all layers, where there is one."""
    window = fields.nullable("sliding_window", None)
    kind: LayerType = "full_attention" if window is None else "sliding_attention"
    return {"sliding_window": window, "layer_types": (kind,) * fields.integer("num_hidden_layers")}


# --- Mixtral -----------------------------------------------------------------------------------------------


def _mixtral(fields: Fields) -> ModelConfig:
    _read_training(fields)
    context = 131_072
    return llama_like(
        fields,
        model_type="mixtral",
        context=context,
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope=rope_of(fields, fields.integer("max_position_embeddings", context), 1_000_000.0),
        moe=MoEConfig(
            num_experts=fields.integer("num_local_experts", 8),
            experts_per_token=fields.integer("num_experts_per_tok", 2),
            expert_width=fields.integer("intermediate_size"),
            sparse_layers=(True,) * fields.integer("num_hidden_layers"),
            norm_topk_prob=True,
        ),
        **_windows(fields),
    )


def _mixtral_names(config: ModelConfig) -> WeightMap:
    block = "block_sparse_moe"
    modules = {"mlp.gate": TensorMapping(f"{block}.gate")}
    for number in range(_moe(config).num_experts):
        for part, name in zip(_PARTS, ("w1", "w3", "w2"), strict=True):
            modules[f"mlp.experts.{number}.{part}"] = TensorMapping(f"{block}.experts.{number}.{name}")
    return WeightMap(modules)


# --- Qwen --------------------------------------------------------------------------------------------------


def _qwen_moe(fields: Fields, **differences: Any) -> MoEConfig:
    _read_training(fields)
    layers, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", 1)
    check_size("decoder_sparse_step", step)
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list | tuple) or not all(isinstance(layer, int) for layer in dense):
        raise ConfigError(f"{fields.where}: mlp_only_layers={brief(dense)} is not a list of layers")
    dense = frozenset(dense)
    return MoEConfig(
        num_experts=_count(fields),
        experts_per_token=fields.integer("num_experts_per_tok"),
        expert_width=fields.integer("moe_intermediate_size"),
        sparse_layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
        norm_topk_prob=fields.boolean("norm_topk_prob", False),
        **differences,
    )


def _qwen2_moe(fields: Fields) -> ModelConfig:
    layers, first = fields.integer("num_hidden_layers"), fields.integer("max_window_layers", 28)
    windowed = fields.boolean("use_sliding_window", False)
    window = fields.nullable("sliding_window", 4096)
    default: tuple[LayerType, ...] = tuple(
        "sliding_attention" if windowed and layer % 2 == 0 and layer < first else "full_attention"
        for layer in range(layers)
    )
    return llama_like(
        fields,
        model_type="qwen2_moe",
        context=32_768,
        attention_bias=fields.boolean("qkv_bias", True),
        layer_types=layer_types_of(fields, default),
        sliding_window=window if windowed else None,
        moe=_qwen_moe(
            fields, shared_width=fields.integer("shared_expert_intermediate_size"), shared_gate=True
        ),
    )


def _qwen3_moe(fields: Fields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    fields.read |= {"max_window_layers"}  # every layer has the window, or none
    if not fields.boolean("use_sliding_window", False):
        fields.read |= {"sliding_window"}
        windows = {}
    else:
        windows = _windows(fields)
    return llama_like(
        fields,
        model_type="qwen3_moe",
        context=32_768,
        qk_norm="head",
        attention_bias=bias,
        attention_out_bias=bias,
        moe=_qwen_moe(fields),
        **windows,
    )


def _gguf_qwen3moe(view: GGUFView) -> ModelConfig:
    return gguf_qwen(
        view,
        model_type="qwen3_moe",
        qk_norm="head",
        moe=MoEConfig(
            num_experts=view.get("expert_count"),
            experts_per_token=view.get("expert_used_count"),
            expert_width=view.get("expert_feed_forward_length"),
            sparse_layers=(True,) * gguf_sizes(view)["num_layers"],
            norm_topk_prob=True,
        ),
    )


def _gguf_qwen3moe_modules(config: ModelConfig) -> Mapping[str, TensorMapping]:
    count = _moe(config).num_experts
    return {
        **GGUF_LAYER,
        **GGUF_QK_NORMS,
        "mlp.gate": TensorMapping("ffn_gate_inp"),
        **{
            f"mlp.experts.{number}.{part}": TensorMapping(f"ffn_{name}_exps", place=number, count=count)
            for part, name in zip(_PARTS, ("gate", "up", "down"), strict=True)
            for number in range(count)
        },
    }


# --- gpt-oss -----------------------------------------------------------------------------------------------


_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _gpt_oss(fields: Fields) -> ModelConfig:
    _read_training(fields)
    fields.require("hidden_act", "silu")
    fields.read |= {"initial_context_length"}  # the rope's original context, once more
    layers, bias = fields.integer("num_hidden_layers"), fields.boolean("attention_bias", True)
    context, per_token = 131_072, fields.integer("num_experts_per_tok", 4)
    fields.require("experts_per_token", per_token)
    default: tuple[LayerType, ...] = tuple(
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)
    )
    return llama_like(
        fields,
        model_type="gpt_oss",
        context=context,
        default_head_dim=64,
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        rope=rope_of(
            fields, fields.integer("max_position_embeddings", context), 150_000.0, default=_GPT_OSS_ROPE
        ),
        layer_types=layer_types_of(fields, default),
        sliding_window=fields.integer("sliding_window", 128),
        attention_bias=bias,
        attention_out_bias=bias,
        attention_sinks=True,
        moe=MoEConfig(
            num_experts=_count(fields),
            experts_per_token=per_token,
            expert_width=fields.integer("intermediate_size"),
            sparse_layers=(True,) * layers,
            norm_topk_prob=True,
            router_bias=True,
            expert_bias=True,
            swiglu_limit=fields.number("swiglu_limit", 7.0),
            swiglu_alpha=fields.number("swiglu_alpha", 1.702),
        ),
    )


def _gpt_oss_names(config: ModelConfig) -> WeightMap:
    """Experts stacked, [in, out], gate and up in turns."""
    moe = _moe(config)
    count, width = moe.num_experts, moe.expert_width
    fused = {"gate_proj": np.arange(0, 2 * width, 2), "up_proj": np.arange(1, 2 * width, 2)}
    modules = {"mlp.gate": TensorMapping("mlp.router")}
    for number in range(count):
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            stack: dict[str, Any] = {"transposed": kind == "weight", "place": number, "count": count}
            expert, stored = f"mlp.experts.{number}", "mlp.experts"
            for part, rows in fused.items():
                modules[f"{expert}.{part}.{kind}"] = TensorMapping(
                    f"{stored}.gate_up_proj{suffix}", rows, 2 * width, **stack
                )
            modules[f"{expert}.down_proj.{kind}"] = TensorMapping(f"{stored}.down_proj{suffix}", **stack)
    return WeightMap(modules)


def _moe(config: ModelConfig) -> MoEConfig:
    assert config.moe is not None
    return config.moe


FAMILIES = (
    Family("mixtral", "Mixtral 8x7B, 8x22B", _mixtral, _mixtral_names),
    Family("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", _qwen2_moe),
    Family(
        "qwen3_moe",
        "Qwen3-30B-A3B, 235B-A22B",
        _qwen3_moe,
        gguf=(GGUFArchitecture("qwen3moe", _gguf_qwen3moe, _gguf_qwen3moe_modules),),
    ),
    Family("gpt_oss", "gpt-oss-20b, 120b", _gpt_oss, _gpt_oss_names),
)
