"""`config.json` and GGUF metadata to `ModelConfig`: two generations of transformers give the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from conftest import GOLDENS

from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig, RopeParameters
from tpjax.errors import ConfigError
from tpjax.families.config_reader import Fields
from tpjax.families.quantization import Quantization, quantization_of
from tpjax.families.registry import (
    FAMILIES,
    GGUFView,
    config_from_gguf,
    config_from_hf,
    gguf_architecture,
)
from tpjax.families.tensor_names import WeightMap
from tpjax.families.unread import IGNORED_FIELDS

SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

# meta-llama/Llama-3.1-8B, as published (transformers 4.43)
LLAMA_4: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_5: dict[str, Any] = {
    **{k: v for k, v in LLAMA_4.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")},
    "dtype": "bfloat16",
    "head_dim": 128,
    "rope_parameters": {**SCALING, "rope_theta": 500000.0},
    "transformers_version": "5.0.0",
}
LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    max_position_embeddings=131072,
    attention=AttentionConfig(
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        query_scale=128**-0.5,
        layer_types=("full_attention",) * 32,
    ),
    rope=RopeConfig(full=RopeParameters(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)),
    mlp=MLPConfig(intermediate_size=14336),
    norm=NormConfig(eps=1e-5),
)

MISTRAL_4: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
MISTRAL_5: dict[str, Any] = {
    **{k: v for k, v in MISTRAL_4.items() if k not in ("rope_theta", "torch_dtype")},
    "dtype": "bfloat16",
    "head_dim": None,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}

# google/gemma-3-4b's text part: 34 layers, linear scaling on the global ones
GEMMA_4: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "max_position_embeddings": 131072,
    "model_type": "gemma3_text",
    "num_attention_heads": 8,
    "num_hidden_layers": 34,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000.0,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262208,
}
GEMMA_TYPES = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(34)]
GEMMA_5: dict[str, Any] = {
    **{
        k: v
        for k, v in GEMMA_4.items()
        if k
        not in ("rope_scaling", "rope_theta", "rope_local_base_freq", "sliding_window_pattern", "torch_dtype")
    },
    "_sliding_window_pattern": 6,
    "dtype": "bfloat16",
    "layer_types": GEMMA_TYPES,
    "rope_parameters": {
        "full_attention": {"factor": 8.0, "rope_theta": 1000000.0, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}


def test_llama() -> None:
    assert config_from_hf(LLAMA_4) == config_from_hf(LLAMA_5) == LLAMA


def test_llama_defaults() -> None:
    """What older files leave out: KV heads, context, epsilon, RoPE, tying."""
    needed = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    )
    config = config_from_hf({name: LLAMA_4[name] for name in needed})
    assert (config.attention.num_kv_heads, config.attention.head_dim, config.max_position_embeddings) == (
        32,
        128,
        2048,
    )
    assert (config.norm.eps, config.rope.full) == (1e-6, RopeParameters(theta=10_000.0))
    assert (config.tie_word_embeddings, config.attention.bias, config.mlp.bias) == (False, False, False)


def test_llama_biases_and_tying() -> None:
    config = config_from_hf(
        {**LLAMA_4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    )
    assert (config.attention.bias, config.attention.out_bias, config.mlp.bias) == (True, True, True)
    assert config.tie_word_embeddings is True


def test_old_spelling_of_linear_scaling() -> None:
    config = config_from_hf({**LLAMA_4, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert config.rope.full == RopeParameters(theta=500000.0, kind="linear", factor=4.0)


def test_theta_beside_rope_parameters() -> None:
    """Files that went through both versions hold both; the new field wins."""
    both = {**LLAMA_5, "rope_theta": 10_000.0}
    assert config_from_hf(both) == LLAMA
    without = {**LLAMA_5, "rope_parameters": SCALING, "rope_theta": 500000.0}
    assert config_from_hf(without) == LLAMA


@pytest.mark.parametrize("raw", (MISTRAL_4, MISTRAL_5))
def test_mistral_window(raw: Mapping[str, Any]) -> None:
    number = config_from_hf(raw)
    assert (number.attention.sliding_window, set(number.attention.layer_types)) == (
        4096,
        {"sliding_attention"},
    )
    null = config_from_hf({**raw, "sliding_window": None})
    assert (null.attention.sliding_window, set(null.attention.layer_types)) == (None, {"full_attention"})
    absent = config_from_hf({k: v for k, v in raw.items() if k != "sliding_window"})
    assert absent == number  # transformers' default is 4096
    assert config_from_hf({**raw, "sliding_window": 8}).attention.window_of("sliding_attention") == 8


def test_mistral() -> None:
    assert config_from_hf(MISTRAL_4) == config_from_hf(MISTRAL_5)
    nemo = config_from_hf({**MISTRAL_5, "hidden_size": 5120, "head_dim": 128})
    assert (nemo.attention.head_dim, nemo.attention.query_scale) == (128, 128**-0.5)  # not 5120 / 32


def test_gemma3() -> None:
    old, new = config_from_hf(GEMMA_4), config_from_hf(GEMMA_5)
    assert old == new
    assert new.attention.layer_types == tuple(GEMMA_TYPES)
    assert new.rope.full == RopeParameters(theta=1e6, kind="linear", factor=8.0)
    assert new.rope.sliding == RopeParameters(theta=1e4)  # scaling is for the global layers alone
    assert (new.attention.sliding_window, new.attention.head_dim, new.attention.query_scale) == (
        1024,
        256,
        1 / 16,
    )
    assert new.embedding_scale == 2560**0.5
    assert (new.attention.qk_norm, new.block, new.norm.offset) == ("head", "sandwich", 1.0)
    assert (new.mlp.activation, new.tie_word_embeddings) == ("gelu_tanh", True)


@pytest.mark.parametrize("name", ("sliding_window_pattern", "_sliding_window_pattern"))
def test_gemma3_pattern(name: str) -> None:
    raw = {k: v for k, v in GEMMA_4.items() if k != "sliding_window_pattern"}
    kinds = config_from_hf({**raw, name: 3}).attention.layer_types
    assert [layer for layer, kind in enumerate(kinds) if kind == "full_attention"] == list(range(2, 34, 3))
    assert config_from_hf(raw).attention.layer_types == tuple(GEMMA_TYPES)  # six by default


def test_gemma3_layer_types_win() -> None:
    types = ["full_attention"] * 33 + ["sliding_attention"]
    assert config_from_hf({**GEMMA_4, "layer_types": types}).attention.layer_types == tuple(types)


def test_gemma3_query_scalar() -> None:
    assert config_from_hf({**GEMMA_4, "query_pre_attn_scalar": 168}).attention.query_scale == pytest.approx(
        168**-0.5
    )


def error_message(raw: Any) -> str:
    with pytest.raises(ConfigError) as error:
        config_from_hf(raw)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("model_type", ("bert", "", None, "LLAMA", 5))
def test_unsupported_model_type_lists_the_supported(model_type: Any) -> None:
    message = error_message({**LLAMA_4, "model_type": model_type})
    assert message == (f"model_type={model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    assert {"llama", "mistral", "gemma3_text"} <= set(FAMILIES)


def test_missing_model_type() -> None:
    assert error_message({}).startswith("model_type=None is not supported")


@pytest.mark.parametrize("raw", ([], None, "llama", 5))
def test_not_an_object(raw: Any) -> None:
    assert error_message(raw) == f"a configuration is an object, not a {type(raw).__name__}"


UNSUPPORTED: dict[str, Any] = {
    "use_bidirectional_attention": True,
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "partial_rotary_factor": 0.5,
    "attention_multiplier": 1.5,
    "scale_attn_by_inverse_layer_idx": True,
}


@pytest.mark.parametrize("raw", (LLAMA_4, MISTRAL_4, GEMMA_4), ids=("llama", "mistral", "gemma3"))
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_fields_that_would_change_the_model(name: str, raw: Mapping[str, Any]) -> None:
    value = UNSUPPORTED[name]
    assert error_message({**raw, name: value}) == f"config.json: {name}={value!r} is not supported"
    expected = config_from_hf({k: v for k, v in raw.items() if k != name})
    assert config_from_hf({**raw, name: None}) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        (
            {"quant_method": "hqq"},
            "quant_method='hqq' is not supported; supported are fp8, mxfp4, compressed-tensors, gptq, awq",
        ),
        ({"bits": 4}, "field 'quant_method' is missing"),
        ({"quant_method": "fp8", "activation_scheme": "token"}, "activation_scheme='token' is not supp"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' is not supported: use e4m3"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype='fp4' is not supported: use fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size=[128] is not supported"),
        ({"quant_method": "fp8", "kv_cache_dtype": "int4"}, "kv_cache_dtype='int4' is not"),
        ({"quant_method": "awq", "checkpoint_format": "gemv"}, "checkpoint_format='gemv' is not supported"),
        ({"quant_method": "awq", "w_bit": 3}, "w_bit=3 is not supported: use 4"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "is_marlin_format=True is not supported"),
        ({"quant_method": "gptq", "bits": True}, "bits=True is not supported: use 4 or 8"),
        ({"quant_method": "mxfp4", "group_size": 16}, "group_size=16 is not supported"),
    ),
)  # fmt: skip
def test_quantization_that_cannot_be_read(settings: dict[str, Any], message: str) -> None:
    error = error_message({**LLAMA_4, "quantization_config": settings})
    assert error.startswith(f"config.json: quantization_config: {message}")


@pytest.mark.parametrize("settings", (None, {}, {"quant_method": "mxfp4"}, {"quant_method": "fp8"}))
def test_quantization_changes_no_architecture(settings: dict[str, Any] | None) -> None:
    assert config_from_hf({**LLAMA_4, "quantization_config": settings}) == LLAMA


def test_quantization_of() -> None:
    def read(**settings: Any) -> Quantization | None:
        return quantization_of(Fields({"quantization_config": settings}))

    # openai/gpt-oss-20b, as published
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    assert read(quant_method="mxfp4", modules_to_not_convert=skipped) == Quantization("mxfp4", (1, 32), 4)
    assert read() is None
    # deepseek-ai/DeepSeek-V3.1, as published
    published = {"activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0"}
    assert read(quant_method="fp8", weight_block_size=[64, 32], **published) == Quantization("fp8", (64, 32))
    # neuralmagic/Meta-Llama-3-8B-Instruct-FP8-KV, as published: the cache is what the user says
    published = {"activation_scheme": "static", "ignored_layers": ["lm_head"], "kv_cache_scheme": "static"}
    assert read(quant_method="fp8", weight_block_size=None, **published) == Quantization("fp8", None)
    # by llm-awq's names
    assert read(quant_method="awq", w_bit=4, q_group_size=64, zero_point=True) == Quantization(
        "awq", (1, 64), 4
    )
    with pytest.raises(ConfigError, match="weight_block_size=0 is not a whole number"):
        read(quant_method="fp8", weight_block_size=[128, 0])


NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("raw", (LLAMA_4, MISTRAL_4, GEMMA_4), ids=("llama", "mistral", "gemma3"))
def test_missing_field(raw: Mapping[str, Any], name: str) -> None:
    message = error_message({k: v for k, v in raw.items() if k != name})
    assert message == f"config.json: field {name!r} is missing"


WRONG_TYPES: dict[str, tuple[Any, ...]] = {
    **{name: ("32", 32.0, True, None, [32]) for name in NEEDED},
    "num_key_value_heads": ("8", 8.0, False, [8]),
    "head_dim": ("128", 128.0, [128]),
    "max_position_embeddings": ("2048", 2048.5, {}),
    "rms_norm_eps": ("1e-5", True, []),
    "rope_theta": ("5e5", True, []),
    "tie_word_embeddings": (0, 1, "false"),
    "attention_bias": (0, "no"),
    "mlp_bias": (1, "yes"),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG_TYPES.items() for v in values])
def test_field_of_the_wrong_type(name: str, value: Any) -> None:
    assert error_message({**LLAMA_4, name: value}).startswith(f"config.json: {name}={value!r} is not ")


def label(value: Any) -> str:
    """A test's name: the family, the field, and what the message must have."""
    if isinstance(value, dict):
        return str(value.get("model_type") if len(value) > 1 else next(iter(value)))
    return str(value[0])


