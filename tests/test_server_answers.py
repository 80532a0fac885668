"""Calls, reasoning and formats through the whole server: a model writes what models of each kind write."""

# ruff: noqa: E501 -- tokens, as they are

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from scripted import scripted_checkpoint
from serving import Running, load_tiny, running

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS: Any = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
FORM: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
DS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)

SCRIPTS = {
    "<go-think>": [
        "<think>", "\nHm,", " yes.\n", "</think>", "\n\n", "<tool_call>", '\n{"name": "lo', 'ok", "arguments": {"a":',
        " 1}", "}\n</tool", "_call>",
    ],
    "<go-mistral>": ["[TOOL_CALLS]", "[", '{"name": "look", "arguments": {"a": 2', "}}", "]"],
    "<go-llama>": ['{"name":', ' "look", "parameters": {"a":', " 3}}", "<|eom_id|>"],
    "<go-python>": ["<|python_tag|>", '{"name":', ' "look", "parameters": {"a":', " 3}}", "<|eom_id|>"],
    "<go-deepseek>": [DS[0], DS[1], "function", DS[2], "look\n```json\n", '{"a": 5}\n', "```", DS[3], DS[4]],
    "<go-gemma>": ["```tool_code\n", "look(a=6)\n``", "`\n"],
    "<go-harmony>": [
        "<|channel|>", "commentary to=functions.look ", "<|constrain|>", "json", "<|message|>", '{"a":', " 7}", "<|call|>",
    ],
    "<go-plain>": ["Just ", "text."],
    "<go-broken>": ["[TOOL_CALLS] ", "look? no."],
    "<go-two>": ["```tool_code\nlook(a=1)\n", "look(a=2)\n", "```\nDone."],
    "<go-json>": ["{", '"a": ', "8}"],
}  # fmt: skip
SPECIAL = (
    "[TOOL_CALLS]", "<|python_tag|>", "<|eom_id|>", *DS, "<|channel|>", "<|constrain|>", "<|message|>", "<|call|>",
    *SCRIPTS,
)  # fmt: skip
# What stands in each kind's template; a request brings its own.
SIGNS = {
    "think": "<tool_call> <think> </think>",
    "mistral": "[TOOL_CALLS]",
    "llama": "<|python_tag|>",
    "python": "<|python_tag|>",
    "deepseek": "<｜tool▁calls▁begin｜> ```json",
    "gemma": "<start_of_turn>",
    "harmony": "<|channel|> <|message|> commentary",
}
EXPECTED = {"think": 1, "mistral": 2, "llama": 3, "python": 3, "deepseek": 5, "gemma": 6, "harmony": 7}


def template(signs: str, ends: str) -> str:
    known = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    named = "{% for t in tools or () %}{{ t.function.name }} {% endfor %}"
    return f"{{# {signs} tool_calls #}}{named}{known}{ends}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = scripted_checkpoint(tmp_path_factory.mktemp("scripted"), SCRIPTS, SPECIAL)
    with running(lambda: load_tiny(directory)) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def ask(client: openai.OpenAI, kind: str, script: str | None = None, **more: Any) -> Any:
    ends = f"<go-{script or kind}>" if script != "" else "<think>"
    own = {"chat_template": template(SIGNS[kind], ends)}
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "go"}],
        temperature=0,
        max_tokens=40,
        extra_body=own,
        **more,
    )


def joined(chunks: Any) -> tuple[str, str, list[tuple[str, str]], str]:
    """What a stream says: reasoning, text, calls, why it ended."""
    reasoning = text = reason = ""
    calls: list[list[str]] = []
    for chunk in chunks:
        (choice,) = chunk.choices
        delta = choice.delta
        assert getattr(delta, "reasoning", None) == getattr(delta, "reasoning_content", None)
        reasoning += getattr(delta, "reasoning", None) or ""
        text += delta.content or ""
        for call in delta.tool_calls or ():
            if call.function.name is not None:
                assert call.index == len(calls) and call.id and call.type == "function"
                calls.append([call.function.name])
            calls[call.index].append(call.function.arguments)
        reason = choice.finish_reason or reason
    return reasoning, text, [(name, "".join(rest)) for name, *rest in calls], reason


