#!/usr/bin/env python
"""Decode speed on this machine of weights kept in 8 and 4 bits, as ratios measured in one run.

    python scripts/bench_quantized.py                      # SmolLM2-135M over float32; one sequence and eight
    python scripts/bench_quantized.py --kinds int8 q4_0 --batch 1

``int8``, ``fp8`` and ``int4`` are what ``LLM(quantize=...)`` rounds to. ``q8_0`` and ``q4_0`` are types that
GGUF weights keep in memory: the matrices of the model's GGUF file, in these. All are loaded first, and decode
in turns, round by round. Times are medians, ratios are taken within a round before the median.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpjax import LLM

CONTEXT, TOKENS = 100, 32
ROUNDED, KEPT = ("int8", "fp8", "int4"), ("q8_0", "q4_0")


def write_kept(source: Path, kind: str, target: Path) -> None:
    """Writes a GGUF file whose layers' matrices are of one type; the rest stays as it is."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader, wanted = GGUFReader(source), GGMLQuantizationType[kind.upper()]
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":  # the writer's own
            inner = entry.types[-1] if entry.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data, its_kind = tensor.data, tensor.tensor_type
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            data, its_kind = quantize(dequantize(data, its_kind), wanted), wanted
        writer.add_tensor(tensor.name, data, raw_dtype=its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decoding(llm: LLM, batch: int) -> Callable[[], None]:
    """Returns a call that decodes TOKENS tokens of each of ``batch`` sequences, from position CONTEXT."""
    import jax

    from tpjax import SamplingParams
    from tpjax.runtime.rows import Row

    runner, greedy = llm.runner, SamplingParams(temperature=0)
    steps, blocks = runner.limits.steps, runner.limits.blocks
    pages = [list(range(1 + blocks * slot, 1 + blocks * (slot + 1))) for slot in range(batch)]

    def decode() -> None:
        for position in range(CONTEXT, CONTEXT + TOKENS, steps):
            rows = [
                Row(slot, position, [pages[slot]], greedy, seed=0, remaining=steps) for slot in range(batch)
            ]
            sampled = runner.decode(rows, steps)
        jax.block_until_ready(sampled)

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="a model in a GGUF file (smollm2-135m)")
    parser.add_argument("--kinds", nargs="+", default=[*ROUNDED, *KEPT], choices=[*ROUNDED, *KEPT])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sequences at once (1 8)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (9)")
    arguments = parser.parse_args()

    import tpjax

    tpjax.fake_devices(1)
    from tpjax import LLM
    from tpjax.checkpoints.hub import resolve
    from tpjax.planning.timing import median_ratio, seconds, take_turns

    sizes = {"tp": 1, "dtype": "float32", "max_model_len": 256, "max_slots": max(arguments.batch)}
    models = {"float32": LLM(arguments.model, **sizes)}
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kinds:
            if kind in ROUNDED:
                models[kind] = LLM(arguments.model, quantize=kind, **sizes)
            else:
                file = Path(folder) / f"{kind}.gguf"
                write_kept(resolve(arguments.model), kind, file)
                models[kind] = LLM(file, **sizes)
    for batch in arguments.batch:
        calls = {kind: decoding(llm, batch) for kind, llm in models.items()}
        times = take_turns(
            {kind: lambda call=call: seconds(call) for kind, call in calls.items()}, arguments.rounds
        )
        for kind, values in times.items():
            ms = sorted(values)[len(values) // 2] * 1e3 / TOKENS
            ratio = median_ratio(values, times["float32"])
            print(f"{batch} at once, {kind:8}{ms:7.2f} ms a step, {ratio:.2f} of float32", flush=True)


if __name__ == "__main__":
    main()
