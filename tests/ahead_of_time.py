"""Programs of TPUs and GPUs, compiled ahead of time where their compilers are installed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tpjax.config import AttentionBackend, ModelConfig, Quantize, SequenceParallel
from tpjax.families.registry import config_from_hf
from tpjax.inspect.program import abstract_runner, compile_program
from tpjax.inspect.topology import extra_problem, parse_topology
from tpjax.inspect.topology_report import ProgramReport
from tpjax.planning import published
from tpjax.runtime.limits import ChunkShape
from tpjax.runtime.programs import ProgramSpec

needs_tpu = pytest.mark.skipif(extra_problem("tpu") is not None, reason="pip install -e '.[aot-tpu]'")
needs_gpu = pytest.mark.skipif(
    extra_problem("gpu") is not None, reason="the GPU compiler (doctor says which)"
)


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


SMOLLM2 = llama(576, 1536, 9, 3, 49152, layers=2)
LLAMA3_8B = llama(4096, 14336, 32, 8, 128256, layers=2)


def first_layers(name: str, **fields: Any) -> ModelConfig:
    """Two layers of a published model."""
    found = published._published()[name]["config"]
    return config_from_hf(found | {"num_hidden_layers": 2} | fields)


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
    spec = ProgramSpec("step", 0 if kind == "prefill" else 4, chunks, greedy=True)
    if kind == "decode":  # the largest
        spec = ProgramSpec.decode(runner.decode_shapes[-1], greedy=True)
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
