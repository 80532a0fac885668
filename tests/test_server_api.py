"""What clients of OpenAI or vLLM send: each parameter has its effect, has none, or is refused by name."""

from __future__ import annotations

import bisect
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from serving import CONTEXT, Running, load_tiny, running, tiny_checkpoint

from tpjax import LLM, SamplingParams
from tpjax.text.tokenizer import Tokenizer

HI: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
LOOK: Any = {"name": "look", "parameters": SCHEMA}
LEAVE: Any = {"name": "leave", "parameters": SCHEMA}
BOS = 0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model; its tokenizer puts a BOS before each text."""
    made = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    library = json.loads((made / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    library["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [BOS], "tokens": ["<|bos|>"]}},
    }
    (made / "tokenizer.json").write_text(json.dumps(library))
    return made


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Running]:
    with running(lambda: load_tiny(directory), allow_origins=("https://a.example",)) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with server.client() as one:
        yield one


@pytest.fixture(scope="module")
def offline(directory: Path) -> LLM:
    return load_tiny(directory)


@pytest.fixture(scope="module")
def tokenizer(offline: LLM) -> Tokenizer:
    assert offline.tokenizer is not None
    return offline.tokenizer


def bytes_of(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token a byte."""
    own = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [own[bytes([byte])] for byte in data]


# --- every parameter of the official client

SAME: Any = lambda base, answer: answer == base  # noqa: E731
OTHER: Any = lambda base, answer: answer["choices"] != base["choices"] or answer["usage"] != base["usage"]  # noqa: E731
TOOL: Any = {"type": "function", "function": LOOK}
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
def test_chat_parameters_of_the_official_client(client: openai.OpenAI, name: str) -> None:
    base: Any = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 12}
    base["extra_body"] = {
        "ignore_eos": True,
        "cache_salt": name,
    }  # a prefix that is found is told in the usage
    hold(client.chat.completions.create, base, name, CHAT)


@pytest.mark.parametrize("name", sorted(parameters(openai.resources.Completions.create)))
def test_completion_parameters_of_the_official_client(client: openai.OpenAI, name: str) -> None:
    base: Any = {"model": "tiny", "prompt": "the fox", "temperature": 0, "max_tokens": 12}
    base["extra_body"] = {"ignore_eos": True, "cache_salt": name}
    hold(client.completions.create, base, name, COMPLETIONS)


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
def test_what_cannot_be_had_is_refused(http: httpx.Client, name: str, nothing: Any, something: Any) -> None:
    for path, ask in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": HI})):
        body = ask | {"max_tokens": 2}
        assert http.post(path, json=body | {name: nothing}).status_code == 200
        error = http.post(path, json=body | {name: something}).json()["error"]
        assert error["param"] == name and error["message"].startswith(f"{name} is not supported")


def test_modalities_with_audio_and_parts_that_are_no_text(http: httpx.Client) -> None:
    ask = {"messages": HI, "max_tokens": 2, "modalities": ["text", "audio"]}
    assert http.post("/v1/chat/completions", json=ask).json()["error"]["param"] == "modalities"


# --- where tokens begin in the text


def begins(tokenizer: Tokenizer, ids: list[int], text: str, skipped: set[int]) -> list[int]:
    """By the definition: which character of the text holds a token's first byte."""
    ends = np.cumsum([len(char.encode()) for char in text]).tolist()
    at, found = 0, []
    for token in ids:
        found.append(bisect.bisect_right(ends, at))
        at += 0 if token in skipped else len(tokenizer.token_bytes(token))
    return found


