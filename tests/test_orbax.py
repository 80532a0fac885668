"""Conversion to Orbax directories: the same model, tokenizer included, at any tp."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tpjax import LLM
from tpjax.checkpoints import digests, orbax
from tpjax.checkpoints.convert import convert, write_vocabulary
from tpjax.checkpoints.gguf import GGUFFile
from tpjax.checkpoints.opening import open_checkpoint, read_config
from tpjax.checkpoints.orbax import OrbaxCheckpoint
from tpjax.cli.app import main
from tpjax.errors import CheckpointError
from tpjax.text.loading import load_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("orbax") / "llama"
    convert(GOLDENS / "llama", target)
    return target


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    ("gemma3", "gpt2", "gpt_oss", *(pytest.param(name, marks=SLOW) for name in ("deepseek_v3", "phi3"))),
)
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
    full = source.read("layers.1.mlp.down_proj.weight", (slice(None), slice(None)))
    box = (slice(3, 9), slice(10, 31))
    read = files.read("layers.1.mlp.down_proj.weight", box)
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, full[box])
    np.testing.assert_array_equal(files.read("layers.1.mlp.down_proj.weight"), full)
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
    names = ["MANIFEST.sha256", "config.json", "model_config.json", "weights"]
    assert sorted(path.name for path in target.iterdir()) == names
    assert list(target.parent.iterdir()) == [target]  # no lock, nothing partial
    assert main(["convert", str(GOLDENS / "llama"), str(target)]) == 2
    assert "exists" in capsys.readouterr().err


def test_what_is_wrong_is_named(llama: Path, tmp_path: Path) -> None:
    raw = json.loads((llama / "model_config.json").read_text())

    def rejects(match: str, **changes: object) -> None:
        (tmp_path / "model_config.json").write_text(json.dumps(raw | changes))
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(tmp_path)

    rejects("no weights/")
    rejects("format 3; this tpjax reads 1 and 2", format=3)
    rejects("both have colour", colour="blue")
    (tmp_path / "model_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a configuration"):
        open_checkpoint(tmp_path)
    (tmp_path / "model_config.json").write_text(json.dumps(raw))
    (tmp_path / "weights").mkdir()
    with pytest.raises(CheckpointError, match="Orbax cannot read it"):
        open_checkpoint(tmp_path)


def test_format_1_is_read(llama: Path, tmp_path: Path) -> None:
    """One object for all fields, under the names they had before they were grouped."""
    raw = json.loads((llama / "model_config.json").read_text())
    attention, rope, mlp, norm = (raw.pop(group) for group in ("attention", "rope", "mlp", "norm"))
    old_names = {"softcap": "attn_softcap", "bias": "attention_bias", "out_bias": "attention_out_bias"}
    old_names |= {"sinks": "attention_sinks"}
    raw |= {"format": 1, "gated_mlp": mlp["gated"], "activation": mlp["activation"], "mlp_bias": mlp["bias"]}
    raw |= {"intermediate_size": mlp["intermediate_size"], "rotary_dim": rope["rotary_dim"]}
    raw |= {"rope": rope["full"], "rope_sliding": rope["sliding"], "rope_layers": rope["layers"]}
    raw |= {"norm": norm["kind"], **{f"norm_{name}": norm[name] for name in ("eps", "bias", "offset")}}
    raw |= {old_names.get(name, name): value for name, value in attention.items()}
    (tmp_path / "model_config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == read_config(llama)


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        convert(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(GOLDENS / "llama", tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


# --- digests -----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converted directory with a tokenizer's file, and no memory of what was checked."""
    monkeypatch.setenv("TPJAX_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "llama", source)
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
    convert(source, tmp_path / "copy")
    open_checkpoint(tmp_path / "copy")
    return tmp_path / "copy"


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("keep_times", (False, True))
def test_a_flipped_bit_anywhere_is_refused_by_name(copy: Path, keep_times: bool) -> None:
    """In weights, Orbax's own files, the configuration, the tokenizer's and the manifest."""
    draw = random.Random(0)
    names = {path.name for path in files_of(copy)}
    assert {"MANIFEST.sha256", "model_config.json", "config.json", "tokenizer_config.json"} < names
    assert any("weights" in path.parts for path in files_of(copy))
    for path in files_of(copy):
        data, times = path.read_bytes(), path.stat()
        for at in {0, len(data) - 1, *(draw.randrange(len(data)) for _ in range(6))}:
            damaged = bytearray(data)
            damaged[at] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            if keep_times:
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            with pytest.raises(CheckpointError) as error:
                open_checkpoint(copy)
            assert str(error.value).startswith(f"{path}: damaged"), (path, at)
            assert "\n" not in str(error.value)
        path.write_bytes(data)
    open_checkpoint(copy)


def test_configuration_alone_is_checked_too(copy: Path) -> None:
    path = copy / "model_config.json"
    path.write_text(path.read_text().replace('"eps": ', '"eps": 1'))
    with pytest.raises(CheckpointError, match=r"model_config\.json: damaged or edited"):
        read_config(copy)


def test_sha256sum_reads_the_manifest(copy: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum, of the GNU coreutils")
    done = subprocess.run(["sha256sum", "--check", "--quiet", "MANIFEST.sha256"], cwd=copy, timeout=60)
    assert done.returncode == 0


def test_missing_extra_and_unlisted_files(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "README.md").write_text("harmless")
    (copy / "weights" / ".DS_Store").write_text("harmless")
    with caplog.at_level(logging.WARNING):
        open_checkpoint(copy)
        assert caplog.messages == []
        (copy / "chat_template.jinja").write_text("{{ messages }}")
        open_checkpoint(copy)
    assert caplog.messages == [
        f"{copy / 'chat_template.jinja'} is used, and was not there when the directory was written"
    ]
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(copy)
    assert str(error.value) == f"{copy / 'tokenizer_config.json'}: missing, and MANIFEST.sha256 lists it"


def test_a_directory_without_a_manifest_loads_with_a_warning(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copy / "MANIFEST.sha256").unlink()
    with caplog.at_level(logging.WARNING):
        open_checkpoint(copy)
    assert len(caplog.messages) == 1
    assert f"{copy} has no MANIFEST.sha256: its weights are not checked" in caplog.text


def test_files_are_read_once_per_change(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    sha256 = digests.sha256

    def spy(path: Path) -> str:
        read.append(path)
        return sha256(path)

    monkeypatch.setattr(digests, "sha256", spy)
    open_checkpoint(copy)
    listed = [path for path in files_of(copy) if path.name != "MANIFEST.sha256"]
    assert set(read) == set(listed)  # too young to be remembered: they might change within the clock's grain
    monkeypatch.setattr(digests, "_GRAIN_NS", 0)
    open_checkpoint(copy)
    read.clear()
    open_checkpoint(copy)
    assert read == []
    os.utime(copy / "config.json")
    open_checkpoint(copy)
    assert read == [copy / "config.json"]
    read.clear()
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")  # nothing can be remembered: each time all are read
    for _ in range(2):
        read.clear()
        open_checkpoint(copy)
        assert set(read) == set(listed)


# --- several at once ---------------------------------------------------------------------------------------

ROOT = Path(orbax.__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
HOLDER = """
import sys
from pathlib import Path
from tpjax.checkpoints import orbax
with orbax.new_directory(Path(sys.argv[1])) as directory:
    (directory / "half").write_text("written")
    print("writing", flush=True)
    sys.stdin.read()
"""


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    return subprocess.Popen([sys.executable, *arguments], **pipes, **options)  # type: ignore[call-overload]


def start_convert(target: Path) -> subprocess.Popen[str]:
    return start("-m", "tpjax", "convert", str(GOLDENS / "llama"), str(target))


@SLOW
def test_two_at_once_one_wins(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with start_convert(target) as one, start_convert(target) as two:
        said = [process.communicate(timeout=240) for process in (one, two)]
    assert sorted((one.returncode, two.returncode)) == [0, 2], said
    loser = said[one.returncode == 0][1].splitlines()[-1]
    assert loser in (
        f"tpjax: error: {target} is being written by another process",
        f"tpjax: error: {target} exists: name a directory that does not",
    )
    assert list(tmp_path.iterdir()) == [target]
    open_checkpoint(target)


@SLOW
def test_a_target_being_written_is_left_alone_and_a_killed_writer_is_no_obstacle(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with start("-c", HOLDER, str(target), stdin=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "writing\n"
        with start_convert(target) as other:
            out, error = other.communicate(timeout=240)
        assert (other.returncode, out) == (2, "")
        assert error == f"tpjax: error: {target} is being written by another process\n"
        assert (tmp_path / ".out.partial" / "half").read_text() == "written"
        holder.send_signal(signal.SIGKILL)
    assert not target.exists()
    convert(GOLDENS / "llama", target)
    assert list(tmp_path.iterdir()) == [target]
    assert not (target / "half").exists()
    open_checkpoint(target)


FULL = """
import resource, sys
from tpjax.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(["convert", sys.argv[2], sys.argv[3]]))
"""


@pytest.mark.parametrize("limit", (0, 3_000, pytest.param(60_000, marks=SLOW)))
def test_a_full_disk_is_one_line(tmp_path: Path, limit: int) -> None:
    """A limit on files stands for the disk: the configuration does not fit, or Orbax's files do not."""
    target = tmp_path / "out"
    with start("-c", FULL, str(limit), str(GOLDENS / "gemma3"), str(target)) as process:
        out, error = process.communicate(timeout=240)
    assert (process.returncode, out) == (2, "")
    assert error == f"tpjax: error: {target}: cannot be written: File too large\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ("/proc", "/proc/nowhere", "file", "file/deeper"))
def test_no_place_to_write_is_one_line(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / folder / "out"
    assert main(["convert", str(GOLDENS / "llama"), str(target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tpjax: error: {target}: cannot be written: ") and error.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="out: cannot be written: Permission denied"):
        convert(GOLDENS / "llama", tmp_path / "out")
    tmp_path.chmod(0o700)
