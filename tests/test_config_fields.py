"""Which fields of ``config.json`` count: transformers' own code, and its numbers, are the oracle."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import json
import logging
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import GOLDENS

from tpjax.config import RopeParameters
from tpjax.errors import ConfigError
from tpjax.families.config_reader import Fields
from tpjax.families.registry import FAMILIES, config_from_hf
from tpjax.families.unread import IGNORED_FIELDS, NUMERIC
from tpjax.layers.rope import inverse_frequencies

RAW: dict[str, dict[str, Any]] = {
    path.parent.name: json.loads(path.read_text()) for path in sorted(GOLDENS.glob("*/config.json"))
}
BY_TYPE = {raw["model_type"]: raw for raw in RAW.values()}
NOTHING_OF_TEXT = {"vision_config", "mm_tokens_per_image", "image_token_id"}


def test_every_family_is_here() -> None:
    assert set(BY_TYPE) == set(FAMILIES)


# --- the rule ----------------------------------------------------------------------------------------------

# None of these can change a number: private marks, training, generation, how others run it, notes.
HARMLESS: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "_flash_attn_2_enabled": True,
    "_commit_hash": "0123abc",
    "attn_implementation": "flash_attention_2",
    "max_sequence_length": 2048,
    "max_length": 20,
    "do_sample": True,
    "temperature": 0.7,
    "repetition_penalty": 1.1,
    "forced_eos_token_id": 2,
    "gradient_checkpointing": True,
    "layerdrop": 0.1,
    "embd_pdrop": 0.1,
    "torch_dtype": "float16",
    "unsloth_version": "2025.1",
    "num_labels": 2,
    "torchscript": True,
    "use_bfloat16": True,
    "my_note": {"by": "me", "at": [1, 2]},
    "a note with\nlines": "x",
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_changes_no_number_is_named_and_ignored(
    model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    raw = BY_TYPE[model_type]
    expected = config_from_hf(raw)
    for name, value in HARMLESS.items():
        caplog.clear()
        assert config_from_hf({**raw, name: value}) == expected, name
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        if name in IGNORED_FIELDS:
            assert not any(name in line for line in lines)
        else:
            assert (
                sum((name if name.isidentifier() else "a note with\\nlines") in line for line in lines) == 1
            )
            assert all(line.isprintable() for line in lines)


def test_a_long_list_of_names_is_shortened(caplog: pytest.LogCaptureFixture) -> None:
    config_from_hf({**BY_TYPE["llama"], **{f"note_{i}": i for i in range(1, 100)}})
    (line,) = (record.getMessage() for record in caplog.records)
    assert "note_20 and 79 more" in line and "note_21" not in line


def test_inside_a_rope_scaling(caplog: pytest.LogCaptureFixture) -> None:
    raw = BY_TYPE["llama"] | {"rope_parameters": None, "rope_theta": 5e5}
    plain = config_from_hf(raw | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    noted = {"finetuned": True, "original_max_position_embeddings": 77, "low_freq_factor": 3.0, "my_note": 1}
    scaling = {"type": "linear", "factor": 2.0, **noted}
    caplog.clear()
    assert config_from_hf(raw | {"rope_scaling": scaling}) == plain
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("config.json: rope_scaling: ") and "finetuned" in line and "my_note" in line
    for name in ("alpha", "attn_factor", "short_mscale", "mrope_interleaved"):  # vLLM reads these
        with pytest.raises(ConfigError, match=f"rope_scaling: {name}=2"):
            config_from_hf(raw | {"rope_scaling": {**scaling, name: 2}})
    yarn = {"rope_type": "yarn", "factor": 4.0, "attn_factor": 1.0, "extrapolation_factor": 1}
    assert config_from_hf(raw | {"rope_scaling": yarn}).rope.full.kind == "yarn"


def test_a_quantisation_that_is_switched_off() -> None:
    raw = BY_TYPE["llama"]
    off = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "_load_in_8bit": False,
        "bnb_4bit_quant": "x",
    }
    assert config_from_hf(raw | {"quantization_config": off}) == config_from_hf(raw)
    for switch in ("load_in_4bit", "_load_in_8bit"):
        with pytest.raises(ConfigError, match="quant_method='bitsandbytes' is not supported"):
            config_from_hf(raw | {"quantization_config": off | {switch: True}})
    with pytest.raises(ConfigError, match=r"config\.json: quantization="):  # MLX's
        config_from_hf(raw | {"quantization": {"bits": 4, "group_size": 64}})


# What published files have beside what transformers reads: Qwen3-Coder's, SmolLM3-3B's, those of Command R7B
# that transformers 4.57 wrote, Kimi K2's. A count of 0 says in any family that there is none.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0},
    "qwen3": {"use_qk_norm": True},
    "smollm3": {"max_window_layers": 28},
    "cohere2": {"_sliding_window_pattern": 4, "use_parallel_embedding": True},
    "deepseek_v3": {"model_type": "kimi_k2", "num_nextn_predict_layers": 0},
    "llama": {"num_experts": 0, "n_shared_experts": 0, "num_kv_shared_layers": 0},
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_what_published_files_have_beside(model_type: str) -> None:
    raw = BY_TYPE[model_type]
    assert config_from_hf(raw | PUBLISHED[model_type]) == config_from_hf(raw)


@pytest.mark.parametrize(
    "field",
    (
        {"num_experts": 2},
        {"n_shared_experts": 1},
        {"num_experts": 0.5},
        {"residual_multiplier": 0},  # of it, 0 is a value like any other
        {"max_window_layers": 0},  # every layer would have the window
        {"use_qk_norm": True},
    ),
)
def test_what_is_no_count_of_nothing_is_rejected(field: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(field))}=.* is not supported"):
        config_from_hf(BY_TYPE["llama"] | field)


def test_a_window_pattern_under_its_older_name() -> None:
    raw = {k: v for k, v in BY_TYPE["cohere2"].items() if k != "layer_types"} | {"num_hidden_layers": 4}
    kinds = config_from_hf(raw | {"_sliding_window_pattern": 2}).attention.layer_types
    assert kinds == ("sliding_attention", "full_attention") * 2


# --- transformers' code is the oracle ----------------------------------------------------------------------


def modeling(model_type: str) -> Any:
    """The module of transformers with a family's layers."""
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'tpjax[parity]'")
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    return importlib.import_module(config.__module__.replace("configuration_", "modeling_"))


