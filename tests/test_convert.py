"""Quantised conversions: the numbers of ``quantize=`` at load, at any tp, in a layout that others read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from flax import nnx
from safetensors.numpy import load_file

from tpjax import LLM
from tpjax.checkpoints import digests, shards
from tpjax.checkpoints.convert import TargetFormat, convert
from tpjax.checkpoints.load import load_decoder
from tpjax.checkpoints.opening import open_checkpoint, read_config
from tpjax.checkpoints.parameters import abstract_decoder
from tpjax.cli.app import main
from tpjax.config import Quantize
from tpjax.errors import CheckpointError, ConfigError
from tpjax.layers.weights import FORMATS
from tpjax.mesh import make_mesh

F32 = jnp.dtype("float32")
# Fused projections, matrices stored [in, out], offsets of norms, experts apart and in a stack, latents.
FAMILIES = ("llama", "phi3", "gpt2", "gemma3", "qwen2_moe", "gpt_oss", "deepseek_v3")
IMPOSSIBLE = {(name, "safetensors") for name in ("gpt2", "gpt_oss")}  # no matrices [out, in]
FAST = {("llama", "int4", "safetensors"), ("phi3", "int8", "safetensors"), ("gpt2", "fp8", "orbax")}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 12 inputs in place of 128, which no slice or head is a multiple of."""
    monkeypatch.setitem(FORMATS, "int4", replace(FORMATS["int4"], group=12))


def arrays(path: Path, tp: int, quantize: Quantize | None = None) -> dict[str, np.ndarray]:
    """Every parameter of a loaded model, by name."""
    checkpoint, mesh = open_checkpoint(path), make_mesh(tp)
    model = abstract_decoder(checkpoint.config, mesh, F32, quantize, format_of=checkpoint.source.format_of)
    model = load_decoder(checkpoint, model, mesh, progress=False)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, key)): np.asarray(leaf.get_value()) for key, leaf in flat}


def source_of(name: str, path: Path) -> Path:
    """A golden, or one of gpt-oss's shape without its MXFP4, which is not rounded once more."""
    if name != "gpt_oss":
        return GOLDENS / name
    convert(GOLDENS / name, path)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "target_format"),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for name in FAMILIES
        for kind in ("int8", "fp8", "int4")
        for target_format in ("orbax", "safetensors")
        if (case := (name, kind, target_format)) and (name, target_format) not in IMPOSSIBLE
    ],
)
def test_what_was_rounded_before_is_what_is_rounded_at_load(
    name: str, kind: Quantize, target_format: TargetFormat, tmp_path: Path
) -> None:
    """Bit by bit, at every tp, from a directory that needs no other."""
    original = source_of(name, tmp_path / "original")
    convert(original, tmp_path / "out", quantize=kind, target_format=target_format)
    assert read_config(tmp_path / "out") == read_config(original)
    for tp in (3,) if (name, kind, target_format) in FAST else range(1, 9):
        want, got = arrays(original, tp, kind), arrays(tmp_path / "out", tp)
        assert got.keys() == want.keys()
        for key, values in want.items():
            assert got[key].dtype == values.dtype, (tp, key)
            assert got[key].tobytes() == values.tobytes(), (tp, key)


