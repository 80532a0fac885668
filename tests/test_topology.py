"""Programs of TPUs and GPUs: recorded, and compiled ahead of time where their compilers are installed."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import GOLDENS
from rich.console import Console

from tpjax.checkpoints.opening import read_config
from tpjax.checkpoints.parameters import parameters
from tpjax.cli.app import main
from tpjax.config import AttentionBackend, KVDtype, ModelConfig, Quantize, SequenceParallel
from tpjax.errors import ConfigError
from tpjax.families.registry import config_from_hf
from tpjax.hardware import USABLE_MEMORY
from tpjax.inspect import doctor, topology
from tpjax.inspect.budget import measured
from tpjax.inspect.collectives import Collective, find_collectives, summarise
from tpjax.inspect.copies import copied_arrays, write_backs
from tpjax.inspect.estimate import Estimate
from tpjax.inspect.hlo import Module
from tpjax.inspect.program import abstract_runner, compile_program
from tpjax.inspect.topology import extra_problem, parse_topology
from tpjax.inspect.topology_report import ProgramReport, TopologyReport
from tpjax.planning import published
from tpjax.planning.published import published_config
from tpjax.runtime.limits import ChunkShape
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner

HLO = Path(__file__).parent / "data" / "hlo"
BUDGET = {**measured(()), "rule": "none"}


def recorded(name: str) -> str:
    return gzip.decompress((HLO / f"{name}.txt.gz").read_bytes()).decode()


def llama(hidden: int, width: int, heads: int, kv_heads: int, vocab: int, layers: int) -> ModelConfig:
    return config_from_hf(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "tie_word_embeddings": hidden < 1024,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
        }
    )


# --- recorded: three layers of SmolLM2, batch 8, tp=8 ------------------------------------------------------


@pytest.mark.parametrize("chip", ("v5e", "h200"))
def test_recorded_decode(chip: str) -> None:
    found = summarise(find_collectives(recorded(f"{chip}_decode")))
    always = [(c.kind, c.count, c.bytes, c.group_size) for c in found if not c.conditional]
    assert always == [
        ("all-reduce", 3, 8 * 576 * 2, 8),  # attention
        ("all-reduce", 3, 8 * 576 * 2, 8),  # MLP
        ("all-reduce", 1, 8 * 576 * 2, 8),  # embedding
        ("all-gather", 1, 8 * 2 * 8 * 4, 8),  # the likeliest token of each device
    ]
    lines = [c.source.split(":")[0] for c in found if not c.conditional]
    assert lines == ["model.py"] * 3 + ["sampling.py"]
    assert len({c.source for c in found if c.source.startswith("model.py")}) == 3
    assert max(c.bytes for c in found if c.conditional) <= 8 * 20 * 8 * 4 * 2  # top 20 of each device


def test_recorded_decode_copies() -> None:
    """A TPU's layout of pages of 64-wide heads is not the one its loops read; a GPU's is."""
    assert [
        sum(sorted(array.dims)[-3:] == [64, 128, 129] for array in copied_arrays(Module(recorded(name))))
        for name in ("v5e_decode", "h200_decode")
    ] == [12, 0]


def test_write_backs() -> None:
    """Written in full, from the on-chip memory of a TPU or by a fusion; not in place, and not copied."""
    hlo = """HloModule m, is_scheduled=true

%in_place (p: bf16[9,128,64], n: bf16[1,128,64], i: s32[]) -> bf16[9,128,64] {
  %p = bf16[9,128,64]{2,1,0} parameter(0)
  %n = bf16[1,128,64]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = bf16[9,128,64]{2,1,0} dynamic-update-slice(%p, %n, %i, %i, %i)
}

%full (q: bf16[9,128,64]) -> bf16[9,128,64] {
  %q = bf16[9,128,64]{2,1,0} parameter(0)
  ROOT %m = bf16[9,128,64]{2,1,0} multiply(%q, %q)
}

