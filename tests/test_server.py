"""The whole surface of the server, driven by the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from serving import CONTEXT, Running, load_tiny, running, tiny_checkpoint

from tpjax import SamplingParams

PROMPT = "the quick brown fox"
HI: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "leave"}},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    with running(lambda: load_tiny(directory)) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same model without a server."""
    return load_tiny(tiny_checkpoint(tmp_path_factory.mktemp("offline")))


def test_models(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "tiny" and card.object == "model"
    assert client.models.retrieve("tiny") == card
    assert card.max_model_len == CONTEXT  # type: ignore[attr-defined]


@pytest.mark.parametrize("extra", ({"temperature": 0}, {"temperature": 0.9, "seed": 7, "top_p": 0.9}))
def test_completion_is_the_library_s(client: openai.OpenAI, offline: Any, extra: dict[str, Any]) -> None:
    (expected,) = offline.generate(PROMPT, SamplingParams(max_tokens=20, **extra))
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, **extra)
    (choice,) = answer.choices
    assert choice.text == expected.text and choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_is_the_same_and_ends_with_its_usage(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "n": 2}
    whole = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    for index in (0, 1):
        own = [c.choices[0] for c in parts if c.choices[0].index == index]
        assert "".join(choice.text for choice in own) == whole.choices[index].text
        assert [choice.finish_reason for choice in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == whole.choices[index].finish_reason
    assert len(parts) > 4  # it did stream
    assert all(part.usage is None for part in parts)
    assert not last.choices and last.usage and whole.usage
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_batches_token_ids_echo_and_n(client: openai.OpenAI, offline: Any) -> None:
    ids = offline.tokenizer.encode(PROMPT)
    answer = client.completions.create(
        model="tiny", prompt=[ids, [5, 6, 7]], max_tokens=4, temperature=0, echo=True, n=2
    )
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    expected = offline.generate([ids, [5, 6, 7]], SamplingParams(max_tokens=4, temperature=0))
    assert texts[0] == texts[1] == PROMPT + expected[0].text
    assert texts[2] == texts[3] == offline.tokenizer.decode([5, 6, 7]) + expected[1].text
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids) + 3  # once each
    assert answer.usage.completion_tokens == 16
    sampled = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, n=3, seed=5)
    each = [
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, seed=5 + i).choices[0].text
        for i in range(3)
    ]
    assert [choice.text for choice in sampled.choices] == each  # seeds follow the index
    assert len(set(each)) > 1


def test_stop_and_extras(client: openai.OpenAI, offline: Any) -> None:
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    (free,) = offline.generate(PROMPT, params)
    stop = free.text[5:8]
    ask: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    (choice,) = client.completions.create(**ask, stop=[stop], extra_body={"ignore_eos": True}).choices
    assert choice.text == free.text[: free.text.index(stop)] and choice.finish_reason == "stop"
    extras = {"top_k": 5, "min_p": 0.02, "repetition_penalty": 1.3, "ignore_eos": True, "cache_salt": "s"}
    ask |= {"temperature": 1.0, "seed": 3, "presence_penalty": 0.5, "logit_bias": {"40": 3.0}}
    (choice,) = client.completions.create(**ask, extra_body=extras).choices
    (expected,) = offline.generate(
        PROMPT,
        SamplingParams(
            max_tokens=30, seed=3, top_k=5, min_p=0.02, repetition_penalty=1.3, ignore_eos=True,
            presence_penalty=0.5, logit_bias={40: 3.0},
        ),
    )  # fmt: skip
    assert choice.text == expected.text


