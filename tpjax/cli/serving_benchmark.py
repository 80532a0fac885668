"""Measures an OpenAI-compatible server as its clients see it, with the figures and names of vLLM's benchmark.

It needs neither JAX nor a model: the server may be any, on this machine or another.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tpjax.errors import RequestError
from tpjax.planning.plots import save

METRICS = {"ttft": "Time to First Token", "tpot": "Time per Output Token", "itl": "Inter-token Latency"}
METRICS["e2el"] = "End-to-end Latency"


@dataclass(frozen=True)
class LoadProfile:
    """The requests to send.

    Attributes:
        base_url: address of the server, ``http://host:port``.
        model: name of the model in the API; ``None``: the first one listed.
        num_prompts: number of requests.
        input_len: tokens of a prompt.
        output_len: tokens of a response; end-of-text is ignored.
        range_ratio: lengths are sampled between ``(1 - r)`` and ``(1 + r)`` times these.
        max_concurrency: most requests in flight; ``None``: no limit.
        seed: seed of prompts, lengths and arrivals.
        api_key: API key of the server.
    """

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    num_prompts: int = 64
    input_len: int = 128
    output_len: int = 64
    range_ratio: float = 0.0
    max_concurrency: int | None = None
    seed: int = 0
    api_key: str | None = None


@dataclass
class Outcome:
    """One request, as its client saw it; times in seconds.

    Attributes:
        prompt_tokens: tokens sent.
        output_tokens: tokens received.
        ttft: time to the first token.
        latency: time to the end.
        itl: times between two events of the response.
        error: why it failed; ``None`` if it did not.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: float = 0.0
    latency: float = 0.0
    itl: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; ``None`` for a single one."""
        return (self.latency - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def meets(self, goals: Mapping[str, float]) -> bool:
        """Whether it is within the goals, milliseconds by metric."""
        values = {"ttft": self.ttft, "tpot": self.tpot or 0.0, "e2el": self.latency}
        return self.error is None and all(values[name] * 1000 <= goal for name, goal in goals.items())


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        request_rate: requested requests a second; ``inf``: all at once.
        duration: seconds.
        outcomes: outcomes of all requests.
        goals: milliseconds by metric.
    """

    request_rate: float
    duration: float
    outcomes: list[Outcome]
    goals: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Returns the figures under vLLM's names."""
        fine = [one for one in self.outcomes if one.error is None]
        prompt = sum(one.prompt_tokens for one in fine)
        output = sum(one.output_tokens for one in fine)
        figures: dict[str, Any] = {
            "request_rate": self.request_rate if math.isfinite(self.request_rate) else "inf",
            "completed": len(fine),
            "failed": len(self.outcomes) - len(fine),
            "duration": self.duration,
            "total_input_tokens": prompt,
            "total_output_tokens": output,
            "request_throughput": len(fine) / self.duration,
            "output_throughput": output / self.duration,
            "total_token_throughput": (prompt + output) / self.duration,
        }
        if self.goals:
            figures["request_goodput"] = sum(one.meets(self.goals) for one in fine) / self.duration
        samples = {
            "ttft": [one.ttft for one in fine],
            "tpot": [one.tpot for one in fine if one.tpot is not None],
            "itl": [gap for one in fine for gap in one.itl],
            "e2el": [one.latency for one in fine],
        }
        for name, values in samples.items():
            ms = sorted(1000 * value for value in values)
            figures[f"mean_{name}_ms"] = sum(ms) / len(ms) if ms else None
            figures[f"median_{name}_ms"] = percentile(ms, 50)
            figures[f"p99_{name}_ms"] = percentile(ms, 99)
        return figures

    def table(self) -> str:
        """Returns the figures in the layout of vLLM's benchmark."""
        figures = self.summary()
        rows = [
            ("Successful requests:", figures["completed"]),
            ("Failed requests:", figures["failed"]),
            ("Request rate asked for (req/s):", figures["request_rate"]),
            ("Benchmark duration (s):", figures["duration"]),
            ("Total input tokens:", figures["total_input_tokens"]),
            ("Total generated tokens:", figures["total_output_tokens"]),
            ("Request throughput (req/s):", figures["request_throughput"]),
            ("Request goodput (req/s):", figures.get("request_goodput")),
            ("Output token throughput (tok/s):", figures["output_throughput"]),
            ("Total token throughput (tok/s):", figures["total_token_throughput"]),
        ]
        lines = [f"{' Serving Benchmark Result ':=^50}", *(_row(*row) for row in rows if row[1] is not None)]
        for name, title in METRICS.items():
            lines.append(f"{f' {title} ':-^50}")
            for kind in ("mean", "median", "p99"):
                label = f"{kind.capitalize()} {name.upper()} (ms):"
                lines.append(_row(label, figures[f"{kind}_{name}_ms"]))
        return "\n".join([*lines, "=" * 50])


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Interpolates a percentile of ascending values linearly; ``None`` if there are none."""
    if not ordered:
        return None
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def sweep(profile: LoadProfile, rates: Sequence[float], goals: Mapping[str, float]) -> list[Result]:
    """Runs once for each request rate, with a progress bar if stderr is a terminal.

    Raises:
        RequestError: the server cannot be reached, or has no such model.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for rate in rates:
            task = progress.add_task(f"{rate:g} requests/s", total=profile.num_prompts)
            results.append(asyncio.run(run(profile, rate, goals, partial(progress.advance, task))))
    return results