def fields_read(source: str) -> Iterator[str]:
    """Attributes of anything called a config in Python code."""

    def is_config(node: ast.expr) -> bool:
        name = getattr(node, "id", getattr(node, "attr", ""))
        return name == "config" or name.endswith("_config")

    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=value, attr=attr) if is_config(value):
                yield attr
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(attr)), *_]):
                if is_config(value):
                    yield attr


# What transformers' code reads besides sizes and formulas: how it runs, what it returns, losses, token ids.
NOT_OF_NUMBERS = {
    *("_attn_implementation", "get_text_config", "vision_config", "text_config", "num_labels", "to_dict"),
    *(
        "initializer_factor",
        "standardize_rope_params",
        "validate_rope",
        "number_of_conv_states",
        "image_token_id",
    ),
    *("_experts_implementation", "aux_loss_coef", "is_heterogeneous", "nested_rope_parameter_keys"),
    *("summary_last_dropout", "attention_softmax_in_fp32", "mm_tokens_per_image", "is_moe", "audio_config"),
    *("image_size", "patch_size"),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_field_that_its_code_reads_is_ignored(model_type: str) -> None:
    import_module = importlib.import_module
    modules = [modeling(model_type)]
    modules += [import_module(f"transformers.{name}") for name in ("masking_utils", "modeling_rope_utils")]
    read_there = {name for module in modules for name in fields_read(inspect.getsource(module))}
    assert len(read_there) > 20
    assert sorted(read_there - read_by_us(model_type) - NUMERIC - IGNORED_FIELDS - NOT_OF_NUMBERS) == []


def read_by_us(model_type: str) -> set[str]:
    fields = Fields(BY_TYPE[model_type])
    FAMILIES[model_type].config(fields)
    return fields.read


def test_what_one_family_reads_is_rejected_in_the_others() -> None:
    images = {"vision_config", "mm_tokens_per_image"} | {
        f"{name}_token_{kind}" for name in ("boi", "eoi", "image") for kind in ("id", "index")
    }
    training = {"ep_size", "aux_loss_alpha", "seq_aux", "num_mtp_layers", "initial_context_length"}
    training |= {"num_nextn_predict_layers"}
    described = {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"}
    read = set().union(*(read_by_us(model_type) for model_type in FAMILIES))
    assert sorted(read - NUMERIC - IGNORED_FIELDS - images - training - described) == []


# Of the fields that every configuration of transformers has, those that change what a model computes.
COUNTED = {"is_encoder_decoder", "tie_word_embeddings", "add_cross_attention", "per_layer_config"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_generic_field_is_an_error(model_type: str) -> None:
    """Whatever ``save_pretrained`` of any transformers writes beside the architecture."""
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'tpjax[parity]'")
    generic = {**transformers.PreTrainedConfig().to_dict(), **transformers.GenerationConfig().to_dict()}
    raw = BY_TYPE[model_type]
    expected = config_from_hf(raw)
    for name, value in generic.items():
        if name in COUNTED or name in raw:
            continue
        for other in (value, 3, 0.5, True, "text", [1], {"a": 1}):
            assert config_from_hf({**raw, name: other}) == expected, name


# --- transformers' numbers are the oracle ------------------------------------------------------------------

LINEAR = {"type": "linear", "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 12345.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "finetuned": True}
ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 5000.0},
    "scaling": {"rope_scaling": LINEAR, "rope_theta": 777.0},
    "scaling beside parameters": {"rope_scaling": LINEAR, "rope_parameters": PLAIN},
    "scaling, parameters and theta": {"rope_scaling": LINEAR, "rope_parameters": PLAIN, "rope_theta": 50.0},
    "default beside linear": {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LINEAR},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 44.0}},
    "type and rope_type": {"rope_scaling": {**LLAMA3, "type": "linear"}, "rope_theta": 777.0},
    "notes": {"rope_scaling": {**LINEAR, "original_max_position_embeddings": 77, "my_note": 1}},
    "yarn": {"rope_scaling": YARN},
    "yarn without original": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "original beside it": {"rope_scaling": YARN, "original_max_position_embeddings": 20},
    "original beside linear": {"rope_scaling": LINEAR, "original_max_position_embeddings": 20},
}
FLAT = ("cohere", "cohere2", "gemma", "gemma2", "gpt_oss", "granite", "llama", "mistral", "olmo2", "qwen2",
        "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2")  # fmt: skip
