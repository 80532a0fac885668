"""Programs of GPUs, compiled ahead of time where the compilers for them are installed."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ahead_of_time import (
    LLAMA3_8B,
    SMOLLM2,
    check,
    compiled,
    compiled_text,
    moves,
    needs_gpu,
)

from tpjax.families.registry import config_from_hf
from tpjax.inspect import topology
from tpjax.inspect.program import abstract_runner
from tpjax.inspect.topology import parse_topology
from tpjax.planning import published
from tpjax.runtime.programs import ProgramSpec


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
    if kind == "decode":
        assert_no_waits(text)


def assert_no_waits(text: str) -> None:
    """A GPU's host waits at each trip of a loop whose end the compiler does not know, and at a branch."""
    loops = [line for line in text.splitlines() if " while(" in line]
    assert all("known_trip_count" in line for line in loops), loops
    assert " conditional(" not in text


@pytest.mark.parametrize(
    ("name", "tp", "greedy"),
    (
        ("a100:8", 8, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("a100:8", 8, False), ("b200:8", 8, True), ("b200:8", 3, False))
        ),
    ),
)
@needs_gpu
def test_decode_without_a_kernel(name: str, tp: int, greedy: bool) -> None:
    """The loop of each layer is as long as the compiler knows; there are no more programs for that."""
    runner = abstract_runner(LLAMA3_8B, parse_topology(name), tp, max_slots=64)
    shape = runner.decode_shapes[-1]
    assert len(runner.programs.serving()) <= 24 and shape.blocks == 64 * 2048 // (8 * 128)
    text = runner.program(ProgramSpec.decode(shape, greedy=greedy)).as_text()
    assert_no_waits(text)
    walks = (line for line in text.splitlines() if " while(" in line and "page_walk" in line)
    trips = [int(re.findall(r'known_trip_count":\{"n":"(\d+)', line)[0]) for line in walks]
    at_once = (16 << 20) // (8 * 128 * -(-8 // tp) * 2 * 128 * 2)  # blocks in 16 MiB
    assert trips == [-(-shape.blocks // at_once)] * LLAMA3_8B.num_layers


@pytest.mark.parametrize(("tp", "kind"), ((1, "decode"), (3, "decode"), (5, "mixed"), (8, "decode")))
@needs_gpu
def test_gpu_kernel(tp: int, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One call a layer and group of tokens; no loop is left whose end the host would have to ask for."""
    program, text = compiled_text(LLAMA3_8B, "h200:8", tp, kind, "gpu")
    check(program, LLAMA3_8B, tp, capfd.readouterr().err)
    assert (program.cache_copies, program.weight_copies) == (0, 0)
    groups = 1 if kind == "decode" else 2
    assert len(re.findall(r"custom_call_target=\"mosaic_gpu", text)) == groups * LLAMA3_8B.num_layers
    assert_no_waits(text)
    loops = text.count(" while(")
    assert loops == 0 if kind == "decode" else loops <= 2  # the sampler's, of eight trips


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
    _, _, entry = text.partition("ENTRY ")
    kernels = re.findall(r" (?:fusion|custom-call)\(.*/mlp/experts/", entry)
    assert len(kernels) <= 8  # laying the tokens out in tiles made it 11


@needs_gpu
def test_sequence_parallel_prefill_on_gpus() -> None:
    """Where it is asked for: 4 MB are summed faster by one kernel."""
    assert moves("h200:8", LLAMA3_8B, "on") == {"all-gather": 4, "reduce-scatter": 5}
    assert moves("h200:8", LLAMA3_8B, "auto") == {"all-reduce": 5}
