"""Gemma 1 to 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tpjax.config import Activation, ModelConfig, RopeConfig, RopeParameters, check_positive
from tpjax.errors import ConfigError
from tpjax.families.config_reader import (
    Fields,
    activation_of,
    attention_biases,
    full_attention_every,
    layer_types_of,
    sizes_of,
)
from tpjax.families.family import Family, GGUFArchitecture, model_config
from tpjax.families.gguf_metadata import GGUFView, gguf_sizes
from tpjax.families.llama import GGUF_LAYER
from tpjax.families.quantization import SECTION
from tpjax.families.rope_variants import gguf_rope, rope_from, rope_of
from tpjax.families.tensor_names import TensorMapping, WeightMap


def _gemma(
    sizes: dict[str, Any],
    *,
    eps: float,
    tied: bool,
    query_scalar: float,
    attention: dict[str, Any],
    rope: RopeConfig,
    activation: Activation = "gelu_tanh",
    **model: Any,
) -> ModelConfig:
    """Builds what all Gemma models share; the rest is as in ``model_config``."""
    return model_config(
        sizes,
        attention={"query_scale": query_scalar**-0.5, **attention},
        rope=rope,
        mlp={"activation": activation},
        norm={"eps": eps, "offset": 1.0},
        tie_word_embeddings=tied,
        embedding_scale=sizes["hidden_size"] ** 0.5,
        **model,
    )


def _shared(fields: Fields, sizes: dict[str, Any], activation: str) -> dict[str, Any]:
    scalar = sizes["head_dim"]
    if activation == "hidden_activation":
        scalar = fields.number("query_pre_attn_scalar", 256)
        check_positive("query_pre_attn_scalar", scalar)
    return {
        "eps": fields.number("rms_norm_eps", 1e-6),
        "tied": fields.boolean("tie_word_embeddings", True),
        "query_scalar": scalar,
        "activation": activation_of(fields, activation, "gelu_pytorch_tanh"),
    }


def _gemma1(fields: Fields) -> ModelConfig:
    sizes = sizes_of(fields, context=8192, head_dim=256)
    shared = _shared(fields, sizes, "hidden_act")
    fields.require("hidden_activation", "gelu_pytorch_tanh")  # transformers reads hidden_act alone
    if shared["activation"] == "gelu":
        shared["activation"] = "gelu_tanh"  # what the first files call gelu is the approximation
    return _gemma(
        sizes,
        model_type="gemma",
        attention=attention_biases(fields),
        rope=RopeConfig(full=rope_of(fields, sizes["max_position_embeddings"])),
        **shared,
    )


def _gemma2(fields: Fields) -> ModelConfig:
    sizes = sizes_of(fields, context=8192, head_dim=256)
    fields.require("hidden_act", "gelu_pytorch_tanh", "gelu")  # transformers reads hidden_activation alone
    return _gemma(
        sizes,
        model_type="gemma2",
        attention={
            "softcap": fields.nullable("attn_logit_softcapping", 50.0),
            "layer_types": layer_types_of(fields, full_attention_every(2, sizes["num_layers"])),
            "sliding_window": fields.integer("sliding_window", 4096),
            **attention_biases(fields),
        },
        rope=RopeConfig(full=rope_of(fields, sizes["max_position_embeddings"])),
        block="sandwich",
        logit_softcap=fields.nullable("final_logit_softcapping", 30.0),
        **_shared(fields, sizes, "hidden_activation"),
    )


def _gemma3_text(fields: Fields) -> ModelConfig:
    sizes = sizes_of(fields, context=131_072, head_dim=256)
    context = sizes["max_position_embeddings"]
    per_type = fields.section("rope_parameters")
    if per_type.raw.get("rope_type"):
        raise ConfigError("config.json: rope_parameters of gemma3_text is given per layer type")
    full, sliding = per_type.section("full_attention"), per_type.section("sliding_attention")
    full = _with_scaling(full, fields.section("rope_scaling"))
    theta = full.number("rope_theta", fields.number("rope_theta", 1_000_000.0))
    local_theta = sliding.number("rope_theta", fields.number("rope_local_base_freq", 10_000.0))
    per_type.finish()
    for parameters in (full, sliding):
        parameters.require("partial_rotary_factor", 1.0)
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    return _gemma(
        sizes,
        model_type="gemma3_text",
        attention={
            "softcap": fields.get("attn_logit_softcapping", None),
            "qk_norm": "head",
            "layer_types": layer_types_of(fields, full_attention_every(pattern, sizes["num_layers"])),
            "sliding_window": fields.integer("sliding_window", 4096),
            **attention_biases(fields),
        },
        rope=RopeConfig(
            full=rope_from(full, theta, context), sliding=rope_from(sliding, local_theta, context)
        ),
        block="sandwich",
        logit_softcap=fields.get("final_logit_softcapping", None),
        **_shared(fields, sizes, "hidden_activation"),
    )


def _with_scaling(full: Fields, scaling: Fields) -> Fields:
    """Returns the parameters of full-attention layers, updated with an older file's ``rope_scaling``."""
    if not scaling.raw:
        return full
    if "type" in scaling.raw and "rope_type" not in scaling.raw:
        scaling.require("type", "default")  # transformers 4 applies the others, 5 ignores them
    return Fields({**full.raw, **scaling.raw}, scaling.where)