def test_offsets_of_bytes_and_after_a_bos(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ask: Any = {"model": "tiny", "max_tokens": 0, "echo": True, "logprobs": 0}
    text = "é the quick 😀\u2028 fox"
    (choice,) = client.completions.create(prompt=text, **ask).choices
    ids = tokenizer.encode(text)
    assert ids[0] == BOS and len(ids) > len(text.split()) + 4  # some characters take several tokens
    assert choice.text == text and choice.logprobs and choice.logprobs.tokens
    assert len(choice.logprobs.tokens) == len(ids)
    assert choice.logprobs.text_offset == begins(tokenizer, ids, text, {BOS})
    (choice,) = client.completions.create(prompt=ids, **ask).choices  # as ids, the BOS is echoed too
    assert choice.text == "<|bos|>" + text and choice.logprobs
    assert choice.logprobs.text_offset == begins(tokenizer, ids, choice.text, set())


@pytest.mark.parametrize("stream", (False, True))
def test_offsets_of_an_answer(client: openai.OpenAI, tokenizer: Tokenizer, stream: bool) -> None:
    """Every byte of a character a token of its own; and an end-of-text token, which shows nothing."""
    text = "aé😀b"
    script = [*bytes_of(tokenizer, text.encode()), min(tokenizer.eos_ids)]
    grammar = f'start: "{text}"'
    ask: Any = {"model": "tiny", "prompt": "ü the", "max_tokens": 20, "logprobs": 0, "echo": True, "seed": 1}
    bias = {str(token): 50 for token in script}
    answer = client.completions.create(
        **ask, stream=stream, logit_bias=bias,
        extra_body={"structured_outputs": {"grammar": grammar}, "return_token_ids": True},
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == "ü the" + text
    prompt = tokenizer.encode("ü the")
    assert choices[0].prompt_token_ids == prompt
    ids = prompt + [token for choice in choices for token in choice.token_ids]
    assert tokenizer.decode(ids) == "ü the" + text
    offsets = [at for choice in choices for at in choice.logprobs.text_offset]
    assert offsets == begins(tokenizer, ids, "ü the" + text, {BOS, *tokenizer.eos_ids})
    assert len(choices) > 3 or not stream


def test_an_echo_that_ends_inside_a_character(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """It comes out whole where the answer goes on with it, and as U+FFFD where it does not."""
    *start, last = bytes_of(tokenizer, "a😀".encode())
    ask: Any = {"model": "tiny", "prompt": start, "echo": True, "logprobs": 0, "max_tokens": 1}
    for stream in (False, True):
        answer = client.completions.create(**ask, stream=stream, extra_body={"allowed_token_ids": [last]})
        choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
        assert "".join(choice.text for choice in choices) == "a😀"
        assert [at for choice in choices for at in choice.logprobs.text_offset] == [0, 1, 1, 1, 1]
    other = bytes_of(tokenizer, b"z")
    (choice,) = client.completions.create(**ask, extra_body={"allowed_token_ids": other}).choices
    assert choice.text == "a\ufffdz" and choice.logprobs and choice.logprobs.text_offset == [0, 1, 1, 1, 2]
    (choice,) = client.completions.create(**ask | {"max_tokens": 0}).choices
    assert choice.text == "a\ufffd"


def test_offsets_end_with_the_text(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """Of a stop string across tokens nothing is shown."""
    x, y, z = bytes_of(tokenizer, b"xyz")
    body = {"structured_outputs": {"regex": "zzxy+"}, "return_token_ids": True}
    bias = {str(token): 50 for token in (x, y, z)}
    for kept, expected in ((False, "zz"), (True, "zzxyy")):
        (choice,) = client.completions.create(
            model="tiny", prompt="the", max_tokens=20, logprobs=0, stop="xyy", logit_bias=bias,
            extra_body=body | {"include_stop_str_in_output": kept},
        ).choices  # fmt: skip
        assert choice.text == expected and choice.finish_reason == "stop"
        assert choice.token_ids == [z, z, x, y, y]  # type: ignore[attr-defined]
        assert choice.logprobs and choice.logprobs.text_offset == [0, 1, 2, 2 + kept, 2 + 2 * kept]
        chunks = client.completions.create(
            model="tiny", prompt="the", max_tokens=20, logprobs=0, stop="xyy", logit_bias=bias, stream=True,
            extra_body=body | {"include_stop_str_in_output": kept},
        )  # fmt: skip
        streamed = [chunk.choices[0] for chunk in chunks]
        assert "".join(one.text for one in streamed) == expected
        assert [at for one in streamed for at in one.logprobs.text_offset] == choice.logprobs.text_offset
        assert [token for one in streamed for token in one.token_ids] == [z, z, x, y, y]


# --- prompts over the context


@pytest.mark.parametrize("stream", (False, True))
def test_prompts_over_the_context(client: openai.OpenAI, stream: bool) -> None:
    long = "the quick brown fox " * CONTEXT
    for name, ask in (
        ("prompt", lambda: client.completions.create(model="tiny", prompt=long, stream=stream)),
        ("prompt", lambda: client.completions.create(model="tiny", prompt=[5] * CONTEXT, stream=stream)),
        ("prompt", lambda: client.completions.create(model="tiny", prompt=[[5], [5] * 5000], stream=stream)),
        (
            "messages",
            lambda: client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": long}], stream=stream
            ),
        ),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        error = caught.value
        assert (error.code, error.param, error.type) == (
            "context_length_exceeded", name, "invalid_request_error",
        )  # fmt: skip
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=CONTEXT)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_completion_tokens")


def test_truncated_prompts(client: openai.OpenAI, offline: LLM) -> None:
    ids = list(range(10, 60))
    ask: Any = {"model": "tiny", "prompt": ids, "max_tokens": 4, "temperature": 0, "echo": True}
    for extra, kept in (
        ({"truncate_prompt_tokens": 7}, ids[-7:]),
        ({"truncate_prompt_tokens": 7, "truncation_side": "right"}, ids[:7]),
        ({"truncate_prompt_tokens": 1000}, ids),
        ({"truncate_prompt_tokens": -1}, ids),
    ):
        answer = client.completions.create(**ask, extra_body=extra | {"return_token_ids": True})
        assert answer.choices[0].prompt_token_ids == kept  # type: ignore[attr-defined]
        (expected,) = offline.generate([kept], SamplingParams(max_tokens=4, temperature=0))
        assert answer.choices[0].token_ids == expected.token_ids  # type: ignore[attr-defined]
    long = ask | {"prompt": [5] * 3000, "echo": False}
    answer = client.completions.create(**long, extra_body={"truncate_prompt_tokens": -1})
    assert answer.usage and answer.usage.prompt_tokens == CONTEXT - 4


# --- what may be sampled, and how it is shown


def test_special_tokens_in_the_text(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    start, end = tokenizer.encode("<|im_start|><|im_end|>", add_special_tokens=False)
    (a,) = bytes_of(tokenizer, b"a")
    ask: Any = {"model": "tiny", "prompt": "the", "max_tokens": 6, "seed": 5, "temperature": 2}
    allowed = {"allowed_token_ids": [start, a], "logit_bias": {str(start): 0}, "return_token_ids": True}
    seen = set()
    for skip in (True, False):
        answer = client.completions.create(**ask, extra_body=allowed | {"skip_special_tokens": skip})
        ids = answer.choices[0].token_ids  # type: ignore[attr-defined]
        assert set(ids) <= {start, a} and ids.count(start)
        assert answer.choices[0].text == tokenizer.decode(ids, skip_special_tokens=skip)
        seen.add(tuple(ids))
    assert len(seen) == 1  # what is sampled does not depend on how it is shown
    stop: Any = {"allowed_token_ids": [end], "stop_token_ids": [end]}
    for extra, text in (
        ({}, ""),
        ({"include_stop_str_in_output": True}, ""),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "<|im_end|>"),
    ):
        (choice,) = client.completions.create(**ask, extra_body=stop | extra).choices
        assert choice.text == text and choice.finish_reason == "stop"


def test_bad_words_and_allowed_tokens_in_chat(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 20, "temperature": 0}
    x, y = bytes_of(tokenizer, b"xy")
    body: dict[str, Any] = {"allowed_token_ids": [x, y], "logit_bias": {str(x): 9}}
    (choice,) = client.chat.completions.create(**ask, extra_body=body).choices
    assert choice.message.content == "x" * 20
    body["bad_words"] = ["xxx"]
    assert (
        client.chat.completions.create(**ask, extra_body=body).choices[0].message.content == "xxy" * 6 + "xx"
    )
    with pytest.raises(openai.BadRequestError, match="allowed_token_ids has token id 999") as caught:
        client.chat.completions.create(**ask, extra_body={"allowed_token_ids": [999]})
    assert caught.value.param == "allowed_token_ids"
    with pytest.raises(openai.BadRequestError, match="at least 1 has to be left") as caught:
        client.chat.completions.create(**ask, extra_body={"allowed_token_ids": [x], "bad_words": ["x"]})
    assert caught.value.param == "bad_words"
    shape = {"structured_outputs": {"regex": "[xz]+"}}
    with pytest.raises(
        openai.BadRequestError, match="allowed_token_ids leave no token that the schema allows"
    ):
        client.chat.completions.create(**ask, extra_body=body | shape)  # neither y nor a third x


@pytest.mark.parametrize("regex", ("zx", "xz", "x{30}"))
@pytest.mark.parametrize("stream", (False, True))
def test_allowed_tokens_that_the_schema_leaves_out(
    client: openai.OpenAI, tokenizer: Tokenizer, regex: str, stream: bool
) -> None:
    """At the first token, at a later one, or only at the token after the last."""
    (x,) = bytes_of(tokenizer, b"x")
    body = {"allowed_token_ids": [x], "structured_outputs": {"regex": regex}}
    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 20, "temperature": 0, "stream": stream}
    if regex == "xz":  # at the last token that was asked for it is no error
        short = client.chat.completions.create(**ask | {"max_tokens": 1, "stream": False}, extra_body=body)
        assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("x", "length")
    if regex == "x{30}":
        answer = client.chat.completions.create(**ask, extra_body=body)
        assert stream or answer.choices[0].message.content == "x" * 20
        return
    with pytest.raises(
        openai.APIError, match="allowed_token_ids leave no token that the schema allows"
    ) as caught:
        list(client.chat.completions.create(**ask, extra_body=body))
    assert stream or isinstance(caught.value, openai.BadRequestError)
    assert "internal" not in str(caught.value) and caught.value.type == "invalid_request_error"


# --- what the answer has to be

SHAPES: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json": ({"json": SCHEMA}, lambda text: json.loads(text)["a"] in (1, 2)),
    "json as text": ({"json": json.dumps(SCHEMA)}, lambda text: json.loads(text)["a"] in (1, 2)),
    "json without space": (
        {"json": SCHEMA, "disable_any_whitespace": True},
        lambda text: text in ('{"a":1}', '{"a":2}'),
    ),
    "regex": ({"regex": "[a-c]{3}/é"}, lambda text: len(text) == 5 and text.endswith("/é")),
    "choice": ({"choice": ['ja "é"\n', "nein 😀"]}, lambda text: text in ('ja "é"\n', "nein 😀")),
    "lark": ({"grammar": 'start: "a" | "b" "c"'}, lambda text: text in ("a", "bc")),
    "gbnf": ({"grammar": 'root ::= [x-z] "!"'}, lambda text: text in ("x!", "y!", "z!")),
}


@pytest.mark.parametrize("name", SHAPES)
def test_structured_outputs(client: openai.OpenAI, name: str) -> None:
    asked, holds = SHAPES[name]
    ask: Any = {"model": "tiny", "max_tokens": 100, "seed": 3, "n": 2}
    body = {"structured_outputs": asked}
    texts = [
        choice.text for choice in client.completions.create(prompt="the", **ask, extra_body=body).choices
    ]
    answer = client.chat.completions.create(messages=HI, **ask, extra_body=body)
    texts += [choice.message.content or "" for choice in answer.choices]
    assert len(texts) == 4 and all(map(holds, texts))
    kind = next(iter(asked))
    old = {f"guided_{kind}": asked[kind], "guided_decoding_backend": "auto"}
    (first, _) = client.completions.create(prompt="the", **ask, extra_body=old).choices
    assert json.loads(first.text)["a"] in (1, 2) if kind == "json" else holds(first.text)


@pytest.mark.parametrize(
    ("asked", "message"),
    (
        ({"regex": "a", "choice": ["b"]}, "regex and choice cannot both"),
        ({"structural_tag": "{}"}, "structural_tag is not supported"),
        ({"regex": "(?=a)"}, "look-around"),
        ({"json": "{"}, "json is not valid JSON"),
        ({"json": "3"}, "json is a int, and no schema"),
        ({"grammar": "((("}, "not usable"),
        ({"grammar": "a" * 70_000}, "takes 70000 bytes, over 65536"),
        ({"choice": []}, "at least 1"),
        ({"xml": "a"}, "not a known parameter"),
    ),
)
def test_shapes_that_cannot_be(http: httpx.Client, asked: Any, message: str) -> None:
    for path, ask in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": HI})):
        answer = http.post(path, json=ask | {"structured_outputs": asked})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "structured_outputs" and message in error["message"]


def test_response_format_of_a_completion(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["é"]}}}
    body = {"response_format": form}
    (choice,) = client.completions.create(model="tiny", prompt="a", extra_body=body).choices
    assert json.loads(choice.text) == "é"