@pytest.mark.parametrize(
    ("raw", "change", "named"),
    (
        (LLAMA_4, {"hidden_size": 4100}, ("num_attention_heads=32", "hidden_size=4100")),
        (LLAMA_4, {"num_attention_heads": 0}, ("num_attention_heads=0",)),
        (LLAMA_4, {"num_key_value_heads": 5}, ("num_kv_heads=5", "num_heads=32")),
        (LLAMA_4, {"num_key_value_heads": 0}, ("num_kv_heads=0",)),
        (LLAMA_4, {"hidden_act": "selu"}, ("hidden_act='selu'", "silu")),
        (LLAMA_4, {"hidden_act": ["silu"]}, ("hidden_act",)),
        (LLAMA_4, {"head_dim": 0}, ("head_dim=0",)),
        (LLAMA_4, {"head_dim": -2}, ("head_dim=-2",)),
        (LLAMA_4, {"num_hidden_layers": -1}, ("num_layers=-1",)),
        (LLAMA_4, {"model_type": ["llama"]}, ("model_type",)),
        (LLAMA_4, {"rope_scaling": {"rope_type": "spiral", "factor": 4.0}}, ("rope_type='spiral'",)),
        (LLAMA_4, {"rope_scaling": {"rope_type": "yarn"}}, ("'yarn'", "factor")),
        (LLAMA_4, {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, ("alpha=3",)),
        (LLAMA_4, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("'llama3'", "low_freq_factor")),
        (LLAMA_4, {"rope_scaling": {"type": "linear"}}, ("'linear'", "factor")),
        (LLAMA_4, {"rope_scaling": {"type": "linear", "factor": "4"}}, ("factor",)),
        (LLAMA_4, {"rope_scaling": {"type": "linear", "factor": 0}}, ("factor=0",)),
        (LLAMA_4, {"rope_scaling": {"rope_type": ["linear"]}}, ("rope_type",)),
        (LLAMA_4, {"rope_scaling": "llama3"}, ("rope_scaling",)),
        (LLAMA_4, {"rope_scaling": {**SCALING, "original_max_position_embeddings": 0}}, ("original_max",)),
        (LLAMA_5, {"rope_parameters": {"rope_theta": "abc"}}, ("rope_theta", "abc")),
        (LLAMA_5, {"rope_parameters": [1]}, ("rope_parameters",)),
        (LLAMA_5, {"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor=0.5",)),
        (MISTRAL_4, {"sliding_window": 0}, ("sliding_window=0",)),
        (MISTRAL_4, {"sliding_window": "4096"}, ("sliding_window='4096'",)),
        (GEMMA_4, {"sliding_window_pattern": 0}, ("sliding_window_pattern",)),
        (GEMMA_4, {"query_pre_attn_scalar": 0}, ("query_pre_attn_scalar",)),
        (GEMMA_4, {"query_pre_attn_scalar": -1}, ("query_pre_attn_scalar",)),
        (GEMMA_4, {"layer_types": ["full_attention"]}, ("layer_types has 1 ", "num_layers=34")),
        (GEMMA_4, {"layer_types": 5}, ("layer_types",)),
        (GEMMA_4, {"layer_types": ["chunked_attention"] * 34}, ("'chunked_attention'",)),
        (GEMMA_4, {"hidden_activation": "silly"}, ("hidden_activation='silly'",)),
        (GEMMA_5, {"rope_parameters": {"rope_type": "default"}}, ("rope_parameters", "per layer type")),
        (GEMMA_5, {"rope_parameters": {"full_attention": {"rope_type": "spiral"}}}, ("'spiral'",)),
        (GEMMA_5, {"rope_parameters": {"full_attention": 5}}, ("rope_parameters",)),
    ),
    ids=label,
)  # fmt: skip
def test_bad_value(raw: Mapping[str, Any], change: dict[str, Any], named: tuple[str, ...]) -> None:
    message = error_message({**raw, **change})
    for part in named:
        assert part in message


# --- no field is ignored ----------------------------------------------------------------------------------


def perturbed(value: Any) -> list[Any]:
    """Other values of a field, of the same type."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value * 2]
        case float():
            return [value * 2 + 0.25]
        case str():
            return [f"not {value}"]
        case dict():
            return [{**value, name: other} for name, inner in value.items() for other in perturbed(inner)]
        case list():
            return [value[:-1], [*value[:-1], *perturbed(value[-1])[:1]]] if value else [[0]]
        case _:  # absent: numbers and switches that some file may hold there
            return [3, True]


CONFIGS = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
# nothing of images is computed, and these say which image tokens there are, or repeat what is read elsewhere
OF_IMAGES = {
    "vision_config",
    "mm_tokens_per_image",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_counts(name: str) -> None:
    """Whatever is changed in a family's ``config.json`` changes the model, or is rejected, or is ignored."""
    raw = json.loads((GOLDENS / name / "config.json").read_text())
    expected = config_from_hf(raw)
    silent = []
    for field, value in raw.items():
        if field in IGNORED_FIELDS | OF_IMAGES:
            continue
        for other in perturbed(value):
            try:
                config = config_from_hf({**raw, field: other})
            except ConfigError:
                continue
            if config == expected:
                silent.append((field, other))
    assert [(field, other) for field, other in silent if not without_effect(raw, field, other)] == []


def without_effect(raw: Mapping[str, Any], field: str, other: Any) -> bool:
    """Changes that transformers' numbers do not follow either."""
    if field == "text_config":
        inside = raw[field]
        return all(
            without_effect(inside, name, other[name]) for name in inside if inside[name] != other[name]
        )
    if field == "tie_word_embeddings":
        return raw["model_type"] == "gemma3_text"  # as the text part: the outer file has it
    if field == "sliding_window":
        return "sliding_attention" not in raw.get("layer_types", ())
    if field in ("max_window_layers", "use_sliding_window", "_sliding_window_pattern"):
        # layer_types say it layer by layer
        return "layer_types" in raw or raw.get("sliding_window") is None
    if field == "decoder_sparse_step":
        return bool(raw.get("mlp_only_layers"))  # the same layer that a step of 2 makes dense
    if field == "num_nextn_predict_layers":
        return True  # layers after the last, which transformers leaves out as well
    if field == "no_rope_layer_interval":
        return "no_rope_layers" in raw
    # Phi-3 keeps the original context in two places
    return field in IGNORED_FIELDS or (
        field == "rope_parameters" and "original_max_position_embeddings" in raw
    )


# --- GGUF --------------------------------------------------------------------------------------------------

GGUF_LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.block_count": 30,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 8192,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": 64,
}
GGUF_GEMMA: dict[str, Any] = {
    "general.architecture": "gemma3",
    "gemma3.embedding_length": 640,
    "gemma3.feed_forward_length": 2048,
    "gemma3.block_count": 18,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": 1,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 512,
    "gemma3.context_length": 32768,
    "gemma3.rope.freq_base": 1000000.0,
}
EMBEDDING = {"token_embd.weight": (49152, 576)}


