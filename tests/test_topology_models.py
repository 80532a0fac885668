"""Published models on TPUs and on GPUs, compiled ahead of time where the compilers are installed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import pytest
from ahead_of_time import (
    LLAMA3_8B,
    check,
    compiled,
    first_layers,
    needs_gpu,
    needs_tpu,
)

from tpjax.checkpoints.parameters import parameters
from tpjax.config import AttentionBackend, KVDtype, Quantize
from tpjax.hardware import USABLE_MEMORY
from tpjax.inspect.budget import measured
from tpjax.inspect.hlo import Module
from tpjax.inspect.program import abstract_runner, compile_program
from tpjax.inspect.topology import parse_topology
from tpjax.planning import published
from tpjax.runtime.limits import ChunkShape
from tpjax.runtime.programs import ProgramSpec
from tpjax.runtime.runner import Runner


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
