"""Mixtures as they are published: their configurations, and their tensors alone, stacked or interleaved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from flax import nnx
from gguf import GGUFWriter

from tpjax.checkpoints.load import load_decoder
from tpjax.checkpoints.opening import open_checkpoint
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
from tpjax.config import ModelConfig, MoEConfig
from tpjax.errors import ConfigError
from tpjax.families.registry import config_from_hf
from tpjax.mesh import make_mesh

# mistralai/Mixtral-8x7B-v0.1
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
# Qwen/Qwen1.5-MoE-A2.7B
QWEN2: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# Qwen/Qwen3-30B-A3B
QWEN3: dict[str, Any] = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# openai/gpt-oss-20b
GPT_OSS: dict[str, Any] = {
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}

MIXTURES = {
    "mixtral": (
        MIXTRAL,
        MoEConfig(
            num_experts=8,
            experts_per_token=2,
            expert_width=14336,
            sparse_layers=(True,) * 32,
            norm_topk_prob=True,
        ),
    ),
    "qwen2_moe": (
        QWEN2,
        MoEConfig(
            num_experts=60,
            experts_per_token=4,
            expert_width=1408,
            sparse_layers=(True,) * 24,
            norm_topk_prob=False,
            shared_width=5632,
            shared_gate=True,
        ),
    ),
    "qwen3_moe": (
        QWEN3,
        MoEConfig(
            num_experts=128,
            experts_per_token=8,
            expert_width=768,
            sparse_layers=(True,) * 48,
            norm_topk_prob=True,
        ),
    ),
    "gpt_oss": (
        GPT_OSS,
        MoEConfig(
            num_experts=32,
            experts_per_token=4,
            expert_width=2880,
            sparse_layers=(True,) * 24,
            norm_topk_prob=True,
            router_bias=True,
            expert_bias=True,
            swiglu_limit=7.0,
        ),
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_published_mixture(name: str) -> None:
    raw, moe = MIXTURES[name]
    assert config_from_hf(raw).moe == moe


def test_published_attention() -> None:
    mixtral, qwen2, qwen3, gpt_oss = (config_from_hf(raw) for raw, _ in MIXTURES.values())
    assert mixtral.rope.full.theta == 1e6
    assert {c.model_type: c.attention.bias for c in (mixtral, qwen2, qwen3, gpt_oss)} == {
        "mixtral": False,
        "qwen2_moe": True,
        "qwen3_moe": False,
        "gpt_oss": True,
    }
    assert qwen3.attention.qk_norm == "head"
    for config in (mixtral, qwen2, qwen3):
        assert set(config.attention.layer_types) == {"full_attention"} and not config.attention.sinks
    assert gpt_oss.attention.layer_types == ("sliding_attention", "full_attention") * 12
    assert gpt_oss.attention.sinks and gpt_oss.attention.out_bias
    assert (gpt_oss.rope.full.kind, gpt_oss.rope.full.theta, gpt_oss.rope.full.truncate) == (
        "yarn",
        150_000.0,
        False,
    )


def with_fields(raw: dict[str, Any], **fields: Any) -> ModelConfig:
    return config_from_hf({**raw, **fields})


def test_which_layers_are_sparse() -> None:
    config = with_fields(QWEN2, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert config.sparse_layers == (False, True, False, False, False, True)


def test_windows() -> None:
    assert with_fields(MIXTRAL, sliding_window=99).attention.window_of("sliding_attention") == 99
    assert set(with_fields(MIXTRAL, sliding_window=99).attention.layer_types) == {"sliding_attention"}
    assert set(with_fields(QWEN3, use_sliding_window=True, sliding_window=5).attention.layer_types) == {
        "sliding_attention"
    }
    config = with_fields(QWEN2, num_hidden_layers=4, max_window_layers=3, use_sliding_window=True)
    assert config.attention.layer_types == ("sliding_attention", "full_attention") * 2


@pytest.mark.parametrize(
    ("raw", "fields", "message"),
    [
        (GPT_OSS, {"experts_per_token": 3}, "config.json: experts_per_token=3 is not supported"),
        (GPT_OSS, {"hidden_act": "gelu"}, "config.json: hidden_act='gelu' is not supported"),
        (QWEN3, {"num_experts": None}, "config.json: field 'num_experts' is missing"),
        (QWEN3, {"mlp_only_layers": "3"}, "config.json: mlp_only_layers='3' is not a list of layers"),
        (QWEN3, {"decoder_sparse_step": 0}, "decoder_sparse_step=0 is not a whole number, 1 or more"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "experts_per_token=9 is over num_experts=8"),
    ],
)
def test_refused(raw: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_fields(raw, **fields)
    assert str(error.value) == message


# --- tensors -----------------------------------------------------------------------------------------------


def loaded(path: Path, tp: int) -> dict[tuple[Any, ...], np.ndarray]:
    checkpoint, mesh = open_checkpoint(path), make_mesh(tp)
    model = abstract_decoder(checkpoint.config, mesh, jnp.dtype("float32"))
    model = load_decoder(checkpoint, model, mesh, progress=False)
    return {key: np.asarray(leaf.get_value()) for key, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_gpt_oss_experts_are_told_apart() -> None:
    """Rows of gate and up alternate in the checkpoint, and are side by side on the device."""
    files = SafetensorsCheckpoint(GOLDENS / "gpt_oss")
    stored = files.read("model.layers.1.mlp.experts.gate_up_proj")
    bias = files.read("model.layers.1.mlp.experts.gate_up_proj_bias")
    weights = loaded(GOLDENS / "gpt_oss", tp=2)
    ours = weights["layers", 1, "mlp", "experts", "gate_up_proj"]
    width = stored.shape[-1] // 2
    np.testing.assert_array_equal(ours[..., :width], stored[..., 0::2])
    np.testing.assert_array_equal(ours[..., width:], stored[..., 1::2])
    np.testing.assert_array_equal(
        weights["layers", 1, "mlp", "experts", "gate_up_bias"],
        np.concatenate([bias[:, 0::2], bias[:, 1::2]], axis=1),
    )


def test_each_device_reads_its_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stack, one expert at a time; over all devices, none more often than its two halves need."""
    read: list[tuple[int, int]] = []
    original = SafetensorsCheckpoint.read

    def spy(self: Any, name: str, index: Any = None, *memory: Any) -> np.ndarray:
        if name == "model.layers.0.mlp.experts.gate_up_proj":
            read.append((index[0].start, index[0].stop))
        return original(self, name, index, *memory)

    monkeypatch.setattr(SafetensorsCheckpoint, "read", spy)
    loaded(GOLDENS / "gpt_oss", tp=3)
    assert sorted(read) == [(expert, expert + 1) for expert in range(6) for _ in ("gate", "up")]


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}


