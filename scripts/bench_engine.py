#!/usr/bin/env python
"""Many requests at once on this machine: throughput, overhead, and what a long prompt does to other streams.

    python scripts/bench_engine.py                   # SmolLM2-135M, float32; needs the parity extra
    python scripts/bench_engine.py --tp 2 --no-transformers
    git worktree add ../before COMMIT && python scripts/bench_engine.py --before ../before

tpjax, its server and transformers are a process each and take turns. Ratios are taken within a round before
the median. The raw loop is the compiled decode step at the same batch, dispatched without a scheduler. The
server's clients are in this process: HTTP, JSON and events of both sides are in its figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from contenders import Contender, Target, serve, served, transformers_model

from tpjax.cli import serving_benchmark
from tpjax.planning.timing import median_ratio, seconds, take_turns

STREAMS = 8
PROMPT_TOKENS = 16
NEW_TOKENS = 64
LONG_PROMPT = 4096
CONTEXT = LONG_PROMPT + 256
OTHERS = 3  # streams that decode while the long prompt is prefilled
SHORT_PROMPTS = 16  # at once, of about this many tokens
SHORT_TOKENS = 24
UNITS = {
    "stall": "longest gap / one-step decode",
    "alone": f"s, a prompt of {LONG_PROMPT} tokens",
    "beside": f"s, a prompt of {LONG_PROMPT} tokens beside {OTHERS} streams",
    "short": f"s, {SHORT_PROMPTS} prompts of {SHORT_TOKENS} tokens, until the last first token",
}


def tpjax_worker(model: str, tp: int) -> dict[str, Callable[[], float]]:
    """Tokens/s of the raw loop, of one stream and of eight; and the stall ratio."""
    import tpjax

    tpjax.fake_devices(tp)
    import jax
    import numpy as np

    from tpjax import LLM, SamplingParams
    from tpjax.engine.request import Request
    from tpjax.runtime.rows import Row

    llm = LLM(model, tp=tp, dtype="float32", max_model_len=CONTEXT, max_slots=STREAMS)
    llm.warm_up()
    engine, runner = llm.engine, llm.runner
    rng = np.random.default_rng(0)
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)

    def prompt(length: int) -> list[int]:
        return rng.integers(0, llm.config.vocab_size, length).tolist()

    def raw() -> float:
        rows = [
            Row(slot, PROMPT_TOKENS, [[slot + 1]], greedy, seed=0, remaining=NEW_TOKENS)
            for slot in range(STREAMS)
        ]
        steps = runner.limits.steps

        def decode() -> None:
            for _ in range(0, NEW_TOKENS, steps):
                sampled = runner.decode(rows, steps)
            jax.block_until_ready(sampled)

        return STREAMS * NEW_TOKENS / seconds(decode)

    def finish() -> None:
        while engine.busy:
            engine.step()

    def stop(requests: list[Request]) -> None:
        for request in requests:
            engine.cancel(request)
        finish()

    def streams(count: int) -> float:
        """Tokens/s once all streams have their first token: no prefill is counted."""
        requests = [Request(prompt(PROMPT_TOKENS), greedy, 0) for _ in range(count)]
        for request in requests:
            engine.add(request)
        while not all(request.output_token_ids for request in requests):
            engine.step()
        before = sum(len(request.output_token_ids) for request in requests)
        return (count * NEW_TOKENS - before) / seconds(finish)

    def others() -> list[Request]:
        """Starts the streams that decode while prompts run."""
        requests = [
            Request(prompt(PROMPT_TOKENS), SamplingParams(2000, 0, ignore_eos=True), 0) for _ in range(OTHERS)
        ]
        for request in requests:
            engine.add(request)
        while not all(len(request.output_token_ids) > NEW_TOKENS for request in requests):
            engine.step()
        return requests

    def stall() -> float:
        """Longest gap of any other stream during a long prompt, over a one-step decode of the same rows."""
        during: list[float] = []
        beside(during)
        steps, engine.scheduler.steps = engine.scheduler.steps, 1
        running, times = others(), []
        for _ in range(30):
            engine.step()
            times.append(time.perf_counter())
        engine.scheduler.steps = steps
        stop(running)
        return max(during) / float(np.median(np.diff(times)))

    def beside(gaps: list[float]) -> float:
        """Seconds of a long prompt while others decode; ``gaps`` gets those between the others' tokens."""
        running = others()
        times: dict[int, list[float]] = {id(request): [] for request in running}
        long = Request(prompt(LONG_PROMPT), SamplingParams(1, 0), 0)
        engine.add(long)
        start = time.perf_counter()
        while engine.busy and long.finish_reason is None:
            for request, tokens in engine.step():
                if tokens and id(request) in times:
                    times[id(request)].append(time.perf_counter())
        end = time.perf_counter()
        gaps += [float(gap) for at in times.values() for gap in np.diff(at)]
        stop(running)
        return end - start

    def alone() -> float:
        """Seconds of a long prompt by itself."""
        engine.add(Request(prompt(LONG_PROMPT), SamplingParams(1, 0), 0))
        return seconds(finish)

    def short() -> float:
        """Seconds until the last of many short prompts, sent at once, has its first token."""
        for _ in range(SHORT_PROMPTS):
            engine.add(Request(prompt(SHORT_TOKENS), SamplingParams(1, 0), 0))
        return seconds(finish)

    work: dict[str, Callable[[], float]] = {"raw": raw, "stall": stall, "alone": alone, "short": short}
    work |= {"one": lambda: streams(1), "eight": lambda: streams(STREAMS), "beside": lambda: beside([])}
    return work


