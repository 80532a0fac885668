"""Conversations through chat templates: as in transformers where the template takes them, and nothing lost elsewhere."""

# ruff: noqa: E501 -- templates, as they are

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tpjax.errors import RequestError
from tpjax.server.conversation import conversation
from tpjax.server.error_responses import ApiError, bad_request
from tpjax.server.parsing.tool_call_formats import HERMES, tool_call_format
from tpjax.server.protocol import ChatBody, Message
from tpjax.server.template_traits import Traits, traits_of
from tpjax.text.chat_template import ChatTemplates

PUBLISHED = Path(__file__).parent / "data" / "templates"
_ALTERNATE = "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
# Templates that take and refuse what Gemma's, Llama's and others do.
OWN = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "like gemma 2": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    + _ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "like gemma 3": "{% set first = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
    "{% set first = (messages[0].content if messages[0].content is string else messages[0].content[0].text) + '\n\n' %}"
    "{% set rest = messages[1:] %}{% endif %}{% for m in rest %}" + _ALTERNATE + "{{ '<start_of_turn>' + "
    "('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "like llama 3.1": "{% if messages[0].role == 'system' %}{% set s = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set s = '' %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\n{{ s }}"
    '{% if tools %}{{ tools | tojson }} "parameters": {% endif %}<|eot_id|>{% for m in messages %}'
    "{% if not (m.role == 'tool' or 'tool_calls' in m) %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% elif 'tool_calls' in m %}{% if not m.tool_calls | length == 1 %}{{ raise_exception('only single tool-calls at once!') }}{% endif %}"
    '<|start_header_id|>assistant<|end_header_id|>\n\n{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>"
    "{% else %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "drops roles": "{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}\n{% elif m.role == 'assistant' %}"
    "A:{{ m.content }}\n{% endif %}{% endfor %}",
    "first system only": "{% if messages[0].role == 'system' %}S:{{ messages[0].content }}\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "{% if m.role != 'system' %}{{ m.role }}:{{ m.content }}\n{% endif %}{% endfor %}",
}
SOURCES = OWN | {path.stem: path.read_text() for path in sorted(PUBLISHED.glob("*.jinja"))}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


@cache
def traits(name: str) -> Traits:
    templates = ChatTemplates({"default": SOURCES[name]}, VARIABLES)

    async def render(job: dict[str, Any]) -> str:
        try:
            return templates.render_here(**job)
        except RequestError as error:
            raise bad_request(str(error)) from error

    return asyncio.run(traits_of(render, SOURCES[name]))


def body(messages: list[dict[str, Any]], **more: Any) -> ChatBody:
    return ChatBody.model_validate({"messages": messages, **more})


def turns(name: str, messages: list[dict[str, Any]], tools: Any = None) -> list[dict[str, Any]]:
    asked = body(messages, tools=tools)
    return conversation(asked.messages, asked.tools, traits(name), tool_call_format(SOURCES[name]))


