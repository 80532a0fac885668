"""Programs of TPUs and GPUs: recorded ones, names of chips, and reports; test_topology_* compile some."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tpjax.cli.app import main
from tpjax.errors import ConfigError
from tpjax.inspect import doctor, topology
from tpjax.inspect.budget import measured
from tpjax.inspect.collectives import Collective, find_collectives, summarise
from tpjax.inspect.copies import copied_arrays, write_backs
from tpjax.inspect.estimate import Estimate
from tpjax.inspect.hlo import Module
from tpjax.inspect.topology import extra_problem, parse_topology
from tpjax.inspect.topology_report import ProgramReport, TopologyReport

HLO = Path(__file__).parent / "data" / "hlo"
BUDGET = {**measured(()), "rule": "none"}


def recorded(name: str) -> str:
    return gzip.decompress((HLO / f"{name}.txt.gz").read_bytes()).decode()


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
