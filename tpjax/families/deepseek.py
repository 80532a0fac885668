"""DeepSeek-V3, R1 and what has their architecture: latent attention, experts chosen from groups."""

from __future__ import annotations

import math

import numpy as np

from tpjax.config import LatentConfig, ModelConfig, MoEConfig, check_size
from tpjax.families.config_reader import Fields
from tpjax.families.family import Family
from tpjax.families.llama import llama_like
from tpjax.families.rope_variants import rope_section
from tpjax.families.tensor_names import TensorMapping, WeightMap


def _deepseek_v3(fields: Fields) -> ModelConfig:
    heads, layers = fields.integer("num_attention_heads"), fields.integer("num_hidden_layers")
    turning, fixed = fields.integer("qk_rope_head_dim", 64), fields.integer("qk_nope_head_dim", 128)
    for name, size in (("qk_rope_head_dim", turning), ("qk_nope_head_dim", fixed)):
        check_size(name, size)
    # said once more in newer files; the code published with the weights has no choice in the others
    supported = {
        "head_dim": turning,
        "qk_head_dim": turning + fixed,
        "num_key_value_heads": heads,
        "rope_interleave": True,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    for name, value in supported.items():
        fields.require(name, value)
    # devices, losses of the training, layers that predict further tokens: nothing of the next token's logits
    fields.read.update({"ep_size", "aux_loss_alpha", "seq_aux", "num_nextn_predict_layers", "num_mtp_layers"})
    bias = fields.boolean("attention_bias", False)
    return llama_like(
        fields,
        context=4096,
        default_head_dim=turning + fixed,
        model_type="deepseek_v3",
        head_dim=turning + fixed,
        rotary_dim=turning,
        query_scale=(turning + fixed) ** -0.5 * _attention_scale(fields) ** 2,
        attention_bias=bias,
        attention_out_bias=bias,
        latent=LatentConfig(
            q_lora_rank=fields.nullable("q_lora_rank", 1536),
            kv_lora_rank=fields.integer("kv_lora_rank", 512),
            v_head_dim=fields.integer("v_head_dim", 128),
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
    """What YaRN multiplies whole queries and keys by, not only the parts that rotate."""
    rope = rope_section(fields)
    coefficient, factor = rope.number("mscale_all_dim", 0), rope.number("factor", 1)
    return 0.1 * coefficient * math.log(factor) + 1.0 if coefficient and factor > 1 else 1.0


def _names(config: ModelConfig) -> WeightMap:
    assert config.latent is not None
    fixed, rank = config.head_dim - config.rotated_dim, config.latent.kv_lora_rank
    queries = "q_proj" if config.latent.q_lora_rank is None else "q_b_proj"
    return WeightMap(
        modules={
            f"self_attn.{queries}": _pairs_last(f"self_attn.{queries}", config.num_heads, fixed, config),
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
    """Heads whose last rows rotate in pairs (2i, 2i + 1), read in the order (i, i + half)."""
    pairs = np.arange(config.rotated_dim).reshape(-1, 2)
    order = np.concatenate([np.arange(before), before + pairs.T.reshape(-1)])
    rows = (np.arange(heads)[:, None] * order.size + order).reshape(-1)
    return TensorMapping(name, rows, rows.size)


FAMILIES = (Family("deepseek_v3", "DeepSeek-V3, V3.1, R1; Kimi K2", _deepseek_v3, _names),)
