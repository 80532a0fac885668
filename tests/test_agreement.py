"""Configuration and tensors: ties as they are stored, tensors nobody needs, sizes that do not fit."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDENS
from safetensors.numpy import load_file, save_file

from tpjax import LLM
from tpjax.checkpoints.convert import convert
from tpjax.checkpoints.load import check_tensors
from tpjax.checkpoints.opening import open_checkpoint, read_config
from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.checkpoints.source import TensorInfo
from tpjax.cli.app import main
from tpjax.errors import CheckpointError, ConfigError, TpjaxError
from tpjax.mesh import make_mesh

TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]
TENSORS = load_file(GOLDENS / "llama" / "model.safetensors")
CONFIG = json.loads((GOLDENS / "llama" / "config.json").read_text())
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save(path: Path, tensors: Mapping[str, np.ndarray], shards: int = 1, **fields: Any) -> Path:
    """A checkpoint directory; a field of ``...`` is left out of its ``config.json``."""
    path.mkdir(parents=True)
    raw = {name: value for name, value in {**CONFIG, **fields}.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = sorted(tensors)
    index = {}
    for number in range(shards):
        of = {name: tensors[name] for name in names[number::shards]}
        save_file(of, path / f"{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(of, f"{number}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def logits(path: Path) -> np.ndarray:
    return LLM(path, tp=2, dtype="float32", max_model_len=32, max_slots=1).logits(TOKENS)


def of_transformers(path: Path) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="needs the extra: pip install 'tpjax[parity]'")
    transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'tpjax[parity]'")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
    return found


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# --- ties --------------------------------------------------------------------------------------------------

WITHOUT_HEAD = {name: values for name, values in TENSORS.items() if name != HEAD}
ONLY_HEAD = {name: values for name, values in TENSORS.items() if name != EMBEDDING}


@pytest.mark.parametrize(
    ("case", "tensors", "tied"),
    (
        ("another head", TENSORS, False),
        ("the same head", {**TENSORS, HEAD: TENSORS[EMBEDDING]}, True),
        ("no head", WITHOUT_HEAD, True),
        ("only a head", ONLY_HEAD, True),
        (
            "one row differs",
            {**TENSORS, HEAD: np.concatenate([TENSORS[EMBEDDING][:-1], [[5.0] * 48]])},
            False,
        ),
    ),
)
def test_a_tied_configuration_is_tied_as_stored(
    tmp_path: Path, case: str, tensors: Mapping[str, np.ndarray], tied: bool
) -> None:
    tensors = {name: np.ascontiguousarray(values, np.float32) for name, values in tensors.items()}
    if case == "one row differs":
        tensors[HEAD] = TENSORS[EMBEDDING].copy()
        tensors[HEAD][-1] *= 3
    path = save(tmp_path / "model", tensors, 1 + len(case) % 2, tie_word_embeddings=True)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tie_word_embeddings is tied
    assert read_config(path) == checkpoint.config  # what plan goes by
    found = logits(path)
    assert_close(found, of_transformers(path))
    convert(path, tmp_path / "orbax")
    assert open_checkpoint(tmp_path / "orbax").config == checkpoint.config
    np.testing.assert_array_equal(logits(tmp_path / "orbax"), found)


def test_an_untied_configuration_needs_a_head(tmp_path: Path) -> None:
    """transformers draws one at random."""
    for given in (False, ...):  # absent is false, for this family
        path = save(tmp_path / str(given), WITHOUT_HEAD, tie_word_embeddings=given)
        with pytest.raises(CheckpointError, match=r"missing     lm_head\.weight"):
            logits(path)
    path = save(
        tmp_path / "neither", {k: v for k, v in ONLY_HEAD.items() if k != HEAD}, tie_word_embeddings=True
    )
    with pytest.raises(CheckpointError, match=r"missing     model\.embed_tokens\.weight"):
        logits(path)


@pytest.mark.parametrize(
    "name", ("gemma", "gpt2", "gemma3", "cohere", "starcoder2", "smollm3", "gemma3-with-vision")
)
def test_families_that_tie_by_default(tmp_path: Path, name: str) -> None:
    """Whatever says so, the field, its absence or a part of the file: a head that differs counts."""
    shutil.copytree(GOLDENS / name, tmp_path / name)
    tensors = load_file(tmp_path / name / "model.safetensors")
    config = open_checkpoint(tmp_path / name).config
    assert config.tie_word_embeddings
    (embedding,) = (key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))
    head = "language_model.lm_head.weight" if embedding.startswith("language_model.") else HEAD
    expected = LLM(tmp_path / name, tp=2, dtype="float32", max_model_len=32, max_slots=1).logits(TOKENS)
    cap = config.logit_softcap
    for factor, tied in ((1.0, True), (0.5, False)):
        save_file({**tensors, head: tensors[embedding] * factor}, tmp_path / name / "model.safetensors")
        assert open_checkpoint(tmp_path / name).config.tie_word_embeddings is tied
        scaled = expected * factor if cap is None else cap * np.tanh(factor * np.arctanh(expected / cap))
        assert_close(logits(tmp_path / name), scaled)


def test_heads_are_compared_by_value(tmp_path: Path) -> None:
    half = TENSORS[EMBEDDING].astype(ml_dtypes.bfloat16)
    narrow = {**TENSORS, EMBEDDING: half}
    same = save(tmp_path / "same", {**narrow, HEAD: half.astype(np.float32)}, tie_word_embeddings=True)
    other = save(tmp_path / "other", {**narrow, HEAD: TENSORS[EMBEDDING]}, tie_word_embeddings=True)
    assert open_checkpoint(same).config.tie_word_embeddings
    assert not open_checkpoint(other).config.tie_word_embeddings


def test_a_head_of_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    path = save(tmp_path / "m", {**TENSORS, HEAD: TENSORS[HEAD][:-1].copy()}, tie_word_embeddings=True)
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight: the configuration says \[131, \d+\], the file has \[130"
    ):
        logits(path)


# --- tensors nobody needs ----------------------------------------------------------------------------------

UNUSED = {
    "value_head.weight": np.ones((1, 4), np.float32),
    "model.extra.weight": np.ones(3, np.float32),
    "vision_tower.layers.0.self_attn.q_proj.weight": np.ones((2, 2), np.float32),
    "optimizer.step": np.ones((), np.int64),
}
BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    "model.rotary_emb.inv_freq": np.ones(2, np.float32),
    "model.layers.0.self_attn.rotary_emb.cos_cached": np.ones(2, np.float32),
    "model.layers.0.self_attn.k_scale": np.ones(1, np.float32),
}
COUNTING = (
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.mlp.gate_proj.lora_A.weight",
    "model.layers.99.input_layernorm.weight",
    "model.norm.bias",
    "lm_head.bias",
    "norm.weight",
)


def check(path: Path) -> None:
    checkpoint, mesh = open_checkpoint(path), make_mesh(1)
    check_tensors(
        checkpoint, parameters(abstract_decoder(checkpoint.config, mesh, np.dtype("float32")), mesh)
    )


def test_what_the_model_has_no_use_for_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(save(tmp_path / "m", TENSORS | UNUSED | BUFFERS))
    (line,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert all(repr(name) in line for name in UNUSED)
    assert not any(name in line for name in BUFFERS)


@pytest.mark.parametrize("name", COUNTING)
def test_what_could_change_a_number_is_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "m", {**TENSORS, name: np.ones(3, np.float32)})
    with pytest.raises(CheckpointError) as error:
        check(path)
    assert f"unexpected  {name} [3]" in str(error.value)


def test_what_an_index_does_not_list_belongs_to_no_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "m", TENSORS, shards=2)
    first = load_file(path / "0.safetensors")
    save_file({**first, **{name: np.ones(3, np.float32) for name in COUNTING}}, path / "0.safetensors")
    check(path)
    assert all(repr(name) in caplog.text for name in COUNTING)


# --- sizes -------------------------------------------------------------------------------------------------

FIELDS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size"),
    *("vocab_size", "head_dim"),
)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", (1000, 10**5, 10**7, 10**400))
def test_sizes_are_held_against_the_files(tmp_path: Path, name: str, value: int) -> None:
    path = save(tmp_path / "m", TENSORS, **{name: value, "head_dim": value if name == "head_dim" else 8})
    begun = time.thread_time()
    with pytest.raises(TpjaxError) as error:
        LLM(path, tp=2)
    assert time.thread_time() - begun < 2  # seconds of this thread's own
    shown = str(value) if value < 10**100 else "1000000"
    assert shown in str(error.value) and len(str(error.value)) < 1500


def test_experts_are_held_against_the_files(tmp_path: Path) -> None:
    for name, field in (
        ("mixtral", "num_local_experts"),
        ("qwen3_moe", "num_experts"),
        ("gpt_oss", "num_local_experts"),
    ):
        for value in (8000, 10**7):
            path = tmp_path / f"{name}{value}"
            shutil.copytree(GOLDENS / name, path)
            raw = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps({**raw, field: value}))
            with pytest.raises(TpjaxError, match=f"num_.*experts={value}"):
                LLM(path, tp=2)


def test_an_orbax_directory_of_absurd_sizes(tmp_path: Path) -> None:
    convert(GOLDENS / "llama", tmp_path / "orbax")
    file = tmp_path / "orbax" / "model_config.json"
    raw = json.loads(file.read_text())
    (tmp_path / "orbax" / "MANIFEST.sha256").unlink()  # as an older version wrote it, or somebody's own
    for name, value in (
        ("num_layers", 10**7),
        ("num_heads", 10**7),
        ("hidden_size", 10**9),
        ("vocab_size", 10**6),
    ):
        changed = {**raw, name: value}
        if name in raw["attention"]:
            changed = {**raw, "attention": {**raw["attention"], name: value}}
        file.write_text(json.dumps(changed))
        with pytest.raises((ConfigError, CheckpointError), match=f"{name}={value}"):
            open_checkpoint(tmp_path / "orbax")


@pytest.mark.parametrize("verb", ("plan", "explain"))
@pytest.mark.parametrize("name", ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"))
def test_a_bare_configuration_of_absurd_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, name: str
) -> None:
    value = 10**7
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, name: value, "head_dim": 8}))
    begun = time.thread_time()
    how = ["--hardware", "v5e:8"] if verb == "plan" else ["--tp", "1"]
    assert main([verb, str(tmp_path / "config.json"), *how]) == 2
    assert time.thread_time() - begun < 2  # seconds of this thread's own
    assert f"={value} is over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    (
        ('{"vocab_size": 5, "model_type": "llama", "vocab_size": 6}', "key 'vocab_size' appears twice"),
        ('{"a": ' + "[" * 10_000, "not valid JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
    ),
)
def test_a_config_that_says_two_things(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_config(tmp_path)


def test_a_key_twice_with_one_value_says_one_thing(tmp_path: Path) -> None:
    text = json.dumps(CONFIG)
    (tmp_path / "config.json").write_text(text[:-1] + f', "vocab_size": {CONFIG["vocab_size"]}}}')
    assert read_config(tmp_path).vocab_size == CONFIG["vocab_size"]


def test_tensor_info_is_what_is_stored() -> None:
    assert open_checkpoint(GOLDENS / "llama").source.stored[EMBEDDING] == TensorInfo(
        TENSORS[EMBEDDING].shape, TENSORS[EMBEDDING].dtype
    )
