"""Qwen 2 and 3 with a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpjax.config import LayerType, ModelConfig, MoEConfig, brief, check_size
from tpjax.errors import ConfigError
from tpjax.families.config_reader import (
    Fields,
    attention_biases,
    layer_types_of,
    num_experts_of,
    window_in_all_layers,
)
from tpjax.families.family import Family, GGUFArchitecture
from tpjax.families.gguf_metadata import GGUFView, gguf_sizes
from tpjax.families.llama import GGUF_LAYER, llama_like
from tpjax.families.qwen import GGUF_QK_NORMS, gguf_qwen
from tpjax.families.tensor_names import EXPERT_PROJECTIONS, TensorMapping


def _qwen_moe(fields: Fields, **differences: Any) -> MoEConfig:
    layers, step = fields.integer("num_hidden_layers"), fields.integer("decoder_sparse_step", 1)
    check_size("decoder_sparse_step", step)
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list | tuple) or not all(isinstance(layer, int) for layer in dense):
        raise ConfigError(f"{fields.where}: mlp_only_layers={brief(dense)} is not a list of layers")
    dense = frozenset(dense)
    return MoEConfig(
        num_experts=num_experts_of(fields),
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
        attention={
            "bias": fields.boolean("qkv_bias", True),
            "layer_types": layer_types_of(fields, default),
            "sliding_window": window if windowed else None,
        },
        moe=_qwen_moe(
            fields, shared_width=fields.integer("shared_expert_intermediate_size"), shared_gate=True
        ),
    )


def _qwen3_moe(fields: Fields) -> ModelConfig:
    # every layer has the window, or none; queries and keys are always normalised, as Qwen3-Coder's files say
    fields.read |= {"max_window_layers", "use_qk_norm"}
    if not fields.boolean("use_sliding_window", False):
        fields.read |= {"sliding_window"}
        windows: dict[str, Any] = {}
    else:
        window, layers = fields.nullable("sliding_window", None), fields.integer("num_hidden_layers")
        windows = window_in_all_layers(window, layers)
    return llama_like(
        fields,
        model_type="qwen3_moe",
        context=32_768,
        attention={"qk_norm": "head", **attention_biases(fields), **windows},
        moe=_qwen_moe(fields),
    )


def _gguf_qwen3moe(view: GGUFView) -> ModelConfig:
    return gguf_qwen(
        view,
        model_type="qwen3_moe",
        attention={"qk_norm": "head"},
        moe=MoEConfig(
            num_experts=view.get("expert_count"),
            experts_per_token=view.get("expert_used_count"),
            expert_width=view.get("expert_feed_forward_length"),
            sparse_layers=(True,) * gguf_sizes(view)["num_layers"],
            norm_topk_prob=True,
        ),
    )


def _gguf_qwen3moe_modules(config: ModelConfig) -> Mapping[str, TensorMapping]:
    assert config.moe is not None
    count = config.moe.num_experts
    return {
        **GGUF_LAYER,
        **GGUF_QK_NORMS,
        "mlp.gate": TensorMapping("ffn_gate_inp"),
        **{
            f"mlp.experts.{number}.{part}": TensorMapping(f"ffn_{name}_exps", place=number, count=count)
            for part, name in zip(EXPERT_PROJECTIONS, ("gate", "up", "down"), strict=True)
            for number in range(count)
        },
    }


FAMILIES = (
    Family("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", _qwen2_moe),
    Family(
        "qwen3_moe",
        "Qwen3-30B-A3B, 235B-A22B",
        _qwen3_moe,
        gguf=(GGUFArchitecture("qwen3moe", _gguf_qwen3moe, _gguf_qwen3moe_modules),),
    ),
)