# --- functions, and tools that may be called


@pytest.mark.parametrize("stream", (False, True))
def test_functions(client: openai.OpenAI, stream: bool) -> None:
    """What tools were before, in the request, its history and the answer."""
    history: Any = [
        *HI,
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "look", "content": "a fox"},
    ]
    ask: Any = {"model": "tiny", "messages": history, "max_tokens": 300, "seed": 4}
    ask |= {"functions": [LOOK, LEAVE], "function_call": {"name": "leave"}, "stream": stream}
    answer = client.chat.completions.create(**ask)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        calls = [chunk.delta.function_call for chunk in chunks if chunk.delta.function_call]
        assert not any(chunk.delta.tool_calls for chunk in chunks)
        name = "".join(call.name or "" for call in calls)
        arguments, reason = "".join(call.arguments or "" for call in calls), chunks[-1].finish_reason
    else:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        assert message.function_call and message.tool_calls is None and message.content is None
        name, arguments = message.function_call.name, message.function_call.arguments
    assert name == "leave" and json.loads(arguments)["a"] in (1, 2) and reason == "function_call"
    # the prompt is the one that today's words give
    call = {"id": "call00001", "type": "function", "function": history[1]["function_call"]}
    today: Any = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": "a fox"},
    ]
    tools: Any = [{"type": "function", "function": function} for function in (LOOK, LEAVE)]
    short: Any = {"model": "tiny", "max_tokens": 1, "extra_body": {"return_token_ids": True}}
    old = client.chat.completions.create(messages=history, functions=[LOOK, LEAVE], **short)
    new = client.chat.completions.create(messages=today, tools=tools, **short)
    assert old.prompt_token_ids == new.prompt_token_ids  # type: ignore[attr-defined]


