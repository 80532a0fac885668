#!/usr/bin/env python
"""Tests and measures tpjax on one NVIDIA GPU: kernels, sampler, decode, prefill, engine, transformers.

    scripts/on_gpu                        # a machine with an H100 or H200: at most nine minutes
    scripts/on_gpu --dry-run              # the same code on a CPU, with tiny models: three minutes
    scripts/on_gpu --only kernels llama   # some sections

Each section is a process of its own with a limit of time, so that one that fails or hangs takes no other
along. Not all fit into nine minutes: the end names what did not run, and how to run that. Results are printed
and written to OUT (--out, else $OUT, else build/on_gpu), as they are found: ``results.json``, what sections
printed in ``log.txt`` and profiles of steps in ``traces.zip``. Models have random weights in the shapes of
published ones; nothing is downloaded. Bandwidth and rate, which all shares refer to, are measured in the same
call. Compiled programs are kept in build/on_gpu/cache for another call.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9
CONTEXT = 2048  # tokens in the cache of each sequence that decodes
BATCHES = {1: CONTEXT, 8: CONTEXT, 64: CONTEXT, 256: 1024}  # whose cache has room beside the weights
SHORT_CONTEXT = 256  # where transformers is beside it
PROMPT = 2048
PAGE = 128
PROFILED = 2  # runs of each in a profile
CHAINED = 8  # calls of a program that times one product
DRAWS = (  # of tests/test_draws.py, those parameters of each that need one device
    "test_masked_tokens_are_never_sampled",
    "test_nothing_allowed_is_told",
    "test_numbers_at_the_ends_of_float32",
    "test_draws_follow_the_softmax",
    "test_a_token_of_probability_one_is_always_sampled",
    "test_noise_is_finite_and_follows_the_gumbel_distribution",
    "test_top_p_of_a_large_vocabulary",
    "test_many_draws_follow_the_softmax",
)
Result = dict[str, Any]


# --- the device -------------------------------------------------------------------------------------------


def machine(dry: bool) -> Result:
    """Measures the bandwidth of a copy and of a sum, and the rate of a product in bfloat16."""
    import jax
    import jax.numpy as jnp

    from tpjax.inspect.chip_benchmark import product_rate, read_bandwidth, seconds

    device = jax.devices()[0]
    found: Result = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    }
    save(found)
    size = 1 << (22 if dry else 31)  # bytes
    words = jnp.ones(size // 4, jnp.int32)
    copied = seconds(functools.partial(jax.jit(lambda x: x + 1), words), calls=4)
    return found | {
        "copy_bytes_s": 2 * size / copied,
        "read_bytes_s": read_bandwidth(size),
        "product_flops": product_rate(256 if dry else 8192, jnp.dtype("bfloat16")),
    }


# --- kernels and sampler -----------------------------------------------------------------------------------


def tests(*arguments: str, dry: bool) -> Result:
    """Runs the part of some tests that is this process's by pytest, as XLA compiles unless told otherwise.

    Returns:
        How many passed, and which failed, were skipped and were not run.
    """
    import pytest

    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": [], "not_run": []}

    class Part:
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            part, parts = map(int, os.environ["ON_GPU_PART"].split("/"))
            alone = [one for one in items if _parameters(one).get("tp", 1) == 1]
            items[:] = alone[::-1][part::parts]  # the longest come last in a file
            found["not_run"] = [one.nodeid for one in items]
            save(found)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                print(report.longreprtext, flush=True)  # pytest's own comes at the end, if that is reached
                found["failed"].append(report.nodeid)
            elif report.skipped:
                found["skipped"].append(report.nodeid)
            if report.when == "call":
                found["passed"] += report.passed
                print(f"{report.nodeid}: {report.outcome}, {report.duration:.1f} s", flush=True)
            if report.nodeid in found["not_run"]:
                found["not_run"].remove(report.nodeid)
            save(found)

    os.chdir(ROOT)
    # conftest.py has programs of tests compiled fast, unless a level is given; this is XLA's own
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=3".strip()
    # what pyproject.toml asks for needs plugins, and makes a later version's warning an error
    lenient = ["-o", "addopts=", "-W", "default", "-p", "no:cacheprovider"]
    chosen = ["-k", "layout or told"] if dry else []
    code = pytest.main(["-q", "-s", "--all", *lenient, *arguments, *chosen], [Part()])
    if code:
        raise SystemExit(int(code))
    return found


def _parameters(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def kernels(dry: bool) -> Result:
    """Tests of the kernels: random shapes against the definition, the self-test, a model's logits."""
    return tests("tests/test_gpu_kernels.py", dry=dry)