def rendered(name: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    given = tools if tools and traits(name).tools else None
    return ChatTemplates({"default": SOURCES[name]}, VARIABLES).render_here(
        turns(name, messages, tools), tools=given
    )


def call(name: str, id_: str | None = "call_1", arguments: str = '{"city": "warg"}') -> dict[str, Any]:
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if id_ is None else made | {"id": id_}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


U, A, S, D, T = "user", "assistant", "system", "developer", "tool"


def words_of(messages: list[dict[str, Any]]) -> list[str]:
    return re.findall(r"\bw[a-z]+", json.dumps(messages))


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TOOLS = [
    {
        "type": "function",
        "function": {"name": "wtool", "description": "wlooks é", "parameters": {"type": "object"}},
    }
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [said(S, "wone"), said(U, "wtwo"), said(A, "wthree"), said(U, "wfour")],
    "developer": [said(D, "wone"), said(U, "wtwo")],
    "system and developer": [said(S, "wone"), said(D, "wtwo"), said(U, "wthree")],
    "a late system": [said(U, "wone"), said(A, "wtwo"), said(S, "wthree"), said(U, "wfour")],
    "a system at the end": [said(U, "wone"), said(S, "wtwo")],
    "a late developer": [said(S, "wzero"), said(U, "wone"), said(A, "wtwo"), said(D, "wthree"), said(U, "wfour")],
    "users in a row": [said(U, "wone"), said(U, "wtwo"), said(A, "wthree"), said(A, "wfour"), said(U, "wfive")],
    "parts": [said(S, parts("wone", "wtwo")), said(U, parts("wthree", "wfour")), said(A, parts("wfive", "wsix")), said(U, "so")],
    "a call": [
        said(U, "wone"), said(A, None, tool_calls=[call("wtwo")]), said(T, "wthree", tool_call_id="call_1"),
    ],
    "a call answered": [
        said(S, "wzero"), said(U, "wone"), said(A, "", tool_calls=[call("wtwo")]), said(T, parts("wthree", "wsix"), tool_call_id="call_1"),
        said(A, "wfour"), said(U, "wfive"),
    ],
    "parallel calls": [
        said(U, "wone"), said(A, None, tool_calls=[call("wtwo", "call_a"), call("wthree", "call_b")]),
        said(T, "wfour", tool_call_id="call_b"), said(T, "wfive", tool_call_id="call_a"), said(U, "wsix"),
    ],
    "parallel calls without ids": [
        said(U, "wone"), said(A, None, tool_calls=[call("wtwo", None), call("wthree", None)]), said(T, "wfour"), said(T, "wfive"),
    ],
    "text, a call and an answer": [
        said(U, "wone"), said(A, "wtwo", tool_calls=[call("wthree")]), said(T, "wfour", tool_call_id="call_1"), said(A, "wfive"), said(U, "so"),
    ],
    "names": [said(U, "wone", name="bob"), said(A, "wtwo", name="ann"), said(U, "wthree", name="bob")],
}  # fmt: skip


@pytest.mark.parametrize("with_tools", (False, True))
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_no_template_loses_a_word(name: str, kind: str, with_tools: bool) -> None:
    messages = CONVERSATIONS[kind]
    text = rendered(name, messages, TOOLS if with_tools else None)
    words = words_of(messages)
    if (name, kind) == ("gpt-oss", "text, a call and an answer"):
        words.remove("wtwo")  # its template shows what led to a call only until there is an answer
    assert [word for word in words if word not in text] == []
    assert not with_tools or ("wtool" in text and "wlooks é" in text)
    assert "'type'" not in text and "None" not in text


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="pip install -e '.[parity]'")
@pytest.mark.parametrize("with_tools", (False, True))
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", SOURCES)
def test_what_a_template_takes_is_transformers_prompt(name: str, kind: str, with_tools: bool) -> None:
    """Wherever transformers renders the messages as they came and keeps all of it, the prompt is the same."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {key: value for key, value in message.items() if value is not None}
        for message in copy.deepcopy(CONVERSATIONS[kind])
    ]
    for message in messages:
        message.setdefault("content", "")
        for one in message.get("tool_calls", ()):
            if isinstance(one["function"]["arguments"], str):
                one["function"] = one["function"] | {"arguments": json.loads(one["function"]["arguments"])}
    tools = TOOLS if with_tools else None
    try:
        ((expected,), _) = render_jinja_template(
            [messages], tools=tools, chat_template=SOURCES[name], add_generation_prompt=True, **VARIABLES
        )
    except Exception:
        pytest.skip("transformers refuses this")
    words = words_of(messages)
    words += ["wtool"] if with_tools else []
    if any(word not in expected for word in words) or "'type'" in expected or '"type": "text"' in expected:
        pytest.skip("transformers loses some of this")
    roles = [message["role"] for message in messages]
    odd = (
        (D in roles and not traits(name).developer)
        or (T in roles and not traits(name).tool_messages)
        or (S in roles[1:] and traits(name).alternation)
    )
    if odd:
        pytest.skip("a role by a name that the model does not know, or where it has never seen it")
    assert rendered(name, CONVERSATIONS[kind], tools) == expected


def test_developer_is_system_where_the_template_does_not_know_it() -> None:
    messages = [said(D, "be brief"), said(U, "hi")]
    plain = [said(S, "be brief"), said(U, "hi")]
    for name in SOURCES:
        assert rendered(name, messages) == rendered(name, plain), name
    assert "<|im_start|>system\nbe brief" in rendered("chatml", messages)
    assert "developer" not in rendered("qwen3", messages)
    assert turns("gpt-oss", messages)[0]["role"] == "developer"  # it knows the role


def test_a_system_message_goes_before_the_first_user_s_text() -> None:
    messages = [said(S, "be brief"), said(S, "be kind"), said(U, "hi")]
    assert turns("like gemma 2", messages) == [said(U, "be brief\n\nbe kind\n\nhi")]
    assert turns("like gemma 3", messages) == [said(S, "be brief\n\nbe kind"), said(U, "hi")]
    assert turns("drops roles", [said(S, "be"), said(A, "a")]) == [said(U, "be"), said(A, "a")]


def test_parallel_results_are_one_user_s_turn() -> None:
    found = turns("like gemma 3", CONVERSATIONS["parallel calls"])
    assert [turn["role"] for turn in found] == [U, A, U]
    assert found[2]["content"] == (
        "<tool_response>\nwfour\n</tool_response>\n<tool_response>\nwfive\n</tool_response>\n\nwsix"
    )
    assert found[1]["content"] == "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "warg"}}}}\n</tool_call>'
        for name in ("wtwo", "wthree")
    )


def test_one_call_a_message_where_a_template_wants_that() -> None:
    found = turns("like llama 3.1", CONVERSATIONS["parallel calls"])
    assert [turn["role"] for turn in found] == [U, A, T, A, T, U]
    assert [turn["tool_calls"][0]["function"]["name"] for turn in found if turn["role"] == A] == [
        "wtwo",
        "wthree",
    ]
    assert [turn["content"] for turn in found if turn["role"] == T] == [
        "wfive",
        "wfour",
    ]  # each after its call
    native = turns("qwen3", CONVERSATIONS["parallel calls"])
    assert len(native[1]["tool_calls"]) == 2 and [turn["content"] for turn in native[2:4]] == [
        "wfour",
        "wfive",
    ]


def test_ids_are_nine_letters_for_mistral() -> None:
    _, asked, first, second, *_ = turns("mistral-nemo", CONVERSATIONS["parallel calls"])
    ids = [one["id"] for one in asked["tool_calls"]]
    assert all(len(id_) == 9 and id_.isalnum() for id_ in ids) and ids[0] != ids[1]
    assert [first["tool_call_id"], second["tool_call_id"]] == ids[::-1]
    kept = [
        said(U, "q"),
        said(A, None, tool_calls=[call("f", "abcDEF123")]),
        said(T, "r", tool_call_id="abcDEF123"),
    ]
    assert turns("mistral-nemo", kept)[1]["tool_calls"][0]["id"] == "abcDEF123"


def test_arguments_are_as_the_template_takes_them() -> None:
    (_, asked, _) = turns("deepseek-v3", CONVERSATIONS["a call"])
    assert asked["content"] is None and asked["tool_calls"][0]["function"]["arguments"] == '{"city": "warg"}'
    assert '```json\n{"city": "warg"}\n```' in rendered("deepseek-v3", CONVERSATIONS["a call"])
    (_, asked, _) = turns("qwen3", CONVERSATIONS["a call"])
    assert asked["content"] == "" and asked["tool_calls"][0]["function"]["arguments"] == {"city": "warg"}


def test_thousands_of_calls_take_no_time() -> None:
    """They are put in order on the event loop: seconds there would be everybody's."""
    count = 4000
    calls = [call("f", f"c{i}", "{}") for i in range(count)]
    results = [{"role": T, "tool_call_id": f"c{i}", "content": f"r{i}"} for i in reversed(range(count))]
    asked = [said(U, "hi"), said(A, None, tool_calls=[*calls, call("g", "c0")]), *results]
    asked.append({"role": T, "tool_call_id": "unknown", "content": "r"})
    messages = [Message.model_validate(one) for one in asked]
    traits = Traits(tool_messages=True, parallel_calls=False)
    start = time.thread_time()
    found = conversation(messages, None, traits, HERMES)
    assert time.thread_time() - start < 1
    assert [one.get("tool_call_id", "call") for one in found[1:6]] == ["call", "c0", "call", "c1", "call"]
    assert [one["role"] for one in found[-2:]] == [A, T] and found[-1]["tool_call_id"] == "unknown"