@pytest.mark.parametrize("choice", ("auto", "required"))
@pytest.mark.parametrize("kind", EXPECTED)
def test_calls_of_each_kind(client: openai.OpenAI, kind: str, choice: Any) -> None:
    if choice == "required" and kind in ("gemma", "python"):
        pytest.skip("a call that has to come comes in the form that the grammar has")
    answer = ask(client, kind, tools=TOOLS, tool_choice=choice)
    (one,) = answer.choices
    assert one.finish_reason == "tool_calls", one
    assert one.message.content is None
    (call,) = one.message.tool_calls
    assert call.function.name == "look" and json.loads(call.function.arguments) == {"a": EXPECTED[kind]}
    if kind == "think":
        assert one.message.reasoning == one.message.reasoning_content == "Hm, yes."
    stream = list(ask(client, kind, tools=TOOLS, tool_choice=choice, stream=True))
    reasoning, text, calls, reason = joined(stream)
    assert (text, calls, reason) == ("", [("look", call.function.arguments)], "tool_calls")
    assert reasoning == (getattr(one.message, "reasoning", None) or "")
    arguments = [
        c for chunk in stream for c in chunk.choices[0].delta.tool_calls or () if c.function.arguments
    ]
    assert len(arguments) > 1 or kind in ("gemma", "deepseek", "mistral", "python")  # they came in pieces
    assert answer.usage.completion_tokens - len(SCRIPTS[f"<go-{kind}>"]) in (
        -1,
        0,
        1,
    )  # what ends it may count


def test_reasoning_that_the_prompt_has_opened(client: openai.OpenAI) -> None:
    (one,) = ask(client, "think", "", tools=TOOLS).choices
    assert one.message.reasoning == "Hm, yes." and one.message.tool_calls[0].function.name == "look"
    assert joined(ask(client, "think", "", tools=TOOLS, stream=True))[0] == "Hm, yes."


@pytest.mark.parametrize(
    ("asked", "shown"),
    (
        ({}, "None,None"),
        ({"reasoning_effort": "high"}, "high,None"),
        ({"reasoning_effort": "none"}, "low,False"),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            "low,True",
        ),
    ),
)
def test_templates_are_told_how_hard_to_think(server: Running, asked: dict[str, Any], shown: str) -> None:
    told = "{{ reasoning_effort | default('None') }},{{ enable_thinking | default('None') }}"
    body = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 1, "return_token_ids": True}
    with server.client() as http:
        answer = http.post("/v1/chat/completions", json=body | {"chat_template": told} | asked).json()
        prompt = http.post("/detokenize", json={"tokens": answer["prompt_token_ids"]}).json()["prompt"]
    assert prompt == shown


def test_reasoning_can_be_left_out(client: openai.OpenAI) -> None:
    own = {"chat_template": template(SIGNS["think"], "<go-think>"), "include_reasoning": False}
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "go"}], "temperature": 0}
    (one,) = client.chat.completions.create(**asked, tools=TOOLS, max_tokens=40, extra_body=own).choices
    assert one.message.reasoning is None and one.message.tool_calls
    shaped = {
        "chat_template": template(SIGNS["think"], "<think>"),
        "structured_outputs": {"choice": ["yes", "no"]},
    }
    (one,) = client.chat.completions.create(**asked, max_tokens=40, extra_body=shaped).choices
    assert one.message.content in ("yes", "no")  # from the first token on