def view(
    metadata: Mapping[str, Any],
    *,
    tensors: Mapping[str, tuple[int, ...]] = EMBEDDING,
    divisors: tuple[float, ...] | None = None,
    **changes: Any,
) -> GGUFView:
    name = metadata["general.architecture"]
    changed = {f"{name}.{key.replace('__', '.')}": value for key, value in changes.items()}
    merged = {k: v for k, v in {**metadata, **changed}.items() if v is not ...}
    return GGUFView(name, merged, tensors, divisors)


def gguf_refusal(of: GGUFView) -> str:
    with pytest.raises(ConfigError) as error:
        config_from_gguf(of)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_gguf_llama() -> None:
    config = config_from_gguf(view(GGUF_LLAMA))
    assert config == ModelConfig(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attention=AttentionConfig(
            num_heads=9, num_kv_heads=3, head_dim=64, query_scale=1 / 8, layer_types=("full_attention",) * 30
        ),
        rope=RopeConfig(full=RopeParameters(theta=100000.0)),
        mlp=MLPConfig(intermediate_size=1536),
        norm=NormConfig(eps=1e-5),
    )


def test_gguf_llama_defaults() -> None:
    config = config_from_gguf(
        view(GGUF_LLAMA, rope__freq_base=..., rope__dimension_count=..., attention__head_count_kv=...)
    )
    assert (config.rope.full.theta, config.attention.num_kv_heads) == (10_000.0, 9)


