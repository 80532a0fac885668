"""Conversion to Orbax directories: the same model, tokenizer included, at any tp."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tpjax import LLM
from tpjax.checkpoints.convert import convert, write_vocabulary
from tpjax.checkpoints.gguf import GGUFFile
from tpjax.checkpoints.load import open_checkpoint, read_config
from tpjax.checkpoints.orbax import OrbaxCheckpoint
from tpjax.cli.app import main
from tpjax.errors import CheckpointError
from tpjax.text.tokenizer import load_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("orbax") / "llama"
    convert(GOLDENS / "llama", target)
    return target


@pytest.mark.parametrize("name", ("gemma3", "gpt2", "gpt_oss", "deepseek_v3", "phi3"))
def test_a_converted_model_is_the_same(name: str, tmp_path: Path) -> None:
    """Sliding windows and rope dictionaries, transposed, quantised, stacked, latent, fused and LongRoPE."""
    convert(GOLDENS / name, tmp_path / "out")
    assert read_config(tmp_path / "out") == read_config(GOLDENS / name)
    there, here = (
        LLM(path, tp=3, max_model_len=64, max_slots=1).logits(TOKENS)
        for path in (GOLDENS / name, tmp_path / "out")
    )
    np.testing.assert_array_equal(here, there)


def test_any_box_can_be_read(llama: Path) -> None:
    files, source = OrbaxCheckpoint(llama), open_checkpoint(GOLDENS / "llama").source
    whole = source.read("layers.1.mlp.down_proj.weight", (slice(None), slice(None)))
    box = (slice(3, 9), slice(10, 31))
    read = files.read("layers.1.mlp.down_proj.weight", box)
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, whole[box])
    np.testing.assert_array_equal(files.read("layers.1.mlp.down_proj.weight"), whole)
    with pytest.raises(CheckpointError, match="no_such"):
        files.read("no_such")


def test_dtype(tmp_path: Path) -> None:
    convert(GOLDENS / "llama", tmp_path / "half", jnp.dtype("bfloat16"))
    assert {info.dtype for info in OrbaxCheckpoint(tmp_path / "half").tensors.values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }


def test_the_vocabulary_of_a_gguf_file_comes_along(
    smollm2_gguf: Path, gemma3_gguf: Path, tmp_path: Path
) -> None:
    text = "Hello 🌍, 你好!\n\t12345 <|im_end|><end_of_turn>"
    for path in (smollm2_gguf, gemma3_gguf):
        folder = tmp_path / path.stem
        folder.mkdir()
        write_vocabulary(GGUFFile(path), folder / "tokenizer.gguf")
        kept, original = load_tokenizer(folder), load_tokenizer(path)
        assert kept is not None and original is not None
        assert kept.encode(text) == original.encode(text)
        assert kept.eos_ids == original.eos_ids
        assert kept.chat_template == original.chat_template


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "llama"
    assert main(["convert", str(GOLDENS / "llama"), str(target), "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model_config.json", "weights"]
    assert main(["convert", str(GOLDENS / "llama"), str(target)]) == 2
    assert "exists" in capsys.readouterr().err


def test_what_is_wrong_is_named(llama: Path, tmp_path: Path) -> None:
    raw = json.loads((llama / "model_config.json").read_text())

    def refused(match: str, **changes: object) -> None:
        (tmp_path / "model_config.json").write_text(json.dumps(raw | changes))
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(tmp_path)

    refused("no weights/")
    refused("format 2; this tpjax reads 1", format=2)
    refused("both have colour", colour="blue")
    (tmp_path / "model_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a configuration"):
        open_checkpoint(tmp_path)
    (tmp_path / "model_config.json").write_text(json.dumps(raw))
    (tmp_path / "weights").mkdir()
    with pytest.raises(CheckpointError, match="Orbax cannot read it"):
        open_checkpoint(tmp_path)


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        convert(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(GOLDENS / "llama", tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