def test_calls_that_must_not_be_parallel(client: openai.OpenAI) -> None:
    """In a format without a grammar the model may still write several: the first one counts."""
    calls = ask(client, "gemma", "two", tools=TOOLS).choices[0].message.tool_calls
    assert [call.function.arguments for call in calls] == ['{"a": 1}', '{"a": 2}']
    for more in ({"tools": TOOLS, "parallel_tool_calls": False}, {"functions": [TOOLS[0]["function"]]}):
        (one,) = ask(client, "gemma", "two", **more).choices
        stream = [chunk.choices[0].delta for chunk in ask(client, "gemma", "two", **more, stream=True)]
        if "functions" in more:
            called = [one.message.function_call]
            parts = [delta.function_call for delta in stream if delta.function_call]
        else:
            called = [call.function for call in one.message.tool_calls]
            parts = [call.function for delta in stream for call in delta.tool_calls or ()]
        assert [(call.name, call.arguments) for call in called] == [("look", '{"a": 1}')]
        assert "".join(part.arguments for part in parts) == '{"a": 1}'
        assert one.message.content == "".join(delta.content or "" for delta in stream) == "Done."


def test_without_tools_the_text_is_the_model_s(client: openai.OpenAI) -> None:
    (one,) = ask(client, "think").choices
    assert one.message.content.startswith('<tool_call>\n{"name": "look"') and one.finish_reason == "stop"
    assert one.message.tool_calls is None and one.message.reasoning == "Hm, yes."
    (one,) = ask(client, "mistral").choices
    assert (
        one.message.content == '[{"name": "look", "arguments": {"a": 2}}]'
    )  # the control token shows nothing
    (one,) = ask(client, "mistral", tools=TOOLS, tool_choice="none").choices
    assert one.message.content == '[{"name": "look", "arguments": {"a": 2}}]'


def test_text_beside_tools(client: openai.OpenAI) -> None:
    for kind in ("llama", "mistral", "think", "gemma"):
        (one,) = ask(client, kind, "plain", tools=TOOLS).choices
        assert one.message.content == "Just text." and one.message.tool_calls is None
        assert joined(ask(client, kind, "plain", tools=TOOLS, stream=True)) == ("", "Just text.", [], "stop")


def test_what_is_no_call_is_text(client: openai.OpenAI) -> None:
    (one,) = ask(client, "mistral", "broken", tools=TOOLS).choices
    assert one.message.content == "[TOOL_CALLS] look? no." and one.message.tool_calls is None
    assert joined(ask(client, "mistral", "broken", tools=TOOLS, stream=True))[1] == "[TOOL_CALLS] look? no."


def test_a_format_beside_tools(client: openai.OpenAI) -> None:
    """The model may call a tool, or answer in the format."""
    for kind in ("llama", "mistral", "think"):
        (one,) = ask(client, kind, tools=TOOLS, response_format=FORM).choices
        assert json.loads(one.message.tool_calls[0].function.arguments) == {"a": EXPECTED[kind]}
        (one,) = ask(client, kind, "json", tools=TOOLS, response_format=FORM).choices
        assert json.loads(one.message.content) == {"a": 8} and one.message.tool_calls is None
    (one,) = ask(client, "think", "json", response_format=FORM).choices
    assert json.loads(one.message.content) == {"a": 8}


def test_more_tools_than_a_grammar_takes(client: openai.OpenAI) -> None:
    """They are advice to the model, and the request goes on; where all of it has to hold, it is refused."""
    many = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": {"enum": ["x" * 1000]}}}
        for i in range(80)
    ]
    (one,) = ask(client, "mistral", tools=[*TOOLS, *many]).choices
    assert json.loads(one.message.tool_calls[0].function.arguments) == {"a": 2}
    with pytest.raises(openai.BadRequestError, match="over 65536"):
        ask(client, "mistral", tools=[*TOOLS, *many], tool_choice="required")


def test_a_grammar_that_grows_too_complex_is_the_client_s_fault(client: openai.OpenAI) -> None:
    branches = [{"type": "array", "prefixItems": [{"const": i}]} for i in range(1200)]
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"anyOf": branches}}}
    own = {"chat_template": template("", "<go-plain>")}
    asked: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "go"}],
        "max_tokens": 20,
        "extra_body": own,
    }
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked, response_format=form)
    assert caught.value.code == "grammar_too_complex" and "too complex" in caught.value.message
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.APIError) as late:
        list(client.chat.completions.create(**asked, response_format=form, stream=True))
    assert late.value.code == "grammar_too_complex" and late.value.type == "invalid_request_error"
