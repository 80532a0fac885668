"""What clients of OpenAI or vLLM send: each parameter has its effect, has none, or is refused by name."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
from api_server import BOS, HI, LOOK, TOOL, Api
from serving import CONTEXT, load_tiny, running

# --- every parameter of the official client

SAME: Any = lambda base, answer: answer == base  # noqa: E731
OTHER: Any = lambda base, answer: answer["choices"] != base["choices"] or answer["usage"] != base["usage"]  # noqa: E731
CALL_LOOK: Any = {"type": "function", "function": {"name": "look"}}
Effect = Callable[[Any, Any], bool]


def said(answer: Any) -> str:
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def shorter(base: Any, answer: Any) -> bool:
    return said(base).startswith(said(answer)) and len(said(answer)) < len(said(base))


def written(count: int) -> Effect:
    return lambda _, answer: answer["usage"]["completion_tokens"] == count


# name -> what to send, and what holds of the answers without and with it; no effect named: refused by name
CHAT: dict[str, tuple[dict[str, Any], Effect | None]] = {
    "audio": ({"audio": {"voice": "alloy", "format": "wav"}}, None),
    "frequency_penalty": ({"frequency_penalty": 2}, OTHER),
    "function_call": ({"functions": [LOOK], "function_call": "none"}, SAME),
    "functions": ({"functions": [LOOK]}, OTHER),
    "logit_bias": ({"logit_bias": {"40": 100}}, OTHER),
    "logprobs": ({"logprobs": True}, lambda _, a: len(a["choices"][0]["logprobs"]["content"]) == 12),
    "max_completion_tokens": ({"max_completion_tokens": 3}, written(3)),
    "max_tokens": ({"max_tokens": 2}, written(2)),
    "metadata": ({"metadata": {"a": "b"}}, SAME),
    "modalities": ({"modalities": ["text"]}, SAME),
    "moderation": ({"moderation": {"model": "omni-moderation-latest"}}, None),
    "n": ({"n": 2}, lambda _, a: len(a["choices"]) == 2),
    "parallel_tool_calls": ({"parallel_tool_calls": False}, SAME),
    "prediction": ({"prediction": {"type": "content", "content": "hello"}}, SAME),
    "presence_penalty": ({"presence_penalty": 2}, OTHER),
    "prompt_cache_key": ({"prompt_cache_key": "a"}, SAME),
    "prompt_cache_options": ({"prompt_cache_options": {"mode": "implicit"}}, SAME),
    "prompt_cache_retention": ({"prompt_cache_retention": "24h"}, SAME),
    "reasoning_effort": ({"reasoning_effort": "low"}, SAME),  # to a template that does not know it
    "response_format": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["x"]}}}},
        lambda _, a: said(a) == '"x"',
    ),
    "safety_identifier": ({"safety_identifier": "a"}, SAME),
    "seed": ({"seed": 9, "temperature": 1}, OTHER),
    "service_tier": ({"service_tier": "auto"}, SAME),
    "stop": ({"stop": list(";.m`aeinoqu ")}, shorter),
    "store": ({"store": True}, SAME),
    "stream": ({"stream": False}, SAME),
    "stream_options": ({"stream_options": None}, SAME),  # its effects: test_streams
    "temperature": ({"temperature": 1, "seed": 3}, OTHER),
    "tool_choice": ({"tools": [TOOL], "tool_choice": "none"}, SAME),
    "tools": ({"tools": [TOOL]}, OTHER),
    "top_logprobs": (
        {"logprobs": True, "top_logprobs": 3},
        lambda _, a: len(a["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3,
    ),
    "top_p": ({"top_p": 1e-6, "temperature": 1, "seed": 3}, lambda b, a: said(a) == said(b)),
    "user": ({"user": "someone"}, SAME),
    "verbosity": ({"verbosity": "low"}, SAME),
    "web_search_options": ({"web_search_options": {}}, None),
}  # fmt: skip

COMPLETIONS: dict[str, tuple[dict[str, Any], Effect | None]] = {
    "best_of": ({"best_of": 2}, None),
    "echo": ({"echo": True}, lambda b, a: a["choices"][0]["text"] == "the fox" + b["choices"][0]["text"]),
    "logprobs": ({"logprobs": 2}, lambda _, a: len(a["choices"][0]["logprobs"]["tokens"]) == 12),
    "suffix": ({"suffix": "end"}, None),
    "prompt": ({"prompt": "the dog"}, OTHER),
    "stop": ({"stop": list(";.m`aeinoqu ")}, shorter),
    "top_p": ({"top_p": 1e-6, "temperature": 1, "seed": 3}, lambda b, a: a["choices"] == b["choices"]),
    **{
        name: CHAT[name]
        for name in (
            "frequency_penalty", "logit_bias", "max_tokens", "n", "presence_penalty", "seed", "stream",
            "stream_options", "temperature", "user",
        )
    },
}  # fmt: skip


def parameters(create: Any) -> set[str]:
    own = {"self", "model", "messages", "extra_headers", "extra_query", "extra_body", "timeout"}
    return set(inspect.signature(create).parameters) - own


def outcome(create: Any, **ask: Any) -> Any:
    """An answer without what differs between any two."""
    answer = create(**ask).model_dump()
    return {name: answer[name] for name in ("choices", "usage")}


@pytest.mark.parametrize("name", sorted(parameters(openai.resources.chat.Completions.create)))
def test_chat_parameters_of_the_official_client(api: Api, name: str) -> None:
    base: Any = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 12}
    base["extra_body"] = {
        "ignore_eos": True,
        "cache_salt": name,
    }  # a prefix that is found is told in the usage
    hold(api.client.chat.completions.create, base, name, CHAT)


@pytest.mark.parametrize("name", sorted(parameters(openai.resources.Completions.create)))
def test_completion_parameters_of_the_official_client(api: Api, name: str) -> None:
    base: Any = {"model": "tiny", "prompt": "the fox", "temperature": 0, "max_tokens": 12}
    base["extra_body"] = {"ignore_eos": True, "cache_salt": name}
    hold(api.client.completions.create, base, name, COMPLETIONS)


def hold(create: Any, base: Any, name: str, table: dict[str, tuple[dict[str, Any], Effect | None]]) -> None:
    assert name in table, f"the client has a parameter {name} that nobody has thought of"
    given, effect = table[name]
    if effect is None:
        with pytest.raises(openai.BadRequestError, match=name) as caught:
            create(**base | given)
        assert caught.value.param == name and caught.value.type == "invalid_request_error"
        create(**base | {name: None})
    else:
        assert effect(outcome(create, **base), outcome(create, **base | given))


@pytest.mark.parametrize(
    ("name", "nothing", "something"),
    (
        ("use_beam_search", False, True),
        ("length_penalty", 1.0, 2.0),
        ("logits_processors", [], ["a"]),
        ("logprob_token_ids", None, [5]),
        ("thinking_token_budget", -1, 10),
        ("repetition_detection", None, {"min_count": 3}),
        ("kv_transfer_params", None, {"do_remote_decode": True}),
        ("vllm_xargs", {}, {"a": 1}),
    ),
)
def test_what_cannot_be_had_is_refused(api: Api, name: str, nothing: Any, something: Any) -> None:
    for path, ask in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": HI})):
        body = ask | {"max_tokens": 2}
        assert api.http.post(path, json=body | {name: nothing}).status_code == 200
        error = api.http.post(path, json=body | {name: something}).json()["error"]
        assert error["param"] == name and error["message"].startswith(f"{name} is not supported")


def test_modalities_with_audio_and_parts_that_are_no_text(api: Api) -> None:
    ask = {"messages": HI, "max_tokens": 2, "modalities": ["text", "audio"]}
    assert api.http.post("/v1/chat/completions", json=ask).json()["error"]["param"] == "modalities"


# --- what an answer tells besides


@pytest.mark.parametrize("path", ("completions", "chat/completions"))
def test_streams(api: Api, path: str) -> None:
    """Token ids of the deltas are those of the whole answer; the usage grows with them."""
    ask = {"prompt": "the fox"} if path == "completions" else {"messages": HI}
    body = ask | {"max_tokens": 12, "n": 2, "seed": 8, "return_token_ids": True, "ignore_eos": True}
    whole = api.http.post(f"/v1/{path}", json=body).json()
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = api.http.post(f"/v1/{path}", json=body | {"stream": True, "stream_options": options}).text
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    *chunks, last = [json.loads(one) for one in data[:-1]]
    assert data[-1] == "[DONE]" and last["usage"]["completion_tokens"] == 24
    first = (
        whole["prompt_token_ids"] if "prompt_token_ids" in whole else whole["choices"][0]["prompt_token_ids"]
    )
    told = [
        given for chunk in chunks
        if (given := chunk.get("prompt_token_ids") or chunk["choices"][0].get("prompt_token_ids"))
    ]  # fmt: skip
    assert told == [first, first] and whole["usage"]["prompt_tokens"] == len(first)
    for index, choice in enumerate(whole["choices"]):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        ids = [token for chunk in own for token in chunk["choices"][0].get("token_ids", [])]
        assert ids == choice["token_ids"] and len(choice["token_ids"]) == 12
        counts = [chunk["usage"]["completion_tokens"] for chunk in own]
        assert counts == sorted(counts) and counts[-1] == 12
        assert all(chunk["usage"]["prompt_tokens"] == len(first) for chunk in own)


def test_log_probabilities_of_the_prompt(api: Api) -> None:
    ids = api.tokenizer.encode("the quick fox")
    logits = api.offline.logits(ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 2, "return_tokens_as_token_ids": True}
    choice = api.http.post("/v1/completions", json=body | {"logprobs": 1}).json()["choices"][0]
    assert choice["logprobs"]["tokens"][0].startswith("token_id:")
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(ids)
    for at, entry in enumerate(choice["prompt_logprobs"][1:]):
        own = entry[str(ids[at + 1])]
        assert own["logprob"] == pytest.approx(logprobs[at, ids[at + 1]], abs=1e-3)
        best = [one for one in entry.values() if one["rank"] == 1]
        assert best[0]["logprob"] == pytest.approx(logprobs[at].max(), abs=1e-3)
    answer = api.http.post(
        "/v1/chat/completions", json={"messages": HI, "max_tokens": 1, "prompt_logprobs": 0}
    )
    assert len(answer.json()["prompt_logprobs"]) == answer.json()["usage"]["prompt_tokens"]
    refused = api.http.post("/v1/completions", json=body | {"stream": True})
    assert refused.json()["error"]["param"] == "prompt_logprobs"


def test_request_ids_are_answered(api: Api) -> None:
    body: Any = {"request_id": "mine", "priority": -3}
    assert api.client.completions.create(model="tiny", prompt="a", extra_body=body).id == "cmpl-mine"
    answer = api.client.chat.completions.create(model="tiny", messages=HI, max_tokens=1, extra_body=body)
    assert answer.id == "chatcmpl-mine"


def test_model_cards(api: Api) -> None:
    (card,) = api.client.models.list().data
    found: Any = card.model_dump()
    assert (
        found["root"] == str(api.directory) and found["parent"] is None and found["max_model_len"] == CONTEXT
    )
    (permission,) = found["permission"]
    assert permission["object"] == "model_permission" and permission["allow_sampling"] is True
    assert permission["id"].startswith("modelperm-")


def test_tokenizer_info(api: Api) -> None:
    info = api.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<|bos|>", "<|eos|>", None)
    assert info["chat_template"] == api.tokenizer.chat_template and info["add_bos_token"] is True
    assert info["model_max_length"] == CONTEXT and info["vocab_size"] == api.tokenizer.vocab_size


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install -e '.[parity]'")
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_with_the_server_s_tokenizer(api: Api) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        base_url=f"{api.server.url}/v1/completions", model="tiny", tokenizer_backend="remote", max_length=512
    )
    remote = lm.tokenizer
    assert remote.encode("the fox") == api.tokenizer.encode("the fox", add_special_tokens=False)
    assert remote.eos_token_id in api.tokenizer.eos_ids and remote.bos_token_id == BOS
    assert remote.apply_chat_template(HI) == api.tokenizer.apply_chat_template(HI)
    ((found, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("the quick", " fox"), 0)])
    before, ids = len(remote.encode("the quick")), remote.encode("the quick fox")
    logits = api.offline.logits(ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert found == pytest.approx(sum(logprobs[i - 1, ids[i]] for i in range(before, len(ids))), abs=1e-3)


# --- what is not here


def test_other_apis_are_refused_by_name(api: Api) -> None:
    """What the official client has besides, and a base URL without /v1 or with two."""
    official, twice = api.client, api.client.with_options(base_url=f"{api.server.url}/v1/v1")
    none = api.client.with_options(base_url=api.server.url)
    asks: list[tuple[Callable[[], Any], str]] = [
        (lambda: official.responses.create(model="tiny", input="a"), "responses: the Responses API is not"),
        (lambda: official.embeddings.create(model="tiny", input="a"), "embeddings are not supported"),
        (lambda: official.moderations.create(input="a"), "Not Found; /openapi.json lists"),
        (lambda: none.models.list(), "GET /models: Not Found; /v1/models is meant: the client's base URL"),
        (lambda: twice.completions.create(model="tiny", prompt="a"), "/v1/completions is meant"),
    ]
    for ask, message in asks:
        with pytest.raises(openai.NotFoundError, match=re.escape(message)) as caught:
            ask()
        assert caught.value.type == "not_found_error"


# --- pages from elsewhere


def test_pages_of_allowed_origins(api: Api) -> None:
    mine, other = {"origin": "https://a.example"}, {"origin": "https://b.example"}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    leave = api.http.options("/v1/chat/completions", headers=mine | asks)
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == "https://a.example"
    assert "authorization" in leave.headers["access-control-allow-headers"]
    assert "POST" in leave.headers["access-control-allow-methods"]
    assert api.http.options("/v1/chat/completions", headers=other | asks).status_code == 400
    for path, body in (
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/completions", {"wrong": 1}),
    ):
        answer = api.http.post(path, json=body, headers=mine)  # an error has to be read as well
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in api.http.post(path, json=body, headers=other).headers


def test_origins_and_keys(api: Api) -> None:
    options: dict[str, Any] = {"api_keys": ("key",), "allow_origins": ("*",), "protect_metrics": True}
    with running(lambda: load_tiny(api.directory), **options) as one, one.client() as http:
        origin = {"origin": "https://any.example"}
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        leave = http.options("/v1/completions", headers=origin | asks)
        assert leave.status_code == 200 and leave.headers["access-control-allow-origin"] == "*"
        refused = http.post("/v1/completions", json={"prompt": "a"}, headers=origin)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "*"
        assert http.get("/metrics").status_code == 401
        assert http.get("/metrics", headers={"authorization": "Bearer key"}).status_code == 200
        for path in ("/health", "/ready", "/ping"):
            assert http.get(path).status_code == http.head(path).status_code == 200
    with running(lambda: load_tiny(api.directory)) as one, one.client() as http:
        answer = http.get("/health", headers=origin)
        assert "access-control-allow-origin" not in answer.headers  # nobody, unless told
        assert http.options("/v1/completions", headers=origin | asks).status_code == 405