def test_logprobs_of_prompt_and_answer_are_the_model_s(client: openai.OpenAI, offline: Any) -> None:
    ids = offline.tokenizer.encode(PROMPT)
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=3, temperature=0, echo=True, logprobs=2,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    found = answer.choices[0].logprobs
    assert found and found.token_logprobs and found.top_logprobs and found.tokens and found.text_offset
    (expected,) = offline.generate(PROMPT, SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    all_ids = ids + expected.token_ids
    logits = offline.logits(all_ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert len(found.tokens) == len(found.token_logprobs) == len(all_ids)
    assert found.token_logprobs[0] is None
    own = [logprobs[i - 1, token] for i, token in enumerate(all_ids) if i]
    assert found.token_logprobs[1:] == pytest.approx(own, abs=1e-3)
    for i, top in enumerate(found.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(logprobs[i].max(), abs=1e-3)
    assert found.text_offset[: len(ids)] == [
        len(offline.tokenizer.decode(ids[:i], skip_special_tokens=False)) for i in range(len(ids))
    ]
    only = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert only.text == PROMPT and only.finish_reason == "length"
    assert only.logprobs and only.logprobs.token_logprobs
    assert only.logprobs.token_logprobs[1:] == pytest.approx(own[: len(ids) - 1], abs=1e-3)


def test_cached_tokens_are_reported(client: openai.OpenAI) -> None:
    ids = list(np.random.default_rng(3).integers(4, 300, 300).tolist())
    ask: Any = {"model": "tiny", "prompt": ids, "max_tokens": 4, "temperature": 0}
    first, again = client.completions.create(**ask), client.completions.create(**ask)
    salted = client.completions.create(**ask, extra_body={"cache_salt": "other"})
    cached = [one.usage.prompt_tokens_details.cached_tokens for one in (first, again, salted)]  # type: ignore[union-attr]
    assert cached == [0, 256, 0]  # whole pages of 128
    assert first.choices[0].text == again.choices[0].text == salted.choices[0].text


def test_chat_whole_and_streamed(client: openai.OpenAI, offline: Any) -> None:
    ask: Any = {"model": "tiny", "messages": HI, "max_completion_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    prompt = offline.tokenizer.encode(offline.tokenizer.apply_chat_template(HI), add_special_tokens=False)
    (expected,) = offline.generate([prompt], SamplingParams(max_tokens=16, temperature=0, logprobs=2))
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.message.content == expected.text
    assert whole.usage and whole.usage.prompt_tokens == len(prompt)
    assert choice.logprobs and choice.logprobs.content
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(
        [entry.logprob for entry in expected.logprobs], abs=1e-4
    )
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    data = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert data.decode(errors="replace") == expected.text
    chunks = list(client.chat.completions.create(**ask, stream=True, logprobs=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    entries = [
        entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content or ()
    ]
    assert len(entries) == len(expected.token_ids)


def test_chat_fills_the_context_by_itself(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage and answer.usage.total_tokens == CONTEXT
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "form",
    (
        {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
        {"type": "json_object"},
    ),
)
def test_answers_follow_a_schema(client: openai.OpenAI, offline: Any, form: Any) -> None:
    ends = {str(offline.tokenizer.encode(char)[0]): 12 for char in '"}'}  # a random model has no wish to end
    answer = client.chat.completions.create(
        model="tiny", messages=HI, seed=2, n=3, max_tokens=400, response_format=form, logit_bias=ends
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content or "")
        assert isinstance(value, dict)
        if form["type"] == "json_schema":
            assert 0 <= value["a"] <= 99 and value["b"] in ("x", "y") and len(value) == 2


def test_a_grammar_s_greedy_draw_is_the_best_allowed(client: openai.OpenAI, offline: Any) -> None:
    """The mask decides, and nothing else: each token is the likeliest of those that the schema allows."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["left", "right"]}}}
    answer = client.chat.completions.create(
        model="tiny", messages=HI, temperature=0, max_tokens=40, response_format=form, logprobs=True
    )
    content = answer.choices[0].message.content
    assert content in ('"left"', '"right"')
    prompt = offline.tokenizer.encode(offline.tokenizer.apply_chat_template(HI), add_special_tokens=False)
    logits = offline.logits(prompt)[-1]
    quote = {i for i in range(320) if b'"left"'.startswith(offline.tokenizer.token_bytes(i) or b"?")}
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    first = answer.choices[0].logprobs.content[0].token
    assert first == offline.tokenizer.token_bytes(max(quote, key=lambda i: logits[i])).decode()


@pytest.mark.parametrize("choice", ("required", {"type": "function", "function": {"name": "look"}}))
def test_tools(client: openai.OpenAI, offline: Any, choice: Any) -> None:
    ask: Any = {"model": "tiny", "messages": HI, "tools": TOOLS, "tool_choice": choice, "seed": 4}
    ends = {str(offline.tokenizer.encode(char)[0]): 12 for char in '"}'}
    ask |= {"max_tokens": 400, "parallel_tool_calls": False, "logit_bias": ends}
    answer = client.chat.completions.create(**ask).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    (call,) = answer.message.tool_calls or ()
    assert call.type == "function" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    assert call.function.name in ("look", "leave")
    if call.function.name == "look":
        assert 0 <= arguments["a"] <= 99 and arguments["b"] in ("x", "y")
    if isinstance(choice, dict):
        assert call.function.name == "look"
    pieces = [c.choices[0] for c in client.chat.completions.create(**ask, stream=True)]
    parts = [tool for piece in pieces for tool in piece.delta.tool_calls or ()]
    assert parts[0].function and parts[0].function.name == call.function.name and parts[0].id
    assert (
        "".join((part.function and part.function.arguments) or "" for part in parts)
        == call.function.arguments
    )
    assert {part.index for part in parts} == {0}
    assert pieces[-1].finish_reason == "tool_calls"
    assert not any(piece.delta.content for piece in pieces)


def test_tools_are_offered_and_results_go_back(client: openai.OpenAI) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    messages: Any = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a fox"},
    ]
    ask: Any = {"model": "tiny", "max_tokens": 12, "temperature": 0, "tools": TOOLS}
    auto = client.chat.completions.create(messages=messages, **ask)
    none = client.chat.completions.create(messages=messages, **ask, tool_choice="none")
    assert auto.usage and none.usage and auto.usage.prompt_tokens > none.usage.prompt_tokens + 100
    assert auto.choices[0].message.tool_calls is None and auto.choices[0].message.content


def test_a_schema_that_is_left_out_allows_any_json(client: openai.OpenAI, offline: Any) -> None:
    (seven,) = offline.tokenizer.encode("7")
    for left_out in ({}, {"schema": None, "strict": None}):
        form: Any = {"type": "json_schema", "json_schema": {"name": "any", **left_out}}
        answer = client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=3, response_format=form, logit_bias={str(seven): 100}
        )
        assert answer.choices[0].message.content == "777"


def test_text_parts(client: openai.OpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    ask: Any = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    texts = [
        client.chat.completions.create(messages=m, **ask).choices[0].message.content for m in (HI, parts)
    ]
    assert texts[0] == texts[1]


def test_tokenize_and_detokenize(server: Running, offline: Any) -> None:
    tokenizer = offline.tokenizer
    with server.client() as http:
        answer = http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
        ids = tokenizer.encode(PROMPT)
        assert answer["tokens"] == ids and answer["count"] == len(ids) and answer["max_model_len"] == CONTEXT
        assert "".join(answer["token_strs"]) == PROMPT
        assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPT}
        rendered = http.post("/tokenize", json={"messages": HI}).json()["tokens"]
    assert rendered == tokenizer.encode(tokenizer.apply_chat_template(HI), add_special_tokens=False)


def test_errors_are_the_client_s_own(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.BadRequestError, match="together 1030: this model's maximum context length is 1024 tokens"
    ) as caught:
        client.completions.create(model="tiny", prompt=[5] * 30, max_tokens=1000)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist"):
        client.chat.completions.create(model="gpt-4", messages=HI)
    with pytest.raises(openai.BadRequestError, match="together 1030"):  # before the stream begins
        client.completions.create(model="tiny", prompt=[5] * 30, max_tokens=1000, stream=True)


def test_health_version_ready_openapi(server: Running) -> None:
    from tpjax import __version__

    with server.client() as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.get("/version").json() == {"version": __version__}
        paths = http.get("/openapi.json").json()["paths"]
        assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/metrics"} <= set(paths)
        assert http.get("/docs").status_code == 404


def test_metrics(server: Running, client: openai.OpenAI) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count")
    names += ("inter_token_latency_seconds_count", "e2e_request_latency_seconds_count")
    before = {name: server.metric(name) for name in names}
    done = server.metric("request_success_total")
    client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=9, n=2, extra_body={"ignore_eos": True}
    )
    after = {name: server.metric(name) - before[name] for name in names}
    assert list(after.values()) == [6, 18, 2, 16, 2]
    assert server.metric("request_success_total") == done + 2
    assert server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0
    assert server.metric("compiles_total") > 0
    queries, hits = (server.metric(f"prefix_cache_{name}_total") for name in ("queries", "hits"))
    for _ in range(2):
        client.completions.create(model="tiny", prompt=[9] * 200, max_tokens=1)
    assert server.metric("prefix_cache_queries_total") == queries + 400
    assert hits + 100 < server.metric("prefix_cache_hits_total") < hits + 200