def sampler(dry: bool) -> Result:
    """Tests of draws at real vocabulary sizes, on this device alone."""
    return tests(*(f"tests/test_draws.py::{name}" for name in DRAWS), dry=dry)


def attention(dry: bool) -> Result:
    """Times attention of decode rows alone, in Llama-3-8B's shape: the kernel and the page walk."""
    from tpjax.attention import KernelShape
    from tpjax.attention.backends import Backend
    from tpjax.inspect.chip_benchmark import attention_s

    shape = KernelShape(8, 4, 128, 128, False, (None,), None, False, PAGE, "bfloat16")
    found: list[Result] = []
    cases = [(1, 256)] if dry else [(1, 2048), (1, 32768), (8, 2048), (8, 8192), (64, 2048), (256, 1024)]
    for batch, context in cases:
        moved = 2 * batch * context * shape.heads * shape.width * 2
        row: Result = {"batch": batch, "context": context, "bytes": moved}
        for name in ("xla",) if dry else ("gpu", "xla"):
            taken = attention_s(Backend(name), shape, batch, context)
            row |= {f"{name}_us": 1e6 * taken, f"{name}_bytes_s": moved / taken}
        found.append(row)
        print(json.dumps(row), flush=True)
        save({"rows": found})
    return {"rows": found}


def chained_us(way: Callable[..., Any], x: Any, arguments: Sequence[tuple[Any, ...]]) -> float:
    """Returns the microseconds of a product, of several in a program that wait for each other.

    Each has arguments of its own: a weight that the one before has read would come from the chip's cache.
    """
    import jax

    from tpjax.inspect.chip_benchmark import seconds

    way = jax.jit(way)  # lowered once

    @jax.jit
    def several(x: jax.Array, arguments: Sequence[tuple[Any, ...]]) -> jax.Array:
        for each in arguments:
            product = jax.lax.optimization_barrier(way(x, *each))  # all of it
            x = x + 0 * product[: len(x), :1].astype(x.dtype)
        return x

    return 1e6 * seconds(functools.partial(several, x, arguments), calls=4) / len(arguments)


