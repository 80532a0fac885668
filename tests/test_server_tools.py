"""What a request makes of the answer and of the prompt: shapes, functions, tools and templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from api_server import HI, LEAVE, LOOK, SCHEMA, TOOL, Api

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
def test_structured_outputs(api: Api, name: str) -> None:
    asked, holds = SHAPES[name]
    ask: Any = {"model": "tiny", "max_tokens": 100, "seed": 3, "n": 2}
    body = {"structured_outputs": asked}
    texts = [
        choice.text for choice in api.client.completions.create(prompt="the", **ask, extra_body=body).choices
    ]
    answer = api.client.chat.completions.create(messages=HI, **ask, extra_body=body)
    texts += [choice.message.content or "" for choice in answer.choices]
    assert len(texts) == 4 and all(map(holds, texts))
    kind = next(iter(asked))
    old = {f"guided_{kind}": asked[kind], "guided_decoding_backend": "auto"}
    (first, _) = api.client.completions.create(prompt="the", **ask, extra_body=old).choices
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
def test_shapes_that_cannot_be(api: Api, asked: Any, message: str) -> None:
    for path, ask in (("/v1/completions", {"prompt": "hi"}), ("/v1/chat/completions", {"messages": HI})):
        answer = api.http.post(path, json=ask | {"structured_outputs": asked})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "structured_outputs" and message in error["message"]


def test_response_format_of_a_completion(api: Api) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["é"]}}}
    body = {"response_format": form}
    (choice,) = api.client.completions.create(model="tiny", prompt="a", extra_body=body).choices
    assert json.loads(choice.text) == "é"


def test_what_clients_keep_beside_calls_and_tools(api: Api) -> None:
    """The official client's ``parse``, LiteLLM's and others' send it back; no prompt has it."""

    def tokens(more: Any, of_function: Any, of_tool: Any) -> list[int]:
        function = {"name": "look", "arguments": '{"a": 1}', **of_function}
        call = {"id": "c", "type": "function", "function": function, **more}
        history = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
        history.append({"role": "tool", "tool_call_id": "c", "content": "x"})
        body = {"messages": history, "tools": [TOOL | of_tool]}
        answer = api.http.post("/tokenize", json=body)
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["tokens"]
        return found

    plain = tokens({}, {}, {})
    assert tokens({"index": 0}, {"parsed_arguments": {"a": 1}}, {}) == plain
    google = {"google": {"thought_signature": "x"}}
    assert tokens({"provider_specific_fields": None, "extra_content": google}, {}, {}) == plain
    assert tokens({}, {}, {"cache_control": {"type": "ephemeral"}}) == plain
    returns = {"name": "look", "parameters": SCHEMA, "return": {"type": "string", "description": "é"}}
    told = api.tokenizer.decode(tokens({}, {}, {"function": returns}))  # transformers' get_json_schema has it
    assert json.dumps(returns, ensure_ascii=False) in told
    misspelt = {"messages": HI, "tools": [TOOL | {"strict": True}]}
    assert "strict is not a known" in api.http.post("/tokenize", json=misspelt).json()["error"]["message"]


# --- functions, and tools that may be called


@pytest.mark.parametrize("stream", (False, True))
def test_functions(api: Api, stream: bool) -> None:
    """What tools were before, in the request, its history and the answer."""
    history: Any = [
        *HI,
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "look", "content": "a fox"},
    ]
    ask: Any = {"model": "tiny", "messages": history, "max_tokens": 300, "seed": 4}
    ask |= {"functions": [LOOK, LEAVE], "function_call": {"name": "leave"}, "stream": stream}
    answer = api.client.chat.completions.create(**ask)
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
    old = api.client.chat.completions.create(messages=history, functions=[LOOK, LEAVE], **short)
    new = api.client.chat.completions.create(messages=today, tools=tools, **short)
    assert old.prompt_token_ids == new.prompt_token_ids  # type: ignore[attr-defined]


