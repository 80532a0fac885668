"""Measures an OpenAI-compatible server as its clients see it.

The figures are those of ``planning.serving_figures``. It needs neither JAX nor a model: the server may be
any, on this machine or another.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2 as httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tpjax.errors import RequestError
from tpjax.planning.arrivals import Arrival, poisson
from tpjax.planning.serving_figures import Outcome, Result

_SHOWN = 100  # characters of an odd reply in an error
_VOCAB = 1000  # tokens of a server that does not say


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

    def arrivals(self, rate: float, rng: random.Random) -> list[Arrival]:
        """Samples lengths and times of the requests, a Poisson process of ``rate`` a second."""
        return poisson(self.num_prompts, rate, self.input_len, self.output_len, self.range_ratio, rng)


def sweep(profile: LoadProfile, rates: Sequence[float], goals: Mapping[str, float]) -> list[Result]:
    """Runs once for each request rate, with a progress bar if stderr is a terminal.

    Raises:
        RequestError: the server cannot be reached, or has no such model.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results, console = [], Console(stderr=True)
    # where there is no terminal, an empty line is all that would be left of it
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
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
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, RecursionError) as error:
            raise RequestError(f"{profile.base_url} does not answer as an OpenAI server: {error}") from error
        rng = random.Random(profile.seed)
        vocab = _VOCAB if card.get("vocab_size") is None else card["vocab_size"]
        room = asyncio.Semaphore(profile.max_concurrency or profile.num_prompts)

        async def one(body: dict[str, Any]) -> Outcome:
            async with room:
                outcome = await request(client, body)
            on_response()
            return outcome

        tasks = []
        start = time.perf_counter()
        for arrival in profile.arrivals(rate, rng):
            body = {
                "model": card["id"],
                "prompt": [rng.randrange(vocab) for _ in range(arrival.input_len)],
                "max_tokens": arrival.output_len,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            if (wait := start + arrival.at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.ensure_future(one(body)))
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
            if not isinstance(chunk, dict):
                raise ValueError(f"a chunk is no object: {data[:_SHOWN]}")
            if (error := chunk.get("error")) is not None:
                message = error.get("message") if isinstance(error, dict) else None
                outcome.error = f"{message or error}"
                break
            if usage := chunk.get("usage"):
                outcome.prompt_tokens, outcome.output_tokens = _counts(usage)
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
    except (httpx.HTTPError, ValueError, LookupError, RecursionError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


def _counts(usage: Any) -> tuple[int, int]:
    """Returns the tokens of the prompt and of the response."""
    names = ("prompt_tokens", "completion_tokens")
    prompt, output = (usage.get(name) if isinstance(usage, dict) else None for name in names)
    if not isinstance(prompt, int) or not isinstance(output, int):
        raise ValueError(f"usage has no counts of tokens: {str(usage)[:_SHOWN]}")
    return prompt, output


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
    if response.is_error:
        raise LookupError(f"/v1/models is {response.status_code} {response.reason_phrase}")
    listed = response.json()
    cards = listed.get("data") if isinstance(listed, dict) else None
    if not isinstance(cards, list):
        raise ValueError(f"/v1/models is no list of models: {response.text[:_SHOWN]}")
    models = {
        card["id"]: card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)
    }
    if not models:
        raise LookupError(f"/v1/models has no model with an id: {response.text[:_SHOWN]}")
    if name is not None and name not in models:
        raise LookupError(f"it has {', '.join(models)}, and not {name!r}")
    card = models[name or next(iter(models))]
    vocab = card.get("vocab_size")
    if vocab is not None and (not isinstance(vocab, int) or vocab < 1):
        raise ValueError(f"the vocab_size of {card['id']} is {vocab!r}")
    return card


def open_client(profile: LoadProfile) -> httpx.AsyncClient:
    """Opens a client with a connection for each request in flight and no timeout: waiting is measured.

    Raises:
        RequestError: the address is no URL, or the API key is not ASCII.
    """
    if profile.api_key and not profile.api_key.isascii():
        raise RequestError("the API key has characters beyond ASCII, which no HTTP header has")
    headers = {"Authorization": f"Bearer {profile.api_key}"} if profile.api_key else {}
    base_url = profile.base_url.rstrip("/").removesuffix("/v1")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        return httpx.AsyncClient(base_url=base_url, headers=headers, timeout=None, limits=limits)
    except httpx.InvalidURL as error:
        raise RequestError(f"{profile.base_url!r} is no URL of a server: {error}") from error