TOGETHER: dict[str, tuple[list[dict[str, Any]], Traits]] = {
    "messages": ([said(U, "x" * 950)], Traits(alternation=True)),
    "results": ([{"role": T, "content": "x" * 950}], Traits(tool_messages=False)),
    "texts beside calls": (
        [said(A, "x" * 950, tool_calls=[call("f")])],
        Traits(tool_messages=True, text_and_calls=False, alternation=True),
    ),
}


@pytest.mark.parametrize("kind", TOGETHER)
def test_adjacent_messages_are_joined_in_linear_time(kind: str) -> None:
    """On the event loop too: joined one by one, eight times the messages take 64 times the time."""
    asked, traits = TOGETHER[kind]

    def seconds(count: int) -> float:
        messages = [Message.model_validate(one) for one in asked * count]
        messages.append(Message.model_validate(said(U if kind == "messages" else A, "Bye.")))
        start = time.thread_time()
        found = conversation(messages, None, traits, HERMES)
        taken = time.thread_time() - start
        assert max(len(one["content"]) for one in found) > 950 * count
        return taken

    few, many = (min(seconds(count) for _ in range(3)) for count in (256, 2048))
    assert many < 24 * few


@pytest.mark.parametrize("text", ("", "null", "{}"))
def test_a_call_without_arguments(text: str) -> None:
    asked = said(A, "", tool_calls=[call("f", arguments=text)])
    (_, turn) = turns("qwen3", [said(U, "hi"), asked])
    assert turn["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    "text", ('{"city": "Par', "[", "[1]", '"x"', "5", '{"a": NaN}', '{"a": "\\ud800"}', '{"a":' * 5000)
)
def test_arguments_that_are_no_object_come_back_as_text(text: str) -> None:
    """A call that was cut at the token limit, and what clients make of it: agents go on with an error."""
    found, expected = (
        [
            said(U, "q"),
            said(A, None, tool_calls=[call("f", arguments=one)]),
            said(T, "Error", tool_call_id="call_1"),
        ]
        for one in (text, json.dumps({"invalid_arguments": text}))
    )
    for name in SOURCES:
        assert rendered(name, found) == rendered(name, expected)


@pytest.mark.parametrize("name", ("chatml", "like gemma 3", "gpt-oss"))
def test_a_refusal_is_the_text_of_its_message(name: str) -> None:
    """OpenAI's answers have it in place of their content, and clients send back what they got."""
    refused = said(A, None, refusal="I will not.", audio=None, function_call=None, annotations=[])
    plain = said(A, "I will not.", annotations=[])
    assert turns(name, [said(U, "q"), refused, said(U, "so")]) == turns(
        name, [said(U, "q"), plain, said(U, "so")]
    )
    beside = said(A, "text", refusal=None)
    assert turns(name, [said(U, "q"), beside])[1] == said(A, "text")


def test_audio_of_an_earlier_answer_is_refused_by_name() -> None:
    with pytest.raises(ApiError, match=r"messages\[1\] has audio: only text"):
        turns("chatml", [said(U, "q"), said(A, None, audio={"id": "audio_1"}), said(U, "so")])


def test_no_content_is_no_text_beside_calls() -> None:
    """Where a template takes lists of parts too: an empty one would be a message of its own."""
    messages = [said(U, "q"), said(A, None, tool_calls=[call("f")]), said(T, "r", tool_call_id="call_1")]
    asked = body(messages)
    traits = Traits(parts=frozenset((U, A)), tool_messages=True, text_and_calls=False)
    found = conversation(asked.messages, None, traits, HERMES)
    assert [(turn["role"], turn["content"]) for turn in found] == [(U, "q"), (A, ""), (T, "r")]


@pytest.mark.parametrize("field", ("reasoning", "reasoning_content", "thinking"))
def test_reasoning_is_read_back_under_every_name(field: str) -> None:
    thought = said(A, "", tool_calls=[call("f")]) | {field: "wthought"}
    messages = [said(U, "q"), thought, said(T, "r", tool_call_id="call_1")]
    assert "<|channel|>analysis<|message|>wthought<|end|>" in rendered("gpt-oss", messages)
    assert "<think>\nwthought\n</think>" in rendered("qwen3", messages)
    inline = said(A, [{"type": "thinking", "thinking": "wthought"}, *parts("so")], tool_calls=[call("f")])
    assert "<think>\nwthought\n</think>" in rendered(
        "qwen3", [said(U, "q"), inline, said(T, "r", tool_call_id="call_1")]
    )
    both = thought | {"content": "wtext"}
    assert "wtext" in rendered("gpt-oss", [said(U, "q"), both, said(T, "r", tool_call_id="call_1")])


def test_tools_are_described_as_the_model_writes_calls() -> None:
    text = rendered("deepseek-v3", [said(U, "q")], TOOLS)
    assert "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>" in text
    assert "<tool_call>" in rendered("like gemma 3", [said(U, "q")], TOOLS)
    granite = rendered("granite-3.3", CONVERSATIONS["a call"], TOOLS)
    assert '<|tool_call|>[{"name": "wtwo", "arguments": {"city": "warg"}}]' in granite


def test_parts_are_joined_as_in_transformers() -> None:
    """By the template where it takes them, and else as transformers' server does."""
    assert "\nonetwo<end_of_turn>" in rendered("like gemma 3", [said(U, parts("one", " two "))])
    assert "\none two<|im_end|>" in rendered("chatml", [said(U, parts("one", "two"))])
    assert (
        turns("like gemma 3", [said(S, parts("a", "b")), said(U, "c")])[0]["content"] == "a b"
    )  # it shows one only


@pytest.mark.parametrize(
    "part",
    ({"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}, {"type": ["text"]}, {}),
)
def test_other_parts_are_refused_by_name(part: dict[str, Any]) -> None:
    for name in ("chatml", "like gemma 3"):
        with pytest.raises(ApiError, match=r"messages\[0\] has a part of type .*only text") as caught:
            turns(name, [said(U, [*parts("a"), part])])
        assert caught.value.status == 400 and str(part.get("type")) in caught.value.message