def experts(dry: bool) -> Result:
    """Times the first product of experts alone, in Qwen3-30B-A3B's shape: the kernel and ragged_dot."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tpjax.layers import experts_gpu

    count, inner, columns, active = (4, 64, 128, 2) if dry else (128, 2048, 1536, 8)
    weights = jax.random.normal(jax.random.key(0), (count, inner, columns), jnp.bfloat16)
    found: list[Result] = []

    def by_kernel(x: jax.Array, assigned: jax.Array, weights: jax.Array) -> jax.Array:
        tiles = experts_gpu.lay_out(assigned, count)
        return experts_gpu.grouped_product(tiles.take(x), weights, tiles)

    def by_xla(x: jax.Array, assigned: jax.Array, weights: jax.Array) -> jax.Array:
        flat = assigned.reshape(-1)
        order, sizes = jnp.argsort(flat), jnp.zeros(count, jnp.int32).at[flat].add(1)
        return jax.lax.ragged_dot(x[order // active], weights, sizes, preferred_element_type=x.dtype)

    ways = {"xla": by_xla} if dry else {"gpu": by_kernel, "xla": by_xla}
    for tokens in (1,) if dry else (1, 8, 64, 256, 2048):
        rng, rows = np.random.default_rng(0), tokens * active
        draws = [np.stack([rng.permutation(count)[:active] for _ in range(tokens)]) for _ in range(CHAINED)]
        x = jax.random.normal(jax.random.key(1), (tokens, inner), jnp.bfloat16)
        distinct = statistics.mean(len(np.unique(chosen)) for chosen in draws)
        row: Result = {
            "tokens": tokens,
            "experts": distinct,
            "bytes": 2 * distinct * inner * columns,
            "flops": 2 * rows * inner * columns,
        }
        arguments = [(jnp.asarray(chosen, jnp.int32), weights) for chosen in draws]
        for name, way in ways.items():
            row[f"{name}_us"] = chained_us(way, x, arguments)
        found.append(row)
        print(json.dumps(row), flush=True)
        save({"rows": found})
    return {"rows": found}


def products(dry: bool) -> Result:
    """Times products with weights of 8 and 4 bits alone, in Llama-3-8B's shapes: the kernel and XLA's."""
    import jax
    import jax.numpy as jnp

    from tpjax.layers.quantized_gpu import quantized_product

    def by_xla(x: jax.Array, values: jax.Array, scales: jax.Array | None) -> jax.Array:
        if scales is None:
            return jnp.einsum("ni,oi->no", x, values.astype(x.dtype), preferred_element_type=jnp.float32)
        split = values.reshape(len(values), len(scales), -1).astype(x.dtype)
        of_x = x.reshape(len(x), len(scales), -1)
        sums = jnp.einsum("ngi,ogi->ngo", of_x, split, preferred_element_type=jnp.float32)
        return (sums * scales).sum(1)

    ways = {"xla": by_xla} if dry else {"gpu": quantized_product, "xla": by_xla}
    found: list[Result] = []
    for outputs, inputs in [(128, 256)] if dry else [(28672, 4096), (4096, 14336), (6144, 4096)]:
        numbers = [
            jax.random.randint(jax.random.key(number), (outputs, inputs), -8, 8, jnp.int8)
            for number in range(CHAINED)
        ]
        for kind, tokens in (("int4", 8), ("int4", 64), ("int8", 8), ("bfloat16", 8)):
            x = jax.random.normal(jax.random.key(1), (tokens, inputs), jnp.bfloat16)
            scales = jnp.ones((inputs // 128, outputs), jnp.bfloat16) if kind == "int4" else None
            size = outputs * inputs * {"int4": 4, "int8": 8, "bfloat16": 16}[kind] // 8
            row: Result = {
                "kind": kind,
                "tokens": tokens,
                "outputs": outputs,
                "inputs": inputs,
                "bytes": size,
            }
            arguments = [(values.astype(kind), scales) for values in numbers]
            for name, way in ways.items():
                if (name, kind) != ("gpu", "bfloat16"):
                    row[f"{name}_us"] = chained_us(way, x, arguments)
            found.append(row)
            print(json.dumps(row), flush=True)
            save({"rows": found})
    return {"rows": found}


# --- parity ------------------------------------------------------------------------------------------------


def parity(dry: bool) -> Result:
    """Compares logits in bfloat16 with those in float32; transformers' own distance is the unit."""
    sys.path.insert(0, str(ROOT / "tests"))
    from rounding import distance, prompts

    from tpjax import LLM

    goldens = ROOT / "tests" / "goldens"
    of_transformers = json.loads((goldens / "bfloat16.json").read_text())
    found: Result = {}
    for name in ("llama",) if dry else ("gemma", "gemma3", "llama", "qwen3_moe"):
        logits = {}
        for dtype in ("float32", "bfloat16"):
            with LLM(goldens / name, tp=1, dtype=dtype, max_model_len=128, max_slots=1) as llm:
                logits[dtype] = [llm.logits(prompt) for prompt in prompts(llm.config.vocab_size)]
                backend = llm.runner.backend.name
        away = distance(logits["bfloat16"], logits["float32"])
        unit = of_transformers[name]
        found[name] = {"attention": backend} | {key: away[key] / unit[key] for key in unit}
        print(name, found[name], flush=True)
        save(found)
    return found


# --- models ------------------------------------------------------------------------------------------------