%retiled (w: s8[128,64]) -> s8[128,64] {
  %w = s8[128,64]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %t = s8[128,64]{1,0:T(8,128)(4,1)} copy(%w)
}

ENTRY %main (cache: bf16[9,128,64], new: bf16[1,128,64], at: s32[]) -> bf16[9,128,64] {
  %cache = bf16[9,128,64]{2,1,0} parameter(0)
  %new = bf16[1,128,64]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %near = (bf16[9,128,64]{2,1,0:S(1)}, bf16[9,128,64]{2,1,0}, u32[]{:S(2)}) copy-start(%cache)
  %back = (bf16[9,128,64]{2,1,0}, bf16[9,128,64]{2,1,0:S(1)}, u32[]{:S(2)}) copy-start(%near)
  %updated = bf16[9,128,64]{2,1,0} fusion(%cache, %new, %at), kind=kLoop, calls=%in_place
  %squared = bf16[9,128,64]{2,1,0} fusion(%cache), kind=kLoop, calls=%full
  %copied = bf16[9,128,64]{2,1,0} copy(%cache)
  %tiles = s8[128,64]{1,0} fusion(%s), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retiled
}
"""
    module = Module(hlo)
    assert [array.dims for array in write_backs(module)].count((9, 128, 64)) == 2  # %back and %squared
    assert [array.dims for array in copied_arrays(module)] == [(9, 128, 64)]  # %copied; not %t


def test_recorded_reduce_scatter() -> None:
    """A block between position-sharded residuals, [2048, 4096] bfloat16."""
    gpu = {c.kind: (c.bytes, c.count) for c in find_collectives(recorded("h200_reduce_scatter"))}
    assert gpu == {"all-gather": (2048 * 4096 * 2, 1), "reduce-scatter": (256 * 4096 * 2, 1)}
    tpu = summarise(find_collectives(recorded("v5e_reduce_scatter")))
    counts = {kind: sum(c.count for c in tpu if c.kind == kind) for kind in {c.kind for c in tpu}}
    # a windowed product: four trips of four permutes, and one to end with
    assert counts == {"all-gather": 1, "collective-permute": 17}


def test_fused_reduce_scatter_is_not_an_all_reduce() -> None:
    hlo = """
%all-reduce-scatter.1 (p: bf16[8,64]) -> bf16[1,64] {
  %ar = bf16[8,64]{1,0} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %ds = bf16[1,64]{1,0} dynamic-slice(%ar, %i, %z), dynamic_slice_sizes={1,64}
}

