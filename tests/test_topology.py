"""Programs of TPUs and GPUs: recorded, and compiled ahead of time where their compilers are installed."""

from __future__ import annotations

import gzip
import importlib.metadata
from collections import Counter
from pathlib import Path

import pytest

from tpjax.cli import main
from tpjax.config import ModelConfig
from tpjax.errors import ConfigError
from tpjax.families import config_from_hf
from tpjax.inspect import topology
from tpjax.inspect.collectives import Collective, find_collectives, summarise
from tpjax.inspect.program import Program, abstract_runner, compile_program, whole_copies
from tpjax.inspect.topology import extra_problem, parse_topology
from tpjax.runner import Residual

HLO = Path(__file__).parent / "data" / "hlo"


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
    page = tuple(sorted((129, 1, 128, 64)))
    assert [
        sum(shape == page for shape, _ in whole_copies(recorded(f"{chip}_decode")))
        for chip in ("v5e", "h200")
    ] == [12, 0]


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
        ("h200", "topology 'h200': '' is not a number of chips, such as h200:8"),
    ),
)
def test_bad_names(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_topology(name)
    assert str(error.value) == message
    assert main(["explain", "smollm2-135m", "--topology", name]) == 2
    assert capsys.readouterr().err == f"tpjax: error: {message}\n"


def test_missing_and_unfit_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"libtpu": "0.0.1"}

    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError
        return versions[package]

    monkeypatch.setattr(topology.importlib.metadata, "version", version)
    monkeypatch.setattr(topology.jax, "__version__", "0.10.2")
    assert extra_problem("tpu") == "libtpu 0.0.1 does not fit jax 0.10.2: pip install 'libtpu==0.0.42.*'"
    gpu = extra_problem("gpu")
    assert gpu is not None and gpu.startswith("compiling GPU programs needs jax-cuda12-plugin: pip install")
    assert "jax-cuda12-pjrt==0.10.2" in gpu
    with pytest.raises(ConfigError, match=r"libtpu 0\.0\.1 does not fit"):
        parse_topology("v5e:2x4").mesh()


# --- compiled here, where the compilers are ----------------------------------------------------------------

needs_tpu = pytest.mark.skipif(extra_problem("tpu") is not None, reason="extra aot-tpu")
needs_gpu = pytest.mark.skipif(extra_problem("gpu") is not None, reason="extra aot-gpu")
SMOLLM2 = llama(576, 1536, 9, 3, 49152, layers=2)
LLAMA3_8B = llama(4096, 14336, 32, 8, 128256, layers=2)


def compiled(config: ModelConfig, name: str, tp: int, kind: str) -> Program:
    runner = abstract_runner(config, parse_topology(name), tp, max_slots=4)
    return compile_program(runner, kind, *((4, 1) if kind == "decode" else (1, 128)))


def check(program: Program, config: ModelConfig, tp: int) -> None:
    always = [c for c in program.collectives if not c.conditional]
    reduces = [c for c in always if c.kind == "all-reduce" and c.source.startswith("model.py")]
    assert sum(c.count for c in reduces) == 2 * config.num_layers + 1
    others = [c for c in always if c not in reduces]
    assert sum(c.count for c in others) <= 3  # O(1)
    # no sampler gathers the logits: at most the top 20 of each device
    sampling = [c for c in program.collectives if c not in reduces]
    assert max(c.bytes for c in sampling) <= program.batch * 20 * 8 * tp
    assert program.aliased_cache_buffers == program.cache_buffers == 2 * config.num_layers


@needs_gpu
@pytest.mark.parametrize("tp", (3, 5, 8))
def test_gpu_decode(tp: int, capfd: pytest.CaptureFixture[str]) -> None:
    program = compiled(SMOLLM2, "h200:8", tp, "decode")
    check(program, SMOLLM2, tp)
    assert program.cache_copies == 0
    assert program.predicted_bytes == pytest.approx(program.argument_bytes, rel=0.02)
    assert "rematerialization" not in capfd.readouterr().err


@needs_tpu
@pytest.mark.parametrize("tp", (3, 5, 8))
def test_tpu_decode(tp: int, capfd: pytest.CaptureFixture[str]) -> None:
    program = compiled(SMOLLM2, "v5e:2x4", tp, "decode")
    check(program, SMOLLM2, tp)
    assert "rematerialization" not in capfd.readouterr().err


@needs_tpu
def test_tpu_llama3_8b() -> None:
    program = compiled(LLAMA3_8B, "v5e:2x4", 8, "decode")
    check(program, LLAMA3_8B, 8)
    assert program.cache_copies == program.weight_copies == 0
    assert program.predicted_bytes == pytest.approx(program.argument_bytes, rel=0.02)


@needs_tpu
def test_more_than_there_are() -> None:
    with pytest.raises(ConfigError, match="tp=9 is more than the 8 devices of v5e:2x4"):
        parse_topology("v5e:2x4").mesh(9)


# --- prefill with the residual cut over positions ----------------------------------------------------------


def moves(chip: str, config: ModelConfig, residual: Residual) -> Counter[str]:
    """Collectives by which a chunk of 512 tokens moves the residual, or a device's part of it."""
    runner = abstract_runner(config, parse_topology(chip), residual=residual, max_slots=1)
    program = compile_program(runner, "prefill", 1, 512)
    assert program.aliased_cache_buffers == program.cache_buffers
    assert program.cache_copies == 0
    counts: Counter[str] = Counter()
    for one in program.collectives:
        if one.bytes >= 512 * config.hidden_size * 2 / runner.mesh.size:
            counts[one.kind] += one.count
    return counts


@needs_tpu
def test_tpu_prefill_cuts_the_residual() -> None:
    """Each block gathers what it reads once and scatters its sum; the embedding is summed whole."""
    counts = moves("v5e:2x4", LLAMA3_8B, "auto")
    assert counts == {"all-gather": 4, "reduce-scatter": 4, "all-reduce": 1}
    assert moves("v5e:2x4", LLAMA3_8B, "replicated") == {"all-reduce": 5}


@needs_gpu
def test_gpu_prefill_cuts_the_residual() -> None:
    """Where it is asked for: 4 MB are summed faster by one kernel."""
    assert moves("h200:8", LLAMA3_8B, "positions") == {"all-gather": 4, "reduce-scatter": 5}
    assert moves("h200:8", LLAMA3_8B, "auto") == {"all-reduce": 5}