def model_runner(
    name: str, dry: bool, slots: int, quantize: str | None = None, kv_dtype: str = "auto"
) -> tuple[Any, int, Result]:
    """Makes the runner of a published model with random weights, and all the cache that fits.

    Returns:
        The runner, the bytes of its weights, and what is known of it so far.
    """
    import jax
    import jax.numpy as jnp

    from tpjax.families.registry import config_from_hf
    from tpjax.inspect.chip_benchmark import checked_backend, random_runner
    from tpjax.mesh import make_mesh

    fields = json.loads((ROOT / "tpjax" / "planning" / "published.json").read_text())[name]["config"]
    if dry:
        fields |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
        if "num_experts" in fields:
            fields |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config, mesh, dtype = config_from_hf(fields), make_mesh(1), jnp.dtype("bfloat16")
    backend, checked = checked_backend(config, mesh, dtype, kv_dtype, quantize)
    found: Result = {"model": name, "weights": quantize or "bfloat16", "cache": kv_dtype, **checked}
    print(json.dumps(found), flush=True)
    save(found)
    runner, weight_bytes = random_runner(
        config,
        mesh,
        dtype,
        backend,
        max_model_len=CONTEXT + 2 * PAGE,
        max_slots=slots,
        quantize=quantize,
        kv_dtype=kv_dtype,
    )
    limits, stats = runner.limits, jax.devices()[0].memory_stats() or {}
    print(f"{limits.num_pages} pages, {limits.max_slots} slots", flush=True)
    found |= {"weight_bytes": weight_bytes, "pages": limits.num_pages}
    found["memory_in_use"] = stats.get("bytes_in_use")
    return runner, weight_bytes, found