OF_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "quantization_config")


@pytest.mark.parametrize("model_type", FLAT)
def test_rope_is_what_transformers_makes_of_it(model_type: str) -> None:
    raw = {name: value for name, value in BY_TYPE[model_type].items() if name not in OF_ROPE}
    for case, fields in ROPES.items():
        config = config_from_hf({**raw, **fields})
        for kind, (frequencies, scale) in rotary_embeddings({**raw, **fields}).items():
            rope = config.rope.parameters_of(kind)
            assert rope.attention_factor == pytest.approx(scale), case
            found = inverse_frequencies(rope, config.rotated_dim)
            np.testing.assert_allclose(found, frequencies, rtol=1e-5, err_msg=f"{model_type}, {case}")


def rotary_embeddings(raw: dict[str, Any]) -> dict[Any, tuple[np.ndarray, float]]:
    """Frequencies and the factor on cosines and sines, per kind of layer, of transformers' own module."""
    module = modeling(raw["model_type"])
    transformers = importlib.import_module("transformers")
    fields = {name: value for name, value in copy.deepcopy(raw).items() if name != "model_type"}
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[raw["model_type"]](**fields)
    kind = next(kind for name, kind in vars(module).items() if name.endswith("RotaryEmbedding"))
    found = kind(config)
    return {"full_attention": (found.inv_freq.numpy(), found.attention_scaling)}


