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
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import GOLDENS
from flax import nnx
from stepwise import Stepwise

from tpjax.checkpoints import convert as converting
from tpjax.checkpoints.convert import write_vocabulary
from tpjax.checkpoints.digests import digest_of_edges
from tpjax.checkpoints.gguf import GGUFFile
from tpjax.checkpoints.opening import open_checkpoint
from tpjax.checkpoints.parameters import abstract_decoder, parameters
from tpjax.checkpoints.safetensors import SafetensorsCheckpoint
from tpjax.config import ModelConfig
from tpjax.errors import CheckpointError, ConfigError
from tpjax.families.gguf_metadata import GGUFView
from tpjax.families.registry import config_from_gguf
from tpjax.mesh import make_mesh
from tpjax.planning.published import find_model

F32 = jnp.dtype("float32")

ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "phi3": gguf.MODEL_ARCH.PHI3,
}


def convert(name: str, path: Path, split: dict[str, Any] | None = None, **added: np.ndarray) -> Path:
    """Writes a golden as a GGUF file, and tensors besides, by their names in GGUF.

    Args:
        name: the golden.
        path: the file; of a split model its parts' names are made from it.
        split: the writer's settings of a split model.
        added: other tensors.
    """
    raw = json.loads((GOLDENS / name / "config.json").read_text())
    files = SafetensorsCheckpoint(GOLDENS / name)
    config = open_checkpoint(GOLDENS / name).config
    writer = gguf.GGUFWriter(path, name, **(split or {}))
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


