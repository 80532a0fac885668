"""Mixtral."""

from __future__ import annotations

from tpjax.config import ModelConfig, MoEConfig, RopeConfig
from tpjax.families.config_reader import Fields, window_in_all_layers
from tpjax.families.family import Family
from tpjax.families.llama import llama_like
from tpjax.families.rope_variants import rope_of
from tpjax.families.tensor_names import EXPERT_PROJECTIONS, TensorMapping, WeightMap


def _mixtral(fields: Fields) -> ModelConfig:
    context, layers = 131_072, fields.integer("num_hidden_layers")
    return llama_like(
        fields,
        model_type="mixtral",
        context=context,
        attention=window_in_all_layers(fields.nullable("sliding_window", None), layers),
        rope=RopeConfig(
            full=rope_of(fields, fields.integer("max_position_embeddings", context), 1_000_000.0)
        ),
        norm={"eps": fields.number("rms_norm_eps", 1e-5)},
        moe=MoEConfig(
            num_experts=fields.integer("num_local_experts", 8),
            experts_per_token=fields.integer("num_experts_per_tok", 2),
            expert_width=fields.integer("intermediate_size"),
            sparse_layers=(True,) * layers,
            norm_topk_prob=True,
        ),
    )


def _mixtral_names(config: ModelConfig) -> WeightMap:
    block = "block_sparse_moe"
    modules = {"mlp.gate": TensorMapping(f"{block}.gate")}
    assert config.moe is not None
    for number in range(config.moe.num_experts):
        for part, name in zip(EXPERT_PROJECTIONS, ("w1", "w3", "w2"), strict=True):
            modules[f"mlp.experts.{number}.{part}"] = TensorMapping(f"{block}.experts.{number}.{name}")
    return WeightMap(modules)


FAMILIES = (Family("mixtral", "Mixtral 8x7B, 8x22B", _mixtral, _mixtral_names),)