ENTRY %main (p: bf16[8,64]) -> bf16[1,64] {
  ROOT %fusion = bf16[1,64]{1,0:T(8,128)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert find_collectives(hlo) == [Collective("reduce-scatter", "bf16[1,64]", 128, 8, 1, False, "")]


# --- names and what is missing -----------------------------------------------------------------------------


def test_names() -> None:
    assert parse_topology("v5e:2x4").grid == (2, 4)
    assert parse_topology("h100:8").hardware.name == "h100-sxm"
    assert parse_topology("tpu7x:2x2x1").memory_bytes == 96e9  # two devices a chip


@pytest.mark.parametrize(
    ("name", "message"),
    (
        (
            "v9:2x2",
            "topology 'v9:2x2' is not known; known chips are v4, v5e, v5p, v6e, tpu7x, a100, h100, "
            "h200, b200",
        ),
        ("v5e:8", "topology 'v5e:8': '8' is not a grid of 2 axes, such as v5e:2x4"),
        ("v5e:32x32", "topology 'v5e:32x32' has 1024 chips, but a pod of v5e has 256"),
        ("h200", "topology 'h200': '' is not a number of chips, such as h200:8"),
    ),
)
def test_bad_names(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_topology(name)
    assert str(error.value) == message
    assert main(["explain", "smollm2-135m", "--topology", name]) == 2
    assert capsys.readouterr().err == f"tpjax: error: {message}\n"


def test_a_context_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "llama-3-8b", "--topology", "v5e:2x4", "--context", "0"]) == 2
    assert capsys.readouterr().err == (
        "tpjax: error: Invalid value for '--context': '0' is not a whole number of tokens, 1 or more "
        "(see `tpjax explain --help`)\n"
    )


def test_missing_and_unfit_extras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"libtpu": "0.0.1"}

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError
        return versions[package]

    monkeypatch.setattr(topology.importlib.metadata, "version", version)
    monkeypatch.setattr(
        topology.importlib.metadata, "requires", lambda _: ["scipy", 'libtpu==0.0.42.*; extra == "tpu"']
    )
    monkeypatch.setattr(topology.jax, "__version__", "0.10.2")
    assert extra_problem("tpu") == "libtpu 0.0.1 does not fit jax 0.10.2: pip install 'libtpu==0.0.42.*'"
    gpu = extra_problem("gpu")
    assert gpu is not None and gpu.startswith("compiling GPU programs needs jax-cuda12-plugin: pip install")
    assert "jax-cuda12-pjrt==0.10.2" in gpu
    with pytest.raises(ConfigError, match=r"libtpu 0\.0\.1 does not fit"):
        parse_topology("v5e:2x4").mesh()
    assert main(["explain", "llama-3-8b", "--topology", "h200:8"]) == 2
    assert capsys.readouterr().err == f"tpjax: error: {gpu}\n"
    assert doctor.examine()["topologies"] == {"TPU": extra_problem("tpu"), "GPU": gpu}


# --- compiled here, where the compilers are ----------------------------------------------------------------

needs_tpu = pytest.mark.skipif(extra_problem("tpu") is not None, reason="pip install -e '.[aot-tpu]'")
needs_gpu = pytest.mark.skipif(
    extra_problem("gpu") is not None, reason="the GPU compiler (doctor says which)"
)
SMOLLM2 = llama(576, 1536, 9, 3, 49152, layers=2)
LLAMA3_8B = llama(4096, 14336, 32, 8, 128256, layers=2)


def compiled(
    config: ModelConfig, name: str, tp: int, kind: str, quantize: Quantize | None = None
) -> ProgramReport:
    return compiled_text(config, name, tp, kind, quantize=quantize)[0]


def compiled_text(
    config: ModelConfig,
    name: str,
    tp: int,
    kind: str,
    attention: AttentionBackend = "auto",
    quantize: Quantize | None = None,
) -> tuple[ProgramReport, str]:
    """A program and its text."""
    runner = abstract_runner(
        config,
        parse_topology(name),
        tp,
        max_slots=4,
        sequence_parallel="off",
        quantize=quantize,
        attention=attention,
    )
    chunks = None if kind == "decode" else ChunkShape(1, 128)
    spec = ProgramSpec(
        "decode" if kind == "decode" else "step", 0 if kind == "prefill" else 4, chunks, greedy=True
    )
    program = compile_program(runner, parse_topology(name), kind, spec, context=256 * (kind == "decode"))
    return program, runner.program(spec).as_text()


def check(program: ProgramReport, config: ModelConfig, tp: int, remarks: str) -> None:
    always = [c for c in program.collectives if not c.conditional]
    reduces = [c for c in always if c.kind == "all-reduce" and c.source.startswith("model.py")]
    assert sum(c.count for c in reduces) == (2 * config.num_layers + 1 if tp > 1 else 0)
    others = [c for c in always if c not in reduces]
    assert sum(c.count for c in others) <= 2  # O(1)
    # no sampler gathers the logits: at most the top 20 of each device
    sampling = [c for c in program.collectives if c not in reduces]
    assert max((c.bytes for c in sampling), default=0) <= max(4, program.batch) * 20 * 8 * tp
    assert program.aliased_cache_buffers == program.cache_buffers == 2 * config.num_layers
    assert program.cache_write_backs == 0
    assert program.predicted_bytes == pytest.approx(program.argument_bytes, rel=0.001)
    assert program.needed_bytes >= program.argument_bytes + program.temporary_bytes
    assert program.fits
    assert "rematerialization" not in remarks  # of the partitioner: "Involuntary full rematerialization"


