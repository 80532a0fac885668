"""What bad input, bad clients and bad luck get: an answer each, and never the server's end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from serving import CONTEXT, SLOTS, WAIT_S, Running, load_tiny, running, tiny_checkpoint

from tpjax import LLM
from tpjax.errors import CheckpointError, RequestError
from tpjax.server.admission_budget import FREE_BYTES, AdmissionBudget, Reservation
from tpjax.server.error_responses import ApiError
from tpjax.server.logs import JsonLines, PlainLines
from tpjax.server.middleware import ServerMiddleware
from tpjax.server.pace import Pace
from tpjax.server.service import Service, State

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
MANY = {str(token): 1 for token in range(2000)}
OVER = f"this model's maximum context length is {CONTEXT} tokens"
KEYS = ("first", "sécond")
LONG = {"prompt": [7, 8, 9], "max_tokens": CONTEXT - 8, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Running]:
    with running(lambda: load_tiny(directory), max_queue=4, max_body_bytes=1 << 20, send_buffer=8192) as one:
        yield one


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with server.client() as one:
        yield one


def chat(**extra: Any) -> dict[str, Any]:
    return {"messages": HI, "max_tokens": 4, **extra}


def completion(**extra: Any) -> dict[str, Any]:
    return {"prompt": "hi", "max_tokens": 4, **extra}


def schema(value: Any) -> dict[str, Any]:
    """Asks for all of a schema."""
    return chat(response_format={"type": "json_schema", "json_schema": {"schema": value, "strict": True}})


def part(kind: str) -> dict[str, Any]:
    inner = {"url": "http://127.0.0.1:9/never-fetched"}
    return chat(messages=[{"role": "user", "content": [{"type": kind, kind: inner}]}])


CHAIN = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(1500)}
TOOL = {"type": "function", "function": {"name": "f"}}
NINES = 10**4300 - 1  # the most digits that Python converts: the sum with another number has one more

# path, body (JSON text or what becomes it), the parameter named, what the message says
BAD: dict[str, tuple[str, Any, str | None, str]] = {
    "malformed": (COMPLETIONS, '{"prompt": ', None, "not valid JSON"),
    "empty": (COMPLETIONS, "", None, "the body is empty"),
    "a list": (COMPLETIONS, "[]", None, "no JSON object"),
    "deep": (COMPLETIONS, "[" * 10_000, None, "recursion limit"),
    "deep and closed": (CHAT, '{"metadata":' * 10_000 + "1" + "}" * 10_000, None, "recursion limit"),
    "not utf-8": (COMPLETIONS, b'{"prompt": "\xff"}', None, "not valid JSON"),
    "lone surrogate": (COMPLETIONS, '{"prompt": "\\ud800"}', None, "not valid JSON"),
    "lone surrogate in messages": (CHAT, '{"messages": [{"role":"user","content":"\\udfff"}]}', None, "JSON"),
    "NaN": (COMPLETIONS, '{"prompt": "a", "temperature": NaN}', None, "not valid JSON"),
    "infinity": (COMPLETIONS, '{"prompt": "a", "top_p": -Infinity}', None, "not valid JSON"),
    "overflow": (COMPLETIONS, '{"prompt": "a", "temperature": 1e999}', "temperature", "finite"),
    "huge integer": (COMPLETIONS, '{"prompt": "a", "seed": 1' + "0" * 5000 + "}", None, "not valid JSON"),
    "a length of 4300 digits": (COMPLETIONS, completion(max_tokens=NINES), "max_tokens", "or equal to 92233"),
    "4300 digits of a chat": (CHAT, chat(max_tokens=NINES), "max_tokens", "or equal to 92233"),
    "4300 digits at least": (COMPLETIONS, completion(min_tokens=NINES), "min_tokens", "or equal to 92233"),
    "4300 digits of an id": (COMPLETIONS, completion(prompt=[NINES]), "prompt", "(4300 characters)"),
    "4300 digits of a stop": (COMPLETIONS, completion(stop_token_ids=[NINES]), "stop_token_ids", "id 999"),
    "4300 digits of text": ("/detokenize", {"tokens": [NINES]}, "tokens", "(4300 characters)"),
    "over float32": (COMPLETIONS, completion(temperature=1e39), "temperature", "1e+39"),
    "string for a number": (COMPLETIONS, completion(temperature="1"), "temperature", "valid"),
    "boolean for a number": (COMPLETIONS, completion(max_tokens=True), "max_tokens", "valid integer"),
    "fraction for an integer": (COMPLETIONS, completion(n=1.5), "n", "valid integer"),
    "number for a prompt": (COMPLETIONS, completion(prompt=3), "prompt", "valid"),
    "mixed prompt": (COMPLETIONS, completion(prompt=["a", 1]), "prompt", "valid"),
    "no prompt": (COMPLETIONS, {"max_tokens": 3}, "prompt", "required"),
    "misspelt": (COMPLETIONS, completion(temprature=1), "temprature", "not a known parameter"),
    "negative temperature": (COMPLETIONS, completion(temperature=-1), "temperature", "greater than"),
    "negative max_tokens": (COMPLETIONS, completion(max_tokens=-1), "max_tokens", "greater than"),
    "no tokens": (COMPLETIONS, completion(max_tokens=0), "max_tokens", "echo"),
    "seed of 65 bits": (COMPLETIONS, completion(seed=2**63), "seed", "less than"),
    "top_p 0": (COMPLETIONS, completion(top_p=0), "top_p", "greater than 0"),
    "top_p 2": (COMPLETIONS, completion(top_p=2), "top_p", "less than"),
    "min_p 2": (COMPLETIONS, completion(min_p=2), "min_p", "less than"),
    "penalty 0": (COMPLETIONS, completion(repetition_penalty=0), "repetition_penalty", "greater than 0"),
    "presence 3": (COMPLETIONS, completion(presence_penalty=3), "presence_penalty", "less than"),
    "n": (COMPLETIONS, completion(n=10**9), "n", "less than or equal to 128"),
    "n 0": (CHAT, chat(n=0), "n", "greater than"),
    "best_of": (COMPLETIONS, completion(best_of=10**9), "best_of", "less than or equal to 128"),
    "best_of over n": (COMPLETIONS, completion(best_of=3), "best_of", "best_of=3 differs from n=1"),
    "fan-out": (COMPLETIONS, completion(prompt=["a"] * 100, n=100), "prompt", "10000 choices, over 128"),
    "logprobs": (COMPLETIONS, completion(logprobs=21), "logprobs", "less than or equal to 20"),
    "top_logprobs": (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
    "top_logprobs alone": (CHAT, chat(top_logprobs=2), "top_logprobs", "needs logprobs=true"),
    "stop": (COMPLETIONS, completion(stop=["a"] * 17), "stop", "at most 16"),
    "long stop": (COMPLETIONS, completion(stop="a" * 300), "stop", "at most 256"),
    "empty stop": (COMPLETIONS, completion(stop=[""]), "stop", "stop.0: String should have at least 1"),
    "logit_bias": (COMPLETIONS, completion(logit_bias=MANY), "logit_bias", "1024"),
    "logit_bias 101": (COMPLETIONS, completion(logit_bias={"5": 101}), "logit_bias", "equal to 100"),
    "logit_bias -101": (COMPLETIONS, completion(logit_bias={"5": -101}), "logit_bias", "equal to -100"),
    "logit_bias key": (COMPLETIONS, completion(logit_bias={"x": 1}), "logit_bias", "'x', which is not"),
    "logit_bias id": (COMPLETIONS, completion(logit_bias={"9999": 1}), "logit_bias", "token id 9999"),
    "stop id": (COMPLETIONS, completion(stop_token_ids=[-1]), "stop_token_ids", "-1"),
    "unknown ids": (COMPLETIONS, completion(prompt=[1, 384]), "prompt", "token id 384, but the vocab"),
    "negative id": (COMPLETIONS, completion(prompt=[-1]), "prompt", "token id -1"),
    "enormous id": (COMPLETIONS, completion(prompt=[2**70]), "prompt", "token id"),
    "empty prompt": (COMPLETIONS, completion(prompt=""), "prompt", "the prompt is empty"),
    "no prompts": (COMPLETIONS, completion(prompt=[]), "prompt", "at least 1 prompt"),
    "one empty prompt": (COMPLETIONS, completion(prompt=[[5], []]), "prompt", "empty"),
    "context": (
        COMPLETIONS, completion(prompt=[5] * 1000, max_tokens=100), "max_tokens",
        f"the prompt has 1000 tokens and max_tokens=100, together 1100: {OVER}",
    ),
    "context, streamed": (
        COMPLETIONS, completion(prompt=[5] * 1000, max_tokens=100, stream=True), "max_tokens",
        "together 1100",
    ),
    "prompt alone": (COMPLETIONS, completion(prompt=[5] * 2000), "prompt", "2000 tokens"),
    "chat context": (CHAT, chat(max_tokens=2000), "max_tokens", OVER),
    "suffix": (COMPLETIONS, completion(suffix="b"), "suffix", "not supported"),
    "stream_options": (COMPLETIONS, completion(stream_options={}), "stream_options", "needs stream"),
    "no messages": (CHAT, chat(messages=[]), "messages", "messages is empty"),
    "no role": (CHAT, chat(messages=[{"content": "a"}]), "messages", "required"),
    "image": (CHAT, part("image_url"), "messages", "'image_url': only text is supported"),
    "file": (CHAT, part("file"), "messages", "'file': only text is supported"),
    "audio": (CHAT, part("input_audio"), "messages", "'input_audio': only text"),
    "template option": (CHAT, chat(chat_template_kwargs={"tools": []}), "chat_template_kwargs", "tools"),
    "tool_choice alone": (CHAT, chat(tool_choice="required"), "tool_choice", "needs tools"),
    "unknown tool": (
        CHAT, chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), "tool_choice",
        "names 'g', but tools has f",
    ),
    "tool_choice of the Responses API": (
        CHAT, chat(tools=[TOOL], tool_choice={"type": "function", "name": "f"}), "tool_choice",
        "tool_choice.name is not a known parameter",
    ),
    "tool_choice without a function": (
        CHAT, chat(tools=[TOOL], tool_choice={"type": "function"}), "tool_choice",
        "tool_choice.function: Field required",
    ),
    "tool name": (CHAT, chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools", "pattern"),
    "schema missing": (CHAT, chat(response_format={"type": "json_schema"}), "response_format", "json_schema"),
    "schema type": (CHAT, schema({"type": "foo"}), "response_format", "foo"),
    "schema keyword": (CHAT, schema({"not": {"type": "string"}}), "response_format", "not"),
    "schema regex": (
        CHAT, schema({"type": "string", "pattern": "(a"}), "response_format", "pattern '(a': unclosed",
    ),
    "schema large": (CHAT, schema({"enum": ["a" * 100] * 1000}), "response_format", "over 65536"),
    "regex large": (CHAT, schema({"pattern": "a" * 70_000}), "response_format", "over 65536"),
    "regex deep": (
        CHAT, schema({"type": "string", "pattern": "(" * 400 + "a" + ")" * 400}),
        "response_format", "pattern",
    ),
    "schema cyclic": (CHAT, schema({"$ref": "#"}), "response_format", "schema"),
    "schema cyclic by two": (
        CHAT, schema({"$ref": "#/$defs/a", "$defs": {a: {"$ref": f"#/$defs/{b}"} for a, b in ("ab", "ba")}}),
        "response_format", "schema",
    ),
    "schema chain": (CHAT, schema({"$ref": "#/$defs/a0", "$defs": CHAIN}), "response_format", "schema"),
    "schema elsewhere": (CHAT, schema({"$ref": "http://127.0.0.1:9/s"}), "response_format", "not fetch"),
    "schema of nothing": (CHAT, schema(False), "response_format", "schema"),
    "guided_choice of nothing": (COMPLETIONS, completion(guided_choice=[]), "guided_choice", "at least 1"),
    "guided_choice": (CHAT, chat(guided_choice=["a"] * 1025), "guided_choice", "at most 1024"),
    "guided_regex": (COMPLETIONS, completion(guided_regex="("), "guided_regex", "not usable"),
    "guided_json": (CHAT, chat(guided_json="{"), "guided_json", "not valid JSON"),
    "guided twice": (CHAT, chat(guided_json={}, guided_regex="a"), "guided_json", "cannot both"),
    "tokenize nothing": ("/tokenize", {}, "prompt", "one of them"),
    "detokenize": ("/detokenize", {"tokens": [384]}, "tokens", "token id 384"),
}  # fmt: skip


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize("name", BAD)
def test_bad_request(http: httpx.Client, server: Running, name: str) -> None:
    path, body, param, message = BAD[name]
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    start = time.monotonic()
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    error = error_of(answer, 400)
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert message in error["message"] and len(error["message"]) < 700
    assert time.monotonic() - start < WAIT_S
    assert server.service.pending == 0


def test_unknown_places(http: httpx.Client) -> None:
    assert error_of(http.post(COMPLETIONS, json=completion(model="gpt-4")), 404)["code"] == "model_not_found"
    assert error_of(http.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"
    assert error_of(http.get("/nothing"), 404)["type"] == "not_found_error"
    embeddings = error_of(http.post("/v1/embeddings", json={"input": "a"}), 404)
    assert embeddings["message"] == "POST /v1/embeddings: embeddings are not supported: the model writes text"
    assert error_of(http.get(COMPLETIONS), 405)["message"].startswith(
        "GET /v1/completions: Method Not Allowed"
    )
    text = http.post(COMPLETIONS, content='{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert "not sent as application/json" in error_of(text, 400)["message"]


def test_the_body_has_a_limit_chunked_or_not(http: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"a" * 65536
        yield b'"}'

    headers = {"content-type": "application/json"}
    whole = http.post(COMPLETIONS, content=b"".join(chunks()), headers=headers)
    assert error_of(whole, 413)["code"] == "request_too_large"
    with contextlib.suppress(httpx.TransportError):  # it may hang up while the client still sends
        assert error_of(http.post(COMPLETIONS, content=chunks(), headers=headers), 413)
    assert http.post(COMPLETIONS, json=completion()).status_code == 200


def test_an_unexpected_error_shows_nothing_and_is_logged(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(LLM, "requests", broken)
    answer = http.post(COMPLETIONS, json=completion(), headers={"x-request-id": "my-id"})
    assert error_of(answer, 500)["code"] == "internal_error"
    assert "secret" not in answer.text and answer.headers["x-request-id"] == "my-id"
    server.until(
        lambda: any(record.exc_info and "a secret" in str(record.exc_info[1]) for record in caplog.records)
    )
    monkeypatch.undo()
    assert http.post(COMPLETIONS, json=completion()).status_code == 200


def lines(response: httpx.Response) -> Iterator[str]:
    return (line for line in response.iter_lines() if line)


def test_nan_logits_fail_that_request_alone(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine says so after the first token: an error event, no [DONE], and the neighbour goes on."""
    step = server.llm.engine.step

    def poisoned() -> Any:
        outputs = step()
        for request, _ in outputs:
            if list(request.prompt_token_ids) == [66] and len(request.output_token_ids) > 3:
                request.finish_reason, request.error = "error", "the logits are not numbers"
                server.llm.engine.scheduler.finish(request)
        return outputs

    monkeypatch.setattr(server.llm.engine, "step", poisoned)
    bad = {"prompt": [66], "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    good: list[httpx.Response] = []
    other = threading.Thread(
        target=lambda: good.append(http.post(COMPLETIONS, json={**LONG, "max_tokens": 60}))
    )
    other.start()
    with http.stream("POST", COMPLETIONS, json={**bad, "stream": True}) as response:
        assert response.status_code == 200
        received = list(lines(response))
    assert received[-2] == "event: error" and "[DONE]" not in received[-1]
    assert json.loads(received[-1][6:])["error"]["message"] == "the logits are not numbers"
    assert error_of(http.post(COMPLETIONS, json=bad), 500)["code"] == "generation_failed"
    other.join()
    assert good[0].status_code == 200 and good[0].json()["usage"]["completion_tokens"] == 60
    server.until(lambda: server.metric("num_requests_running") == 0)


def sent(server: Running, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A connection over which a completion has been asked for, and nothing read."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect((host, int(port)))
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


@pytest.mark.parametrize("streamed", (False, True))
def test_a_client_that_goes_frees_its_slots(http: httpx.Client, server: Running, streamed: bool) -> None:
    aborted = server.metric("request_success_total")
    with sent(server, {**LONG, "n": SLOTS, "stream": streamed}):
        server.until(lambda: [one.stats.running for one in server.service.replicas] == [SLOTS])
    server.until(lambda: [one.stats.running for one in server.service.replicas] == [0])
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert server.metric(gauge) == 0
    assert server.service.pending == 0
    assert server.metric("request_success_total") == aborted + SLOTS


def test_a_full_queue_says_when_to_come_back(http: httpx.Client, server: Running) -> None:
    with http.stream("POST", COMPLETIONS, json={**LONG, "n": SLOTS + 4, "stream": True}) as response:
        assert response.status_code == 200
        refused = http.post(COMPLETIONS, json=completion())
        assert error_of(refused, 429)["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    server.until(lambda: server.service.pending == 0)
    assert http.post(COMPLETIONS, json=completion()).status_code == 200


def test_when_to_come_back_follows_from_the_pace_of_the_queue() -> None:
    def retry_after_s(ends: Sequence[float], busy_since: float, excess: int, now: float) -> int:
        pace = Pace()
        pace.begin(busy_since)
        for end in ends:
            pace.end(1, end)
        return pace.retry_after_s(excess, 1, now)

    ends = [5.0, 45.0, 55.0]
    # since 40 s two have ended and the third is to come, in 30 s
    assert [retry_after_s(ends, 40.0, excess, 70.0) for excess in (0, 1, 4, 100)] == [1, 10, 40, 60]
    assert retry_after_s(ends, 0.0, 1, 70.0) == 20  # in the last minute
    assert retry_after_s([], 69.0, 3, 70.0) == 3 and retry_after_s([], 0.0, 300, 0.1) == 30  # none so far
    fast = [10 + i / 64 for i in range(64)]  # the pace is that of the latest 64
    assert retry_after_s(fast, 0.0, 640, 11.0) == 10


def refused_at(monkeypatch: pytest.MonkeyPatch, now: float, ask: Callable[[], object]) -> ApiError:
    """The error of what is asked for at a time."""
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with pytest.raises(ApiError) as caught:
        ask()
    return caught.value


def test_when_to_come_back_with_a_long_text_follows_from_the_pace_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unit, budget = FREE_BYTES, AdmissionBudget(10 * FREE_BYTES)
    one, other, third, fourth = (Reservation(budget) for _ in range(4))

    def retry_after(now: float, units: int) -> str:
        refused = refused_at(monkeypatch, now, lambda: fourth.grow(units * unit))
        assert (refused.status, refused.code) == (429, "text_budget_full")
        return refused.headers["Retry-After"]

    monkeypatch.setattr(time, "perf_counter", lambda: 100.0)
    one.grow(4 * unit)
    one.grow(6 * unit)
    other.grow(4 * unit)
    assert retry_after(100.0, 5) == "1"
    # five units are wanted, and one of two requests, which have five on an average, will have ended
    assert retry_after(110.0, 5) == "10"
    one.release()
    third.grow(6 * unit)
    assert retry_after(120.0, 5) == "10"  # of 20 s, in which six and five units become free
    other.release()
    third.release()
    assert budget.used == 0
    monkeypatch.setattr(time, "perf_counter", lambda: 150.0)
    other = Reservation(budget)
    other.grow(10 * unit)
    assert retry_after(152.0, 5) == "1"  # what ended before this began says nothing
    too_long = refused_at(monkeypatch, 152.0, lambda: fourth.grow(11 * unit))
    assert (too_long.status, too_long.headers) == (413, {})  # it would be refused for ever


def test_when_to_come_back_to_a_server_that_takes_no_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        def headers(state: State, now: float) -> dict[str, str]:
            service.state = state
            refused = refused_at(monkeypatch, now, lambda: service.llm)
            assert (refused.status, refused.code) == (503, state)
            return refused.headers

        monkeypatch.setattr(time, "perf_counter", lambda: 1000.0)
        go = threading.Event()
        service = Service(lambda: go.wait(WAIT_S) and None, "m")  # type: ignore[arg-type, return-value]
        service.start()
        try:
            # as long again as it has loaded
            assert [headers("loading", 1000.0 + s)["Retry-After"] for s in (0, 7.5, 90)] == ["1", "8", "60"]
            await service.drain(30)  # nothing runs: it is over at once
            assert headers("draining", 1100.0) == {"Retry-After": "20"}
            assert headers("failed", 1100.0) == {}
        finally:
            go.set()

    asyncio.run(play())


def test_a_slow_reader_is_disconnected(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tpjax.server.responses.STREAM_LIMIT", 16)
    with sent(server, {**LONG, "stream": True, "n": SLOTS, "logprobs": 20}, 4096):
        server.until(lambda: "too slow" in caplog.text)  # and reads nothing
        server.until(lambda: server.service.pending == 0)
    server.until(lambda: [one.stats.running for one in server.service.replicas] == [0])
    assert http.post(COMPLETIONS, json=completion()).status_code == 200


def test_idle_connections_are_closed(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that does not come, and an answer that nobody reads, though it fits the buffer of deltas."""
    monkeypatch.setattr("tpjax.server.run.IDLE_TIMEOUT_S", 0.2)
    host, port = server.url.removeprefix("http://").split(":")
    kept = set(server.server.server_state.connections)  # between the requests of other tests
    with (
        socket.create_connection((host, int(port)), WAIT_S) as silent,
        socket.create_connection((host, int(port)), WAIT_S) as half,
        sent(server, {**LONG, "stream": True, "n": SLOTS, "logprobs": 20}, 4096),
    ):
        half.sendall(b"GET /version HTTP/1.1\r\nHost: ")
        assert silent.recv(1) == half.recv(1) == b""
        server.until(lambda: server.service.pending == 0)
        server.until(lambda: server.server.server_state.connections <= kept)
    slow = http.post(COMPLETIONS, json=LONG)  # longer than that, but the server's turn to move
    assert slow.elapsed.total_seconds() > 0.4 and slow.json()["usage"]["completion_tokens"] == CONTEXT - 8


def test_a_connection_is_kept_between_requests(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than clients keep it: one would send a request just as the server closes. A half head is cut."""
    assert server.server.config.timeout_keep_alive > 60  # what load balancers have
    monkeypatch.setattr("tpjax.server.run.IDLE_TIMEOUT_S", 0.2)
    with contextlib.closing(HTTPConnection(server.url.removeprefix("http://"), timeout=WAIT_S)) as one:
        for _ in range(2):
            one.request("GET", "/version")
            first = one.sock
            assert json.loads(one.getresponse().read())["version"]
            time.sleep(0.8)
        assert one.sock is first
        one.sock.sendall(b"GET /version HTTP/1.1\r\nHost: ")
        assert one.sock.recv(1) == b""


def test_a_template_that_hangs_or_grows_is_killed(directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        os.link(directory / name, tmp_path / name)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    grow = "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}"
    template = (
        f"{{% if messages[0].content == 'loop' %}}{loop}{{% elif messages[0].content == 'grow' %}}{grow}"
        "{% elif messages[0].content == 'raise' %}{{ raise_exception('roles') }}{% else %}fine{% endif %}"
    )
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    with running(lambda: load_tiny(tmp_path)) as one, one.client() as http:
        for text, message in (
            ("loop", "took over 5 s"),
            ("grow", "needs more memory"),
            ("raise", "refused the messages: roles"),
        ):
            answer = http.post(CHAT, json=chat(messages=[{"role": "user", "content": text}]))
            assert message in error_of(answer, 400)["message"]
            assert http.post("/tokenize", json={"messages": HI}).json()["count"] > 0


def test_an_empty_key_is_no_key() -> None:
    with pytest.raises(RequestError, match="an API key is empty"):
        ServerMiddleware(lambda *_: None, ("a", ""))  # type: ignore[arg-type]


def test_keys(directory: Path) -> None:
    with (
        running(lambda: load_tiny(directory), api_keys=KEYS) as one,
        one.client() as http,
    ):
        for path in ("/health", "/ready", "/metrics", "/ping"):  # a probe and a scraper have no key
            assert http.get(path).status_code == http.head(path).status_code == 200
            assert not http.head(path).content
        assert http.post("/ping").status_code == 200
        # who has no key reserves no room: four such bodies would take all of it
        assert error_of(http.post("/ping", content=b"a" * (65 << 10)), 413)["code"] == "request_too_large"
        for path in (
            "/v1/models",
            "/version",
            "/openapi.json",
            "/stats",
            "/shards",
            "/tokenizer_info",
            "/nothing",
        ):
            assert error_of(http.get(path), 401)["code"] == "invalid_api_key"
        assert http.post("/render", json={"text": "a"}).status_code == 401
        refused = http.get("/stats").headers["www-authenticate"]
        assert refused.startswith("Bearer")  # not Basic: the page asks for the key, the browser does not
        for path in ("/", "/page/main.js", "/page/style.css"):  # the page itself is no secret
            assert http.get(path).status_code == 200
        for value in ("Bearer wrong", "Bearer", "Bearer first2", "Basic !!", "first", "Bearer \xff"):
            given = {"authorization": value.encode("latin-1")}
            assert http.get("/v1/models", headers=given).status_code == 401  # type: ignore[arg-type]
        for key in KEYS:
            given = {"authorization": f"Bearer {key}".encode()}
            assert http.get("/v1/models", headers=given).status_code == 200  # type: ignore[arg-type]
        assert http.get("/stats", auth=("anyone", "first")).status_code == 200


@pytest.mark.slow
def test_loading_draining_and_a_model_that_does_not_load(directory: Path) -> None:
    go = threading.Event()

    def load() -> LLM:
        go.wait(WAIT_S)
        return load_tiny(directory)

    with running(load, wait=False) as one, one.client() as http:
        one.until(lambda: one.server.started)
        assert http.get("/health").status_code == 200
        for path in ("/ready", "/v1/models"):
            assert error_of(http.get(path), 503)["code"] == "loading"
        assert error_of(http.post(CHAT, json=chat()), 503)["code"] == "loading"
        go.set()
        one.until(lambda: http.get("/ready").status_code == 200)
        with http.stream("POST", COMPLETIONS, json={**LONG, "max_tokens": 300, "stream": True}) as response:
            received = lines(response)
            next(received)
            one.server.servers[0].get_loop().call_soon_threadsafe(one.server.finish)
            one.until(lambda: http.get("/ready").status_code == 503)
            assert error_of(http.post(COMPLETIONS, json=completion()), 503)["code"] == "draining"
            assert list(received)[-1] == "data: [DONE]"  # what ran was finished
        one.until(lambda: one.server.should_exit)

    def missing() -> LLM:
        raise CheckpointError("no such model")

    with running(missing, wait=False) as one:
        one.until(lambda: one.server.should_exit)
        assert isinstance(one.service.error, CheckpointError)


@pytest.mark.slow
def test_a_drain_has_a_limit(directory: Path) -> None:
    with running(lambda: load_tiny(directory), drain_s=0.0) as one, one.client() as http:
        with http.stream("POST", COMPLETIONS, json={**LONG, "stream": True}) as response:
            received = lines(response)
            next(received)
            one.server.servers[0].get_loop().call_soon_threadsafe(one.server.finish)
            *_, name, last = received
        assert name == "event: error" and json.loads(last[6:])["error"]["code"] == "draining"


@contextlib.contextmanager
def serve(directory: Path, *options: str, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """``tpjax serve`` as a process of its own, which ends with the block."""
    command = [sys.executable, "-m", "tpjax", "serve", "--model", str(directory), "--port", "0"]
    limits = ["--max-model-len", "256", "--max-slots", "1", "--tp", "1"]
    with subprocess.Popen([*command, *limits, *options], stderr=stderr, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError(f"{pattern} never came")


@pytest.mark.slow
def test_signals_and_a_taken_port(directory: Path) -> None:
    with serve(directory, "--served-model-name", "m") as process:
        url = wait_for(process, r"(http://\S+)")
        wait_for(process, r"(m is ready)")
        with httpx.Client(base_url=url, timeout=2 * WAIT_S) as http:
            assert http.post(COMPLETIONS, json=completion(model="m")).status_code == 200
        port = url.rpartition(":")[2]
        second = subprocess.run(
            [sys.executable, "-m", "tpjax", "serve", "--model", str(directory), "--port", port],
            capture_output=True, text=True,
        )  # fmt: skip
        assert second.returncode == 2
        assert second.stderr == f"tpjax: error: port {port} of 127.0.0.1 is in use\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        rest = process.stderr.read()
        assert process.wait(WAIT_S) == 0 and "Traceback" not in rest
    with serve(directory, "--drain-s", "600") as process:
        url = wait_for(process, r"(http://\S+)")
        wait_for(process, r"(is ready)")
        with httpx.Client(base_url=url, timeout=2 * WAIT_S) as http:
            ask = {"prompt": [7] * 8, "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 64}
            with http.stream("POST", COMPLETIONS, json=ask) as response:
                next(response.iter_lines())
                process.send_signal(signal.SIGTERM)
                wait_for(process, "(draining)")
                process.send_signal(signal.SIGTERM)
                assert process.wait(WAIT_S) == 128 + signal.SIGTERM
    with serve(directory) as process:
        wait_for(process, r"(http://\S+)")
        process.send_signal(signal.SIGTERM)  # while it loads
        assert process.wait(WAIT_S) == 0
    with serve(directory / "missing") as process:
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]
        assert process.wait(WAIT_S) == 2 and last.startswith("tpjax: error: ") and "missing" in last


def test_a_log_line_is_one_line() -> None:
    record = logging.LogRecord("tpjax", logging.INFO, __file__, 1, "a\r\nb %s", ("\x1b[31m\nforged",), None)
    record.fields = {"path": "/x\r\ninjected"}
    line, plain = JsonLines().format(record), PlainLines().format(record)
    for one in (line, plain):
        assert one.isprintable()
    assert json.loads(line)["message"] == "a\r\nb \x1b[31m\nforged"
    assert json.loads(line)["path"] == "/x\r\ninjected"
    assert plain.endswith(r" a\r\nb \x1b[31m\nforged path=/x\r\ninjected")


@pytest.mark.slow
def test_the_wait_for_the_compiler_is_seen(directory: Path) -> None:
    """Which program of how many, at /ready and in the log: plain on a terminal, JSON lines in a pipe."""
    terminal, end = pty.openpty()
    log = os.fdopen(terminal, errors="replace")
    with log, serve(directory) as piped, serve(directory, stderr=end) as process:
        os.close(end)
        listening = next(line for line in log if "http://" in line)
        assert "loads" in listening
        said = []
        with httpx.Client(base_url=listening.split()[1], timeout=2 * WAIT_S) as http:
            while (answer := http.get("/ready")).status_code == 503:
                said.append(error_of(answer, 503)["message"])
                time.sleep(0.02)
            counts = [
                int(found[1]) for one in said if (found := re.search(r"loading, program (\d+) of \d+$", one))
            ]
            assert counts and counts == sorted(counts)
            lines = []
            while not lines or "is ready" not in lines[-1]:
                lines.append(log.readline())
            ready = re.escape(f"tpjax: {directory.name} is ready at {listening.split()[1]} ")
            assert re.fullmatch(rf"{ready}\(program \d+ of \d+ compiles in the background\)\s+", lines[-1])
            # others compile in the background: requests are answered meanwhile, and do not wait for them
            assert re.fullmatch(r"program \d+ of \d+", http.get("/ready").json()["compiling"])
            assert http.post(COMPLETIONS, json=completion(model=directory.name)).status_code == 200
            while "compiling" in http.get("/ready").json() or not http.get("/shards").json():
                time.sleep(0.1)
            assert http.get("/ready").json() == {"status": "ready"}
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(OSError):  # Linux ends a terminal that nobody has open so
                lines += log
        compiled = [re.search(r"^\d\d:\d\d:\d\d program (\d+) of (\d+): compiled ", one) for one in lines]
        numbers = [(int(one[1]), int(one[2])) for one in compiled if one]
        assert numbers == [(at, len(numbers)) for at in range(1, len(numbers) + 1)]
        assert process.wait(WAIT_S) == 0

        assert piped.stderr is not None
        while "is ready" not in (line := piped.stderr.readline()):
            if not line.startswith("tpjax: "):
                assert json.loads(line)["level"] == "info"


def test_request_ids_and_long_paths(
    http: httpx.Client, server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tpjax")

    def answered(given: str) -> str:
        answer = http.get("/version", headers={"x-request-id": given})
        return answer.headers["x-request-id"]

    assert answered("abc-1") == "abc-1"
    made = {answered(""), answered("a b")}
    assert len(made) == 2 and all(re.fullmatch("[0-9a-f]{32}", one) for one in made)
    assert http.get("/" + "a" * 5000).status_code == 404
    # the line is written after the response
    logged = "/" + "a" * 255
    server.until(lambda: caplog.records[-1].fields["path"] == logged)  # type: ignore[attr-defined]
