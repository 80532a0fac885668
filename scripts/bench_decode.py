#!/usr/bin/env python
"""Decode and prefill speed on this machine, as ratios measured in one run.

    python scripts/bench_decode.py                     # SmolLM2-135M, float32; needs the parity extra
    python scripts/bench_decode.py --no-transformers --json out.json

Each contender is a process of its own, loaded once; then all take turns, round by round, so that a machine
whose speed drifts drifts under all of them. Figures are medians over the rounds; ratios are taken within a
round before the median. The read bandwidth is that of `threads` threads summing a buffer as large as the
weights (NumPy), in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from contenders import Contender, Target, serve, transformers_model

from tpjax.planning.timing import median_ratio, seconds, take_turns

PROMPT_TOKENS = 256
DECODE_TOKENS = 64
CONTEXT = 100


# --- contenders: each answers one line of work with one line of milliseconds --------------------------------


def tpjax_worker(model: str, tp: int, max_model_len: int) -> dict[str, Callable[[], float]]:
    """Decode (ms a token, at a context of about CONTEXT) and prefill (ms for PROMPT_TOKENS tokens)."""
    import tpjax

    tpjax.fake_devices(tp)
    import jax
    import numpy as np

    from tpjax import LLM, SamplingParams
    from tpjax.runtime.rows import Chunk, Row

    llm = LLM(model, tp=tp, dtype="float32", max_model_len=max_model_len, max_slots=1)
    runner = llm.runner
    steps = runner.limits.steps
    pages = list(range(1, 1 + -(-512 // runner.limits.page_size)))
    prompt = np.random.default_rng(0).integers(0, llm.config.vocab_size, PROMPT_TOKENS).tolist()

    def row(position: int, remaining: int) -> Row:
        return Row(0, position, [pages], SamplingParams(temperature=0), seed=0, remaining=remaining)

    def decode() -> None:
        for position in range(CONTEXT, CONTEXT + DECODE_TOKENS, steps):
            sampled = runner.decode([row(position, steps)], steps)
        jax.block_until_ready(sampled)

    def prefill() -> None:
        jax.block_until_ready(runner.step([], [Chunk(row(0, 1), prompt)]).sampled)

    return {
        "decode": lambda: seconds(decode) * 1e3 / DECODE_TOKENS,
        "prefill": lambda: seconds(prefill) * 1e3,
    }


def transformers_worker(model: str) -> dict[str, Callable[[], float]]:
    """The same work by transformers, float32, its default attention and cache."""
    import torch
    import transformers

    net = transformers_model(model)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, net.config.vocab_size, (1, PROMPT_TOKENS), generator=generator)

    @torch.inference_mode()
    def decode() -> float:
        cache = transformers.DynamicCache(config=net.config)
        token = net(prompt[:, :CONTEXT], past_key_values=cache).logits[:, -1:].argmax(-1)

        def steps() -> None:
            nonlocal token
            for _ in range(DECODE_TOKENS):
                token = net(token, past_key_values=cache).logits[:, -1:].argmax(-1)

        return seconds(steps) * 1e3 / DECODE_TOKENS

    @torch.inference_mode()
    def prefill() -> float:
        return seconds(lambda: net(prompt, logits_to_keep=1)) * 1e3

    return {"decode": decode, "prefill": prefill}


def bandwidth_worker(megabytes: int) -> dict[str, Callable[[], float]]:
    """Reads a buffer with one thread per core; ms a pass."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    threads = os.cpu_count() or 1
    parts = [np.ones(megabytes * 2**20 // 4 // threads, np.float32) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def read() -> None:
        for _ in range(10):
            list(pool.map(np.sum, parts))

    return {"read": lambda: seconds(read) * 1e3 / 10}


# --- the run ------------------------------------------------------------------------------------------------


def weight_bytes(model: str) -> int:
    """Bytes a decode step must read: every weight once, float32. The tied embedding is the LM head."""
    from tpjax.checkpoints.hub import resolve
    from tpjax.checkpoints.opening import open_checkpoint

    tensors = open_checkpoint(resolve(model)).source.stored.values()
    total = 0
    for info in tensors:
        size = 4
        for dim in info.shape:
            size *= dim
        total += size
    return total


def start_seconds(model: str) -> dict[str, float]:
    """`import tpjax`, and the first token of `tpjax generate` at tp=4, each in a fresh process."""
    source = "import time; t = time.perf_counter(); import tpjax; print(time.perf_counter() - t)"
    imports = [float(subprocess.check_output([sys.executable, "-c", source])) for _ in range(5)]
    command = [sys.executable, "-m", "tpjax", "generate", "The capital of France is"]
    command += ["--model", model, "--tp", "4", "--temperature", "0", "--max-tokens", "1"]
    first = [seconds(partial(subprocess.run, command, check=True, capture_output=True)) for _ in range(3)]
    return {"import": statistics.median(imports), "first_token": statistics.median(first)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="an alias (smollm2-135m)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender (9)")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure of every round")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, *rest = arguments.worker
        if kind == "bandwidth":
            serve(bandwidth_worker(int(rest[0])))
        elif kind == "transformers":
            serve(transformers_worker(rest[0]))
        else:
            serve(tpjax_worker(rest[0], int(rest[1]), int(rest[2])))
        return

    read_bytes = weight_bytes(arguments.model)
    contenders = {
        "bandwidth": ("bandwidth", str(read_bytes // 2**20)),
        "tp1": ("tpjax", arguments.model, "1", "512"),
        "tp1-8192": ("tpjax", arguments.model, "1", "8192"),
        "tp2": ("tpjax", arguments.model, "2", "512"),
        "tp3": ("tpjax", arguments.model, "3", "512"),
        "transformers": ("transformers", arguments.model),
    }
    if arguments.no_transformers:
        del contenders["transformers"]
    processes = {name: Contender(name, __file__, worker) for name, worker in contenders.items()}
    work = [("bandwidth", "read")]
    work += [(name, "decode") for name in processes if name != "bandwidth"]
    work += [(name, "prefill") for name in ("tp1", "transformers") if name in processes]
    turns = {f"{name} {what}": partial(processes[name].run, what) for name, what in work}
    figures = take_turns(turns, arguments.rounds)
    for process in processes.values():
        process.close()
    report(figures, read_bytes, start_seconds(arguments.model), arguments)


def report(
    figures: dict[str, list[float]],
    read_bytes: int,
    starts: dict[str, float],
    arguments: argparse.Namespace,
) -> None:
    """Prints medians, then ratios against their targets."""
    print(f"{arguments.model}, float32, {os.cpu_count()} cores, {arguments.rounds} rounds")
    print(f"{'':24}{'median ms':>12}{'min':>9}{'max':>9}")
    for name, values in figures.items():
        print(f"{name:24}{statistics.median(values):12.2f}{min(values):9.2f}{max(values):9.2f}")
    gb_s = read_bytes / 1e6 / statistics.median(figures["bandwidth read"])
    print(f"read bandwidth: {gb_s:.1f} GB/s over {read_bytes / 1e6:.0f} MB, the bytes a decode step reads\n")

    def ratio(over: str, under: str) -> float:
        return median_ratio(figures[over], figures[under])

    targets = [
        Target("decode tp=1: share of the bandwidth", ratio("bandwidth read", "tp1 decode"), ">=", 0.70),
        Target("decode tp=2 / tp=1, time", ratio("tp2 decode", "tp1 decode"), "<=", 1.15),
        Target("decode tp=3 / tp=1, time", ratio("tp3 decode", "tp1 decode"), "<=", 1.15),
        Target("max_model_len 8192 / 512, time", ratio("tp1-8192 decode", "tp1 decode"), "<=", 1.05),
        Target("import tpjax, s", starts["import"], "<=", 0.3),
        Target("first token of generate, tp=4, s", starts["first_token"], "<=", 15.0),
    ]
    if "transformers decode" in figures:
        decode, prefill = (ratio(f"transformers {what}", f"tp1 {what}") for what in ("decode", "prefill"))
        targets += [
            Target("decode: transformers / tpjax", decode, ">=", 2.2),
            Target("prefill 256: transformers / tpjax", prefill, ">=", 1.1),
        ]
    print(*targets, sep="\n")
    if arguments.json:
        results: list[dict[str, Any]] = [
            {"name": one.name, "value": one.value, "target": f"{one.sign} {one.bound}", "met": one.met}
            for one in targets
        ]
        arguments.json.write_text(json.dumps({"ms": figures, "ratios": results, "starts": starts}, indent=1))


if __name__ == "__main__":
    main()
