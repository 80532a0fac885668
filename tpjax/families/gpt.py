"""GPT-2, GPT-NeoX and StarCoder2: layer norms with biases, MLPs without a gate."""

from __future__ import annotations

from typing import Any

from tpjax.config import ModelConfig, RopeConfig
from tpjax.errors import ConfigError
from tpjax.families.config_reader import (
    Fields,
    activation_of,
    attention_biases,
    checked_sizes,
    sizes_of,
    window_in_all_layers,
)
from tpjax.families.family import Family, model_config
from tpjax.families.llama import llama_like
from tpjax.families.rope_variants import check_fraction, partial_rope_of
from tpjax.families.tensor_names import TensorMapping, WeightMap, fused_qkv_by_head, slices

_NORM: dict[str, Any] = {"kind": "layer", "bias": True}
_BIASES = {"bias": True, "out_bias": True}


def _gpt2(fields: Fields) -> ModelConfig:
    hidden, heads = fields.integer("n_embd", 768), fields.integer("n_head", 12)
    positions = fields.integer("n_positions", 1024)
    fields.require("n_ctx", positions)
    checked_sizes({"n_embd": hidden, "n_head": heads})
    if hidden % heads:
        raise ConfigError(f"{fields.where}: n_head={heads} is not a divisor of n_embd={hidden}")
    layers, head_dim = fields.integer("n_layer", 12), hidden // heads
    sizes = {
        "vocab_size": fields.integer("vocab_size", 50_257),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("n_inner", 4 * hidden),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
    }
    query_scale = head_dim**-0.5 if fields.boolean("scale_attn_weights", True) else 1.0
    activation = activation_of(fields, "activation_function", "gelu_new")
    return model_config(
        sizes,
        model_type="gpt2",
        attention={"query_scale": query_scale, **_BIASES},
        rope=RopeConfig(),
        mlp={"gated": False, "activation": activation, "bias": True},
        norm={**_NORM, "eps": fields.number("layer_norm_epsilon", 1e-5)},
        position_embedding="learned",
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
    )


def _gpt2_names(config: ModelConfig) -> WeightMap:
    q, k, v = slices("attn.c_attn", (config.hidden_size,) * 3, transposed=True)
    return WeightMap(
        {
            "embed_tokens": TensorMapping("wte"),
            "embed_positions": TensorMapping("wpe"),
            "norm": TensorMapping("ln_f"),
            "input_layernorm": TensorMapping("ln_1"),
            "post_attention_layernorm": TensorMapping("ln_2"),
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": TensorMapping("attn.c_proj", transposed=True),
            "mlp.up_proj": TensorMapping("mlp.c_fc", transposed=True),
            "mlp.down_proj": TensorMapping("mlp.c_proj", transposed=True),
        },
        layers="h",
        prefixes=(("transformer.", ""),),
        ignored=(r".*\.attn\.(masked_)?bias",),  # the causal mask, in old files
    )


def _gpt_neox(fields: Fields) -> ModelConfig:
    sizes = sizes_of(fields)
    theta, default = fields.number("rotary_emb_base", 10_000.0), fields.number("rotary_pct", 0.25)
    check_fraction("rotary_pct", default)
    rope, fraction = partial_rope_of(fields, sizes["max_position_embeddings"], theta, default)
    return llama_like(
        fields,
        model_type="gpt_neox",
        attention=attention_biases(fields, default=True),
        rope=RopeConfig(full=rope, rotary_dim=int(sizes["head_dim"] * fraction)),
        mlp={"gated": False, "activation": activation_of(fields, "hidden_act", "gelu"), "bias": True},
        norm={**_NORM, "eps": fields.number("layer_norm_eps", 1e-5)},
        block="parallel_two_norms" if fields.boolean("use_parallel_residual", True) else "pre",
    )


def _gpt_neox_names(config: ModelConfig) -> WeightMap:
    attention = config.attention
    q, k, v = fused_qkv_by_head("attention.query_key_value", attention.num_heads, attention.head_dim)
    return WeightMap(
        {
            "embed_tokens": TensorMapping("embed_in"),
            "norm": TensorMapping("final_layer_norm"),
            "lm_head": TensorMapping("embed_out"),
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": TensorMapping("attention.dense"),
            "mlp.up_proj": TensorMapping("mlp.dense_h_to_4h"),
            "mlp.down_proj": TensorMapping("mlp.dense_4h_to_h"),
        },
        prefixes=(("gpt_neox.", ""),),
        ignored=(r".*\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
    )


def _starcoder2(fields: Fields) -> ModelConfig:
    # its files have these fields too; transformers reads none of them
    described: dict[str, tuple[Any, ...]] = {
        "activation_function": ("gelu", "gelu_pytorch_tanh"),
        "attention_softmax_in_fp32": (True,),
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
        "scale_attention_softmax_in_fp32": (True,),
        "scale_attn_weights": (True,),
    }
    for name, supported in described.items():
        fields.require(name, *supported)
    bias, window = fields.boolean("use_bias", True), fields.integer("sliding_window", None)
    windows = window_in_all_layers(window, fields.integer("num_hidden_layers"))
    activation = activation_of(fields, "hidden_act", "gelu_pytorch_tanh")
    return llama_like(
        fields,
        context=4096,
        model_type="starcoder2",
        attention={**windows, "bias": bias, "out_bias": bias},
        mlp={"gated": False, "activation": activation, "bias": bias},
        norm={**_NORM, "eps": fields.number("norm_epsilon", 1e-5)},
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
    )


def _starcoder2_names(config: ModelConfig) -> WeightMap:
    return WeightMap({"mlp.up_proj": TensorMapping("mlp.c_fc"), "mlp.down_proj": TensorMapping("mlp.c_proj")})


FAMILIES = (
    Family("starcoder2", "StarCoder2 3B, 7B, 15B", _starcoder2, _starcoder2_names),
    Family("gpt2", "GPT-2, DistilGPT2", _gpt2, _gpt2_names),
    Family("gpt_neox", "Pythia, GPT-NeoX-20B, Dolly 2", _gpt_neox, _gpt_neox_names),
)