def decode_speed(
    found: Result, key: str, runner: Any, weight_bytes: int, batches: dict[int, int], bandwidth: float | None
) -> None:
    """Times decode steps, and adds rows to those of ``key``: bytes read over the time of a step.

    Those are the stored bytes of weights, of experts that tokens pick, and of each sequence's cache.
    """
    from tpjax.cache import page_bytes_per_device
    from tpjax.inspect.chip_benchmark import decode_s

    config, rows = runner.config, found.setdefault(key, [])
    page = page_bytes_per_device(config, 1, PAGE, runner.dtype, kv_dtype=runner.kv_dtype)
    embedding = config.vocab_size * config.hidden_size * 2  # of which a step reads a row per token
    read = weight_bytes - (0 if config.tie_word_embeddings else embedding)
    for batch, context in batches.items():
        if batch > runner.limits.max_slots:
            continue
        started = time.perf_counter()
        if config.moe is not None and batch > 1:
            start_slots(runner, batch)
        step = decode_s(runner, batch, context)
        cache = batch * context * page / PAGE
        weights = read - unread_experts(config, batch)
        rows.append(
            {
                "batch": batch,
                "context": context,
                "ms": 1e3 * step,
                "tokens_s": batch / step,
                "weight_bytes": weights,
                "cache_bytes": cache,
                "of_bandwidth": share((weights + cache) / step, bandwidth),
                "distinct_pages": min(batch * -(-context // PAGE), runner.limits.num_pages - 1),
                "with_compiling_s": time.perf_counter() - started,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        save(found)


def share(reached: float, ceiling: float | None) -> float | None:
    """Returns the share of what the machine was measured to reach; ``None``: it was not measured."""
    return None if ceiling is None else reached / ceiling


def start_slots(runner: Any, batch: int) -> None:
    """Gives each slot a last token of its own: equal ones would pick the same experts."""
    import numpy as np

    from tpjax.inspect.chip_benchmark import decode_rows
    from tpjax.runtime.rows import Chunk

    tokens = np.random.default_rng(0).integers(3, runner.config.vocab_size, (batch, 4)).tolist()
    rows = decode_rows(runner, batch, PAGE)
    for start in range(0, batch, 8):
        chunks = []
        for row, ids in zip(rows[start : start + 8], tokens[start : start + 8], strict=True):
            row.position = 0
            chunks.append(Chunk(row, ids))
        runner.step([], chunks)


def unread_experts(config: Any, batch: int) -> float:
    """Returns the bytes of experts that no token picks, where each picks evenly: an expectation."""
    if config.moe is None:
        return 0.0
    moe = config.moe
    share = (1 - moe.experts_per_token / moe.num_experts) ** batch
    return share * config.num_layers * moe.num_experts * 3 * config.hidden_size * moe.expert_width * 2


def prefill_speed(runner: Any, flops: float | None, prompt: int) -> Result:
    """Times a prompt in one step, against the FLOPs of its products and of causal attention."""
    from tpjax.inspect.chip_benchmark import prefill_s
    from tpjax.runtime.counts import Counts

    started = time.perf_counter()
    step = prefill_s(runner, prompt)
    config, held = runner.config, Counts("", runner.config).on_device(1)
    each = held.attention + held.mlp + held.routers  # weights that every token is multiplied by
    if config.moe is not None:
        each += held.experts * config.moe.experts_per_token // config.moe.num_experts
    attention = 2 * 2 * config.attention.num_heads * config.attention.head_dim * prompt**2 / 2
    work = 2 * each * prompt + config.num_layers * attention + 2 * (held.head or held.embedding)
    return {
        "tokens": prompt,
        "ms": 1e3 * step,
        "tokens_s": prompt / step,
        "flops": work,
        "of_rate": share(work / step, flops),
        "with_compiling_s": time.perf_counter() - started,
    }


def engine_speed(runner: Any, requests: int, prompt: int, answer: int) -> Result:
    """Times requests that come at once: prompts and decoding share steps."""
    import numpy as np

    from tpjax.engine.engine import Engine
    from tpjax.engine.request import Request
    from tpjax.sampling_params import SamplingParams

    engine, rng = Engine(runner), np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)

    def run(count: int, tokens: int) -> float:
        started = time.perf_counter()
        limited = replace(params, max_tokens=tokens)
        for number in range(count):
            ids = rng.integers(3, runner.config.vocab_size, prompt).tolist()
            engine.add(Request(ids, limited, seed=number))
        while engine.busy:
            engine.step()
        return time.perf_counter() - started

    compiling = run(requests, answer)  # compiles what such requests need
    compiled = runner.compile_count
    taken = run(requests, answer)
    return {
        "compiled_meanwhile": runner.compile_count - compiled,
        "requests": requests,
        "prompt": prompt,
        "answer": answer,
        "seconds": taken,
        "output_tokens_s": requests * answer / taken,
        "tokens_s": requests * (prompt + answer) / taken,
        "first_s": compiling,
    }


def model(name: str, dry: bool, slots: int) -> Result:
    """Decode at several batches, prefill, where the time of both goes, and the engine."""
    runner, weight_bytes, found = model_runner(name, dry, 8 if dry else slots)
    batches = {1: SHORT_CONTEXT, 2: SHORT_CONTEXT} if dry else asked_batches(slots)
    known, prompt = ceilings(), 512 if dry else PROMPT
    bandwidth = known.get("read_bytes_s")
    for batch, context in batches.items():
        decode_speed(found, "decode", runner, weight_bytes, {batch: context}, bandwidth)
        if batch in (1, 8):
            profile_decode(found, runner, batch, context)
        if "prefill" not in found:
            found["prefill"] = prefill_speed(runner, known.get("product_flops"), prompt)
            print(json.dumps(found["prefill"]), flush=True)
            profile_prompt(found, runner, prompt)
    short = {batch: SHORT_CONTEXT for batch in (1, 8) if dry or batch in batches}
    decode_speed(found, "decode_short", runner, weight_bytes, short, bandwidth)
    found["engine"] = engine_speed(runner, *((2, 40, 4) if dry else (min(64, slots), 512, 128)))
    return found


def asked_batches(slots: int) -> dict[int, int]:
    """Returns the context of each batch that was asked for and has slots."""
    asked = map(int, os.environ["ON_GPU_BATCHES"].split())
    return {batch: BATCHES[batch] for batch in asked if batch <= slots}


def profile(found: Result, name: str, run: Callable[[], Any]) -> None:
    """Adds to ``found`` which kernels take the time of a run, and keeps the trace.

    A profiler that does not work leaves its error: other figures do not depend on it.
    """
    import jax

    profiles = found.setdefault("profile", {})
    try:
        run()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready([run() for _ in range(PROFILED)])
            (trace,) = Path(folder).rglob("*.xplane.pb")
            kept = work() / f"{os.environ['ON_GPU_SECTION']}-{len(profiles)}.xplane.pb"
            shutil.copy(trace, kept)
        profiles[name] = kernel_times(kept)
    except Exception as error:
        profiles[name] = f"{type(error).__name__}: {error}"
        print(f"profile of {name}: {profiles[name]}", flush=True)
    save(found)


def kernel_times(trace: Path) -> list[Result]:
    """Returns the time of the kernels of a trace in a run, those that take most first."""
    import jax

    times: dict[str, list[float]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        times.setdefault(event.name, []).append(event.duration_ns / 1e3)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    every = [one for all_of in times.values() for one in all_of]
    return [
        {"kernel": "all", "us": sum(every) / PROFILED, "calls": len(every) / PROFILED},
        *[
            {"kernel": name, "us": sum(all_of) / PROFILED, "calls": len(all_of) / PROFILED}
            for name, all_of in ranked[:30]
        ],
    ]


def profile_decode(found: Result, runner: Any, batch: int, context: int) -> None:
    """Profiles a decode step."""
    from tpjax.inspect.chip_benchmark import decode_rows

    rows = decode_rows(runner, batch, context)
    profile(found, f"decode, {batch} of {context}", lambda: runner.decode(rows, 1).tokens)


def profile_prompt(found: Result, runner: Any, prompt: int) -> None:
    """Profiles a prompt."""
    from tpjax.inspect.chip_benchmark import prompt_step

    profile(found, f"prompt of {prompt}", prompt_step(runner, prompt))


def llama(dry: bool) -> Result:
    """Llama-3-8B."""
    return model("llama-3-8b", dry, 256)


def moe(dry: bool) -> Result:
    """Qwen3-30B-A3B: 128 experts, of which a token takes 8."""
    return model("qwen3-30b-a3b", dry, 64)


def quantized(dry: bool, quantize: str | None, kv_dtype: str) -> Result:
    """Llama-3-8B with weights or cache of 8 or 4 bits: decode steps."""
    slots, batches = (8, {1: SHORT_CONTEXT}) if dry else (64, {1: CONTEXT, 8: CONTEXT, 64: CONTEXT})
    runner, weight_bytes, found = model_runner("llama-3-8b", dry, slots, quantize, kv_dtype)
    bandwidth = ceilings().get("read_bytes_s")
    for batch, context in batches.items():
        decode_speed(found, "decode", runner, weight_bytes, {batch: context}, bandwidth)
        if batch == 8 or dry:
            profile_decode(found, runner, batch, context)
    return found


def doctor(dry: bool) -> Result:
    """What `tpjax doctor --measure` shows."""
    from rich import print as show

    from tpjax.inspect.chip_benchmark import Figure, measure

    figures: list[Result] = []

    def found(figure: Figure) -> None:
        figures.append(figure.to_dict())
        print(figure, flush=True)
        save({"figures": figures})

    report = measure(found=found)
    show(report)
    return report.to_dict()


def transformers(dry: bool) -> Result:
    """Llama-3-8B by transformers, compiled, with a static cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **({"vocab_size": 512, "num_key_value_heads": 2} | small)
        if dry
        else {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        }
    )
    device = "cpu" if dry else "cuda"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        llm = LlamaForCausalLM(config).eval()
    prompt, answer = (16, 4) if dry else (SHORT_CONTEXT - 64, 128)
    found: Result = {"prompt": prompt, "answer": answer}

    def generate(batch: int, count: int) -> float:
        ids = torch.randint(3, config.vocab_size, (batch, prompt), device=device)
        if not dry:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            llm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                cache_implementation="static",
                pad_token_id=0,
            )
        if not dry:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for batch in (8, 1):
        first = generate(batch, answer)
        generate(batch, answer)
        pairs = [(generate(batch, answer), generate(batch, 1)) for _ in range(3)]
        step = statistics.median((long - short) / (answer - 1) for long, short in pairs)
        found[str(batch)] = {"ms": 1e3 * step, "tokens_s": batch / step, "first_s": first}
        print(json.dumps(found[str(batch)]), flush=True)
        save(found)
    return found


# --- sections ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        run: measures or tests; its argument is whether it is a dry run.
        seconds: it may take. Compiling is most of it.
        parts: processes that share its tests.
    """

    run: Callable[[bool], Result]
    seconds: int
    parts: int = 1


def model_in(quantize: str | None, kv_dtype: str) -> Callable[[bool], Result]:
    return functools.partial(quantized, quantize=quantize, kv_dtype=kv_dtype)


# Those of a group run at once, and time nothing. What no chip has told yet comes first.
GROUPS: tuple[dict[str, Section], ...] = (
    {"machine": Section(machine, 45)},
    {
        "kernels": Section(kernels, 150, parts=8),
        "parity": Section(parity, 150),
        "sampler": Section(sampler, 150),
    },
    {"int4": Section(model_in("int4", "auto"), 75)},
    {"moe": Section(moe, 130)},
    {"doctor": Section(doctor, 90)},
    {"cache": Section(model_in(None, "int8"), 60)},
    {"llama": Section(llama, 120)},
    {"attention": Section(attention, 50)},
    {"experts": Section(experts, 40)},
    {"products": Section(products, 60)},
    {"int8": Section(model_in("int8", "auto"), 60)},
    {"fp8": Section(model_in("fp8", "fp8"), 60)},
    {"transformers": Section(transformers, 120)},
)
SECTIONS = {name: section for group in GROUPS for name, section in group.items()}


def work() -> Path:
    """Returns the folder of this call, in which each process has files of its own."""
    return Path(os.environ["ON_GPU_WORK"])


def ceilings() -> Result:
    """Returns what the section ``machine`` measured, as far as it came."""
    with contextlib.suppress(OSError, ValueError):
        found: Result = json.loads((work() / "machine.json").read_text())
        return found
    return {}


def save(result: Result) -> None:
    """Writes what a section has found so far, and what all have to ``results.json``."""
    keep(os.environ["ON_GPU_SECTION"], result)


def keep(name: str, result: Result) -> None:
    """Writes what is known under a name into the last of the calls in ``results.json``."""
    results = Path(os.environ["ON_GPU_OUT"]) / "results.json"
    with (work() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        replace_text(work() / f"{name}.json", json.dumps(result))
        parts = sorted(work().glob("*.json"), key=lambda file: file.stat().st_ctime_ns)
        call = {file.stem: json.loads(file.read_text()) for file in parts}
        calls = json.loads(results.read_text())["calls"]
        replace_text(results, json.dumps({"calls": [*calls[:-1], call]}, indent=1) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Writes a file whole, or not at all: the machine may end at any moment."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def run_here(section: str, dry: bool) -> None:
    """Runs a section in this process; shortly before its time is over, says where it is."""
    limit = float(os.environ["ON_GPU_SECONDS"])
    faulthandler.dump_traceback_later(max(1.0, limit - 2))
    save(SECTIONS[section].run(dry))
    faulthandler.cancel_dump_traceback_later()


def start(
    name: str, section: str, part: str, limit: float, dry: bool, beside: int
) -> subprocess.Popen[bytes]:
    """Starts a process of a section, one of ``beside`` that run at once."""
    environment = os.environ | {
        "ON_GPU_SECTION": name,
        "ON_GPU_PART": part,
        "ON_GPU_SECONDS": str(limit),
        "HF_HUB_OFFLINE": "1",
    }
    if not dry:  # the largest model leaves little; each process has a context beside what it allocates
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.93 if beside == 1 else 0.8 / beside:.2f}"
    command = [sys.executable, __file__, "--section", section, *(["--dry-run"] if dry else [])]
    with (work() / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_group(group: dict[str, Section], left: float, dry: bool) -> Iterator[tuple[str, str, float]]:
    """Runs sections at once; yields the name of each process, how it ended, and after how many seconds."""
    counts = {name: 1 if dry else section.parts for name, section in group.items()}
    parts = {
        name if count == 1 else f"{name}-{part + 1}": (name, f"{part}/{count}")
        for name, count in counts.items()
        for part in range(count)
    }
    running, started = dict[str, tuple[subprocess.Popen[bytes], float]](), time.perf_counter()
    try:
        for name, (section, part) in parts.items():
            limit = min(group[section].seconds, left)
            running[name] = start(name, section, part, limit, dry, len(parts)), limit
        while running:
            time.sleep(0.1)
            for name, (process, limit) in list(running.items()):
                code, taken = process.poll(), time.perf_counter() - started
                if code is None and taken < limit:
                    continue
                if code is None:
                    process.kill()
                    process.wait()
                del running[name]
                how = f"stopped after {limit:.0f} s" if code is None else f"exit {code}" if code else "ok"
                yield name, how, taken
    finally:  # interrupted
        for process, _ in running.values():
            process.kill()
            process.wait()


def report(name: str) -> Iterator[str]:
    """Returns the figures of a section, a line each."""
    with contextlib.suppress(OSError, ValueError):
        result = json.loads((work() / f"{name}.json").read_text())
        result.pop("profile", None)
        for key, value in result.items():
            for one in value if isinstance(value, list) else [value]:
                yield f"  {key}: {shown(one)}"


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(one)}" for key, one in value.items())
    return str(value)


def collect(out: Path) -> None:
    """Adds what processes that ended have printed, and their traces, to the files of this call."""
    with (out / "log.txt").open("a") as log:
        for file in sorted(work().glob("*.log")):
            log.write(f"=== {file.stem}\n{file.read_text(errors='replace')}\n")
            file.unlink()
    for file in sorted(work().glob("*.xplane.pb")):
        with zipfile.ZipFile(out / "traces.zip", "a", zipfile.ZIP_DEFLATED) as traces:
            traces.write(file, file.name)
        file.unlink()


def run_all(groups: Sequence[dict[str, Section]], end: float, out: Path, dry: bool) -> dict[str, str]:
    """Runs groups of sections in turn until the time is over, and returns how each process ended."""
    ends: dict[str, str] = {}
    for group in groups:
        left = end - time.perf_counter()
        if left < 5 or ("machine" in ends and not ceilings()):  # no GPU
            ends |= dict.fromkeys(group, "not run")
            continue
        for name, how, taken in run_group(group, left, dry):
            ends[name] = how
            print(f"{name}: {how}, {taken:.0f} s", flush=True)
            keep("sections", ends)
            if how != "ok":
                lines = (work() / f"{name}.log").read_text(errors="replace").splitlines()[-12:]
                print("  " + "\n  ".join(lines), flush=True)
            print("\n".join(report(name)), flush=True)
        collect(out)
    keep("sections", ends)
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all sections ({MINUTES})")
    parser.add_argument("--out", type=Path, help="folder of results ($OUT, else build/on_gpu)")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        choices=BATCHES,
        default=list(BATCHES),
        help="of decode of whole models",
    )
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dry = arguments.dry_run
    if arguments.section:
        run_here(arguments.section, dry)
        return
    out = (arguments.out or Path(os.environ.get("OUT") or ROOT / "build" / "on_gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    calls = json.loads((out / "results.json").read_text())["calls"] if (out / "results.json").exists() else []
    replace_text(out / "results.json", json.dumps({"calls": [*calls, {}]}))
    chosen = [
        {name: one for name, one in group.items() if name in (*(arguments.only or SECTIONS), "machine")}
        for group in GROUPS
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    with tempfile.TemporaryDirectory(prefix="on_gpu-") as folder:
        cache = Path(folder) if dry else ROOT / "build" / "on_gpu"
        os.environ |= {
            "ON_GPU_OUT": str(out),
            "ON_GPU_WORK": folder,
            "ON_GPU_BATCHES": " ".join(map(str, arguments.batches)),
            "TPJAX_CACHE": str(cache / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(cache / "cache" / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
            # JAX goes on without a GPU that does not start: figures would be a CPU's
            "JAX_PLATFORMS": "cpu" if dry else "cuda,cpu",
        }
        end = time.perf_counter() + 60 * arguments.minutes
        try:
            ends = run_all([group for group in chosen if group], end, out, dry)
        finally:
            collect(out)
    failed = [name for name, how in ends.items() if how not in ("ok", "not run")]
    if left_out := [name for name, how in ends.items() if how == "not run"]:
        print(f"not run: {', '.join(left_out)}; for another call: --only {' '.join(left_out)}", flush=True)
    if failed or (left_out and arguments.only):
        sys.exit(f"failed: {', '.join(failed or left_out)}")


if __name__ == "__main__":
    main()