def test_gguf_tells_tying_and_biases_from_its_tensors() -> None:
    names = ("output.weight", "blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_up.bias")
    config = config_from_gguf(view(GGUF_LLAMA, tensors={**EMBEDDING, **dict.fromkeys(names, (1,))}))
    assert not config.tie_word_embeddings
    assert config.attention.bias and config.attention.out_bias and config.mlp.bias
    only_q = config_from_gguf(view(GGUF_LLAMA, tensors={**EMBEDDING, "blk.0.attn_q.bias": (1,)}))
    assert (only_q.attention.bias, only_q.attention.out_bias, only_q.mlp.bias) == (True, False, False)


def test_gguf_rope_divisors() -> None:
    divisors = tuple(1.0 + i / 4 for i in range(32))
    assert config_from_gguf(view(GGUF_LLAMA, divisors=divisors)).rope.full == RopeParameters(
        100000.0, divisors=divisors
    )


@pytest.mark.parametrize("metadata", (GGUF_LLAMA, GGUF_GEMMA), ids=("llama", "gemma3"))
def test_gguf_linear_scaling(metadata: Mapping[str, Any]) -> None:
    config = config_from_gguf(view(metadata, rope__scaling__type="linear", rope__scaling__factor=8.0))
    assert (config.rope.full.kind, config.rope.full.factor) == ("linear", 8.0)
    if config.rope.sliding is not None:
        assert config.rope.sliding == RopeParameters(theta=10_000.0)
    assert "llama.rope.scaling.factor" in gguf_refusal(view(GGUF_LLAMA, rope__scaling__type="linear"))