@pytest.fixture(scope="module")
def qwen3moe_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden qwen3_moe as llama.cpp's converter writes it: the experts of a layer in one tensor."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    config, files = (
        open_checkpoint(GOLDENS / "qwen3_moe").config,
        SafetensorsCheckpoint(GOLDENS / "qwen3_moe"),
    )
    assert config.moe is not None
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp.intermediate_size)
    writer.add_head_count(config.attention.num_heads)
    writer.add_head_count_kv(config.attention.num_kv_heads)
    writer.add_key_length(config.attention.head_dim)
    writer.add_value_length(config.attention.head_dim)
    writer.add_layer_norm_rms_eps(config.norm.eps)
    writer.add_rope_freq_base(config.rope.full.theta)
    writer.add_expert_count(config.moe.num_experts)
    writer.add_expert_used_count(config.moe.experts_per_token)
    writer.add_expert_feed_forward_length(config.moe.expert_width)
    for ours, name in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):
        writer.add_tensor(f"{name}.weight", files.read(f"{ours}.weight"))
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for ours, name in GGUF_NAMES.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", files.read(f"{prefix}.{ours}.weight"))
        for part in ("gate", "up", "down"):
            each = [
                files.read(f"{prefix}.mlp.experts.{number}.{part}_proj.weight")
                for number in range(config.moe.num_experts)
            ]
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", np.stack(each))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tp", (2, 4))
def test_gguf_holds_the_same_model(qwen3moe_gguf: Path, tp: int) -> None:
    original, config = (open_checkpoint(path).config for path in (GOLDENS / "qwen3_moe", qwen3moe_gguf))
    assert config.norm.eps == pytest.approx(original.norm.eps)  # GGUF metadata is float32
    assert replace(config, norm=original.norm) == original
    expected, found = loaded(GOLDENS / "qwen3_moe", tp), loaded(qwen3moe_gguf, tp)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=str(key))