def test_functions_that_are_wrong(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 4}
    for given, name in (
        ({"functions": [LOOK], "tools": [TOOL]}, "functions"),
        ({"functions": []}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"functions": [LOOK], "function_call": {"name": "leave"}}, "function_call"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**ask, **given)
        assert caught.value.param == name


def test_allowed_tools(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": function} for function in (LOOK, LEAVE)]

    def choice(mode: str, *names: str) -> Any:
        named = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}

    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 300, "tools": tools}
    for seed in range(4):
        answer = client.chat.completions.create(
            **ask, seed=seed, tool_choice=choice("required", "leave"), parallel_tool_calls=False
        )
        (call,) = answer.choices[0].message.tool_calls or ()
        assert call.type == "function" and call.function.name == "leave"
    short: Any = ask | {"max_tokens": 4, "extra_body": {"return_token_ids": True}}
    auto = client.chat.completions.create(**short, tool_choice=choice("auto", "look"))
    alone = client.chat.completions.create(**short | {"tools": tools[:1]})
    assert auto.prompt_token_ids == alone.prompt_token_ids  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="allows 'fly', but tools has look, leave") as caught:
        client.chat.completions.create(**ask, tool_choice=choice("auto", "fly"))
    assert caught.value.param == "tool_choice"


def test_text_that_is_not_ascii_is_told_as_it_is(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """In tools that are spelled out, and in the calls and results of a history."""
    told = LOOK | {"description": "Schaut nach Füchsen 🦊"}
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "look", "arguments": '{"wo": "Öd\\u00e9 🌲"}'},
    }
    messages: Any = [
        *HI,
        {"role": "assistant", "content": "ä", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "größer"},
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, tools=[{"type": "function", "function": told}], max_tokens=1,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    prompt = tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=False)  # type: ignore[attr-defined]
    assert "Schaut nach Füchsen 🦊" in prompt and '"Ödé 🌲"' in prompt and "größer" in prompt
    assert "\\u" not in prompt