@pytest.mark.parametrize("metadata", (GGUF_LLAMA, GGUF_GEMMA), ids=("llama", "gemma3"))
def test_gguf_yarn(metadata: Mapping[str, Any]) -> None:
    config = config_from_gguf(
        view(
            metadata,
            rope__scaling__type="yarn",
            rope__scaling__factor=8.0,
            rope__scaling__original_context_length=4096,
        )
    )
    assert (config.rope.full.kind, config.rope.full.factor) == ("yarn", 8.0)
    assert config.rope.full.original_max_position_embeddings == 4096
    assert config.rope.full.attention_factor == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.parametrize("metadata", (GGUF_LLAMA, GGUF_GEMMA), ids=("llama", "gemma3"))
def test_gguf_unknown_scaling(metadata: Mapping[str, Any]) -> None:
    message = gguf_refusal(view(metadata, rope__scaling__type="spiral", rope__scaling__factor=8.0))
    assert message == "GGUF rope.scaling.type='spiral' is not supported: use none, linear or yarn"


def test_gguf_experts() -> None:
    assert "expert_count=8" in gguf_refusal(view(GGUF_LLAMA, expert_count=8))
    assert config_from_gguf(view(GGUF_LLAMA, expert_count=0)) == config_from_gguf(view(GGUF_LLAMA))