@pytest.mark.parametrize("target_format", ("orbax", pytest.param("safetensors", marks=pytest.mark.slow)))
def test_tokens(target_format: TargetFormat, tmp_path: Path) -> None:
    convert(GOLDENS / "llama", tmp_path / "out", quantize="int8", target_format=target_format)
    tokens = []
    settings: tuple[tuple[Path, Quantize | None], ...] = (
        (GOLDENS / "llama", "int8"),
        (tmp_path / "out", None),
    )
    for path, quantize in settings:
        with LLM(path, tp=2, quantize=quantize, max_model_len=64, max_slots=1) as llm:
            (one,) = llm.generate([[5, 6, 7]], max_tokens=24, temperature=0, ignore_eos=True)
        tokens.append(one.token_ids)
    assert tokens[0] == tokens[1]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards, an index, the configuration with what the field calls its fields, and a manifest."""
    target = tmp_path / "out"
    command = ["convert", str(GOLDENS / "llama"), str(target), "--quantize", "int4"]
    assert main([*command, "--format", "safetensors", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    files = ["MANIFEST.sha256", "config.json", "model.safetensors"]
    assert sorted(path.name for path in target.iterdir()) == files
    config = json.loads((target / "config.json").read_text())
    original = json.loads((GOLDENS / "llama" / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == {**original, "dtype": "bfloat16"}
    assert settings["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": 12,
        "symmetric": True,
        "dynamic": False,
    }
    assert settings["ignore"] == ["lm_head", "model.embed_tokens"]
    tensors = load_file(target / "model.safetensors")
    assert {x.dtype.name for name, x in tensors.items() if "norm" in name} == {"bfloat16"}
    o_proj = {name.split(".")[-1]: x for name, x in tensors.items() if "layers.0.self_attn.o_proj" in name}
    assert o_proj.keys() == {"weight_packed", "weight_scale", "weight_shape"}
    assert o_proj["weight_packed"].dtype == np.int32


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    convert(GOLDENS / "llama", tmp_path / "out", quantize="int8", target_format="safetensors")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {file: load_file(tmp_path / "out" / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(x.nbytes for one in held.values() for x in one.values())
    assert arrays(tmp_path / "out", 2).keys() == arrays(GOLDENS / "llama", 2, "int8").keys()


def test_a_changed_byte_is_refused_by_name(tmp_path: Path) -> None:
    convert(GOLDENS / "llama", tmp_path / "out", quantize="int8", target_format="safetensors")
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or edited"):
        open_checkpoint(tmp_path / "out")
    (tmp_path / "out" / digests.MANIFEST).write_text("of someone else\n")
    open_checkpoint(tmp_path / "out")


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as error:
        convert(*args, **kwargs)
    return str(error.value)


def test_what_cannot_be_written(
    tmp_path: Path, smollm2_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, gpt2, llama = tmp_path / "out", GOLDENS / "gpt2", GOLDENS / "llama"
    assert refusal(gpt2, out, quantize="int8", target_format="safetensors") == (
        f"{gpt2}: tensor 'transformer.h.0.mlp.c_proj.weight' of shape [46, 36] is not stored as a matrix "
        "[out, in], as compressed-tensors has it: use target_format='orbax'"
    )
    assert refusal(smollm2_gguf, out, quantize="int8", target_format="safetensors") == (
        f"{smollm2_gguf} is a GGUF file: only a Hugging Face directory can be written as safetensors; "
        "target_format='orbax' takes any"
    )
    wrong = {"quantize": None, "target_format": "safetensors"}
    assert "target_format='safetensors' needs quantize" in refusal(llama, out, **wrong)
    assert "target_format='pickle' is not supported" in refusal(llama, out, target_format="pickle")
    assert "quantize='int3' is not supported" in refusal(llama, out, quantize="int3")
    convert(llama, tmp_path / "int8", quantize="int8")
    message = refusal(tmp_path / "int8", out, quantize="int4")
    assert "would round weights that are quantised already" in message
    assert main(["convert", str(llama), str(out), "--format", "safetensors"]) == 2
    assert "--format safetensors needs --quantize: int8, fp8 or int4" in capsys.readouterr().err
    assert not out.exists()


def test_what_is_quantised_can_be_dequantised(tmp_path: Path) -> None:
    convert(GOLDENS / "llama", tmp_path / "int8", quantize="int8")
    convert(tmp_path / "int8", tmp_path / "wide")
    narrow, wide = (open_checkpoint(tmp_path / name) for name in ("int8", "wide"))
    assert wide.quantization is None and narrow.quantization is not None
    name, box = "layers.0.mlp.down_proj.weight", (slice(0, 48), slice(0, 20))
    assert np.array_equal(narrow.source.read(name, box), wide.source.read(name, box))


# --- read by others ----------------------------------------------------------------------------------------


def of_whole_groups(path: Path) -> Path:
    """A Llama whose sizes are multiples of 12: compressed-tensors takes no shorter last group."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("int8", "fp8", "int4"))
def test_compressed_tensors_reads_the_same_weights(kind: Quantize, tmp_path: Path) -> None:
    """Those that tpjax reads; bfloat16 scales make a bfloat16 weight there."""
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="pip install -e '.[parity]'")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from safetensors.torch import load_file as load_torch

    original = of_whole_groups(tmp_path / "original")
    convert(original, tmp_path / "out", quantize=kind, target_format="safetensors")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationScheme(**settings["config_groups"]["group_0"])
    compressor = compressors.BaseCompressor.get_value_from_registry(settings["format"])
    tensors = load_torch(tmp_path / "out" / "model.safetensors")
    source = open_checkpoint(tmp_path / "out").source
    modules = {name.rsplit(".", 1)[0] for name in tensors if name.endswith("weight_scale")}
    assert len(modules) == 14
    for module in modules:
        parts = {name.rsplit(".", 1)[1]: x for name, x in tensors.items() if name.rsplit(".", 1)[0] == module}
        parts["weight_scale"] = parts["weight_scale"].to(torch.float32)
        want = compressor.decompress(parts, scheme)["weight"].numpy()
        name = f"{module.removeprefix('model.')}.weight"
        got = source.read(name, tuple(slice(0, size) for size in want.shape))
        np.testing.assert_array_equal(got, want, err_msg=module)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("int8", "fp8", "int4"))
def test_transformers_reads_the_same_model(kind: Quantize, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[parity]'")
    pytest.importorskip("compressed_tensors", reason="pip install -e '.[parity]'")
    original = of_whole_groups(tmp_path / "original")
    convert(original, tmp_path / "out", quantize=kind, target_format="safetensors")
    tokens = np.random.default_rng(3).integers(0, 64, 24).tolist()
    with LLM(tmp_path / "out", tp=2, max_model_len=64, max_slots=1) as llm:
        got = llm.logits(tokens)
    with LLM(original, tp=1, max_model_len=64, max_slots=1) as llm:
        assert np.abs(llm.logits(tokens) - got).max() > 1e-3 * np.abs(got).max()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0].float().numpy()
    tolerance = 1e-4 if kind != "int4" else 2e-2  # whose weights transformers rounds to bfloat16
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()
