"""gpt-oss."""

from __future__ import annotations

from typing import Any

import numpy as np

from tpjax.config import LayerType, ModelConfig, MoEConfig, RopeConfig
from tpjax.families.config_reader import Fields, attention_biases, layer_types_of, num_experts_of
from tpjax.families.family import Family
from tpjax.families.llama import llama_like
from tpjax.families.rope_variants import rope_of
from tpjax.families.tensor_names import TensorMapping, WeightMap

_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _gpt_oss(fields: Fields) -> ModelConfig:
    fields.require("hidden_act", "silu")
    fields.read |= {"initial_context_length"}  # repeats the original context of the RoPE scaling
    layers, per_token = fields.integer("num_hidden_layers"), fields.integer("num_experts_per_tok", 4)
    context = fields.integer("max_position_embeddings", 131_072)
    rope = rope_of(fields, context, 150_000.0, default=_GPT_OSS_ROPE)
    fields.require("experts_per_token", per_token)
    default: tuple[LayerType, ...] = tuple(
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)
    )
    return llama_like(
        fields,
        model_type="gpt_oss",
        context=context,
        default_head_dim=64,
        attention={
            "sinks": True,
            "layer_types": layer_types_of(fields, default),
            "sliding_window": fields.integer("sliding_window", 128),
            **attention_biases(fields, default=True),
        },
        rope=RopeConfig(full=rope),
        norm={"eps": fields.number("rms_norm_eps", 1e-5)},
        moe=MoEConfig(
            num_experts=num_experts_of(fields),
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
    """Returns the weight map: experts are stacked as [in, out], with rows of gate and up alternating."""
    assert config.moe is not None
    count, width = config.moe.num_experts, config.moe.expert_width
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


FAMILIES = (Family("gpt_oss", "gpt-oss-20b, 120b", _gpt_oss, _gpt_oss_names),)