@pytest.mark.parametrize("first", ("with tensors", "without"))
def test_a_model_in_parts(first: str, tmp_path: Path) -> None:
    """As the gguf package splits it: the first part, with tensors or metadata alone, stands for all."""
    whole = open_checkpoint(convert("qwen3", tmp_path / "tiny.gguf"))
    parts = {"split_max_tensors": 8, "small_first_shard": first == "without"}
    convert("qwen3", tmp_path / "tiny.gguf", parts)
    paths = sorted(tmp_path.glob("tiny-*.gguf"))
    assert paths[0].name == f"tiny-00001-of-{len(paths):05}.gguf" and len(paths) > 2
    found = open_checkpoint(paths[0])
    assert found.config == whole.config
    assert dict(found.source.stored) == dict(whole.source.stored)
    assert (GGUFFile(paths[0]).file_of("token_embd.weight") == paths[0]) == (first == "with tensors")
    for name, info in whole.source.stored.items():
        box = tuple(slice(size // 3, size) for size in info.shape)
        np.testing.assert_array_equal(
            GGUFFile(paths[0]).read(name, box), GGUFFile(whole.path).read(name, box), name
        )
    before = digest_of_edges(paths[0])
    assert len({before, *map(digest_of_edges, (paths[1], whole.path))}) == 3
    content = bytearray(paths[-1].read_bytes())
    content[-1] ^= 1
    paths[-1].write_bytes(content)
    assert digest_of_edges(paths[0]) != before


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    convert("qwen3", tmp_path / "tiny.gguf", {"split_max_tensors": 8})
    paths = sorted(tmp_path.glob("tiny-*.gguf"))
    count, first = len(paths), paths[0]
    total = len(GGUFFile(first).tensors)

    def refused(path: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(path)
        return str(error.value)

    assert (
        refused(paths[1])
        == f"{paths[1]}: is part 2 of {count} of a split model: give the first, {first.name}"
    )
    other = first.rename(tmp_path / "other.gguf")
    assert refused(other) == (
        f"{other}: is part 1 of {count} of a split model, and the others are found by its name, which must "
        f"end with -00001-of-{count:05}.gguf"
    )
    other.rename(first)
    kept = paths[1].read_bytes()
    paths[1].unlink()
    assert refused(first) == (
        f"{first}: is part 1 of {count} of a split model, of which {count - 1} are there: {paths[1].name} is "
        "missing"
    )
    paths[1].write_bytes(paths[2].read_bytes())
    assert refused(first) == f"{paths[1]}: says that it is part 3 of {count}, its name says 2 of {count}"
    paths[1].write_bytes(kept)
    own, others = ({one.name for one in gguf.GGUFReader(path).tensors} for path in paths[:2])
    moved, twice = next((a, b) for a in sorted(others) for b in sorted(own) if len(a) == len(b))
    paths[1].write_bytes(kept.replace(moved.encode(), twice.encode()))
    assert refused(first) == f"{paths[1]}: tensor '{twice}' is in {first.name} too"
    paths[1].write_bytes(kept[:-7])
    assert refused(first).startswith(f"{paths[1]}: truncated: tensor ")
    paths[1].write_bytes(kept)
    content = first.read_bytes()
    key = content.index(b"split.tensors.count") + len("split.tensors.count") + 4
    first.write_bytes(content[:key] + (total + 1).to_bytes(4, "little") + content[key + 4 :])
    assert refused(first) == (
        f"{first}: split.tensors.count is {total + 1}, the {count} parts have {total} tensors"
    )


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


# --- metadata that no model has ----------------------------------------------------------------------------


def view_of(name: str, path: Path) -> GGUFView:
    file = GGUFFile(convert(name, path))
    shapes = {tensor: info.shape for tensor, info in file.tensors.items()}
    lists = {
        key: tuple(file.read(f"rope_factors_{end}.weight").tolist())
        for key, end in (("rope_divisors", "short"), ("rope_long_divisors", "long"))
        if f"rope_factors_{end}.weight" in file.tensors
    }
    return GGUFView(name, file.metadata, shapes, **lists)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    (
        ("qwen2", {"type": "linear", "factor": "x"}, "GGUF rope.scaling.factor='x' is not a number"),
        ("qwen2", {"type": "linear", "factor": [1.0]}, r"GGUF rope.scaling.factor=\[1.0\] is not a number"),
        ("qwen2", {"type": "yarn", "factor": 0.0}, "rope.scaling.factor=0.0 is not a positive number"),
        ("qwen2", {"type": "yarn", "factor": -1.0}, "rope.scaling.factor=-1.0 is not a positive number"),
        ("phi3", {"original_context_length": 0}, "original_context_length=0 is not a whole number"),
        ("phi3", {"original_context_length": "x"}, "original_context_length='x' is not a whole number"),
        (
            "phi3",
            {"original_context_length": 1, "attn_factor": None},
            "embeddings=1 give no attention factor",
        ),
    ),
)
def test_scalings_that_crashed(name: str, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    view = view_of(name, tmp_path / "tiny.gguf")
    scaling = {f"{name}.rope.scaling.{key}": value for key, value in changed.items()}
    metadata = {key: value for key, value in {**view.metadata, **scaling}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        config_from_gguf(replace(view, metadata=metadata))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_metadata_is_read_or_refused(name: str, tmp_path: Path) -> None:
    """Each key, and those of both scalings, with each value: none meets a reader that did not expect it."""
    view = view_of(name, tmp_path / "tiny.gguf")
    scaling = dict.fromkeys(("factor", "attn_factor", "yarn_beta_fast", "yarn_beta_slow"), 2.0)
    scaling |= {"original_context_length": 64}
    odd = (True, -1, 0, 1, -1.0, 0.0, 1e308, float("nan"), float("inf"), "x", [], [1.0], 2**63)
    for kind in ("none", "linear", "yarn"):
        added = {f"{name}.rope.scaling.{key}": value for key, value in {"type": kind, **scaling}.items()}
        metadata = {**view.metadata, **added}
        config_from_gguf(replace(view, metadata=metadata))
        for key in (key for key in metadata if key.startswith(f"{name}.")):
            for value in odd:
                try:
                    config_from_gguf(replace(view, metadata={**metadata, key: value}))
                except ConfigError as error:
                    assert "malformed" not in str(error), (key, value)


def test_divisors_are_a_list(tmp_path: Path) -> None:
    path = convert("qwen2", tmp_path / "tiny.gguf", **{"rope_freqs.weight": np.ones((2, 4), np.float32)})
    with pytest.raises(ConfigError, match=r": tensor rope_freqs\.weight of shape \[2, 4\] is not"):
        open_checkpoint(path)


def test_a_vocabulary_keeps_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any type, and it is written before the weights: what it cannot hold costs no hours."""
    path, values = convert("qwen2", tmp_path / "tiny.gguf"), {}

    def wide(name: str, value: Any, kind: str, items: str | None = None) -> None:
        values[f"tokenizer.{name}"] = value
        sub_type = items and gguf.GGUFValueType[items]
        writer.add_key_value(f"tokenizer.{name}", value, gguf.GGUFValueType[kind], sub_type=sub_type)

    writer = gguf.GGUFWriter(tmp_path / "wide.gguf", "qwen2")
    wide("ggml.padding_token_id", 2**32 - 1, "UINT32")
    wide("below", -(2**31) - 1, "INT64")
    wide("above", 2**64 - 1, "UINT64")
    wide("flag", True, "BOOL")
    wide("text", "é", "STRING")
    wide("double", 1e300, "FLOAT64")
    wide("single", 0.5, "FLOAT32")
    wide("types", [1, -3], "ARRAY", "INT32")
    wide("ids", [1, 2**32 - 1], "ARRAY", "UINT32")
    wide("mixed", [-1, 2**40], "ARRAY", "INT64")
    wide("scores", [0.1, -2.0], "ARRAY", "FLOAT64")
    wide("texts", ["", "b"], "ARRAY", "STRING")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write_vocabulary(GGUFFile(tmp_path / "wide.gguf"), tmp_path / "again.gguf")
    assert GGUFFile(tmp_path / "again.gguf").metadata.items() >= values.items()

    def failing(*_: Any) -> None:
        raise CheckpointError("no vocabulary")

    monkeypatch.setattr(converting, "write_vocabulary", failing)
    monkeypatch.setattr(converting.orbax, "write", lambda *_: pytest.fail("weights came first"))
    with pytest.raises(CheckpointError, match="no vocabulary"):
        converting.convert(path, tmp_path / "out")


# --- kept as they are stored -------------------------------------------------------------------------------

PROMPT = np.random.default_rng(2).integers(0, 64, 24)
SIZES = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
SIZES |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}


def quantized_llama(path: Path, kinds: dict[str, str], default: str) -> Path:
    """Writes a random Llama of two layers whose matrices are of ggml's types."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)

    def add(name: str, shape: tuple[int, int], kind: str) -> None:
        values = rng.normal(size=shape).astype(np.float32) / 8
        raw_dtype = gguf.GGMLQuantizationType[kind]
        if kind == "F32":
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, raw_dtype), raw_dtype=raw_dtype)

    add("token_embd.weight", (64, 64), kinds.get("token_embd", "F32"))
    add("output.weight", (64, 64), kinds.get("output", "F32"))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    for layer in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(64, np.float32))
        for name, shape in SIZES.items():
            add(f"blk.{layer}.{name}.weight", shape, kinds.get(name, default))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised_logits(path: Path) -> np.ndarray:
    """Those of the NumPy model with every weight as the gguf package dequantises it."""
    checkpoint, mesh = open_checkpoint(path), make_mesh(1)
    weights = {}
    for parameter in parameters(abstract_decoder(checkpoint.config, mesh, F32), mesh):
        for source, shape in parameter.layout.canonical_shapes().items():
            name = parameter.canonical(source)
            weights[name] = checkpoint.source.read(name, tuple(slice(0, size) for size in shape))
    return reference.logits(checkpoint.config, weights, PROMPT)


@pytest.mark.parametrize(
    ("kind", "tp"),
    (
        ("Q4_0", 3),
        *(pytest.param(kind, tp, marks=pytest.mark.slow) for kind in ("Q8_0", "Q4_0") for tp in (1, 2, 5, 8)),
    ),
)
def test_types_that_are_kept(kind: str, tp: int, tmp_path: Path) -> None:
    """Values and scales stay as they are stored, in groups that slices and heads cut."""
    path = quantized_llama(tmp_path / "tiny.gguf", {}, kind)
    kept = open_checkpoint(path).source.format_of("layers.0.self_attn.q_proj.weight")
    assert kept is not None and (kept.group, kept.scales.name) == (32, "float16")
    assert kept.values.name == {"Q8_0": "int8", "Q4_0": "int4"}[kind]
    said = find_model(str(path)).stored_bytes  # `plan` counts them so
    assert said == {"Q8_0": 1 + 2 / 32, "Q4_0": 0.5 + 2 / 32}[kind]
    model = Stepwise(str(path), tp, max_length=64)
    stored = {leaf.get_value().dtype.name for _, leaf in nnx.to_flat_state(model.weights)}
    assert stored == {"float32", "int8", "float16"}  # on a CPU 4 bits take a byte
    want = dequantised_logits(path)
    got = np.concatenate([model(PROMPT[:-1].tolist()), model(PROMPT[-1:].tolist())])
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_fused_tensors_of_several_types_are_widened(tmp_path: Path) -> None:
    """Queries, keys and values are one matrix; an embedding stays as it is stored if that is asked for."""
    kinds = {"attn_v": "Q8_0", "ffn_up": "Q4_1", "token_embd": "Q8_0", "output": "Q8_0"}
    path = quantized_llama(tmp_path / "tiny.gguf", kinds, "Q4_0")
    checkpoint, mesh = open_checkpoint(path), make_mesh(2)
    layers = {f"layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")}
    for head, ends in ((False, set()), (True, {"embed_tokens", "lm_head"})):
        model = abstract_decoder(
            checkpoint.config, mesh, F32, format_of=checkpoint.source.format_of, quantize_head=head
        )
        kept = {one.name for one in parameters(model, mesh) if one.is_quantized}
        assert kept == {f"{name}.weight.values" for name in layers | ends}
    want = dequantised_logits(path)
    got = Stepwise(str(path), 3, max_length=64, quantize_head=True)(PROMPT.tolist())
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    ("kind", "said"), (("Q8_0", r"nan at \[0, 0\]"), ("Q5_0", r"the value at \[0, 0\] is nan"))
)
def test_a_scale_that_is_no_number(kind: str, said: str, tmp_path: Path) -> None:
    """Whether its type is kept as it is stored or widened."""
    path = quantized_llama(tmp_path / "tiny.gguf", {}, kind)
    start = GGUFFile(path)._tensors["blk.1.ffn_down.weight"].start
    data = bytearray(path.read_bytes())
    data[start : start + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"'blk\.1\.ffn_down\.weight' .* no finite number: {said}$"):
        Stepwise(str(path), 2, max_length=64)
