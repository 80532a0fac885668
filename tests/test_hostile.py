"""Hostile input: too much text, templates that do not end, clients that go, requests with two lengths."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from conftest import COMPILE_FAST
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from serving import CONTEXT, LOOP, SLOTS, VOCAB, WAIT_S, Running, load_tiny, running, tiny_checkpoint

from tpjax.engine.generation import Generation
from tpjax.engine.request_builder import RequestBuilder
from tpjax.sampling_params import SamplingParams
from tpjax.server import conversation, json_bodies, responses
from tpjax.server.admission_budget import FREE_BYTES, AdmissionBudget, Reservation
from tpjax.server.completions import CompletionResponse
from tpjax.server.error_responses import ApiError
from tpjax.server.grammars import compiler, structured_outputs
from tpjax.server.protocol import CompletionBody, StreamOptions
from tpjax.server.worker_pools import WorkerPool
from tpjax.text.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
QUEUE, BODY = 4, 1 << 20
TEMPLATE = f"{{% if messages[0].content == 'loop' %}}{LOOP}{{% endif %}}{{{{ messages[0].content }}}}"


def test_a_budget_counts_what_is_large_and_gives_it_back() -> None:
    budget = AdmissionBudget(10 * FREE_BYTES)
    one, other, small = Reservation(budget), Reservation(budget), Reservation(budget)
    one.grow(6 * FREE_BYTES)
    one.grow(4 * FREE_BYTES)  # a part of what it has
    with pytest.raises(ApiError) as caught:
        other.grow(5 * FREE_BYTES)
    assert caught.value.status == 429 and caught.value.code == "text_budget_full"
    assert caught.value.headers == {"Retry-After": "1"}
    assert budget.used == 6 * FREE_BYTES
    other.grow(4 * FREE_BYTES)
    small.grow(FREE_BYTES)
    assert budget.used == 10 * FREE_BYTES
    one.release()
    one.grow(9 * FREE_BYTES)  # it has been prepared
    assert budget.used == 4 * FREE_BYTES
    other.release()
    assert budget.used == 0


# --- the server ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    names = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": TEMPLATE}))
    with running(lambda: load_tiny(directory, tp=1), max_queue=QUEUE, max_body_bytes=BODY) as one:
        yield one


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with server.client() as one:
        yield one


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def chat(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1}


def completion(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 1, **more}


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 60)


def sent(server: Running, path: str, body: dict[str, Any]) -> socket.socket:
    sock = connect(server)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


def test_rendering_ends_with_its_client(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    began, ended = threading.Event(), threading.Event()

    async def run(*_: Any) -> Any:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr(server.server.config.app._app.state.shared.renderer, "run", run)
    body = b'{"text":"a"}'
    head = (
        f"POST /render HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    with connect(server) as sock:
        sock.sendall(head.encode() + b"\r\n\r\n" + body)
        assert began.wait(WAIT_S) and not ended.is_set()
    assert ended.wait(WAIT_S)


def test_a_prompt_that_is_certainly_too_long_is_not_encoded(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("it was encoded"))
    monkeypatch.setattr(WorkerPool, "run", lambda *_: pytest.fail("it was encoded"))
    error = error_of(http.post(COMPLETIONS, json=completion("a" * 900_000)), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert "at least " in error["message"] and f"context length is {CONTEXT} tokens" in error["message"]
    error = error_of(http.post(COMPLETIONS, json=completion([5] * 200_000)), 400)
    assert (
        error["message"]
        == f"the prompt has 200000 tokens: this model's maximum context length is {CONTEXT} tokens"
    )
    assert error["code"] == "context_length_exceeded"
    assert server.service.pending == 0


def test_a_long_text_is_encoded_in_a_process_as_here(http: httpx.Client, server: Running) -> None:
    tokenizer = server.llm.tokenizer
    assert tokenizer is not None
    text = "the quick brown fox é " * 20_000
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode(text) and answer["count"] == len(answer["tokens"])
    assert answer["token_strs"][:3] == [tokenizer.token_bytes(i).decode() for i in answer["tokens"][:3]]
    # not over the context for certain, and over it
    odd = "\x00" * 70_000
    count = len(tokenizer.encode(odd))
    assert tokenizer.fewest_tokens(odd) <= count
    error = error_of(http.post(COMPLETIONS, json=completion(odd)), 400)
    assert error["code"] == "context_length_exceeded"
    truncated = http.post(COMPLETIONS, json=completion(text, truncate_prompt_tokens=8)).json()
    assert truncated["usage"]["prompt_tokens"] == 8


def test_what_all_choices_share_is_done_once(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand words are encoded, and every token id is checked, as often for four choices as for one."""
    counts: Counter[str] = Counter()

    def counted(owner: type, name: str) -> None:
        whole = getattr(owner, name)

        def count(*arguments: Any, **more: Any) -> Any:
            counts[name] += 1
            return whole(*arguments, **more)

        monkeypatch.setattr(owner, name, count)

    counted(SamplingParams, "__post_init__")
    counted(SamplingParams, "_check_items")
    counted(Tokenizer, "encode")
    counted(RequestBuilder, "checked")
    many = {"bad_words": ["zx", "yy", "zx"], "logit_bias": {"9": 1}, "allowed_token_ids": [*range(99)] * 3}
    for path, body in ((COMPLETIONS, completion("hi")), (CHAT, chat("hi"))):
        found = []
        for n in (1, 4):
            counts.clear()
            answer = http.post(path, json=body | many | {"n": n, "temperature": 1})
            assert len(answer.json()["choices"]) == n
            found.append(dict(counts))
        assert found[0] == found[1] and found[0]["__post_init__"] == 1
        assert found[0]["encode"] == 1 + 2 * 2  # the prompt, and each word as it is and after a space
    (first, second) = server.llm.requests(
        [5], server.llm.checked_params(SamplingParams(allowed_token_ids=[7])), [1, 2]
    )
    assert first.params is second.params and first.prompt_token_ids is second.prompt_token_ids