# --- the rendering


def test_templates_and_how_they_end(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    def prompt(messages: Any = HI, **extra: Any) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=1, extra_body={"return_token_ids": True, **extra}
        )
        ids = answer.prompt_token_ids  # type: ignore[attr-defined]
        return tokenizer.decode(ids, skip_special_tokens=False)

    open_ended: Any = [*HI, {"role": "assistant", "content": "so, the fo"}]
    turn = "<|im_start|>user\nhi<|im_end|>\n"
    assert prompt() == turn + "<|im_start|>assistant\n"
    assert prompt(add_generation_prompt=False) == turn
    assert prompt(add_special_tokens=True) == "<|bos|>" + turn + "<|im_start|>assistant\n"
    goes_on = turn + "<|im_start|>assistant\nso, the fo"
    assert prompt(open_ended, continue_final_message=True, add_generation_prompt=False) == goes_on
    assert prompt(open_ended, continue_final_message=True) == goes_on
    own = "{% for m in messages %}[{{ m.content }}|{{ mood }}|{{ documents[0].text }}]{% endfor %}"
    given = {"chat_template": own, "chat_template_kwargs": {"mood": "gut"}, "documents": [{"text": "Füchse"}]}
    assert prompt(**given) == "[hi|gut|Füchse]"
    for extra, name in (
        ({"chat_template": "{% for %}"}, "messages"),
        ({"chat_template": "{{ ().__class__.__bases__[0].__subclasses__() }}"}, "messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"chat_template": "a"}}, "chat_template_kwargs"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            prompt(**extra)
        assert caught.value.param == name
    assert prompt() == turn + "<|im_start|>assistant\n"  # nothing of a request's template stays
    for stream in (False, True):
        answer: Any = client.chat.completions.create(
            model="tiny", messages=open_ended, max_tokens=4, stream=stream,
            extra_body={"echo": True, "continue_final_message": True},
        )  # fmt: skip
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
        assert text.startswith("so, the fo") and len(text) > len("so, the fo")


def test_tokenize_as_chat_renders(http: httpx.Client, client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": LOOK}]
    for extra in (
        {"tools": tools},
        {"add_generation_prompt": False},
        {"chat_template": "{{ messages[0].content }}{{ x }}", "chat_template_kwargs": {"x": 1}},
    ):
        tokens = http.post("/tokenize", json={"messages": HI, **extra}).json()["tokens"]
        body = {"messages": HI, "max_tokens": 1, "return_token_ids": True, **extra}
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["prompt_token_ids"] == tokens


# --- what an answer tells besides


@pytest.mark.parametrize("path", ("completions", "chat/completions"))
def test_streams(http: httpx.Client, path: str) -> None:
    """Token ids of the deltas are those of the whole answer; the usage grows with them."""
    ask = {"prompt": "the fox"} if path == "completions" else {"messages": HI}
    body = ask | {"max_tokens": 12, "n": 2, "seed": 8, "return_token_ids": True, "ignore_eos": True}
    whole = http.post(f"/v1/{path}", json=body).json()
    options = {"include_usage": True, "continuous_usage_stats": True}
    text = http.post(f"/v1/{path}", json=body | {"stream": True, "stream_options": options}).text
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


def test_log_probabilities_of_the_prompt(http: httpx.Client, offline: LLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the quick fox")
    logits = offline.logits(ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    body = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 2, "return_tokens_as_token_ids": True}
    choice = http.post("/v1/completions", json=body | {"logprobs": 1}).json()["choices"][0]
    assert choice["logprobs"]["tokens"][0].startswith("token_id:")
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(ids)
    for at, entry in enumerate(choice["prompt_logprobs"][1:]):
        own = entry[str(ids[at + 1])]
        assert own["logprob"] == pytest.approx(logprobs[at, ids[at + 1]], abs=1e-3)
        best = [one for one in entry.values() if one["rank"] == 1]
        assert best[0]["logprob"] == pytest.approx(logprobs[at].max(), abs=1e-3)
    answer = http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 1, "prompt_logprobs": 0})
    assert len(answer.json()["prompt_logprobs"]) == answer.json()["usage"]["prompt_tokens"]
    refused = http.post("/v1/completions", json=body | {"stream": True})
    assert refused.json()["error"]["param"] == "prompt_logprobs"


def test_request_ids_are_answered(client: openai.OpenAI) -> None:
    body: Any = {"request_id": "mine", "priority": -3}
    assert client.completions.create(model="tiny", prompt="a", extra_body=body).id == "cmpl-mine"
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=1, extra_body=body)
    assert answer.id == "chatcmpl-mine"


def test_model_cards(client: openai.OpenAI, directory: Path) -> None:
    (card,) = client.models.list().data
    found: Any = card.model_dump()
    assert found["root"] == str(directory) and found["parent"] is None and found["max_model_len"] == CONTEXT
    (permission,) = found["permission"]
    assert permission["object"] == "model_permission" and permission["allow_sampling"] is True
    assert permission["id"].startswith("modelperm-")


def test_tokenizer_info(http: httpx.Client, tokenizer: Tokenizer) -> None:
    info = http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<|bos|>", "<|eos|>", None)
    assert info["chat_template"] == tokenizer.chat_template and info["add_bos_token"] is True
    assert info["model_max_length"] == CONTEXT and info["vocab_size"] == tokenizer.vocab_size


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install -e '.[parity]'")
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_with_the_server_s_tokenizer(server: Running, offline: LLM, tokenizer: Tokenizer) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer_backend="remote", max_length=512
    )
    remote = lm.tokenizer
    assert remote.encode("the fox") == tokenizer.encode("the fox", add_special_tokens=False)
    assert remote.eos_token_id in tokenizer.eos_ids and remote.bos_token_id == BOS
    assert remote.apply_chat_template(HI) == tokenizer.apply_chat_template(HI)
    ((found, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("the quick", " fox"), 0)])
    before, ids = len(remote.encode("the quick")), remote.encode("the quick fox")
    logits = offline.logits(ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert found == pytest.approx(sum(logprobs[i - 1, ids[i]] for i in range(before, len(ids))), abs=1e-3)


# --- pages from elsewhere


def test_pages_of_allowed_origins(http: httpx.Client) -> None:
    mine, other = {"origin": "https://a.example"}, {"origin": "https://b.example"}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    leave = http.options("/v1/chat/completions", headers=mine | asks)
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == "https://a.example"
    assert "authorization" in leave.headers["access-control-allow-headers"]
    assert "POST" in leave.headers["access-control-allow-methods"]
    assert http.options("/v1/chat/completions", headers=other | asks).status_code == 400
    for path, body in (
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/completions", {"wrong": 1}),
    ):
        answer = http.post(path, json=body, headers=mine)  # an error has to be read as well
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in http.post(path, json=body, headers=other).headers


def test_origins_and_keys(directory: Path) -> None:
    options: dict[str, Any] = {"api_keys": ("key",), "allow_origins": ("*",), "protect_metrics": True}
    with running(lambda: load_tiny(directory, tp=1), **options) as one, one.client() as http:
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
    with running(lambda: load_tiny(directory, tp=1)) as one, one.client() as http:
        answer = http.get("/health", headers=origin)
        assert "access-control-allow-origin" not in answer.headers  # nobody, unless told
        assert http.options("/v1/completions", headers=origin | asks).status_code == 405