GEMMA3_ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bases": {"rope_theta": 500.0, "rope_local_base_freq": 70.0},
    "scaling": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "scaling on top": {
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 33.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 22.0},
        },
    },
}


@pytest.mark.parametrize("case", GEMMA3_ROPES)
def test_rope_of_gemma3(case: str) -> None:
    raw = {name: value for name, value in BY_TYPE["gemma3_text"].items() if name not in OF_ROPE}
    raw |= GEMMA3_ROPES[case]
    module, config = modeling("gemma3_text"), config_from_hf(raw)
    transformers = importlib.import_module("transformers")
    found = module.Gemma3RotaryEmbedding(transformers.Gemma3TextConfig(**copy.deepcopy(raw)))
    for kind in ("full_attention", "sliding_attention"):
        np.testing.assert_allclose(
            inverse_frequencies(config.rope.parameters_of(kind), config.rotated_dim),
            getattr(found, f"{kind}_inv_freq").numpy(),
            rtol=1e-5,
        )


def test_gemma3_scaled_by_one_transformers_and_not_by_the_other_is_rejected() -> None:
    raw = {name: value for name, value in BY_TYPE["gemma3_text"].items() if name not in OF_ROPE}
    with pytest.raises(ConfigError, match="rope_scaling: type='linear' is not supported"):
        config_from_hf(raw | {"rope_scaling": {"type": "linear", "factor": 8.0}})


# --- sizes that no model has -------------------------------------------------------------------------------

COUNTS = {
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts"),
    *("n_routed_experts", "n_layer", "n_head", "n_embd", "hidden_size", "intermediate_size", "vocab_size"),
    *("head_dim", "moe_intermediate_size", "num_experts_per_tok", "n_group", "n_shared_experts"),
    *("kv_lora_rank", "shared_expert_intermediate_size", "v_head_dim", "max_position_embeddings"),
    *("sliding_window", "first_k_dense_replace", "max_window_layers"),
}
ABSURD = (10**7, 10**9, 2**31, 2**63, 10**400, 0, -1, -(10**400), 1e400, float("nan"), 4.0, "30", True, [30])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_size_hangs_or_crashes(model_type: str) -> None:
    """Each ends in a configuration or an error of one short line, and 10**9 allocates little memory."""
    raw = BY_TYPE[model_type]
    expected = config_from_hf(raw)
    for name in sorted(COUNTS & set(raw)):
        for value in ABSURD:
            try:
                config = config_from_hf({**raw, name: value})
            except ConfigError as error:
                assert len(str(error)) < 400 and "\n" not in str(error)
            else:
                assert config == expected or value not in (2**63, 10**400), (name, value)


@pytest.mark.parametrize(
    ("name", "model_type"),
    (
        ("num_hidden_layers", "llama"),
        ("num_hidden_layers", "mistral"),
        ("num_hidden_layers", "cohere2"),
        ("num_hidden_layers", "gemma3_text"),
        ("num_attention_heads", "llama"),
        ("num_local_experts", "mixtral"),
        ("num_experts", "qwen3_moe"),
        ("n_routed_experts", "deepseek_v3"),
        ("n_layer", "gpt2"),
    ),
)
def test_counts_are_named_with_their_limit(name: str, model_type: str) -> None:
    with pytest.raises(ConfigError, match=rf"config.json: {name}=10000000 is over \d+"):
        config_from_hf(BY_TYPE[model_type] | {name: 10**7})


@pytest.mark.parametrize("value", (10**400, -(10**400), float("nan"), float("inf")))
@pytest.mark.parametrize("name", ("rms_norm_eps", "rope_theta"))
def test_numbers_beyond_all_floats(name: str, value: Any) -> None:
    raw = {k: v for k, v in BY_TYPE["llama"].items() if k != "rope_parameters"}
    with pytest.raises(ConfigError) as error:
        config_from_hf(raw | {name: value})
    assert len(str(error.value)) < 200


