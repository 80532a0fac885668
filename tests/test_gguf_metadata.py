"""GGUF metadata to `ModelConfig`, and the names that GGUF files have for tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from tpjax.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig, RopeParameters
from tpjax.errors import ConfigError
from tpjax.families.registry import FAMILIES, GGUFView, config_from_gguf, gguf_architecture
from tpjax.families.tensor_names import WeightMap

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