def test_gguf_partial_rope() -> None:
    message = gguf_refusal(view(GGUF_LLAMA, rope__dimension_count=32))
    assert "rope.dimension_count=32" in message and "head_dim=64" in message


def test_gguf_gemma3() -> None:
    config = config_from_gguf(view(GGUF_GEMMA, tensors={"token_embd.weight": (262144, 640)}))
    assert (config.model_type, config.vocab_size) == ("gemma3_text", 262144)
    assert (config.attention.num_heads, config.attention.num_kv_heads, config.attention.head_dim) == (
        4,
        1,
        256,
    )
    assert [i for i, kind in enumerate(config.attention.layer_types) if kind == "full_attention"] == [
        5,
        11,
        17,
    ]
    assert (config.rope.full, config.rope.sliding) == (RopeParameters(theta=1e6), RopeParameters(theta=1e4))
    assert (config.attention.sliding_window, config.attention.query_scale, config.norm.offset) == (
        512,
        1 / 16,
        1.0,
    )
    assert config.embedding_scale == 640**0.5
    assert (config.tie_word_embeddings, config.attention.qk_norm, config.block) == (True, "head", "sandwich")
    assert config.mlp.activation == "gelu_tanh"


def test_gguf_gemma3_27b() -> None:
    """Its queries are scaled by D / H = 168, not by head_dim = 128."""
    config = config_from_gguf(
        view(GGUF_GEMMA, embedding_length=5376, block_count=62, attention__head_count=32,
             attention__head_count_kv=16, attention__key_length=128)
    )  # fmt: skip
    assert config.attention.query_scale == pytest.approx(168**-0.5)
    assert config.attention.head_dim == 128


