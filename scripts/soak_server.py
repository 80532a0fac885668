"""Many clients for minutes on end: `tpjax serve` must fail none of them, leak nothing, and answer as offline.

    python scripts/soak_server.py                         # 64 clients, 5 minutes, SmolLM2-135M
    python scripts/soak_server.py --seconds 60 --clients 16 --tp 2

Each client asks for one of some prompts of mixed lengths, greedily, and compares the answer with the one
`LLM` gave before; one in ten hangs up in the middle. Prints a line every ten seconds, and at the end what
held and what did not; exits with 1 if anything did not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
from contenders import served

from tpjax import LLM, SamplingParams
from tpjax.cli.serving_benchmark import stream_events
from tpjax.mesh import ensure_devices

CONTEXT, SLOTS, CASES = 1024, 8, 24
GROWTH = 0.05  # of memory, from the first minute to the end


@dataclass(frozen=True)
class Case:
    """A prompt and what must come of it."""

    prompt: list[int]
    max_tokens: int
    text: str


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    hung_up: int = 0
    wrong: int = 0
    failed: int = 0
    tokens: int = 0


def cases(model: str, tp: int) -> list[Case]:
    """Prompts of 8 to 600 tokens and their greedy answers of 8 to 96, from a model in this process."""
    ensure_devices(tp)
    llm = LLM(model, tp=tp, max_model_len=CONTEXT, max_slots=SLOTS)
    draw = random.Random(0)
    prompts = [
        [draw.randrange(100, llm.config.vocab_size) for _ in range(draw.randint(8, 600))]
        for _ in range(CASES)
    ]
    params = [SamplingParams(max_tokens=draw.randint(8, 96), temperature=0) for _ in prompts]
    answers = llm.generate(prompts, params)
    return [Case(p, s.max_tokens, a.text) for p, s, a in zip(prompts, params, answers, strict=True)]


async def client(
    http: httpx.AsyncClient, known: list[Case], until: float, draw: random.Random, tally: Tally
) -> None:
    """Asks one question after the other."""
    while time.monotonic() < until:
        case = draw.choice(known)
        hangs_up = draw.randint(1, 4) if draw.random() < 0.1 else None
        body = {"prompt": case.prompt, "max_tokens": case.max_tokens, "temperature": 0, "stream": True}
        text, pieces, done = "", 0, False
        events = stream_events(http, "/v1/completions", body)
        try:
            async for data in events:
                if data == "[DONE]":
                    done = True
                    break
                chunk = json.loads(data)
                if "error" in chunk:
                    break
                text += chunk["choices"][0]["text"]
                pieces += 1
                if pieces == hangs_up:
                    break
        except (httpx.HTTPError, ValueError) as error:
            print(f"failed: {error}", file=sys.stderr)
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        tally.tokens += pieces
        if done:
            tally.answered += 1
            tally.wrong += text != case.text
        elif pieces == hangs_up:
            tally.hung_up += 1
        else:
            tally.failed += 1


async def stats(http: httpx.AsyncClient) -> dict[str, Any]:
    """What the server says it is doing."""
    found: dict[str, Any] = (await http.get("/stats", timeout=30)).json()
    return found


def process(pid: int) -> tuple[float, int]:
    """Resident MiB and threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE))
    return int(found["VmRSS"]) / 1024, int(found["Threads"])


async def soak(url: str, known: list[Case], clients: int, seconds: float, pid: int) -> bool:
    """Runs the clients and looks at the server; says whether all held."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        return await watched(http, known, clients, seconds, pid)


async def watched(http: httpx.AsyncClient, known: list[Case], clients: int, seconds: float, pid: int) -> bool:
    """Runs the clients over one pool of connections."""
    tally, start = Tally(), time.monotonic()
    until = start + seconds
    tasks = [
        asyncio.ensure_future(client(http, known, until, random.Random(seed), tally))
        for seed in range(clients)
    ]
    samples: list[tuple[float, float, int]] = []
    while not all(task.done() for task in tasks):
        await asyncio.sleep(min(10, seconds / 6))
        now, (mib, threads) = time.monotonic() - start, process(pid)
        samples.append((now, mib, threads))
        said = await stats(http)
        print(
            f"{now:6.0f} s  {tally.answered} answered, {tally.hung_up} hung up, {tally.failed} failed, "
            f"{tally.wrong} wrong; {said['running']} running, {said['waiting']} waiting, "
            f"cache {said['kv_cache_usage']:.0%}; {mib:.0f} MiB, {threads} threads",
            flush=True,
        )
    for task in tasks:
        task.result()
    await asyncio.sleep(1)
    said, (mib, threads) = await stats(http), process(pid)
    warm = next(((m, t) for now, m, t in samples if now >= min(60, seconds / 3)), samples[-1][1:])
    checks = {
        f"no request failed but the {tally.hung_up} that hung up: {tally.failed}": tally.failed == 0,
        f"of {tally.answered} answers none differs from offline: {tally.wrong}": tally.wrong == 0,
        f"slots and queue are empty: {said['running']} and {said['waiting']}": (
            said["running"] == said["waiting"] == 0
        ),
        f"the cache is free: {said['kv_cache_usage']:.2%}": said["kv_cache_usage"] == 0,
        f"memory since minute one, MiB: {warm[0]:.0f} to {mib:.0f}": mib <= warm[0] * (1 + GROWTH),
        f"threads since minute one: {warm[1]} to {threads}": threads <= warm[1],
    }
    for what, held in checks.items():
        print(f"{'held  ' if held else 'BROKEN'}  {what}")
    return all(checks.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args()
    known = cases(args.model, args.tp)
    with served(args.model, args.tp, "--max-model-len", str(CONTEXT), "--max-slots", str(SLOTS)) as server:
        held = asyncio.run(soak(server.url, known, args.clients, args.seconds, server.pid))
    status = server.status
    print(f"{'held  ' if status == 0 else 'BROKEN'}  SIGTERM ends it: status {status}")
    return 0 if held and status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