async def run(
    profile: LoadProfile,
    rate: float,
    goals: Mapping[str, float],
    on_response: Callable[[], None] = lambda: None,
) -> Result:
    """Sends the requests as a Poisson process of ``rate`` a second, and waits for all responses.

    Raises:
        RequestError: the server cannot be reached, or has no such model.
    """
    async with open_client(profile) as client:
        try:
            card = await _model(client, profile.model)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
            raise RequestError(f"{profile.base_url} does not answer as an OpenAI server: {error}") from error
        rng = random.Random(profile.seed)
        vocab = int(card.get("vocab_size", 1000))
        room = asyncio.Semaphore(profile.max_concurrency or profile.num_prompts)

        def length(mean: int) -> int:
            spread = int(mean * profile.range_ratio)
            return max(1, rng.randint(mean - spread, mean + spread))

        async def one(body: dict[str, Any]) -> Outcome:
            async with room:
                outcome = await request(client, body)
            on_response()
            return outcome

        tasks = []
        start = time.perf_counter()
        for i in range(profile.num_prompts):
            body = {
                "model": card["id"],
                "prompt": [rng.randrange(vocab) for _ in range(length(profile.input_len))],
                "max_tokens": length(profile.output_len),
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            tasks.append(asyncio.ensure_future(one(body)))
            if math.isfinite(rate) and i < profile.num_prompts - 1:
                await asyncio.sleep(rng.expovariate(rate))
        outcomes = await asyncio.gather(*tasks)
        return Result(rate, time.perf_counter() - start, list(outcomes), goals)


async def request(client: httpx.AsyncClient, body: dict[str, Any]) -> Outcome:
    """Sends a request for a streamed completion and times its events."""
    outcome = Outcome()
    start = last = time.perf_counter()
    try:
        async for data in stream_events(client, "/v1/completions", body):
            now = time.perf_counter()
            if data == "[DONE]":
                break
            chunk = json.loads(data)
            if "error" in chunk:
                outcome.error = chunk["error"]["message"]
                break
            if chunk.get("usage"):
                outcome.prompt_tokens = chunk["usage"]["prompt_tokens"]
                outcome.output_tokens = chunk["usage"]["completion_tokens"]
            if not chunk["choices"]:
                continue
            if outcome.ttft:
                outcome.itl.append(now - last)
            else:
                outcome.ttft = now - start
            last = now
            outcome.latency = now - start
        else:
            outcome.error = "the stream ended early"
    except (httpx.HTTPError, ValueError, LookupError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def stream_events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[str]:
    """Yields the data of server-sent events."""
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            text = (await response.aread())[:300].decode(errors="replace")
            raise ValueError(f"HTTP {response.status_code}: {text}")
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                yield line[6:]


async def _model(client: httpx.AsyncClient, name: str | None) -> dict[str, Any]:
    response = await client.get("/v1/models")
    response.raise_for_status()
    cards: list[dict[str, Any]] = response.json()["data"]
    if name is None:
        return cards[0]
    found = [card for card in cards if card["id"] == name]
    if not found:
        raise LookupError(f"it has {', '.join(card['id'] for card in cards)}, and not {name!r}")
    return found[0]


def open_client(profile: LoadProfile) -> httpx.AsyncClient:
    """Opens a client with a connection for each request in flight and no timeout: waiting is measured."""
    headers = {"Authorization": f"Bearer {profile.api_key}"} if profile.api_key else {}
    base_url = profile.base_url.rstrip("/").removesuffix("/v1")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=base_url, headers=headers, timeout=None, limits=limits)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draws latency and throughput over the request rate, in the format of the file's suffix.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    summaries = [result.summary() for result in results]
    labels = [f"{result.request_rate:g}" for result in results]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, axis in zip(("ttft", "tpot"), axes, strict=False):
        for kind in ("median", "p99"):
            values = [summary[f"{kind}_{name}_ms"] or math.nan for summary in summaries]
            axis.plot(labels, values, marker="o", label=kind)
        axis.set(title=METRICS[name], ylabel="ms")
        axis.legend()
    axes[2].plot(labels, [summary["output_throughput"] for summary in summaries], marker="o", color="C2")
    axes[2].set(title="Output throughput", ylabel="tokens/s")
    for axis in axes:
        axis.set(xlabel="requests a second asked for", ylim=(0, 1.1 * axis.dataLim.ymax))
        axis.grid(alpha=0.3)
    save(figure, path)


def _row(label: str, value: Any) -> str:
    shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40}{shown:<10}"