def transformers_worker(model: str) -> dict[str, Callable[[], float]]:
    """Tokens/s of batched greedy generate, float32."""
    import torch
    import transformers

    net = transformers_model(model)
    generator = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def generate() -> float:
        ids = torch.randint(0, net.config.vocab_size, (STREAMS, PROMPT_TOKENS), generator=generator)
        cache = transformers.DynamicCache(config=net.config)
        token = net(ids, past_key_values=cache).logits[:, -1:].argmax(-1)

        def steps() -> None:
            nonlocal token
            for _ in range(NEW_TOKENS - 1):
                token = net(token, past_key_values=cache).logits[:, -1:].argmax(-1)

        return STREAMS * (NEW_TOKENS - 1) / seconds(steps)

    return {"eight": generate}


def through_http(url: str, draw: random.Random) -> float:
    """Tokens/s of eight streams once all have their first token: no prefill is counted."""
    bodies = [
        {
            "prompt": [draw.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        for _ in range(STREAMS)
    ]

    async def stream(client: Any, body: dict[str, Any]) -> list[tuple[float, int]]:
        """Returns when each part of the answer came, and how many tokens it had."""
        parts = []
        async for data in serving_benchmark.stream_events(client, "/v1/completions", body):
            if data != "[DONE]":
                (choice,) = json.loads(data)["choices"]
                parts.append((time.perf_counter(), len(choice["token_ids"])))
        return parts

    async def all_streams() -> list[list[tuple[float, int]]]:
        async with serving_benchmark.open_client(serving_benchmark.LoadProfile(base_url=url)) as client:
            return await asyncio.gather(*(stream(client, body) for body in bodies))

    answers = asyncio.run(all_streams())
    start = max(answer[0][0] for answer in answers)
    parts = [part for answer in answers for part in answer if part[0] > start]
    return sum(tokens for _, tokens in parts) / (max(at for at, _ in parts) - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="an alias (smollm2-135m)")
    parser.add_argument("--tp", type=int, default=1, help="devices (1)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (5)")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers out")
    parser.add_argument(
        "--before", type=Path, metavar="DIR", help="also measure the tpjax of another checkout, in turns"
    )
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, model, *tp = arguments.worker
        serve(transformers_worker(model) if kind == "transformers" else tpjax_worker(model, int(tp[0])))
        return

    ours = ["tpjax", arguments.model, str(arguments.tp)]
    contenders = {"tpjax": Contender("tpjax", __file__, ours)}
    work = [("tpjax", what) for what in ("raw", "one", "eight", "stall", "alone", "beside", "short")]
    if arguments.before:
        contenders["before"] = Contender("before", __file__, ours, checkout=arguments.before)
        work += [("before", what) for what in ("eight", "stall", "alone", "beside", "short")]
    if not arguments.no_transformers:
        contenders["transformers"] = Contender("transformers", __file__, ["transformers", arguments.model])
        work.append(("transformers", "eight"))
    turns = {f"{name} {what}": partial(contenders[name].run, what) for name, what in work}
    options = ("--dtype", "float32", "--max-model-len", str(CONTEXT), "--max-slots", str(STREAMS))
    with served(arguments.model, arguments.tp, *options) as server:
        turns["tpjax served"] = partial(through_http, server.url, random.Random(0))
        figures = take_turns(turns, arguments.rounds)
    for contender in contenders.values():
        contender.close()

    print(f"{arguments.model}, float32, tp={arguments.tp}, {STREAMS} streams, {arguments.rounds} rounds")
    for name, values in figures.items():
        unit = UNITS.get(name.split()[-1], "tokens/s")
        print(f"{name:24}{statistics.median(values):9.2f}{min(values):9.2f}{max(values):9.2f}  {unit}")

    def ratio(over: str, under: str) -> float:
        return median_ratio(figures[over], figures[under])

    targets = [
        Target("8 streams / 1 stream, throughput", ratio("tpjax eight", "tpjax one"), ">=", 3.4),
        Target("8 streams / raw decode loop, throughput", ratio("tpjax eight", "tpjax raw"), ">=", 0.95),
        Target("8 streams over HTTP / raw loop, throughput", ratio("tpjax served", "tpjax raw"), ">=", 0.95),
        Target("long prompt beside streams / alone", ratio("tpjax beside", "tpjax alone"), "<=", 1.3),
    ]
    if "transformers eight" in figures:
        against = ratio("tpjax eight", "transformers eight")
        targets.append(Target("8 streams: tpjax / transformers", against, ">=", 1.7))
    if "before stall" in figures:
        targets += [
            Target("stall by a long prompt / before", ratio("tpjax stall", "before stall"), "<=", 0.75),
            Target("16 short prompts / before", ratio("tpjax short", "before short"), "<=", 0.7),
        ]
    print(*targets, sep="\n")


if __name__ == "__main__":
    main()