def _gemma3(fields: Fields) -> ModelConfig:
    """Reads the text half; the fields and weights for images are ignored."""
    fields.read.update({"vision_config", "mm_tokens_per_image"})
    fields.read.update(
        {f"{name}_token_{kind}" for name in ("boi", "eoi", "image") for kind in ("id", "index")}
    )
    text = fields.section("text_config")
    if not text.raw:
        raise ConfigError(f"{fields.where}: field 'text_config' is missing")
    text.require("model_type", "gemma3_text")
    # the first files leave out of the text part what is at its default, sizes included
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}
    tied = fields.boolean("tie_word_embeddings", True)  # the outer field counts: the text part has no head
    filled = Fields({**sizes, **text.raw, "tie_word_embeddings": tied}, text.where)
    config = replace(_gemma3_text(filled), model_type="gemma3")
    filled.read.add(SECTION)  # `quantization_of` reads it
    filled.finish()
    return config


def _gemma3_names(config: ModelConfig) -> WeightMap:
    return WeightMap(
        prefixes=(("model.language_model.", ""), ("language_model.model.", "language_model.")),
        ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
    )


_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def _gguf_modules(config: ModelConfig) -> Mapping[str, TensorMapping]:
    norms = {"norm": "output_norm", "input_layernorm": "attn_norm", **_NORMS}
    # converters add 1 to what Gemma's norms multiply by
    return {**GGUF_LAYER, **{name: TensorMapping(gguf, offset=1.0) for name, gguf in norms.items()}}


def _gguf_query_scalar(sizes: dict[str, Any], largest: int) -> float:
    """Returns the query scalar: llama.cpp recognises 27B, which does not scale by head_dim, by its depth."""
    deepest: bool = sizes["num_layers"] == largest
    scalar: float = sizes["hidden_size"] / sizes["num_heads"] if deepest else sizes["head_dim"]
    return scalar


def _gguf_gemma2(view: GGUFView) -> ModelConfig:
    sizes = gguf_sizes(view)
    return _gemma(
        sizes,
        model_type="gemma2",
        eps=view.get("attention.layer_norm_rms_epsilon"),
        tied=view.tied,
        query_scalar=_gguf_query_scalar(sizes, 46),
        attention={
            "softcap": view.get("attn_logit_softcapping", 50.0),
            "layer_types": full_attention_every(2, sizes["num_layers"]),
            "sliding_window": view.get("attention.sliding_window", 4096),
        },
        rope=RopeConfig(full=gguf_rope(view, 10_000.0)),
        block="sandwich",
        logit_softcap=view.get("final_logit_softcapping", 30.0),
    )


def _gguf_gemma3(view: GGUFView) -> ModelConfig:
    sizes = gguf_sizes(view)
    return _gemma(
        sizes,
        model_type="gemma3_text",
        eps=view.get("attention.layer_norm_rms_epsilon"),
        tied=view.tied,
        query_scalar=_gguf_query_scalar(sizes, 62),
        attention={
            "qk_norm": "head",
            "layer_types": full_attention_every(6, sizes["num_layers"]),
            "sliding_window": view.get("attention.sliding_window"),
        },
        rope=RopeConfig(full=gguf_rope(view, 1_000_000.0), sliding=RopeParameters(theta=10_000.0)),
        block="sandwich",
    )


FAMILIES = (
    Family("gemma", "Gemma 2B, 7B; CodeGemma", _gemma1),
    Family(
        "gemma2",
        "Gemma 2 2B, 9B, 27B",
        _gemma2,
        gguf=(GGUFArchitecture("gemma2", _gguf_gemma2, _gguf_modules),),
    ),
    Family(
        "gemma3_text",
        "Gemma 3 270M, 1B",
        _gemma3_text,
        gguf=(GGUFArchitecture("gemma3", _gguf_gemma3, _gguf_modules),),
    ),
    Family("gemma3", "Gemma 3 4B, 12B, 27B: their text half", _gemma3, _gemma3_names),
)
