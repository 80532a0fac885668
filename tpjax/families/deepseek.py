"""DeepSeek-V3, R1 and what has their architecture: latent attention, experts chosen from groups."""

from __future__ import annotations

import math

import numpy as np

from tpjax.config import LatentConfig, ModelConfig, MoEConfig, RopeConfig, check_size
from tpjax.errors import ConfigError
from tpjax.families.config_reader import Fields, attention_biases
from tpjax.families.family import Family
from tpjax.families.llama import llama_like
from tpjax.families.rope_variants import rope_of, rope_section
from tpjax.families.tensor_names import TensorMapping, WeightMap


def _deepseek_v3(fields: Fields) -> ModelConfig:
    heads, layers = fields.integer("num_attention_heads"), fields.integer("num_hidden_layers")
    rotating, plain = fields.integer("qk_rope_head_dim", 64), fields.integer("qk_nope_head_dim", 128)
    for name, size in (("qk_rope_head_dim", rotating), ("qk_nope_head_dim", plain)):
        check_size(name, size)
    # the first four repeat others in newer files; the published code supports one value of the rest
    supported = {
        "head_dim": rotating,
        "qk_head_dim": rotating + plain,
        "num_key_value_heads": heads,
        "rope_interleave": True,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    for name, value in supported.items():
        fields.require(name, value)
    # number of devices, training losses, layers that predict further tokens: without effect on the logits
    fields.read.update({"ep_size", "aux_loss_alpha", "seq_aux", "num_nextn_predict_layers", "num_mtp_layers"})
    latent = LatentConfig(
        q_lora_rank=fields.nullable("q_lora_rank", 1536),
        kv_lora_rank=fields.integer("kv_lora_rank", 512),
        v_head_dim=fields.integer("v_head_dim", 128),
    )
    return llama_like(
        fields,
        context=4096,
        default_head_dim=rotating + plain,
        model_type="deepseek_v3",
        attention={
            "head_dim": rotating + plain,
            "query_scale": (rotating + plain) ** -0.5 * _attention_scale(fields) ** 2,
            "latent": latent,
            **attention_biases(fields),
        },
        rope=RopeConfig(
            full=rope_of(fields, fields.integer("max_position_embeddings", 4096)), rotary_dim=rotating
        ),
        moe=_moe(fields, layers),
    )


def _moe(fields: Fields, layers: int) -> MoEConfig:
    dense, width = fields.integer("first_k_dense_replace", 3), fields.integer("moe_intermediate_size", 2048)
    return MoEConfig(
        num_experts=fields.integer("n_routed_experts", 256),
        experts_per_token=fields.integer("num_experts_per_tok", 8),
        expert_width=width,
        sparse_layers=tuple(layer >= dense for layer in range(layers)),
        scoring="sigmoid",
        norm_topk_prob=fields.boolean("norm_topk_prob", True),
        num_groups=fields.integer("n_group", 8),
        groups_per_token=fields.integer("topk_group", 4),
        routed_scale=fields.number("routed_scaling_factor", 2.5),
        correction_bias=True,
        shared_width=width * fields.integer("n_shared_experts", 1),
    )


def _attention_scale(fields: Fields) -> float:
    """Returns the factor by which YaRN multiplies all dimensions of queries and keys, rotated or not."""
    rope = rope_section(fields)
    coefficient, factor = rope.number("mscale_all_dim", 0), rope.number("factor", 1)
    scale = 0.1 * coefficient * math.log(factor) + 1.0 if coefficient and factor > 1 else 1.0
    if not 0 < scale * scale < math.inf:
        raise ConfigError(
            f"{rope.where}: mscale_all_dim={coefficient} with factor={factor} scales attention by {scale}"
        )
    return scale


def _names(config: ModelConfig) -> WeightMap:
    attention, latent = config.attention, config.attention.latent
    assert latent is not None
    plain, rank = attention.head_dim - config.rotated_dim, latent.kv_lora_rank
    queries = "q_proj" if latent.q_lora_rank is None else "q_b_proj"
    return WeightMap(
        modules={
            f"self_attn.{queries}": _pairs_last(f"self_attn.{queries}", attention.num_heads, plain, config),
            "self_attn.kv_a_proj_with_mqa": _pairs_last("self_attn.kv_a_proj_with_mqa", 1, rank, config),
            **{
                f"mlp.shared_expert.{name}_proj": TensorMapping(f"mlp.shared_experts.{name}_proj")
                for name in ("gate", "up", "down")
            },
        },
        # the layer after the last predicts a second token ahead
        ignored=(rf"model\.layers\.{config.num_layers}\..*", r".*rotary_emb\.inv_freq"),
    )


def _pairs_last(name: str, heads: int, before: int, config: ModelConfig) -> TensorMapping:
    """Returns the place of heads whose last rows are stored for rotary pairs (2i, 2i + 1)."""
    pairs = np.arange(config.rotated_dim).reshape(-1, 2)
    order = np.concatenate([np.arange(before), before + pairs.T.reshape(-1)])
    rows = (np.arange(heads)[:, None] * order.size + order).reshape(-1)
    return TensorMapping(name, rows, rows.size)


FAMILIES = (
    Family(
        "deepseek_v3",
        "DeepSeek-V3, V3.1, R1; Moonlight; Kimi K2 (`kimi_k2`)",
        _deepseek_v3,
        _names,
        other_types=("kimi_k2",),
    ),
)