@pytest.mark.parametrize(
    "key",
    (
        "embedding_length",
        "feed_forward_length",
        "block_count",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
        "context_length",
    ),
)
@pytest.mark.parametrize("metadata", (GGUF_LLAMA, GGUF_GEMMA), ids=("llama", "gemma3"))
def test_gguf_missing_key(metadata: Mapping[str, Any], key: str) -> None:
    name = metadata["general.architecture"]
    message = gguf_refusal(view(metadata, **{key.replace(".", "__"): ...}))
    assert message == f"the GGUF file has no metadata '{name}.{key}'"


def test_gguf_missing_window_and_embedding() -> None:
    message = gguf_refusal(view(GGUF_GEMMA, attention__sliding_window=...))
    assert "gemma3.attention.sliding_window" in message
    assert gguf_refusal(view(GGUF_LLAMA, tensors={})) == "the GGUF file has no tensor 'token_embd.weight'"


@pytest.mark.parametrize(
    ("changes", "named"),
    (
        ({"attention__head_count": 0}, "head"),
        ({"attention__head_count": [9, 9]}, "head"),
        ({"attention__head_count_kv": 2}, "num_kv_heads=2"),
        ({"attention__key_length": 0}, "head_dim=0"),
        ({"feed_forward_length": [1536] * 30}, "intermediate_size"),
        ({"block_count": "30"}, "num_layers"),
        ({"embedding_length": "576"}, "hidden_size"),
        ({"attention__layer_norm_rms_epsilon": "small"}, "norm_eps"),
        ({"rope__freq_base": "high"}, "freq_base"),
    ),
)
def test_gguf_bad_value(changes: dict[str, Any], named: str) -> None:
    assert named in gguf_refusal(view(GGUF_LLAMA, **changes))