def test_rope_config_of_a_huge_integer() -> None:
    with pytest.raises(ConfigError, match="rope factor="):
        RopeParameters(kind="linear", factor=10**400)


# --- values that no field has ------------------------------------------------------------------------------

# The kinds of JSON, and numbers at the edges of what Python and a float hold.
ODD = (None, True, -1, 0, 1, 1e308, float("nan"), float("inf"), "x", [], {}, [1], 2**63)

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {
        **{"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": None, "beta_fast": 32},
        **{"beta_slow": 1, "truncate": True, "attn_factor": 1.0, "extrapolation_factor": 1.0},
    },
    "longrope": {"short_factor": [1.0], "long_factor": [2.0], "attention_factor": None, "factor": 4.0},
}
_WEIGHTS = {
    **{"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16, "actorder": None},
    **{"dynamic": False, "symmetric": True, "block_structure": None},
}
METHODS: dict[str, dict[str, Any]] = {
    "fp8": {
        **{"activation_scheme": "dynamic", "fmt": "e4m3", "expert_dtype": "fp8"},
        **{"weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
    },
    "mxfp4": {"modules_to_not_convert": ["lm_head"]},
    "bitsandbytes": {"load_in_4bit": False},
    "gptq": {
        **{"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "pack_dtype": "int32"},
        **{"dynamic": None, "checkpoint_format": "gptq", "format": "gptq"},
    },
    "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "compressed-tensors": {
        **{"format": "int-quantized", "sparsity_config": {"format": "dense"}, "ignore": ["lm_head"]},
        "config_groups": {"group_0": {"weights": _WEIGHTS, "targets": ["Linear"], "format": None}},
    },
}
# What errors call fields that have another name in ModelConfig, or others that they contradict.
OTHER_NAMES = {
    "_sliding_window_pattern": "sliding_window_pattern",
    "attention_multiplier": "query_scale",
    "attn_logit_softcapping": "attn_softcap",
    "embedding_multiplier": "embedding_scale",
    "final_logit_softcapping": "logit_softcap",
    "intermediate_size": "expert_width",
    "layer_norm_epsilon": "norm_eps",
    "layer_norm_eps": "norm_eps",
    "layer_types": "layer type",
    "logits_scaling": "logit_scale",
    "long_factor": "long_divisors",
    "moe_intermediate_size": "expert_width|shared_width",
    "n_group": "num_groups",
    "n_inner": "intermediate_size",
    "n_layer": "num_layers",
    "n_positions": "max_position_embeddings|n_ctx",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "shared_width",
    "no_rope_layers": "rope_layers",
    "norm_epsilon": "norm_eps",
    "num_attention_heads": "num_heads|num_key_value_heads",
    "num_experts_per_tok": "experts_per_token",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_kv_heads",
    "num_local_experts": "num_experts",
    "partial_rotary_factor": "rotary_dim|dimensions of a head rotate",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "head_dim",
    "residual_multiplier": "residual_scale",
    "rms_norm_eps": "norm_eps",
    "rope_parameters": "rotary_dim|rope divisors",
    "rope_scaling": "rotary_dim",
    "rope_theta": "rope theta",
    "rotary_pct": "rotary_dim",
    "routed_scaling_factor": "routed_scale",
    "shared_expert_intermediate_size": "shared_",
    "short_factor": "rope divisors",
    "topk_group": "groups_per_token",
    "use_sliding_window": "sliding_window",
}


def with_odd_values(
    raw: dict[str, Any], only: str = ""
) -> Iterator[tuple[tuple[str, ...], Any, dict[str, Any]]]:
    """Each field, or one of them, and those of objects inside of it, with each value in place of its own."""
    for name, value in raw.items() if not only else ((only, raw[only]),):
        for odd in ODD:
            yield (name,), odd, raw | {name: odd}
        if isinstance(value, dict):
            for names, odd, changed in with_odd_values(value):
                yield (name, *names), odd, raw | {name: changed}


def odd_configurations(raw: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any, dict[str, Any]]]:
    """Those of a golden, and of each kind of scaling and quantisation in it."""
    yield from with_odd_values(raw)
    config = config_from_hf(raw)
    rotated, fraction = config.rotated_dim, config.rotated_dim / config.attention.head_dim
    if config.attention.latent is not None:
        fraction = 1.0
    for kind, scaling in ROPES.items():
        lists = {name: x * (rotated // 2) for name, x in scaling.items() if isinstance(x, list)}
        rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 64}
        rope |= {"partial_rotary_factor": fraction, **scaling, **lists}
        plain = {name: x for name, x in raw.items() if name not in ("rope_parameters", "rope_scaling")}
        yield from with_odd_values(plain | {"rope_scaling": rope}, "rope_scaling")
    for method, settings in METHODS.items():
        settings = {"quant_method": method, **settings}
        yield from with_odd_values(raw | {"quantization_config": settings}, "quantization_config")


@pytest.mark.parametrize("share", (0.05, pytest.param(1.0, marks=pytest.mark.slow)))
def test_any_value_is_read_or_refused_by_name(share: float) -> None:
    """By the name of the field, or of the object that it is in."""
    draw, wrong = random.Random(1), []
    for model_type, raw in BY_TYPE.items():
        cases = list(odd_configurations(raw))
        for names, odd, changed in draw.sample(cases, int(len(cases) * share)):
            known = "|".join(f"{name}|{OTHER_NAMES.get(name, name)}" for name in names)
            try:
                config_from_hf(changed)
            except ConfigError as error:
                if "malformed" in str(error) or not re.search(known, str(error)):
                    wrong.append((model_type, names, odd, str(error)))
    assert not wrong


YARN = {"rope_type": "yarn", "factor": 32.0, "mscale": 1.0}
COMPRESSED = {"quant_method": "compressed-tensors", **METHODS["compressed-tensors"]}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "changed", "message"),
    (
        ("llama", {"quantization_config": {"quant_method": ["fp8"]}}, r"quant_method=\['fp8'\] is not supp"),
        ("llama", {"quantization_config": {"quant_method": {}}}, "quant_method={} is not supported"),
        (
            "llama",
            {"quantization_config": COMPRESSED | {"format": ["x"]}},
            r"format=\['x'\] are not supported",
        ),
        (
            "llama",
            {"quantization_config": COMPRESSED | {"sparsity_config": "dense"}},
            "config='dense' is not",
        ),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0 is not"),
        ("llama", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 0}}, "embeddings=0 is"),
        ("llama", {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 1}}, "=1 give no att"),
        ("llama", {"rope_parameters": LONGROPE | {"factor": -5}}, "rope factor=-5 is not a positive number"),
        ("gpt_neox", {"rotary_pct": float("nan")}, "rotary_pct=nan is not a number"),
        ("phi3", {"partial_rotary_factor": float("inf")}, "partial_rotary_factor=inf is not a number"),
        ("gpt_neox", {"rotary_pct": 1e308}, r"rotary_pct=1e\+308 is not above 0 and at most 1"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 1e308}},
            r"rope factor=1e\+308 of max",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 1e30}},
            r"a context of .*e\+3\d tok",
        ),
        (
            "deepseek_v3",
            {"rope_parameters": YARN | {"mscale_all_dim": 1e300}},
            r"mscale_all_dim=1e\+300 with",
        ),
    ),
)
def test_values_that_crashed(model_type: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf(BY_TYPE[model_type] | changed)


def test_what_no_reader_expected_is_an_error_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        TypeError("x"),
        ZeroDivisionError("x"),
        OverflowError("x"),
        KeyError("x"),
        AttributeError("x"),
    ):

        def failing(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("tpjax.families.registry.quantization_of", failing)
        with pytest.raises(
            ConfigError, match=rf"^config\.json: malformed: .*x.* \({type(error).__name__}\)$"
        ):
            config_from_hf(BY_TYPE["llama"])
