"""`config.json` to `ModelConfig`: two generations of transformers give the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from conftest import GOLDENS

from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig, RopeParameters
from tpjax.errors import ConfigError
from tpjax.families.config_reader import Fields
from tpjax.families.quantization import Quantization, quantization_of
from tpjax.families.registry import FAMILIES, config_from_hf
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
            "quant_method='hqq' is not supported; supported are fp8, fbgemm_fp8, mxfp4, gptq",
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
        "awq", (1, 64), 4, is_float=False
    )
    # AutoRound's are in GPTQ's or AWQ's packing
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
    settings |= {"autoround_version": "0.16.1", "block_name_to_quantize": "model.layers"}
    for packing, method, extra in (
        ("auto_round:auto_gptq", "gptq", {"model.layers.0.mlp.gate": {"bits": 16}, ".*q_proj": {"bits": 16}}),
        ("auto_round:auto_awq", "awq", {"model.layers.0.mlp.gate": {"bits": 16, "data_type": "fp"}}),
    ):
        found = read(**settings, packing_format=packing, extra_config=extra)
        assert found == read(quant_method=method, bits=4, group_size=32) and found is not None
        assert found.skipped == ("model.layers.0.mlp.gate", "re:.*q_proj")[: len(extra)]
    with pytest.raises(ConfigError, match="packing_format='auto_round:llm_compressor' is not supported"):
        read(**settings, packing_format="auto_round:llm_compressor")
    message = "extra_config: model.layers.1.mlp.down_proj: bits=8 is not supported: use 4"
    with pytest.raises(ConfigError, match=message):
        extra = {"model.layers.1.mlp.down_proj": {"bits": 8}}
        read(**settings, packing_format="auto_round:auto_gptq", extra_config=extra)
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