@needs_gpu
@pytest.mark.parametrize("tp", (3, 5, 8))
def test_gpu_smollm2(tp: int, capfd: pytest.CaptureFixture[str]) -> None:
    program = compiled(SMOLLM2, "h200:8", tp, "decode")
    check(program, SMOLLM2, tp, capfd.readouterr().err)
    assert program.cache_copies == 0
    assert program.estimate is None  # of a GPU's program no time can be read


@needs_gpu
def test_compilers_are_not_heard(tmp_path: Path) -> None:
    """The CUDA plugin logs that it finds no driver, four times."""
    config = Path(__file__).parent / "goldens/llama/config.json"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA", "JAX"))}
    done = subprocess.run(
        [sys.executable, "-m", "tpjax", "explain", "--config", str(config), "--topology", "h200:2"],
        env={**kept, "PYTHONPATH": str(Path(topology.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "at tp=2 on h200:2" in done.stdout


@needs_tpu
@pytest.mark.parametrize("tp", (3, 5, 8))
def test_tpu_smollm2(tp: int, capfd: pytest.CaptureFixture[str]) -> None:
    program = compiled(SMOLLM2, "v5e:2x4", tp, "decode")
    check(program, SMOLLM2, tp, capfd.readouterr().err)
    assert program.cache_copies == 0  # heads of 64 lie in rows of 128


@pytest.mark.parametrize(
    ("name", "kind"),
    (
        pytest.param("v5e:2x4", "decode", marks=needs_tpu),
        pytest.param("v5e:2x4", "prefill", marks=needs_tpu),
        pytest.param("v5e:2x4", "mixed", marks=needs_tpu),
        pytest.param("h200:8", "decode", marks=needs_gpu),
        pytest.param("h200:8", "prefill", marks=needs_gpu),
        pytest.param("h200:8", "mixed", marks=needs_gpu),
    ),
)
def test_llama3_8b(name: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    program = compiled(LLAMA3_8B, name, 8, kind)
    check(program, LLAMA3_8B, 8, capfd.readouterr().err)
    assert program.cache_copies == 0
    if name == "h200:8" or kind == "decode":
        assert program.weight_copies == 0
    if name == "h200:8":
        return
    found = program.estimate
    assert found is not None and found.bound_s < found.total_s
    if kind == "decode":
        # what is read is little more than the weights, and two pages of each sequence
        assert 1.0 <= found.traffic_s / found.memory_bound_s < 1.2


@pytest.mark.parametrize(
    ("name", "kind", "quantize"),
    (
        pytest.param("v5e:2x4", "decode", "int8", marks=needs_tpu),
        pytest.param("v5e:2x4", "decode", "fp8", marks=(needs_tpu, pytest.mark.slow)),
        pytest.param("v5e:2x4", "prefill", "int8", marks=(needs_tpu, pytest.mark.slow)),
        pytest.param("h200:8", "decode", "int8", marks=needs_gpu),
        pytest.param("h200:8", "decode", "fp8", marks=(needs_gpu, pytest.mark.slow)),
    ),
)
def test_quantised_llama3_8b(
    name: str, kind: str, quantize: Quantize, capfd: pytest.CaptureFixture[str]
) -> None:
    """Arguments are a byte a weight; no wide copy of one is kept, and a TPU reads less."""
    program, plain = (compiled(LLAMA3_8B, name, 8, kind, one) for one in (quantize, None))
    check(program, LLAMA3_8B, 8, capfd.readouterr().err)
    weights = 2 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336) // 8
    assert plain.argument_bytes - program.argument_bytes == pytest.approx(weights, rel=0.01)
    smallest = 4096 * 512 * 2  # of the weights, if it were widened
    assert program.temporary_bytes < plain.temporary_bytes + smallest
    assert program.weight_copies == 0
    if program.estimate is not None and plain.estimate is not None and kind == "decode":
        # The head is as large as both layers. Products this small take as many cycles as in bfloat16.
        assert program.estimate.traffic_bytes < 0.75 * plain.estimate.traffic_bytes
        assert program.estimate.total_s <= plain.estimate.total_s


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


def first_layers(name: str, **fields: Any) -> ModelConfig:
    """Two layers of a published model."""
    found = published._published()[name]["config"]
    return config_from_hf(found | {"num_hidden_layers": 2} | fields)


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
    ("model", "name", "tp", "kind", "kv_dtype", "attention"),
    (
        pytest.param("llama-3-8b", "v5e:2x4", 8, "decode", "int8", "tpu", marks=needs_tpu),
        pytest.param("llama-3-8b", "v5e:2x4", 2, "mixed", "fp8", "auto", marks=needs_tpu),
        pytest.param("llama-3-8b", "h200:8", 8, "decode", "fp8", "auto", marks=needs_gpu),
        pytest.param("llama-3-8b", "h200:8", 4, "mixed", "int8", "auto", marks=needs_gpu),
        *(
            pytest.param(*case, marks=(needs, pytest.mark.slow))
            for needs, *case in (
                (needs_tpu, "llama-3-8b", "v5e:2x4", 3, "decode", "fp8", "tpu"),
                (needs_tpu, "llama-3-8b", "v5e:2x4", 8, "mixed", "fp8", "tpu"),
                (needs_tpu, "llama-3-8b", "v5p:2x2x1", 4, "decode", "int8", "tpu"),
                (needs_tpu, "llama-3-8b", "v4:2x2x1", 4, "decode", "int8", "tpu"),
                (needs_tpu, "llama-3-8b", "tpu7x:2x2x1", 8, "decode", "fp8", "tpu"),
                (needs_tpu, "gemma-3-1b", "v5e:2x4", 4, "mixed", "int8", "tpu"),
                (needs_tpu, "gemma-3-1b", "v6e:2x4", 1, "decode", "fp8", "auto"),
                (needs_tpu, "gemma-2-9b", "v5e:2x4", 4, "mixed", "fp8", "tpu"),
                (needs_tpu, "gemma-2-9b", "v5e:2x4", 4, "mixed", "int8", "auto"),
                (needs_tpu, "deepseek-v3", "v5e:2x4", 8, "decode", "int8", "tpu"),
                (needs_tpu, "deepseek-v3", "v6e:2x4", 8, "mixed", "fp8", "tpu"),
                (needs_tpu, "deepseek-v3", "v6e:2x4", 8, "mixed", "int8", "auto"),
                (needs_gpu, "deepseek-v3", "h200:8", 8, "decode", "int8", "auto"),
                (needs_gpu, "gemma-2-9b", "h200:8", 4, "mixed", "fp8", "gpu"),
                (needs_gpu, "llama-3-8b", "h200:8", 8, "mixed", "int8", "gpu"),
            )
        ),
    ),
)
def test_a_cache_of_8_bits(
    model: str, name: str, tp: int, kind: str, kv_dtype: KVDtype, attention: AttentionBackend
) -> None:
    """Values and scales are updated in place, neither copied nor widened, and counted as they are."""
    fields = {"first_k_dense_replace": 2} if model == "deepseek-v3" else {}
    chips, config = parse_topology(name), first_layers(model, **fields)
    runner = abstract_runner(
        config, chips, tp, max_slots=16, max_model_len=8192, attention=attention, kv_dtype=kv_dtype
    )
    chunks = None if kind == "decode" else ChunkShape(1, 128)
    spec = ProgramSpec("decode" if kind == "decode" else "step", 16, chunks, greedy=True)
    program = compile_program(runner, chips, kind, spec)
    buffers = jax.tree.leaves(runner.abstract_state().cache)
    assert program.aliased_cache_buffers == program.cache_buffers == len(buffers)
    assert program.cache_copies == 0
    if attention == "tpu":  # XLA moves scales on chip, and back
        assert program.cache_write_backs == 0
    assert program.predicted_bytes == pytest.approx(program.argument_bytes, rel=0.001)
    sizes = {math.prod(one.sharding.shard_shape(one.shape)) for one in buffers if one.dtype.itemsize == 1}
    made = re.findall(r"= (?:f32|bf16|f16)\[([\d,]+)\]", runner.program(spec).as_text())
    assert not sizes & {math.prod(map(int, dimensions.split(","))) for dimensions in made}


DEEPSEEK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name", "quantize", "stored"),
    (
        pytest.param("llama-3-70b", "v5e:2x4", "int8", None, marks=needs_tpu),
        pytest.param("llama-3-70b", "v5e:2x2", "int4", None, marks=needs_tpu),
        pytest.param("deepseek-v3", "h200:8", None, DEEPSEEK_FP8, marks=needs_gpu),
    ),
)
def test_models_that_fit_in_8_or_4_bits(
    model: str, name: str, quantize: Quantize | None, stored: dict[str, Any] | None, tmp_path: Path
) -> None:
    """The whole model fits with a cache for 8 sequences; of two layers, what their decode step does."""
    fields = published._published()[model]["config"] | ({"quantization_config": stored} if stored else {})
    chips = parse_topology(name)

    def runner_of(**more: Any) -> Runner:
        (tmp_path / "config.json").write_text(json.dumps(fields | more))
        known = published.find_model(str(tmp_path / "config.json"))
        sizes = {"max_slots": 8, "max_model_len": 4096}
        return abstract_runner(known.config, chips, quantize=quantize, format_of=known.format_of, **sizes)

    whole = runner_of()
    weights = sum(one.bytes_per_device for one in parameters(whole.abstract_model(), whole.mesh))
    state = jax.tree.leaves(whole.abstract_state())
    cache = sum(math.prod(one.sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in state)
    assert whole.limits.num_pages > 8 * 4096 // whole.limits.page_size
    assert weights + cache < USABLE_MEMORY * chips.memory_bytes
    two = runner_of(num_hidden_layers=2, **({"first_k_dense_replace": 1} if stored else {}))
    spec = ProgramSpec("decode", 8, greedy=True)
    program = compile_program(two, chips, "decode", spec)
    assert (program.weight_copies, program.cache_copies, program.cache_write_backs) == (0, 0, 0)
    assert program.aliased_cache_buffers == program.cache_buffers
    assert program.predicted_bytes == pytest.approx(program.argument_bytes, rel=0.001)
    found = measured(program.collectives)
    assert all(found[what] <= program.budget[what] for what in ("all_reduces", "all_reduce_bytes"))
    shapes = set()
    for one in parameters(two.abstract_model(), two.mesh):
        if one.quantized is not None and one.is_quantized:
            shape, group = one.sharding.shard_shape(one.layout.shape), one.quantized.group or 1
            shapes |= {
                tuple(sorted(shape)),
                tuple(sorted((*shape[:-2], shape[-2] // group, group, shape[-1]))),
            }
    wide = [
        array
        for one in Module(two.program(spec).as_text()).executed()
        for array in one.instruction.arrays
        if not one.fused and array.space == 0 and array.dtype in ("bf16", "f32") and array.sizes in shapes
    ]
    assert not wide


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


GPUS = ("a100:8", "h100:8", "h200:8", "b200:8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tp", "kind"),
    (*((name, tp, "decode") for name in GPUS for tp in (1, 3, 5, 8)), *((name, 3, "mixed") for name in GPUS)),
)
@needs_gpu
def test_every_gpu(name: str, tp: int, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Nine heads, of which three are keys': by the kernel on Hopper, elsewhere by the page walk."""
    by_kernel = name in ("h100:8", "h200:8")
    program, text = compiled_text(SMOLLM2, name, tp, kind, "gpu" if by_kernel else "auto")
    check(program, SMOLLM2, tp, capfd.readouterr().err)
    assert (program.cache_copies, program.weight_copies) == (0, 0)
    groups = 1 if kind == "decode" else 2
    calls = len(re.findall(r"custom_call_target=\"mosaic_gpu", text))
    assert calls == (groups * SMOLLM2.num_layers if by_kernel else 0)
    assert ("page_walk" in text) != by_kernel


@pytest.mark.parametrize(("tp", "kind"), ((1, "decode"), (3, "decode"), (5, "mixed"), (8, "decode")))
@needs_gpu
def test_gpu_kernel(tp: int, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One call a layer and group of tokens; no loop is left whose end the host would have to ask for."""
    program, text = compiled_text(LLAMA3_8B, "h200:8", tp, kind, "gpu")
    check(program, LLAMA3_8B, tp, capfd.readouterr().err)
    assert (program.cache_copies, program.weight_copies) == (0, 0)
    groups = 1 if kind == "decode" else 2
    assert len(re.findall(r"custom_call_target=\"mosaic_gpu", text)) == groups * LLAMA3_8B.num_layers
    loops = [line for line in text.splitlines() if " while(" in line]
    assert all("known_trip_count" in line for line in loops), loops
    assert len(loops) == 0 if kind == "decode" else len(loops) <= 2  # the sampler's, of eight trips
    assert " conditional(" not in text


@pytest.mark.parametrize(
    ("name", "tp", "kind"),
    (
        ("v5e:2x4", 8, "decode"),
        pytest.param("v5e:2x4", 5, "mixed", marks=pytest.mark.slow),
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


@pytest.mark.parametrize(("tp", "kind"), ((1, "decode"), (5, "mixed"), (8, "decode")))
@needs_gpu
def test_gpu_product_in_int4(tp: int, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A call for each matrix of a layer; neither a wide weight nor the sums of groups are written."""
    program, text = compiled_text(LLAMA3_8B, "h200:8", tp, kind, "gpu", "int4")
    check(program, LLAMA3_8B, tp, capfd.readouterr().err)
    assert (program.cache_copies, program.weight_copies) == (0, 0)
    products = re.findall(r"custom_call_target=\"mosaic_gpu.*quantized_product", text)
    assert len(products) == 4 * LLAMA3_8B.num_layers
    groups, rows = 4096 // 128, 4 if kind == "decode" else 132
    made = {math.prod(map(int, one.split(","))) for one in re.findall(r"= f32\[([\d,]+)\]", text)}
    assert max(made) < groups * rows * 2 * 14336 // tp


@needs_gpu
def test_gpu_experts() -> None:
    """Nothing is computed for every expert, and nothing as large as an expert is written."""
    fields = published._published()["qwen3-30b-a3b"]["config"]
    config = config_from_hf(fields | {"num_hidden_layers": 1, "vocab_size": 1024})
    program, text = compiled_text(config, "h200:8", 1, "decode", "gpu")
    assert len(re.findall(r"custom_call_target=\"mosaic_gpu", text)) == 3  # attention, and two products
    assert not [line for line in text.splitlines() if " while(" in line]
    assert program.temporary_bytes < 8 * 2**20  # all experts take 1.2 GB


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


def test_what_the_compiler_cannot_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**options: object) -> None:
        raise RuntimeError(f"no {options['topology_name']} here\nand more")

    monkeypatch.setattr(topology, "extra_problem", lambda kind: None)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    assert main(["explain", "llama-3-8b", "--topology", "v5e:2x4"]) == 2
    assert capsys.readouterr().err == (
        "tpjax: error: the installed compiler cannot target topology 'v5e:2x4': no v5e:2x4 here\n"
    )


def test_a_report_says_why_an_estimate_is_above_its_bound() -> None:
    """Estimates of Llama 3 8B on v5e:2x4: loops over pages in decode, collectives in prefill; and none."""
    parts = {"traffic_bytes": 2**31, "memory_bound_s": 2.6e-3, "compute_bound_s": 0.1e-3, "kernels": 0}
    decode = Estimate(
        context=2048,
        compute_s=8.8e-3,
        pages_s=7.3e-3,
        traffic_s=2.7e-3,
        collectives_s=0.2e-3,
        exposed_s=0.2e-3,
        total_s=9.0e-3,
        bound_s=2.7e-3,
        **parts,
    )
    prefill = replace(
        decode, pages_s=0.0, collectives_s=6.0e-3, exposed_s=5.6e-3, total_s=14.4e-3, bound_s=4.8e-3
    )
    near = replace(decode, compute_s=2.7e-3, pages_s=0.1e-3, total_s=2.9e-3)

    def shown(**estimates: Estimate | None) -> str:
        sizes = {"compile_s": 1.0, "predicted_bytes": 10**6, "cache_buffers": 2, "argument_bytes": 1_000_300}
        programs = [
            ProgramReport(kind, 8, 1, BUDGET, estimate=one, fits=True, **sizes)
            for kind, one in estimates.items()
        ]
        console = Console(width=100, file=io.StringIO())
        console.print(TopologyReport("llama", "v5e:2x4", 8, "bfloat16", "xla", 2**34, programs))
        return " ".join(console.file.getvalue().split())

    text = shown(decode=decode, prefill=prefill)
    assert "decode 8×1 is above its bound, which is reading weights and cache once" in text
    assert "7.30 ms are loops over pages of the cache" in text
    assert "5.60 ms are collectives" in text and "8.8 ms" not in text
    assert "expects 1.8 times the bound" in text  # prefill: 8.8 of 4.8 ms
    assert "above its bound" not in shown(decode=near)
    assert "no estimated time: only the compiler for TPUs" in shown(decode=None)
    assert "(+0.0%)" in text and "-0.0%" not in text


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
def test_more_than_there_are() -> None:
    with pytest.raises(ConfigError, match="tp=9 is more than the 8 devices of v5e:2x4"):
        parse_topology("v5e:2x4").mesh(9)


# --- prefill with sequence parallelism ----------------------------------------------------------


def moves(chip: str, config: ModelConfig, sequence_parallel: SequenceParallel) -> Counter[str]:
    """Collectives by which a chunk of 512 tokens moves the residual, or a device's part of it."""
    topology = parse_topology(chip)
    runner = abstract_runner(config, topology, sequence_parallel=sequence_parallel, max_slots=1)
    spec = ProgramSpec("step", 0, ChunkShape(4, 128), greedy=True)
    program = compile_program(runner, topology, "prefill", spec)
    assert program.aliased_cache_buffers == program.cache_buffers
    assert program.cache_copies == 0
    counts: Counter[str] = Counter()
    for one in program.collectives:
        if one.bytes >= 512 * config.hidden_size * 2 / runner.mesh.size:
            counts[one.kind] += one.count
    return counts


@needs_tpu
def test_sequence_parallel_prefill_on_tpus() -> None:
    """Each block gathers what it reads once and scatters its sum; so does the embedding."""
    assert moves("v5e:2x4", LLAMA3_8B, "auto") == {"all-gather": 4, "reduce-scatter": 5}
    assert moves("v5e:2x4", LLAMA3_8B, "off") == {"all-reduce": 5}


@needs_gpu
def test_sequence_parallel_prefill_on_gpus() -> None:
    """Where it is asked for: 4 MB are summed faster by one kernel."""
    assert moves("h200:8", LLAMA3_8B, "on") == {"all-gather": 4, "reduce-scatter": 5}
    assert moves("h200:8", LLAMA3_8B, "auto") == {"all-reduce": 5}
