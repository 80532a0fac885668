"""Programs of TPUs, compiled ahead of time where libtpu is installed."""

from __future__ import annotations

import math
import re

import pytest
from ahead_of_time import (
    LLAMA3_8B,
    SMOLLM2,
    check,
    compiled,
    compiled_text,
    first_layers,
    moves,
    needs_tpu,
)
from conftest import GOLDENS

from tpjax.checkpoints.opening import read_config
from tpjax.cli.app import main
from tpjax.config import KVDtype
from tpjax.errors import ConfigError
from tpjax.inspect.budget import measured
from tpjax.inspect.program import abstract_runner, compile_program
from tpjax.inspect.topology import parse_topology
from tpjax.planning import published
from tpjax.planning.published import published_config
from tpjax.runtime.limits import ChunkShape
from tpjax.runtime.programs import ProgramSpec


@needs_tpu
@pytest.mark.parametrize("tp", (3, 5, 8))
def test_tpu_smollm2(tp: int, capfd: pytest.CaptureFixture[str]) -> None:
    program = compiled(SMOLLM2, "v5e:2x4", tp, "decode")
    check(program, SMOLLM2, tp, capfd.readouterr().err)
    assert program.cache_copies == 0  # heads of 64 lie in rows of 128


@pytest.mark.parametrize(
    ("name", "tp", "kind"),
    (
        ("v5e:2x4", 1, "decode"),
        ("v5e:2x4", 3, "decode"),
        ("v5e:2x4", 5, "mixed"),
        ("v5e:2x4", 8, "decode"),
        ("v5e:2x4", 8, "prefill"),
        ("v6e:2x4", 8, "decode"),
        ("v6e:2x4", 3, "prefill"),
        ("v5p:2x2x1", 4, "mixed"),
        ("v4:2x2x1", 4, "decode"),
        ("tpu7x:2x2x1", 8, "mixed"),
    ),
)
@needs_tpu
def test_kernel(name: str, tp: int, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One call for each group of tokens in place of a loop over pages, and one for each buffer of a chunk."""
    program, text = compiled_text(LLAMA3_8B, name, tp, kind, "tpu")
    check(program, LLAMA3_8B, tp, capfd.readouterr().err)
    assert (program.cache_copies, program.weight_copies) == (0, 0)
    assert "page_walk" not in text
    found = program.estimate
    assert found is not None
    calls = {"decode": 1, "prefill": 1 + 2, "mixed": 2 + 2}
    assert found.kernels == calls[kind] * LLAMA3_8B.num_layers
    if kind == "decode":  # little more than weights, and two pages of each sequence
        bandwidth = found.traffic_bytes / found.traffic_s
        assert 1.0 <= (found.kernel_bytes + found.traffic_bytes) / bandwidth / found.memory_bound_s < 1.2


@pytest.mark.parametrize(
    ("name", "tp", "kind", "kv_dtype"),
    (
        ("v6e:2x4", 4, "decode", "auto"),
        pytest.param("v5e:2x4", 2, "mixed", "auto", marks=pytest.mark.slow),
        pytest.param("v5e:2x4", 4, "decode", "int8", marks=pytest.mark.slow),
    ),
)
@needs_tpu
def test_heads_narrower_than_lanes(name: str, tp: int, kind: str, kv_dtype: KVDtype) -> None:
    """Tokens of gpt-oss' heads of 64 are written in place; XLA would turn the whole cache around and back."""
    chips, config = parse_topology(name), published_config("gpt-oss-20b").of_layers(range(2))
    runner = abstract_runner(
        config, chips, tp, max_slots=16, max_model_len=8192, attention="tpu", kv_dtype=kv_dtype
    )
    chunks = None if kind == "decode" else ChunkShape(1, 128)
    spec = ProgramSpec("decode" if kind == "decode" else "step", 16, chunks, greedy=True)
    program = compile_program(runner, chips, kind, spec)
    assert program.aliased_cache_buffers == program.cache_buffers
    assert (program.cache_copies, program.cache_write_backs) == (0, 0)


@pytest.mark.parametrize(
    ("name", "tp", "kind"),
    (
        ("v5e:2x4", 8, "decode"),
        pytest.param("v5e:2x4", 3, "mixed", marks=pytest.mark.slow),  # a last block that is not full
        pytest.param("v6e:2x4", 8, "prefill", marks=pytest.mark.slow),
    ),
)
@needs_tpu
def test_tpu_product_in_int4(name: str, tp: int, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A call for each matrix of a layer; no wide weight is written, and the estimate counts the calls."""
    program, text = compiled_text(LLAMA3_8B, name, tp, kind, "tpu", "int4")
    check(program, LLAMA3_8B, tp, capfd.readouterr().err)
    assert program.cache_copies == 0 and program.weight_copy_bytes < 2**20  # scales
    assert len(re.findall(r"quantized_product[.\d]* = ", text)) == 4 * LLAMA3_8B.num_layers
    made = {math.prod(map(int, one.split(","))) for one in re.findall(r"= bf16\[([\d,]+)\]", text)}
    assert 4096 * 2 * 14336 // tp not in made
    stored = LLAMA3_8B.num_layers * 218_103_808 // 2 // tp  # elements of a layer, two a byte
    assert program.estimate is not None and program.estimate.kernel_bytes > stored


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tp", "kind"),
    (("v5e:2x4", 8, "mixed"), ("v6e:2x4", 3, "prefill"), ("v6e:2x4", 5, "decode"), ("v5p:2x2x1", 4, "mixed")),
)
@needs_tpu
def test_kernel_of_latents(name: str, tp: int, kind: str) -> None:
    """All heads of a device share one latent, in decode rows and in prompt chunks: nothing walks pages."""
    config = first_layers("deepseek-v3", first_k_dense_replace=2)
    program, text = compiled_text(config, name, tp, kind, "tpu")
    assert program.aliased_cache_buffers == program.cache_buffers == config.num_layers
    assert (program.cache_copies, program.cache_write_backs, program.weight_copies) == (0, 0, 0)
    assert "page_walk" not in text
    reduces = measured(program.collectives)["all_reduces"]
    assert reduces == program.budget["all_reduces"] == 2 * config.num_layers + 1
    assert program.estimate is not None
    calls = {"decode": 1, "prefill": 1 + 1, "mixed": 2 + 1}
    assert program.estimate.kernels == calls[kind] * config.num_layers


@pytest.mark.parametrize(
    ("model", "name", "tp", "kind"),
    (
        ("gemma-2-2b", "v5e:2x4", 4, "decode"),
        ("gemma-2-2b", "v5e:2x4", 4, "mixed"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("gemma-2-27b", "v6e:2x4", 8, "decode"),
                ("gemma-2-27b", "v6e:2x4", 8, "mixed"),
            )
        ),
    ),
)
@needs_tpu
def test_page_groups_share_buffers_in_place(model: str, name: str, tp: int, kind: str) -> None:
    """Layers of both groups write and read each buffer, of one KV head a device and of several, by XLA."""
    config = published.published_config(model).of_layers(range(4))
    topology = parse_topology(name)
    # a cache that does not fit on chip
    runner = abstract_runner(config, topology, tp, max_slots=64, max_model_len=8192, sequence_parallel="off")
    assert len(runner.limits.windows) == 2
    chunks = None if kind == "decode" else ChunkShape(1, 128)
    spec = ProgramSpec("decode" if kind == "decode" else "step", 8, chunks, greedy=True)
    program = compile_program(runner, topology, kind, spec)
    assert program.aliased_cache_buffers == program.cache_buffers == 4  # keys and values of two entries
    assert (program.cache_copies, program.cache_write_backs) == (0, 0)


@needs_tpu
def test_each_stage_of_a_pipeline() -> None:
    """On the chips of two hosts each: its own layers, and of the collectives what it has to do."""
    chips, config = parse_topology("v5e:4x4"), read_config(GOLDENS / "deepseek_v3")
    runner = abstract_runner(config, chips, 8, pp=2, max_model_len=256)
    ids = [{device.id for device in stage.mesh.devices.flat} for stage in runner.stages]
    assert [len(one) for one in ids] == [8, 8] and not ids[0] & ids[1]
    spec = ProgramSpec("decode", 4, greedy=True)
    programs = [compile_program(stage, chips, "decode", spec) for stage in runner.stages]
    for stage, program in zip(runner.stages, programs, strict=True):
        assert program.fits and program.cache_buffers == len(stage.layers)
        assert program.aliased_cache_buffers == program.cache_buffers
        assert (program.cache_copies, program.cache_write_backs) == (0, 0)
        assert measured(program.collectives)["all_reduces"] <= program.budget["all_reduces"]
    layers = [len(stage.layers) for stage in runner.stages]
    budgets = [program.budget["all_reduces"] for program in programs]
    assert budgets == [2 * layers[0] + 1, 2 * layers[1]]  # the first embeds


@needs_tpu
def test_a_model_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two vocabularies of 12 GB; a v5e has 16."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 128, "intermediate_size": 256}
    config = {**published._published()["llama-3-8b"]["config"], **sizes, "vocab_size": 1_500_000}
    monkeypatch.setitem(published._published(), "llama-3-wide", {"id": "none/wide", "config": config})
    options = ["--topology", "v5e:2x4", "--tp", "1", "--max-model-len", "128"]
    assert main(["explain", "llama-3-wide", *options]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"^decode does not fit: it needs 23\.1 GiB on each device, of 14\.9 GiB; failed\s+to\s+compile:\s+"
        r"RESOURCE_EXHAUSTED: ",
        out,
        re.MULTILINE,
    )


@needs_tpu
def test_more_than_there_are() -> None:
    with pytest.raises(ConfigError, match="tp=9 is more than the 8 devices of v5e:2x4"):
        parse_topology("v5e:2x4").mesh(9)


@needs_tpu
def test_sequence_parallel_prefill_on_tpus() -> None:
    """Each block gathers what it reads once and scatters its sum; so does the embedding."""
    assert moves("v5e:2x4", LLAMA3_8B, "auto") == {"all-gather": 4, "reduce-scatter": 5}
    assert moves("v5e:2x4", LLAMA3_8B, "off") == {"all-reduce": 5}
