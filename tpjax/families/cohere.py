"""Command R, Command R+ and Command R7B; Aya."""

from __future__ import annotations

from typing import Any

from tpjax.config import ModelConfig, RopeConfig
from tpjax.families.config_reader import Fields, attention_biases, full_attention_every, layer_types_of
from tpjax.families.family import Family
from tpjax.families.llama import llama_like
from tpjax.families.rope_variants import rope_of
from tpjax.families.tensor_names import WeightMap, interleaved


def _parallel(fields: Fields, *, attention: dict[str, Any], **model: Any) -> ModelConfig:
    """Reads what both generations share: parallel blocks, layer norms, a scale on the logits."""
    return llama_like(
        fields,
        context=8192,
        attention={**attention, **attention_biases(fields)},
        norm={"kind": "layer", "eps": fields.number("layer_norm_eps", 1e-5)},
        block="parallel",
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        logit_scale=fields.number("logit_scale", 0.0625),
        **model,
    )


def _cohere(fields: Fields) -> ModelConfig:
    context = fields.integer("max_position_embeddings", 8192)
    return _parallel(
        fields,
        model_type="cohere",
        attention={"qk_norm": "each_head" if fields.boolean("use_qk_norm", False) else "none"},
        rope=RopeConfig(full=rope_of(fields, context, 500_000.0)),
    )


def _cohere2(fields: Fields) -> ModelConfig:
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 4))
    # Command R7B's file has these fields too; transformers reads none of them
    described: dict[str, tuple[Any, ...]] = {
        "layer_switch": (pattern,),
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1.0,),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
    }
    for name, supported in described.items():
        fields.require(name, *supported)
    types = layer_types_of(fields, full_attention_every(pattern, fields.integer("num_hidden_layers")))
    context = fields.integer("max_position_embeddings", 8192)
    return _parallel(
        fields,
        model_type="cohere2",
        attention={"layer_types": types, "sliding_window": fields.integer("sliding_window", 4096)},
        rope=RopeConfig(
            full=rope_of(fields, context), layers=tuple(kind == "sliding_attention" for kind in types)
        ),
    )


def _names(config: ModelConfig) -> WeightMap:
    attention = config.attention
    heads = {"q": attention.num_heads, "k": attention.num_kv_heads}
    return WeightMap(
        {
            f"self_attn.{name}_{part}": interleaved(
                f"self_attn.{name}_{part}", count, attention.head_dim, by_head=part == "norm"
            )
            for name, count in heads.items()
            for part in ("proj", "norm")
        }
    )


FAMILIES = (
    Family("cohere", "Command R, Command R+, Aya 23, Aya Expanse", _cohere, _names),
    Family("cohere2", "Command R7B, Command A", _cohere2, _names),
)