def test_no_more_tokens_are_allowed_than_there_are(http: httpx.Client) -> None:
    for path, body in ((COMPLETIONS, completion("hi")), (CHAT, chat("hi"))):
        for count in (VOCAB, VOCAB + 1, 400_000):
            answer = http.post(path, json=body | {"allowed_token_ids": [7] * count})
            if count == VOCAB:
                assert answer.status_code == 200
                continue
            error = error_of(answer, 400)
            assert error["param"] == "allowed_token_ids"
            assert error["message"] == f"allowed_token_ids has {count} tokens, over the vocabulary of {VOCAB}"


def test_the_choices_of_a_prompt_share_its_log_probabilities(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[Generation] = []
    submit = server.service.submit
    monkeypatch.setattr(server.service, "submit", lambda g, *more: (added.extend(g), submit(g, *more))[1])
    for path, body in ((COMPLETIONS, completion(["zz", "ab"])), (CHAT, chat("zzz"))):
        asked = body | {"prompt_logprobs": 2, "temperature": 0}
        one, three = (http.post(path, json=asked | {"n": n}).json() for n in (1, 3))
        if path == CHAT:
            assert len(three["prompt_logprobs"]) > 1 and three["prompt_logprobs"] == one["prompt_logprobs"]
        else:
            found = [choice["prompt_logprobs"] for choice in three["choices"]]
            assert found == [choice["prompt_logprobs"] for choice in one["choices"] for _ in range(3)]
        assert [bool(one.request.prompt_logprobs) for one in added[-3:]] == [True, False, False]
    monkeypatch.setattr(responses, "MAX_PROMPT_LOGPROBS", 11)
    for path, body, message in (
        (
            COMPLETIONS,
            completion([5] * 4) | {"n": 2},
            "=1 for 4 tokens of the prompt in each of 2 choices are 16",
        ),
        (COMPLETIONS, completion([[5] * 2, [6] * 4]), "=1 for 6 tokens of the prompt are 12"),
        (CHAT, chat("zzzzzz") | {"n": 2}, "=1 for 6 tokens of the prompt are 12"),
    ):
        error = error_of(http.post(path, json=body | {"prompt_logprobs": 1}), 400)
        assert error["message"] == f"prompt_logprobs{message} log-probabilities, over 11"
        assert error["param"] == "prompt_logprobs"
    echoed = completion([5] * 6) | {"echo": True, "logprobs": 1}
    assert error_of(http.post(COMPLETIONS, json=echoed | {"stream": True}), 400)["param"] == "logprobs"
    monkeypatch.undo()
    responses.check_prompt_logprobs(8192, 20, 1, "prompt_logprobs")


def test_an_echo_is_made_once_for_a_prompt(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[int] = []
    echo = CompletionResponse._echo
    monkeypatch.setattr(
        CompletionResponse, "_echo", lambda self, index: (prompts.append(index), echo(self, index))[1]
    )
    asked = completion(["the fox", "dog é"]) | {"echo": True, "logprobs": 2, "n": 2, "temperature": 0}
    asked |= {"max_tokens": 4, "ignore_eos": True}
    whole = http.post(COMPLETIONS, json=asked).json()["choices"]
    assert prompts == [0, 2]
    lines = http.post(COMPLETIONS, json=asked | {"stream": True}).text.split("\n\n")
    assert sorted(prompts) == [0, 0, 2, 2]
    parts = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if "choices" in line]
    assert len(parts) > len(whole)
    for choice in whole:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert choice["text"] == "".join(part["text"] for part in own)
        for name in ("tokens", "text_offset"):
            assert choice["logprobs"][name] == [one for part in own for one in part["logprobs"][name]]
        assert own[0]["logprobs"]["token_logprobs"][:2] == choice["logprobs"]["token_logprobs"][:2]


@pytest.mark.parametrize("stream", (False, True))
def test_a_large_response_is_built_beside_the_event_loop(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    begun, answered, waited = threading.Event(), threading.Event(), []
    echo, encoded = CompletionResponse._echo, responses._encoded

    def slow(function: Any) -> Any:
        def wait(*arguments: Any, **more: Any) -> Any:
            if not waited:
                begun.set()
                waited.append(answered.wait(20))
            return function(*arguments, **more)

        return wait

    for owner, name, function in ((CompletionResponse, "_echo", echo), (responses, "_encoded", encoded)):
        waited.clear()
        begun.clear(), answered.clear()
        monkeypatch.setattr(owner, name, slow(function))
        body = completion([5] * 500) | {"echo": True, "logprobs": 20, "stream": stream}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(http.post, COMPLETIONS, json=body)
            assert begun.wait(60)
            assert http.get("/health", timeout=15).status_code == 200
            answered.set()
            assert asked.result().status_code == 200 and waited == [True]
        monkeypatch.undo()


def test_json_in_pieces_is_json() -> None:
    value = {
        "none": {}, "nothing": [], "text": "é\u2028", "usage": {"a": {"b": {"c": {"d": {"e": []}}}}},
        "choices": [{"logprobs": {"tokens": list(range(1000)), "tops": [{"x": [None, 0.5]}] * 700}}] * 3,
        "prompt_logprobs": [None, *({"7": {"logprob": -1.5}} for _ in range(999))],
    }  # fmt: skip
    assert json.loads(responses.json_of(value)) == value
    assert json.loads(responses.event(value).removeprefix(b"data: ")) == value
    assert responses.json_of({"tokens": iter([1, 2]), "none": iter([])}) == b'{"tokens":[1,2],"none":[]}'
    assert max(map(len, responses._pieces(value, json.dumps, 4))) < 10_000
    with pytest.raises(ValueError, match="not JSON compliant"):
        responses.json_of({"choices": [{"logprob": float("nan")}]})


@contextlib.contextmanager
def slow_chats(server: Running, count: int) -> Iterator[list[socket.socket]]:
    """Chats whose template does not end."""
    socks = [sent(server, CHAT, chat("loop")) for _ in range(count)]
    try:
        server.until(lambda: server.service.pending >= count)
        yield socks
    finally:
        for sock in socks:
            sock.close()
        server.until(lambda: server.service.pending == 0)


def test_who_waits_for_a_template_waits_in_the_queue(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = server.server.config.app._app.state.shared.chat_prompts.workers._slow
    monkeypatch.setattr(workers, "_time_limit_s", 600)
    with slow_chats(server, SLOTS + QUEUE):
        for path, body in (
            (CHAT, chat("hi")),
            (COMPLETIONS, completion("hi")),
            ("/tokenize", {"prompt": "hi"}),
        ):
            refused = http.post(path, json=body)
            assert error_of(refused, 429)["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert http.post(CHAT, json=chat("hi")).status_code == 200


def test_slow_templates_leave_room_and_end_with_their_clients(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = server.server.config.app._app.state.shared.chat_prompts.workers._slow
    monkeypatch.setattr(workers, "_time_limit_s", 600)
    with slow_chats(server, SLOTS + QUEUE - 1):  # more than there are places for such
        assert http.post(COMPLETIONS, json=completion("hi")).status_code == 200
        assert http.post(CHAT, json=chat("hi")).status_code == 200
        assert server.service.pending == SLOTS + QUEUE - 1
    assert http.post(CHAT, json=chat("hi")).status_code == 200


def test_text_over_the_budget_comes_back_later(http: httpx.Client, server: Running) -> None:
    """Four bodies of the largest size hold all there is; what is small goes by."""
    body = json.dumps(completion("a" * (BODY - 200))).encode()
    held: list[socket.socket] = []
    try:
        for _ in range(4):
            sock = connect(server)
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])  # all but the end
            held.append(sock)
        large = {"content-type": "application/json"}

        held_bytes = 4 * len(body)
        server.until(lambda: server.server.config.app._budget.used == held_bytes)
        answer = http.post(COMPLETIONS, content=body, headers=large)
        assert error_of(answer, 429)["code"] == "text_budget_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert http.post(COMPLETIONS, json=completion("hi")).status_code == 200
        assert http.post(CHAT, json=chat("hi")).status_code == 200
    finally:
        for sock in held:
            sock.close()
    server.until(lambda: http.post(COMPLETIONS, content=body, headers=large).status_code == 400)


def test_a_body_of_many_parts_is_refused_before_it_is_read(http: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    for path, content in (
        (COMPLETIONS, '{"prompt":[' + "[]," * 70_000 + "[1]]}"),
        (COMPLETIONS, '{"prompt":"a"' + "".join(f',"{i:x}":1' for i in range(70_000)) + "}"),
        (CHAT, '{"messages":[' + "{}," * 70_000 + "{}]}"),
    ):
        answer = http.post(path, content=content, headers=headers)
        assert "objects, lists and fields, over 65536" in error_of(answer, 400)["message"]
    # in a text they are no parts
    text = json.dumps(completion('[{":\\"' * 30_000)).encode()
    assert json_bodies.parts(text) == 3
    assert (
        error_of(http.post(COMPLETIONS, content=text, headers=headers), 400)["code"]
        == "context_length_exceeded"
    )
    # and of many wrong items one is named
    wrong = http.post(COMPLETIONS, content='{"prompt":[' + '"a",1,' * 100_000 + "1]}", headers=headers)
    assert error_of(wrong, 400)["param"] == "prompt"


def test_json_in_a_string_has_limits_of_its_own(
    http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of a body do not count what is in a string; it is refused before it is decoded."""

    def decode(_: Any) -> Any:
        raise AssertionError

    many = "[" + "[]," * 100_000 + "0]"
    monkeypatch.setattr(structured_outputs, "strict_json", decode)
    for asked in ({"guided_json": many}, {"structured_outputs": {"json": many}}):
        error = error_of(http.post(COMPLETIONS, json=completion("a", **asked)), 400)
        assert error["param"] in asked and f"takes {len(many)} bytes, over 65536" in error["message"]
    half = {"function": {"name": "f", "arguments": '{"a\\"":[' + "[]," * 40_000 + "0]}"}}
    one = {"role": "assistant", "tool_calls": [half]}
    body = {"messages": [one, one], "max_tokens": 1}
    monkeypatch.setattr(conversation, "strict_json", decode)
    error = error_of(http.post(CHAT, json=body), 400)
    assert error["param"] == "messages" and "have 80006 objects, lists and fields, over" in error["message"]


def test_schemas_are_prepared_off_the_event_loop(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparing 64 KiB may take a quarter of a second; a larger schema is not begun."""
    names: dict[str, str] = {}

    def noted(name: str) -> None:
        whole = getattr(compiler, name)

        def note(*arguments: Any) -> Any:
            names[name] = threading.current_thread().name
            return whole(*arguments)

        monkeypatch.setattr(compiler, name, note)

    for name in ("prepared", "_written", "patterns", "without_patterns"):
        noted(name)
    large = {"anyOf": [{}] * 30_000}
    assert error_of(http.post(COMPLETIONS, json=completion("a", guided_json=large)), 400)
    assert not names
    usable = {"type": "string", "pattern": "(?=a)"}
    answer = http.post(COMPLETIONS, json=completion("a", guided_json=usable))
    assert answer.status_code == 200, answer.text
    assert len(names) == 4 and all(name.startswith("tpjax-grammar") for name in names.values())


@pytest.mark.parametrize("nested", (False, True))
def test_of_unknown_fields_the_first_is_named_and_its_name_is_cut(http: httpx.Client, nested: bool) -> None:
    unknown = {"x" * 500_000: 1} | {f"{i:x}": 1 for i in range(60_000)}
    with pytest.raises(ValidationError) as caught:
        StreamOptions.model_validate(unknown)
    (only,) = caught.value.errors()
    assert only["type"] == "extra_forbidden" and only["loc"] == ("x" * 500_000,)
    body = completion("a", stream=True, **({"stream_options": unknown} if nested else unknown))
    error = error_of(http.post(COMPLETIONS, json=body), 400)
    assert error["param"] == ("stream_options" if nested else "x" * 200)
    assert error["message"].endswith("xx is not a known parameter") and len(error["message"]) < 300
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({"prompt": "a", "logit_bias": {f"{i}": "x" for i in range(60_000)}})
    (only,) = caught.value.errors()
    assert only["type"] == "too_long" and only["loc"] == ("logit_bias",)
    body = {"messages": [], "functions": [{"name": "f"}], "function_call": {"name": "g" * 500_000}}
    error = error_of(http.post(CHAT, json=body), 400)
    assert error["param"] == "function_call" and len(error["message"]) < 5000


LEAVES = st.none() | st.integers() | st.text(st.characters(codec="utf-8"), max_size=6)
NAMES = st.text('"\\:[{a', max_size=3)
PART = st.recursive(
    LEAVES | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)


@given(value=PART, ascii_only=st.booleans())
def test_parts_are_counted_exactly(value: Any, ascii_only: bool) -> None:
    def count(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + len(value) + sum(count(one) for one in value.values())
        return 1 + sum(count(one) for one in value) if isinstance(value, list) else 0

    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_bodies, "MAX_PARTS", -1)
        assert json_bodies.parts(text) == count(value)


# --- requests as they come over the wire --------------------------------------------------------------------

PROTOCOLS = ["h11"] + ["httptools"] * (importlib.util.find_spec("httptools") is not None)


@pytest.fixture(scope="module", params=PROTOCOLS)
def wire(request: pytest.FixtureRequest, server: Running) -> Iterator[Running]:
    """The server with either of uvicorn's parsers."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "httptools":
            from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Protocol
        else:
            from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
        patch.setattr(server.server.config, "http_protocol_class", Protocol)
        yield server


def exchange(server: Running, request: bytes) -> bytes:
    """What comes back until the server closes the connection."""
    with connect(server) as sock:
        sock.sendall(request)
        data = b""
        while part := sock.recv(65536):
            data += part
        return data


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = b"5\r\nhello\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    (
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 15\r\n",
        b"Content-Length: 5\r\nContent-Length: 15\r\n",
        b"Content-Length: 5, 15\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5_0\r\n",
        b"Content-Length: \xb2\r\n",
        b"Content-Length : 5\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding:\r\n chunked\r\n",
    ),
)
def test_a_body_of_doubtful_length_ends_the_connection(wire: Running, head: bytes) -> None:
    """What follows is never taken for a request."""
    smuggled = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = exchange(wire, POST + head + b"\r\n" + CHUNKED + smuggled)
    assert answer.split(b" ")[1] in (b"400", b"501") and answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer.lower()


def test_the_same_length_twice_is_one_or_an_error(wire: Running) -> None:
    answer = exchange(wire, POST + b"Connection: close\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}")
    assert answer.split(b" ")[1] == b"400" and answer.count(b"HTTP/1.1") == 1


def test_a_body_that_is_packed_is_told(wire: Running) -> None:
    packed = gzip.compress(json.dumps(completion("hi")).encode())
    for coding, status in ((b"gzip", b"415"), (b"br", b"415"), (b"identity", b"400")):
        length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(packed)
        answer = exchange(wire, POST + b"Content-Encoding: " + coding + b"\r\n" + length + packed)
        assert answer.split(b" ")[1] == status
        assert status == b"400" or b"Content-Encoding '%s' is not supported" % coding in answer


@pytest.mark.parametrize("chunked", (False, True))
@pytest.mark.parametrize("keys", ([], [b"secret"]))
def test_who_sends_too_much_can_read_why(
    wire: Running, chunked: bool, keys: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 MB without reading: a reset would take the answer with it."""
    monkeypatch.setattr(wire.server.config.app, "_keys", keys)
    part = b"a" * (1 << 20)
    with connect(wire) as sock:
        length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (50 * len(part))
        sock.sendall(POST + length + b"\r\n\r\n")
        for _ in range(50):
            sock.sendall(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
        if chunked:
            sock.sendall(b"0\r\n\r\n")
        data = b""
        while more := sock.recv(65536):
            data += more
    status, code = (401, "invalid_api_key") if keys else (413, "request_too_large")
    assert data.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(data.partition(b"\r\n\r\n")[2])["error"]["code"] == code


def test_an_expectation_is_answered_without_the_body(wire: Running) -> None:
    head = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (50 << 20)
    with connect(wire) as sock:
        sock.sendall(POST + head)
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_an_ordinary_client_reads_its_413(http: httpx.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(50):
            yield b"a" * (1 << 20)

    for content in (b"a" * (50 << 20), parts()):
        answer = http.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
        assert error_of(answer, 413)["code"] == "request_too_large"
    assert http.post(COMPLETIONS, json=completion("hi")).status_code == 200


@pytest.mark.slow
def test_a_server_holds_under_attack(smollm2_first_layers: Path) -> None:
    """The script's whole programme against `tpjax serve`; on a busy machine others wait longer.

    Text, templates and grammars are what it is about: two layers with the whole vocabulary do.
    """
    script = Path(__file__).parents[1] / "scripts" / "attack_server.py"
    options = ["--model", str(smollm2_first_layers), "--rounds", "5", "--latency-s", "10"]
    kept = {name: value for name, value in os.environ.items() if name != "NPROC"}
    done = subprocess.run(
        [sys.executable, str(script), *options],
        env=kept | {"XLA_FLAGS": " ".join(COMPILE_FAST)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held    memory after 5 rounds" in done.stdout and "429: " in done.stdout
