"""Phi-3, and Phi-4, which has its architecture."""

from __future__ import annotations

from collections.abc import Mapping

from tpjax.config import ModelConfig, RopeConfig, RopeParameters, check_size
from tpjax.families.config_reader import Fields, sizes_of, window_in_all_layers
from tpjax.families.family import Family, GGUFArchitecture
from tpjax.families.gguf_metadata import GGUFView, gguf_sizes
from tpjax.families.llama import GGUF_LAYER, gguf_llama_like, llama_like
from tpjax.families.rope_variants import gguf_rope, longrope_attention_factor, partial_rope_of
from tpjax.families.tensor_names import TensorMapping, WeightMap, slices


def _phi3(fields: Fields) -> ModelConfig:
    for name in ("full_attn_mod", "interpolate_factor"):
        fields.require(name, 1)  # in Phi-4's files; transformers does not read them
    sizes = sizes_of(fields, context=4096)
    rope, fraction = partial_rope_of(fields, sizes["max_position_embeddings"])
    return llama_like(
        fields,
        context=4096,
        model_type="phi3",
        rope=RopeConfig(full=rope, rotary_dim=int(sizes["head_dim"] * fraction)),
        norm={"eps": fields.number("rms_norm_eps", 1e-5)},
        attention=window_in_all_layers(fields.integer("sliding_window", None) or None, sizes["num_layers"]),
    )


def _fused(config: ModelConfig, qkv: str, gate_up: str) -> dict[str, TensorMapping]:
    attention = config.attention
    kv = attention.num_kv_heads * attention.head_dim
    q, k, v = slices(qkv, (attention.num_heads * attention.head_dim, kv, kv))
    gate, up = slices(gate_up, (config.mlp.intermediate_size,) * 2)
    return {
        "self_attn.q_proj": q,
        "self_attn.k_proj": k,
        "self_attn.v_proj": v,
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
    }


def _names(config: ModelConfig) -> WeightMap:
    return WeightMap(_fused(config, "self_attn.qkv_proj", "mlp.gate_up_proj"))


def _gguf_phi3(view: GGUFView) -> ModelConfig:
    sizes = gguf_sizes(view)
    rope = gguf_rope(view, 10_000.0)
    if view.rope_long_divisors is not None:
        original = view.get("rope.scaling.original_context_length")
        check_size("rope.scaling.original_context_length", original)
        stretch = sizes["max_position_embeddings"] / original
        rope = RopeParameters(
            theta=rope.theta,
            kind="longrope",
            original_max_position_embeddings=original,
            divisors=view.rope_divisors,
            long_divisors=view.rope_long_divisors,
            attention_factor=longrope_attention_factor(
                view.number("rope.scaling.attn_factor", None), stretch, original
            ),
        )
    return gguf_llama_like(
        view,
        model_type="phi3",
        attention=window_in_all_layers(view.get("attention.sliding_window", 0) or None, sizes["num_layers"]),
        rope=RopeConfig(full=rope, rotary_dim=view.get("rope.dimension_count", sizes["head_dim"])),
    )


def _gguf_modules(config: ModelConfig) -> Mapping[str, TensorMapping]:
    return {**GGUF_LAYER, **_fused(config, "attn_qkv", "ffn_up")}


FAMILIES = (
    Family(
        "phi3",
        "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        _phi3,
        _names,
        gguf=(GGUFArchitecture("phi3", _gguf_phi3, _gguf_modules),),
    ),
)
