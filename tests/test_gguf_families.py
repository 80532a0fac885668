"""GGUF files of the families: what llama.cpp's converter would write of a golden loads as the same model.

Keys are written by the ``gguf`` package's own methods and tensors under the names of its own map, so that the
mappings are held to llama.cpp's conventions and not to themselves.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import GOLDENS

from tpjax.checkpoints.load import open_checkpoint
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
from tpjax.config import ModelConfig

ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "phi3": gguf.MODEL_ARCH.PHI3,
}


def convert(name: str, path: Path, **added: np.ndarray) -> Path:
    """Writes a golden as a GGUF file, and tensors besides, by their names in GGUF."""
    raw = json.loads((GOLDENS / name / "config.json").read_text())
    files = SafetensorsCheckpoint(GOLDENS / name)
    config = open_checkpoint(GOLDENS / name).config
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(raw["rope_parameters"]["rope_theta"])
    if "head_dim" in raw:
        writer.add_key_length(raw["head_dim"])
        writer.add_value_length(raw["head_dim"])
    if name == "gemma2":
        writer.add_sliding_window(raw["sliding_window"])
        writer.add_attn_logit_softcapping(raw["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(raw["final_logit_softcapping"])
    if name == "phi3":
        rope = raw["rope_parameters"]
        writer.add_rope_dimension_count(config.rotated_dim)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(config.rope.full.attention_factor)
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    names = gguf.get_tensor_name_map(ARCHITECTURES[name], raw["num_hidden_layers"])
    for tensor in files.tensors:
        stored = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        assert stored is not None, tensor
        values = files.read(tensor)
        if name == "gemma2" and tensor.endswith("norm.weight"):
            values = values + 1  # the converter's: llama.cpp multiplies by the weight alone
        writer.add_tensor(stored, values)
    for tensor, values in added.items():
        writer.add_tensor(tensor, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_gguf_has_it(config: ModelConfig) -> ModelConfig:
    """The model, less what GGUF cannot say: Qwen2's windows, and Gemma 2's query scale."""
    differences: dict[str, Any] = {}
    if config.model_type == "qwen2":
        differences = {"layer_types": ("full_attention",) * config.num_layers, "sliding_window": None}
    if config.model_type == "gemma2":
        differences = {"query_scale": config.attention.head_dim**-0.5}
    return replace(config, attention=replace(config.attention, **differences))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_converted_golden_is_the_same_model(name: str, tmp_path: Path) -> None:
    original = open_checkpoint(GOLDENS / name)
    found = open_checkpoint(convert(name, tmp_path / "tiny.gguf"))
    expected = as_gguf_has_it(original.config)
    assert found.config.norm.eps == pytest.approx(expected.norm.eps)  # GGUF keeps float32
    rope = found.config.rope
    assert replace(found.config, norm=expected.norm, rope=expected.rope) == expected
    for field in ("theta", "kind", "original_max_position_embeddings"):
        assert getattr(rope.full, field) == getattr(expected.rope.full, field), field
    assert rope.full.attention_factor == pytest.approx(expected.rope.full.attention_factor)
    for field in ("divisors", "long_divisors"):
        assert getattr(rope.full, field) == pytest.approx(getattr(expected.rope.full, field)), field
    modules = ["embed_tokens", "norm"] + ["lm_head"] * (not expected.tie_word_embeddings)
    for layer in range(expected.num_layers):
        parts = [f"self_attn.{part}_proj" for part in "qkvo"]
        parts += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        parts += ["input_layernorm", "post_attention_layernorm"]
        if expected.attention.qk_norm == "head":
            parts += ["self_attn.q_norm", "self_attn.k_norm"]
        if expected.block == "sandwich":
            parts += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        modules += [f"layers.{layer}.{part}" for part in parts]
    everything = (slice(None), slice(None))
    for module in modules:
        index = everything[:1] if module.endswith("norm") else everything
        before, after = (c.source.read(f"{module}.weight", index) for c in (original, found))
        np.testing.assert_allclose(after, before, rtol=0, atol=3e-7, err_msg=module)
    if expected.attention.bias:
        for part in "qkv":
            bias = f"layers.1.self_attn.{part}_proj.bias"
            values = [c.source.read(bias, everything[:1]) for c in (original, found)]
            np.testing.assert_array_equal(*values)


@pytest.mark.parametrize("same", (True, False))
def test_a_head_that_is_the_embedding_is_tied(same: bool, tmp_path: Path) -> None:
    """GGUF has no field for it: what is stored decides."""
    original = open_checkpoint(GOLDENS / "gemma2")
    everything = (slice(None), slice(None))
    head = original.source.read("embed_tokens.weight", everything).copy()
    if not same:
        head[-1, -1] += 1
    found = open_checkpoint(convert("gemma2", tmp_path / "tiny.gguf", **{"output.weight": head}))
    assert original.config.tie_word_embeddings and found.config.tie_word_embeddings == same
    if not same:
        np.testing.assert_array_equal(found.source.read("lm_head.weight", everything), head)
