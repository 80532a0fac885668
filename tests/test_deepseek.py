"""DeepSeek-V3: its configuration, its order of rotating dimensions, its float8 weights, its extra layer."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDENS
from flax import nnx
from safetensors.numpy import load_file, save_file

from tpjax.checkpoints.load import load_decoder
from tpjax.checkpoints.opening import open_checkpoint
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.config import LatentConfig, MoEConfig, RopeParameters
from tpjax.errors import CheckpointError, ConfigError
from tpjax.families.registry import FAMILIES, config_from_hf
from tpjax.mesh import make_mesh

# deepseek-ai/DeepSeek-V3, as published
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_published_configuration() -> None:
    config = config_from_hf(PUBLISHED)
    assert (
        config.attention.num_heads,
        config.attention.num_kv_heads,
        config.attention.head_dim,
        config.rope.rotary_dim,
    ) == (128, 128, 192, 64)
    assert config.attention.latent == LatentConfig(q_lora_rank=1536, kv_lora_rank=512, v_head_dim=128)
    assert config.moe == MoEConfig(
        num_experts=256,
        experts_per_token=8,
        expert_width=2048,
        sparse_layers=(False,) * 3 + (True,) * 58,
        scoring="sigmoid",
        norm_topk_prob=True,
        num_groups=8,
        groups_per_token=4,
        routed_scale=2.5,
        correction_bias=True,
        shared_width=2048,
    )
    assert config.rope.full == RopeParameters(
        theta=10_000.0, kind="yarn", factor=40, original_max_position_embeddings=4096
    )
    assert config.attention.query_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_scale_without_yarn() -> None:
    plain = {name: value for name, value in PUBLISHED.items() if name != "rope_scaling"}
    assert config_from_hf(plain).attention.query_scale == pytest.approx(192**-0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("rope_interleave", False),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_layer_freq", 2),
        ("num_key_value_heads", 16),
        ("head_dim", 56),
        ("qk_head_dim", 128),
        ("hidden_act", "tanh"),
        ("attention_multiplier", 1.5),
    ),
)
def test_what_would_change_the_numbers_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not supported"):
        config_from_hf({**PUBLISHED, name: value})


def test_bad_sizes() -> None:
    for name in ("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank", "q_lora_rank", "v_head_dim"):
        with pytest.raises(ConfigError, match=f"{name}=0 is not a whole number"):
            config_from_hf({**PUBLISHED, name: 0})


def test_pairs_become_halves() -> None:
    """Two heads of one row that does not rotate and six that do."""
    config = config_from_hf(PUBLISHED)
    assert config.attention.latent is not None
    latent = replace(config.attention.latent, kv_lora_rank=2)
    attention = replace(config.attention, num_heads=2, num_kv_heads=2, head_dim=7, latent=latent)
    small = replace(config, attention=attention, rope=replace(config.rope, rotary_dim=6))
    modules = FAMILIES["deepseek_v3"].names(small).modules
    queries, latents = modules["self_attn.q_b_proj"].rows, modules["self_attn.kv_a_proj_with_mqa"].rows
    assert queries is not None and latents is not None
    assert queries.tolist() == [0, 1, 3, 5, 2, 4, 6, 7, 8, 10, 12, 9, 11, 13]
    assert latents.tolist() == [0, 1, 2, 4, 6, 3, 5, 7]


def copied(tmp_path: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """The golden's directory with other tensors."""
    directory = tmp_path / "model"
    shutil.copytree(GOLDENS / "deepseek_v3", directory)
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**fields, **config}))
    save_file(tensors, directory / "model.safetensors")
    return directory


def loaded(path: Path, tp: int) -> dict[Any, jax.Array]:
    checkpoint, mesh = open_checkpoint(path), make_mesh(tp)
    model = abstract_decoder(checkpoint.config, mesh, jnp.dtype("float32"))
    state = nnx.state(load_decoder(checkpoint, model, mesh, progress=False), nnx.Param)
    return {name: variable.get_value() for name, variable in nnx.to_flat_state(state)}


def test_float8_is_what_it_stands_for(tmp_path: Path) -> None:
    """Every projection in blocks of 16 x 12, which do not align with heads and experts."""
    plain = load_file(GOLDENS / "deepseek_v3" / "model.safetensors")
    stored, values = dict(plain), dict(plain)
    for name in (name for name in plain if "_proj" in name):
        blocks = [-(-size // step) for size, step in zip(plain[name].shape, (16, 12), strict=True)]
        scale = np.random.default_rng(len(stored)).uniform(0.5, 2, blocks).astype(np.float32)
        stored[name] = plain[name].astype(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        spread = np.kron(scale, np.ones((16, 12), np.float32))
        values[name] = stored[name].astype(np.float32) * spread[tuple(map(slice, plain[name].shape))]
    settings = {"quant_method": "fp8", "weight_block_size": [16, 12]}
    float8 = loaded(copied(tmp_path / "float8", stored, quantization_config=settings), 3)
    wide = loaded(copied(tmp_path / "wide", values), 3)
    assert float8.keys() == wide.keys()
    for name, array in float8.items():
        np.testing.assert_array_equal(array, wide[name], err_msg=str(name))


def test_layers_beyond_the_last(tmp_path: Path) -> None:
    """Published checkpoints have one more, which predicts a token further ahead; no other is ignored."""
    plain = load_file(GOLDENS / "deepseek_v3" / "model.safetensors")
    extra = {"model.layers.3.eh_proj.weight": np.zeros((36, 72), np.float32)}
    open_and_load = loaded(copied(tmp_path / "mtp", {**plain, **extra}), 1)
    assert open_and_load.keys() == loaded(GOLDENS / "deepseek_v3", 1).keys()
    further = {"model.layers.4.eh_proj.weight": extra["model.layers.3.eh_proj.weight"]}
    with pytest.raises(CheckpointError, match=r"unexpected  model\.layers\.4\.eh_proj\.weight"):
        loaded(copied(tmp_path / "further", {**plain, **further}), 1)