def test_unsupported_gguf_architecture() -> None:
    with pytest.raises(ConfigError) as error:
        gguf_architecture("mamba")
    known = [gguf.name for family in FAMILIES.values() for gguf in family.gguf]
    assert str(error.value) == (
        f"GGUF architecture 'mamba' is not supported; supported are {', '.join(known)}"
    )


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("canonical", "hf"),
    (
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("layers.12.self_attn.q_proj.weight", "model.layers.12.self_attn.q_proj.weight"),
    ),
)
def test_hf_name(canonical: str, hf: str) -> None:
    names = FAMILIES["llama"].names(LLAMA)
    assert names.locate(canonical, names.prefixes[0]).name == hf


GGUF_CONFIGS = {
    "llama": GGUF_LLAMA,
    "gemma3": GGUF_GEMMA,
}


def gguf_names(architecture: str) -> WeightMap:
    return gguf_architecture(architecture).names(config_from_gguf(view(GGUF_CONFIGS[architecture])))


@pytest.mark.parametrize(
    ("architecture", "canonical", "gguf"),
    (
        ("llama", "embed_tokens.weight", "token_embd.weight"),
        ("llama", "norm.weight", "output_norm.weight"),
        ("llama", "lm_head.weight", "output.weight"),
        ("llama", "layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ("llama", "layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight"),
        ("llama", "layers.3.self_attn.k_proj.bias", "blk.3.attn_k.bias"),
        ("llama", "layers.3.self_attn.v_proj.weight", "blk.3.attn_v.weight"),
        ("llama", "layers.29.self_attn.o_proj.weight", "blk.29.attn_output.weight"),
        ("llama", "layers.29.post_attention_layernorm.weight", "blk.29.ffn_norm.weight"),
        ("llama", "layers.29.mlp.gate_proj.weight", "blk.29.ffn_gate.weight"),
        ("llama", "layers.29.mlp.up_proj.weight", "blk.29.ffn_up.weight"),
        ("llama", "layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
        ("gemma3", "layers.1.self_attn.q_norm.weight", "blk.1.attn_q_norm.weight"),
        ("gemma3", "layers.1.self_attn.k_norm.weight", "blk.1.attn_k_norm.weight"),
        # the same names mean other norms: Gemma has one after each block as well
        ("gemma3", "layers.1.post_attention_layernorm.weight", "blk.1.post_attention_norm.weight"),
        ("gemma3", "layers.1.pre_feedforward_layernorm.weight", "blk.1.ffn_norm.weight"),
        ("gemma3", "layers.1.post_feedforward_layernorm.weight", "blk.1.post_ffw_norm.weight"),
    ),
)
def test_gguf_name(architecture: str, canonical: str, gguf: str) -> None:
    assert gguf_names(architecture).locate(canonical).name == gguf


def test_gguf_names_differ() -> None:
    """A map that sends two tensors to one would load one of them twice."""
    for architecture in GGUF_CONFIGS:
        names = [stored.name for stored in gguf_names(architecture).modules.values()]
        assert len(names) == len(set(names)), architecture


def test_only_llama_files_interleave_and_only_gemma_files_offset() -> None:
    llama, gemma = (gguf_names(name) for name in ("llama", "gemma3"))
    query = llama.locate("layers.0.self_attn.q_proj.weight")
    assert query.rows is not None
    assert query.rows[:4].tolist() == [0, 2, 4, 6] and query.rows[32:36].tolist() == [1, 3, 5, 7]
    assert gemma.locate("layers.0.self_attn.q_proj.weight").rows is None  # NEOX order in llama.cpp
    norms = [
        names.locate(name).offset
        for names in (llama, gemma)
        for name in ("norm.weight", "layers.0.input_layernorm.weight")
    ]
    assert norms == [0, 0, 1, 1]
