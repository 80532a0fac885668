#!/usr/bin/env python
"""Tests and measures tpjax on one NVIDIA GPU: kernels, sampler, decode, prefill, engine, transformers.

    scripts/on_gpu                        # a machine with an H100 or H200: at most nine minutes
    scripts/on_gpu --dry-run              # the same code on a CPU, with tiny models: three minutes
    scripts/on_gpu --only kernels llama   # some sections

Each section is a process of its own with a limit of time, so that one that fails or hangs takes no other
along. Not all fit into nine minutes: what did not run is named at the end. Results are printed and written
to OUT (--out, else $OUT, else build/on_gpu): NAME.json and NAME.log of each section, and a profile of
decode steps. Models have random weights in the shapes of published ones; nothing is downloaded. Bandwidth
and rate, which all shares refer to, are measured in the same call.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
DRAWS = (  # tests of one device
    "test_noise_is_finite_and_follows_the_gumbel_distribution",
    "test_a_token_of_probability_one_is_always_sampled[128256-1]",
    "test_masked_tokens_are_never_sampled[1]",
    "test_nothing_allowed_is_told[1-0.0]",
    "test_nothing_allowed_is_told[1-1.0]",
    "test_numbers_at_the_ends_of_float32[1]",
    "test_many_draws_follow_the_softmax[128256]",
    "test_many_draws_follow_the_softmax[262144]",
)
Result = dict[str, Any]


# --- the device -------------------------------------------------------------------------------------------


def machine(dry: bool) -> Result:
    """Measures the bandwidth of a copy and of a sum, and the rate of a product in bfloat16."""
    import jax
    import jax.numpy as jnp

    from tpjax.inspect.chip_benchmark import product_rate, read_bandwidth, seconds

    size = 1 << (22 if dry else 31)  # bytes
    words = jnp.ones(size // 4, jnp.int32)
    copied = seconds(functools.partial(jax.jit(lambda x: x + 1), words), calls=4)
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "copy_bytes_s": 2 * size / copied,
        "read_bytes_s": read_bandwidth(size),
        "product_flops": product_rate(256 if dry else 8192, jnp.dtype("bfloat16")),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    }


# --- kernels and sampler -----------------------------------------------------------------------------------


def tests(*arguments: str, dry: bool) -> Result:
    """Runs tests by pytest, and returns how many passed and which did not."""
    import pytest

    class Outcomes:
        def __init__(self) -> None:
            self.found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.found[report.outcome].append(report.nodeid)
                save({name: len(those) if name == "passed" else those for name, those in self.found.items()})

    outcomes = Outcomes()
    os.chdir(ROOT)
    chosen = ["-k", "layout or told"] if dry else []
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--all", *arguments, *chosen], [outcomes])
    if code:
        raise SystemExit(int(code))
    return {name: len(those) if name == "passed" else those for name, those in outcomes.found.items()}


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


def experts(dry: bool) -> Result:
    """Times the first product of experts alone, in Qwen3-30B-A3B's shape: the kernel and ragged_dot."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tpjax.inspect.chip_benchmark import seconds
    from tpjax.layers import experts_gpu

    count, inner, columns, active = (4, 64, 128, 2) if dry else (128, 2048, 1536, 8)
    weights = jax.random.normal(jax.random.key(0), (count, inner, columns), jnp.bfloat16)
    found: list[Result] = []
    for tokens in (1,) if dry else (1, 8, 64, 256, 2048):
        rng, rows = np.random.default_rng(0), tokens * active
        chosen = np.stack([rng.permutation(count)[:active] for _ in range(tokens)])
        assigned = jnp.asarray(chosen, jnp.int32)
        x = jax.random.normal(jax.random.key(1), (tokens, inner), jnp.bfloat16)
        distinct = len(np.unique(chosen))
        row: Result = {
            "tokens": tokens,
            "experts": distinct,
            "bytes": 2 * distinct * inner * columns,
            "flops": 2 * rows * inner * columns,
        }

        def by_kernel(x: jax.Array, weights: jax.Array, assigned: jax.Array) -> jax.Array:
            tiles = experts_gpu.lay_out(assigned, count)
            return experts_gpu.grouped_product(tiles.take(x), weights, tiles)[tiles.places]

        def by_xla(x: jax.Array, weights: jax.Array, assigned: jax.Array) -> jax.Array:
            flat = assigned.reshape(-1)
            order, sizes = jnp.argsort(flat), jnp.zeros(count, jnp.int32).at[flat].add(1)
            return jax.lax.ragged_dot(x[order // active], weights, sizes, preferred_element_type=x.dtype)

        ways = {"xla": by_xla} if dry else {"gpu": by_kernel, "xla": by_xla}
        for name, way in ways.items():
            call = functools.partial(jax.jit(way), x, weights, assigned)
            row[f"{name}_us"] = 1e6 * seconds(call, calls=20)
        found.append(row)
        print(json.dumps(row), flush=True)
        save({"rows": found})
    return {"rows": found}


def products(dry: bool) -> Result:
    """Times products with weights of 8 and 4 bits alone, in Llama-3-8B's shapes: the kernel and XLA's."""
    import jax
    import jax.numpy as jnp

    from tpjax.inspect.chip_benchmark import seconds
    from tpjax.layers.quantized_gpu import quantized_product

    def by_xla(x: jax.Array, values: jax.Array, scales: jax.Array | None) -> jax.Array:
        if scales is None:
            return jnp.einsum("ni,oi->no", x, values.astype(x.dtype), preferred_element_type=jnp.float32)
        split = values.reshape(len(values), len(scales), -1).astype(x.dtype)
        of_x = x.reshape(len(x), len(scales), -1)
        sums = jnp.einsum("ngi,ogi->ngo", of_x, split, preferred_element_type=jnp.float32)
        return (sums * scales).sum(1)

    def chained(product: Callable[..., jax.Array], x: jax.Array, *weight: Any) -> jax.Array:
        for _ in range(8):  # each waits for the one before
            x = x + 0 * product(x, *weight)[:, :1].astype(x.dtype)
        return x

    ways = {"xla": by_xla} if dry else {"gpu": quantized_product, "xla": by_xla}
    found: list[Result] = []
    for outputs, inputs in [(128, 256)] if dry else [(28672, 4096), (4096, 14336), (6144, 4096)]:
        numbers = jax.random.randint(jax.random.key(0), (outputs, inputs), -8, 8, jnp.int8)
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
            for name, way in ways.items():
                if (name, kind) != ("gpu", "bfloat16"):
                    call = functools.partial(jax.jit(chained, static_argnums=0), way, x, numbers.astype(kind))
                    row[f"{name}_us"] = 1e6 * seconds(functools.partial(call, scales), calls=10) / 8
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
) -> Any:
    """Makes the runner of a published model with random weights, and all the cache that fits."""
    import jax.numpy as jnp

    from tpjax.attention import KernelShape, choose_backend, selftest
    from tpjax.families.registry import config_from_hf
    from tpjax.inspect.chip_benchmark import random_runner
    from tpjax.mesh import make_mesh

    fields = json.loads((ROOT / "tpjax" / "planning" / "published.json").read_text())[name]["config"]
    if dry:
        fields |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
        if "num_experts" in fields:
            fields |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config, mesh, dtype = config_from_hf(fields), make_mesh(1), jnp.dtype("bfloat16")
    device, shape = mesh.local_devices[0], KernelShape.of(config, 1, dtype, PAGE, kv_dtype)
    folder = Path(os.environ["TPJAX_CACHE"]) / "attention"
    backend = choose_backend("auto", device, shape, lambda: selftest.verdict("gpu", shape, device, folder))
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
    limits = runner.limits
    print(f"attention: {backend}; {limits.num_pages} pages, {limits.max_slots} slots", flush=True)
    return runner, weight_bytes


def decode_speed(runner: Any, weight_bytes: int, batches: dict[int, int], bandwidth: float) -> list[Result]:
    """Times decode steps: bytes of weights and live cache over the time of a step."""
    from tpjax.cache import page_bytes_per_device
    from tpjax.inspect.chip_benchmark import decode_s

    config, found = runner.config, []
    page = page_bytes_per_device(config, 1, PAGE, runner.dtype, kv_dtype=runner.kv_dtype)
    embedding = config.vocab_size * config.hidden_size * 2  # of which a step reads a row per token
    read = weight_bytes - (0 if config.tie_word_embeddings else embedding)
    for batch, context in batches.items():
        if batch > runner.limits.max_slots:
            continue
        if config.moe is not None:
            start_slots(runner, batch)
        started = time.perf_counter()
        step = decode_s(runner, batch, context)
        cache = batch * context * page / PAGE
        weights = read - unread_experts(config, batch)
        found.append(
            {
                "batch": batch,
                "context": context,
                "ms": 1e3 * step,
                "tokens_s": batch / step,
                "weight_bytes": weights,
                "cache_bytes": cache,
                "of_bandwidth": (weights + cache) / step / bandwidth,
                "with_compiling_s": time.perf_counter() - started,
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


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


def prefill_speed(runner: Any, weight_bytes: int, flops: float, prompt: int) -> Result:
    """Times a prompt in one step."""
    from tpjax.inspect.chip_benchmark import prefill_s

    started = time.perf_counter()
    step = prefill_s(runner, prompt)
    config = runner.config
    embedding = config.vocab_size * config.hidden_size
    weights = weight_bytes / 2 - embedding * (1 if config.tie_word_embeddings else 2)
    if config.moe is not None:
        moe, width = config.moe, config.moe.expert_width
        idle = moe.num_experts - moe.experts_per_token
        weights -= config.num_layers * idle * 3 * config.hidden_size * width
    attention = 2 * 2 * config.attention.num_heads * config.attention.head_dim * prompt**2 / 2
    work = 2 * weights * prompt + config.num_layers * attention
    return {
        "tokens": prompt,
        "ms": 1e3 * step,
        "tokens_s": prompt / step,
        "flops": work,
        "of_rate": work / step / flops,
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


def model(name: str, dry: bool, slots: int, ceilings: Result) -> Result:
    """Decode at several batches, prefill, the engine, and where the time of a decode step goes."""
    runner, weight_bytes = model_runner(name, dry, 8 if dry else slots)
    batches = {1: SHORT_CONTEXT, 2: SHORT_CONTEXT} if dry else asked_batches(slots)
    found: Result = {"model": name, "attention": str(runner.backend), "weight_bytes": weight_bytes}
    found["decode"] = decode_speed(runner, weight_bytes, batches, ceilings["read_bytes_s"])
    short = {batch: SHORT_CONTEXT for batch in (1, 8) if dry or batch in batches}
    found["decode_short"] = decode_speed(runner, weight_bytes, short, ceilings["read_bytes_s"])
    save(found)
    prompt = 512 if dry else PROMPT
    found["prefill"] = prefill_speed(runner, weight_bytes, ceilings["product_flops"], prompt)
    found["profile"] = profiles(runner, {1: SHORT_CONTEXT} if dry else {1: CONTEXT, 8: CONTEXT}, prompt)
    print(json.dumps(found["prefill"]), flush=True)
    save(found)
    found["engine"] = engine_speed(runner, *((2, 40, 4) if dry else (min(64, slots), 512, 128)))
    return found


def asked_batches(slots: int) -> dict[int, int]:
    """Returns the context of each batch that was asked for and has slots."""
    asked = map(int, os.environ["ON_GPU_BATCHES"].split())
    return {batch: BATCHES[batch] for batch in asked if batch <= slots}


def profile(runs: dict[str, Callable[[], Any]]) -> dict[str, list[Result]]:
    """Returns which kernels take the time of each run, and keeps the traces."""
    import jax

    found, folder = {}, output() / "trace"
    for at, (name, run) in enumerate(runs.items()):
        run()
        with jax.profiler.trace(str(folder)):
            jax.block_until_ready([run() for _ in range(PROFILED)])
        (trace,) = folder.rglob("*.xplane.pb")
        kept = shutil.copy(trace, output() / f"{os.environ['ON_GPU_SECTION']}-{at}.xplane.pb")
        shutil.rmtree(folder)
        found[name] = kernel_times(Path(kept))
    return found


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
    return [
        {"kernel": name, "us": sum(all_of) / PROFILED, "calls": len(all_of) / PROFILED}
        for name, all_of in ranked[:30]
    ]


def profiles(runner: Any, decode: dict[int, int], prompt: int | None = None) -> dict[str, list[Result]]:
    """Profiles decode steps at the given batches and contexts, and a prompt of so many tokens."""
    from tpjax.inspect.chip_benchmark import decode_rows, prompt_step

    def decoding(batch: int, context: int) -> Callable[[], Any]:
        rows = decode_rows(runner, batch, context)
        return lambda: runner.decode(rows, 1).tokens

    runs = {f"decode, {batch} of {context}": decoding(batch, context) for batch, context in decode.items()}
    if prompt is not None:
        runs[f"prompt of {prompt}"] = prompt_step(runner, prompt)
    return profile(runs)


def llama(dry: bool) -> Result:
    """Llama-3-8B."""
    return model("llama-3-8b", dry, 256, ceilings())


def moe(dry: bool) -> Result:
    """Qwen3-30B-A3B: 128 experts, of which a token takes 8."""
    return model("qwen3-30b-a3b", dry, 64, ceilings())


def quantized(dry: bool, quantize: str | None, kv_dtype: str) -> Result:
    """Llama-3-8B with weights or cache of 8 or 4 bits: decode steps."""
    import jax

    slots, batches = (8, {1: SHORT_CONTEXT}) if dry else (64, {1: CONTEXT, 8: CONTEXT, 64: CONTEXT})
    runner, weight_bytes = model_runner("llama-3-8b", dry, slots, quantize, kv_dtype)
    found: Result = {
        "weights": quantize or "bfloat16",
        "cache": kv_dtype,
        "attention": str(runner.backend),
        "weight_bytes": weight_bytes,
        "memory_in_use": (jax.devices()[0].memory_stats() or {}).get("bytes_in_use"),
    }
    found["decode"] = decode_speed(runner, weight_bytes, batches, ceilings()["read_bytes_s"])
    save(found)
    found["profile"] = profiles(runner, {1: SHORT_CONTEXT} if dry else {8: CONTEXT})
    return found


def doctor(dry: bool) -> Result:
    """What `tpjax doctor --measure` shows."""
    from rich import print as show

    from tpjax.inspect.chip_benchmark import measure

    report = measure()
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

# Seconds of each; compiling is most of it. Those of a group run at once, and time nothing.
GROUPS: tuple[dict[str, tuple[Callable[[bool], Result], int]], ...] = (
    {"machine": (machine, 40)},
    {"llama": (llama, 110)},
    {"transformers": (transformers, 100)},
    {"kernels": (kernels, 90), "parity": (parity, 90), "sampler": (sampler, 90)},
    {"attention": (attention, 50)},
    {"experts": (experts, 30)},
    {"products": (products, 60)},
    {"moe": (moe, 140)},
    {"int4": (functools.partial(quantized, quantize="int4", kv_dtype="auto"), 60)},
    {"int8": (functools.partial(quantized, quantize="int8", kv_dtype="auto"), 60)},
    {"fp8": (functools.partial(quantized, quantize="fp8", kv_dtype="fp8"), 60)},
    {"cache": (functools.partial(quantized, quantize=None, kv_dtype="int8"), 60)},
    {"doctor": (doctor, 90)},
)
SECTIONS = {name: section for group in GROUPS for name, section in group.items()}


def output() -> Path:
    return Path(os.environ["ON_GPU_OUT"])


def ceilings() -> Result:
    """Returns what the section ``machine`` measured."""
    found: Result = json.loads((output() / "machine.json").read_text())
    return found


def save(result: Result) -> None:
    """Writes what a section has found so far."""
    (output() / f"{os.environ['ON_GPU_SECTION']}.json").write_text(json.dumps(result, indent=1) + "\n")


def run_section(name: str, limit: float, dry: bool, beside: int) -> tuple[str, float]:
    """Runs a section as a process, and returns how it ended and after how many seconds."""
    started = time.perf_counter()
    environment = os.environ | {"ON_GPU_SECTION": name}
    if not dry:  # the largest model leaves little
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.93 / (1 + beside):.2f}"
    command = [sys.executable, __file__, "--section", name, *(["--dry-run"] if dry else [])]
    with (output() / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s", time.perf_counter() - started
    return "ok" if code == 0 else f"exit {code}", time.perf_counter() - started


def run_group(names: list[str], left: float, dry: bool) -> Iterator[tuple[str, str, float]]:
    """Runs sections at once, and returns the name of each, how it ended, and its seconds."""
    with ThreadPoolExecutor(len(names)) as pool:
        ends = [
            pool.submit(run_section, name, min(SECTIONS[name][1], left), dry, len(names) - 1)
            for name in names
        ]
        for name, end in zip(names, ends, strict=True):
            yield name, *end.result()


def report(name: str) -> Iterator[str]:
    """Returns the figures of a section, a line each."""
    with contextlib.suppress(OSError, ValueError):
        result = json.loads((output() / f"{name}.json").read_text())
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all sections ({MINUTES})")
    parser.add_argument("--out", type=Path, help="folder of results ($OUT, else build/on_gpu)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=list(BATCHES), help="of decode (1 8 64 256)"
    )
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        save(SECTIONS[arguments.section][0](arguments.dry_run))
        return
    out = arguments.out or Path(os.environ.get("OUT") or ROOT / "build" / "on_gpu")
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"ON_GPU_OUT": str(out.resolve()), "TPJAX_CACHE": str(out.resolve() / "cache")}
    os.environ["ON_GPU_BATCHES"] = " ".join(map(str, arguments.batches))
    if arguments.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"
    end = time.perf_counter() + 60 * arguments.minutes
    failed = []
    for group in GROUPS:
        names = [name for name in group if not arguments.only or name in (*arguments.only, "machine")]
        left = end - time.perf_counter()
        if left < 5:
            failed += names
            continue
        for name, how, taken in run_group(names, left, arguments.dry_run) if names else ():
            print(f"{name}: {how}, {taken:.0f} s", flush=True)
            if how != "ok":
                failed.append(name)
                print("  " + "\n  ".join((out / f"{name}.log").read_text().splitlines()[-6:]), flush=True)
            print("\n".join(report(name)), flush=True)
    shutil.rmtree(out / "cache", ignore_errors=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