def test_functions_that_are_wrong(api: Api) -> None:
    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 4}
    for given, name in (
        ({"functions": [LOOK], "tools": [TOOL]}, "functions"),
        ({"functions": []}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"functions": [LOOK], "function_call": {"name": "leave"}}, "function_call"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            api.client.chat.completions.create(**ask, **given)
        assert caught.value.param == name


def test_allowed_tools(api: Api) -> None:
    tools: Any = [{"type": "function", "function": function} for function in (LOOK, LEAVE)]

    def choice(mode: str, *names: str) -> Any:
        named = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}

    ask: Any = {"model": "tiny", "messages": HI, "max_tokens": 300, "tools": tools}
    for seed in range(4):
        answer = api.client.chat.completions.create(
            **ask, seed=seed, tool_choice=choice("required", "leave"), parallel_tool_calls=False
        )
        (call,) = answer.choices[0].message.tool_calls or ()
        assert call.type == "function" and call.function.name == "leave"
    short: Any = ask | {"max_tokens": 4, "extra_body": {"return_token_ids": True}}
    auto = api.client.chat.completions.create(**short, tool_choice=choice("auto", "look"))
    alone = api.client.chat.completions.create(**short | {"tools": tools[:1]})
    assert auto.prompt_token_ids == alone.prompt_token_ids  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="allows 'fly', but tools has look, leave") as caught:
        api.client.chat.completions.create(**ask, tool_choice=choice("auto", "fly"))
    assert caught.value.param == "tool_choice"


def test_text_that_is_not_ascii_is_told_as_it_is(api: Api) -> None:
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
    answer = api.client.chat.completions.create(
        model="tiny", messages=messages, tools=[{"type": "function", "function": told}], max_tokens=1,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    prompt = api.tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=False)  # type: ignore[attr-defined]
    assert "Schaut nach Füchsen 🦊" in prompt and '"Ödé 🌲"' in prompt and "größer" in prompt
    assert "\\u" not in prompt


# --- the rendering


def test_templates_and_how_they_end(api: Api) -> None:
    def prompt(messages: Any = HI, **extra: Any) -> str:
        answer = api.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=1, extra_body={"return_token_ids": True, **extra}
        )
        ids = answer.prompt_token_ids  # type: ignore[attr-defined]
        return api.tokenizer.decode(ids, skip_special_tokens=False)

    open_ended: Any = [*HI, {"role": "assistant", "content": "so, the fo"}]
    turn = "<|im_start|>user\nhi<|im_end|>\n"
    assert prompt() == turn + "<|im_start|>assistant\n"
    assert prompt(add_generation_prompt=False) == turn
    assert prompt(add_special_tokens=True) == "<|bos|>" + turn + "<|im_start|>assistant\n"
    goes_on = turn + "<|im_start|>assistant\nso, the fo"
    assert prompt(open_ended, continue_final_message=True, add_generation_prompt=False) == goes_on
    assert prompt(open_ended, continue_final_message=True) == goes_on
    twice = [*HI, {"role": "assistant", "content": "so,"}, {"role": "assistant", "content": "the fo"}]
    turns = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    only_turns = f"{{% for m in messages %}}{turns}[{{{{ m.content }}}}]{{% endfor %}}"
    assert prompt(twice, chat_template=only_turns, continue_final_message=True) == "[hi][so,\n\nthe fo"
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
        answer: Any = api.client.chat.completions.create(
            model="tiny", messages=open_ended, max_tokens=4, stream=stream, temperature=0,
            extra_body={"echo": True, "continue_final_message": True},
        )  # fmt: skip
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
        assert text.startswith("so, the fo") and len(text) > len("so, the fo")


def test_tokenize_as_chat_renders(api: Api) -> None:
    tools = [{"type": "function", "function": LOOK}]
    for extra in (
        {"tools": tools},
        {"add_generation_prompt": False},
        {"chat_template": "{{ messages[0].content }}{{ x }}", "chat_template_kwargs": {"x": 1}},
    ):
        tokens = api.http.post("/tokenize", json={"messages": HI, **extra}).json()["tokens"]
        body = {"messages": HI, "max_tokens": 1, "return_token_ids": True, **extra}
        answer = api.http.post("/v1/chat/completions", json=body).json()
        assert answer["prompt_token_ids"] == tokens
