"""Responses in the format of each kind of model, parsed into calls, reasoning and text, however they are split."""

# ruff: noqa: E501 -- models\' own words and schemas, as they are

from __future__ import annotations

import itertools
import json
import random
import time
from typing import Any

import pytest

from tpjax.server.chat_format import ChatFormat, ResponseParser
from tpjax.server.parsing.incremental import Malformed
from tpjax.server.parsing.model_parsers import gemma_arguments
from tpjax.server.parsing.reasoning import reasoning_format
from tpjax.server.parsing.tool_call_formats import tool_call_format
from tpjax.server.template_traits import Traits

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "where": {"type": "object"},
    },
}
TOOLS: dict[str, Any] = {"get_weather": WEATHER, "get_time": {"type": "object", "properties": {}}}

# What stands in the templates of the models of each kind, as far as it decides.
SOURCES = {
    "hermes": "<tool_call>",
    "thinking": "<tool_call> <think> </think>",
    "coder": "<tool_call>\n<function=",
    "glm": "<tool_call> <arg_key> </think>",
    "llama": "<|start_header_id|> <|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "mistral-v11": "[TOOL_CALLS] [ARGS]",
    "mistral-ids": "[TOOL_CALLS] [CALL_ID] [ARGS]",
    "magistral": "[TOOL_CALLS] [ARGS] [THINK] [/THINK]",
    "deepseek-v3": "<｜tool▁calls▁begin｜> ```json",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜> </think>",
    "kimi": "<|tool_calls_section_begin|>",
    "granite": "<|tool_call|>",
    "command": "<|START_ACTION|> <|END_THINKING|>",
    "gemma": "<start_of_turn>",
    "gemma4": "<|tool_call>call: <channel|>",
    "functiongemma": "<start_function_call>",
    "lfm2": "<|tool_call_start|>",
    "harmony": "<|channel|> <|message|> commentary",
}

PARIS = ("get_weather", {"city": "Paris"})
LONDON = ("get_weather", {"city": "London", "days": 2})
TIME = ("get_time", {})
Expected = tuple[str, str, list[tuple[str, Any]]]  # reasoning, text, calls


def answers() -> dict[str, tuple[str, str, Expected]]:
    """Name -> (kind, what the model wrote, what it means)."""
    ds = (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    )
    return {
        "qwen": (
            "hermes",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
            ("", "", [PARIS]),
        ),
        "qwen, text and two": (
            "hermes",
            'I will look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "London", "days": 2}}\n</tool_call>',
            ("", "I will look.\n", [PARIS, LONDON]),
        ),
        "hermes, arguments first, no new lines": (
            "hermes",
            '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>',
            ("", "", [PARIS]),
        ),
        "hermes, arguments in a string": (
            "hermes",
            '<tool_call>\n{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}\n</tool_call>',
            ("", "", [PARIS]),
        ),
        "hermes, the closing tag inside an argument": (
            "hermes",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "}</tool_call>\\"{"}}\n</tool_call>',
            ("", "", [("get_weather", {"city": '}</tool_call>"{'})]),
        ),
        "hermes, nothing to say": (
            "hermes", '<tool_call>\n{"name": "get_time"}\n</tool_call>', ("", "", [TIME]),
        ),
        "qwen3": (
            "thinking",
            "<think>\nThe user asks\nfor <tool_call>s.\n</think>\n\n"
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
            ("The user asks\nfor <tool_call>s.", "", [PARIS]),
        ),
        "qwen3, an answer": ("thinking", "<think>\n2 + 2\n</think>\n\nFour.", ("2 + 2", "Four.", [])),
        "qwen3, no thoughts": ("thinking", "<think>\n\n</think>\n\nFour.", ("", "Four.", [])),
        "qwen3, not thinking": ("thinking", "Four, <think>.", ("", "Four, <think>.", [])),
        "qwen3-coder": (
            "coder",
            "Let me see.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nSão Paulo\nBrazil\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n<parameter=units>\nnull\n</parameter>\n"
            '<parameter=where>\n{"lat": 1.5}\n</parameter>\n</function>\n</tool_call>',
            (
                "", "Let me see.\n",
                [("get_weather", {"city": "São Paulo\nBrazil", "days": 3, "units": None, "where": {"lat": 1.5}})],
            ),
        ),
        "qwen3-coder, a number that is text; no arguments": (
            "coder",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\n7\n</parameter>\n</function>\n</tool_call>\n"
            "<tool_call>\n<function=get_time>\n</function>\n</tool_call>",
            ("", "", [("get_weather", {"city": "7"}), TIME]),
        ),
        "glm": (
            "glm",
            "<think>Hm.</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
            ("Hm.", "", [("get_weather", {"city": "Paris", "days": 2})]),
        ),
        "llama 3": (
            "llama", '{"name": "get_weather", "parameters": {"city": "Paris"}}', ("", "", [PARIS])
        ),
        "llama 3, two": (
            "llama",
            '{"name": "get_weather", "parameters": {"city": "Paris"}}; '
            '{"name": "get_weather", "parameters": {"city": "London", "days": 2}}',
            ("", "", [PARIS, LONDON]),
        ),
        "llama 3, python tag": (
            "llama",
            '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}};'
            '{"type": "function", "name": "get_time", "parameters": {}}',
            ("", "", [PARIS, TIME]),
        ),
        "llama 3, a built-in tool": (
            "llama", '<|python_tag|>brave_search.call(query="the \\"news\\"")',
            ("", "", [("brave_search", {"query": 'the "news"'})]),
        ),
        "llama 3, wrapped": (
            "llama", '{"type": "function", "function": {"name": "get_weather", "parameters": {"city": "Paris"}}}',
            ("", "", [PARIS]),
        ),
        "llama 3, JSON that is no call": (
            "llama", '{"name": "Bob", "parameters": {"city": "Paris"}} and {"a": {}}',
            ("", '{"name": "Bob", "parameters": {"city": "Paris"}} and {"a": {}}', []),
        ),
        "llama 3, a call and then no call": (
            "llama", '{"name": "get_time", "parameters": {}}; {"a": 1}', ("", '; {"a": 1}', [TIME]),
        ),
        "mistral": (
            "mistral",
            '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, '
            '{"name": "get_weather", "arguments": {"city": "London", "days": 2}, "id": "abcdefghi"}]',
            ("", "", [PARIS, LONDON]),
        ),
        "mistral, a space": (
            "mistral", '[TOOL_CALLS] [{"arguments": {"city": "Paris"}, "name": "get_weather"}]', ("", "", [PARIS])
        ),
        "mistral v11": (
            "mistral-v11",
            'Sure. [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[CALL_ID]abcdefghi[ARGS]{}',
            ("", "Sure. ", [PARIS, TIME]),
        ),
        "magistral": (
            "magistral", '[THINK]Hm.[/THINK][TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', ("Hm.", "", [PARIS])
        ),
        "deepseek v3": (
            "deepseek-v3",
            f'{ds[0]}{ds[1]}function{ds[2]}get_weather\n```json\n{{"city": "Paris"}}\n```{ds[3]}\n'
            f'{ds[1]}function{ds[2]}get_time\n```json\n{{}}\n```{ds[3]}{ds[4]}',
            ("", "", [PARIS, TIME]),
        ),
        "deepseek v3.1": (
            "deepseek-v3.1",
            f'Looking.{ds[0]}{ds[1]}get_weather{ds[2]}{{"city": "Paris"}}{ds[3]}{ds[1]}get_time{ds[2]}{{}}{ds[3]}{ds[4]}',
            ("", "Looking.", [PARIS, TIME]),
        ),
        "kimi k2": (
            "kimi",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
            '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{}'
            "<|tool_call_end|><|tool_calls_section_end|>",
            ("", "", [PARIS, TIME]),
        ),
        "granite": (
            "granite", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_time"}]',
            ("", "", [PARIS, TIME]),
        ),
        "command": (
            "command",
            '<|START_THINKING|>Hm.<|END_THINKING|><|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": '
            '"get_weather", "parameters": {"city": "Paris"}}\n]<|END_ACTION|>',
            ("Hm.", "", [PARIS]),
        ),
        "gemma, tool_code": (
            "gemma", '```tool_code\nget_weather(city="Paris")\n```', ("", "", [PARIS])
        ),
        "gemma, tool_code printed": (
            "gemma", 'Okay:\n```tool_code\nprint(get_weather("Paris"))\n```', ("", "Okay:\n", [PARIS])
        ),
        "gemma, python": (
            "gemma", '[get_weather(city="Paris"), get_weather(city=\'London\', days=2)]', ("", "", [PARIS, LONDON])
        ),
        "gemma, JSON": ("gemma", '{"name": "get_weather", "parameters": {"city": "Paris"}}', ("", "", [PARIS])),
        "gemma, JSON in a fence": (
            "gemma", '```json\n{"name": "get_weather", "parameters": {"city": "Paris"}}\n```', ("", "", [PARIS])
        ),
        "gemma, an array in a fence": (
            "gemma", '```json\n[{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "get_time", '
            '"parameters": {}}]\n```', ("", "", [PARIS, TIME])
        ),
        "gemma, as it was told": (
            "gemma", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
            ("", "", [PARIS]),
        ),
        "gemma, other code": (
            "gemma", "```python\nx = [1, {'a': f(2)}]\n```\n[link](x)",
            ("", "```python\nx = [1, {'a': f(2)}]\n```\n[link](x)", []),
        ),
        "functiongemma": (
            "functiongemma",
            "<start_function_call>call:get_weather{city:<escape>London<escape>,days:2}<end_function_call>",
            ("", "", [LONDON]),
        ),
        "gemma 4": (
            "gemma4",
            '<|channel>thought\nHm.\n<channel|><|tool_call>call:get_weather{city:<|"|>London<|"|>,days:2}<tool_call|>',
            ("Hm.", "", [LONDON]),
        ),
        "lfm2": (
            "lfm2", '<|tool_call_start|>[get_weather(city="Paris"), get_time()]<|tool_call_end|>So.',
            ("", "So.", [PARIS, TIME]),
        ),
        "gpt-oss": (
            "harmony",
            "<|channel|>analysis<|message|>2 + 2\nis easy.<|end|><|start|>assistant<|channel|>final<|message|>Four.",
            ("2 + 2\nis easy.", "Four.", []),
        ),
        "gpt-oss, a call": (
            "harmony",
            "<|channel|>analysis<|message|>Weather.<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
            ("Weather.", "", [PARIS]),
        ),
        "gpt-oss, remarks and two calls": (
            "harmony",
            "<|channel|>commentary<|message|>Two things.<|end|><|start|>assistant to=functions.get_weather"
            '<|channel|>commentary json<|message|>{"city": "Paris"}<|call|><|start|>assistant<|channel|>commentary '
            "to=functions.get_time <|constrain|>json<|message|>{}",
            ("", "Two things.", [PARIS, TIME]),
        ),
        "gpt-oss, two thoughts": (
            "harmony",
            "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>So.<|return|>",
            ("One.\nTwo.", "So.", []),
        ),
        "gpt-oss, no channel at all": ("harmony", "Just text.", ("", "Just text.", [])),
    }  # fmt: skip


MALFORMED = {
    "hermes": (
        "<tool_call>not JSON</tool_call>",
        '<tool_call>\n{"name": "get_weather", "arguments": {bad}}\n</tool_call>',
        "<tool_call>\n{'name': 'get_weather', 'arguments': {}}\n</tool_call>",
        '<tool_call>\n{"name": "get_weather", "arguments": 3}\n</tool_call>',
        '<tool_call>\n{"name": "a name with spaces", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n{"nam',
        "just text <tool_c",
        "<tool_call>",
        "<tool_call><tool_call>",
    ),
    "coder": ("<tool_call>\n<function=>\n</function>\n</tool_call>", "<tool_call>\n<function=f x>", "<function=f"),
    "llama": ("<|python_tag|>print('hi')\nx = 1", '{"name": "get_weather"}', '{"name": "get_weather", "par', "{", "{{{"),
    "mistral": ("[TOOL_CALLS]", "[TOOL_CALLS][1, 2]", "[TOOL_CALLS]get_weather now", "[TOOL_CALLS][{]"),
    "deepseek-v3": ("<｜tool▁calls▁begin｜>oh", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\nx\n```"),
    "gemma": ("```tool_code\nx = 1\n```", "[get_weather(city=open('x'))]", "[get_weather(", "```tool_code\nunknown()\n```"),
    "kimi": ("<|tool_call_begin|>functions.f:0",),
    "lfm2": ("<|tool_call_start|>[1 + 1]<|tool_call_end|>",),
    "functiongemma": ("<start_function_call>call:f{a:}<end_function_call>", "<start_function_call>f"),
}  # fmt: skip


def parser(kind: str, *, inside: bool = False, tools: Any = TOOLS) -> ResponseParser:
    source = SOURCES[kind]
    found = ChatFormat(Traits(), tool_call_format(source), reasoning_format(source), {}).parser(
        tools, inside=inside
    )
    assert found is not None
    return found


def read(parts: list[str], kind: str, **options: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """What an answer says; a call's name has to come before its arguments, and calls in their order."""
    one = parser(kind, **options)
    pieces = [piece for part in parts for piece in one.push(part)] + one.flush()
    calls: list[list[str]] = []
    for piece in pieces:
        if piece.name is not None:
            assert piece.call == len(calls)
            calls.append([piece.name])
        if piece.call is not None:
            assert piece.call == len(calls) - 1
            calls[-1].append(piece.text)
    assert one.called == bool(calls)
    reasoning = "".join(piece.text for piece in pieces if piece.reasoning)
    text = "".join(piece.text for piece in pieces if piece.call is None and not piece.reasoning)
    return reasoning, text, [(name, "".join(rest)) for name, *rest in calls]


ANSWERS = answers()


@pytest.mark.parametrize("name", ANSWERS)
def test_each_model_s_calls_are_read(name: str) -> None:
    kind, answer, (reasoning, text, calls) = ANSWERS[name]
    found = read([answer], kind)
    assert found[:2] == (reasoning, text)
    assert [(call, json.loads(arguments)) for call, arguments in found[2]] == calls


@pytest.mark.parametrize("name", ANSWERS)
def test_however_an_answer_is_cut_it_says_the_same(name: str) -> None:
    kind, answer, _ = ANSWERS[name]
    whole = read([answer], kind)
    for split in range(len(answer)):
        assert read([answer[:split], answer[split:]], kind) == whole
        # an answer that ends here is read the same in one piece and character by character
        assert read([answer[:split]], kind) == read(list(answer[:split]), kind)
    draw = random.Random(0)
    for _ in range(20):
        at = sorted(draw.choices(range(len(answer) + 1), k=6))
        parts = [answer[a:b] for a, b in itertools.pairwise([0, *at, len(answer)])]
        assert read(parts, kind) == whole


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("hermes", '<tool_call>\n{"arguments": {"city": "LONG"}, "name": "get_weather"}\n</tool_call>Bye.'),
        ("granite", '<|tool_call|>[{"arguments": {"city": "LONG"}, "name": "get_weather"} ]Bye.'),
        ("gemma", '{"arguments": {"city": "LONG"}, "name": "get_weather"} ; Bye.'),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "LONG"}, "arguments": { } }</tool_call>Bye.'),
    ],
)  # fmt: skip
def test_long_answers_are_read_the_same_in_parts(kind: str, answer: str) -> None:
    """Text that was read is dropped once there are 4,096 characters of it, and positions in it with it."""
    answer = answer.replace("LONG", "x" * 5000)
    whole = read([answer], kind)
    assert whole[1].endswith("Bye.") and whole[2]
    assert read(list(answer), kind) == whole
    for split in range(5000, len(answer)):
        assert read([answer[:split], answer[split:]], kind) == whole


@pytest.mark.parametrize(
    ("kind", "answer"), [(kind, one) for kind, some in MALFORMED.items() for one in some]
)
def test_what_is_no_call_stays_text(kind: str, answer: str) -> None:
    for text in (answer, f"Before. {answer} After."):
        assert read([text], kind) == ("", text, []) == read(list(text), kind)


def test_arguments_come_as_they_are_written() -> None:
    one = parser("hermes")
    assert one.push('<tool_call>\n{"name": "get_weather", "argu') == []
    (head,) = one.push('ments": {"city": "Pa')
    assert (head.name, head.call, head.text) == ("get_weather", 0, '{"city": "Pa')
    (more,) = one.push('ris"')
    assert (more.name, more.call, more.text) == (None, 0, 'ris"')
    assert [piece.text for piece in one.push("}}\n</tool")] == ["}"]
    assert one.push("_call>") == [] == one.flush()


def test_an_answer_cut_off_in_its_arguments_keeps_them() -> None:
    answer = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'
    assert read([answer], "hermes") == ("", "", [("get_weather", '{"city": "Par')])
    coder = "<tool_call>\n<function=get_weather>\n<parameter=days>\n3\n</parameter>\n<parameter=city>\nPar"
    assert read([coder], "coder") == ("", "", [("get_weather", '{"days": 3')])


@pytest.mark.parametrize("answer", ("I see.\n</think>\n\nFour.", "<think>\nI see.</think>Four."))
def test_reasoning_that_the_prompt_has_opened(answer: str) -> None:
    for parts in ([answer], list(answer)):
        assert read(parts, "thinking", inside=True) == ("I see.", "Four.", [])
    assert read(["I see, and"], "thinking", inside=True) == ("I see, and", "", [])


def test_without_tools_calls_are_text() -> None:
    answer = "<think>Hm.</think>" + ANSWERS["qwen"][1]
    assert read([answer], "thinking", tools=None) == ("Hm.", ANSWERS["qwen"][1], [])
    source = SOURCES["hermes"]
    plain = ChatFormat(Traits(), tool_call_format(source), reasoning_format(source), {})
    assert plain.parser(None, inside=False) is None


@pytest.mark.parametrize(
    "text", ("f(a=" + "-" * 60000 + "1)", "f" + "(1)" * 9000, "f(a=" + "[" * 5000 + "]" * 5000)
)
def test_code_that_would_overflow_a_stack_is_text(text: str) -> None:
    answer = f"```tool_code\n{text}\n```"
    tools = {"f": {"type": "object", "properties": {"a": {}}}}
    assert read([answer], "gemma", tools=tools) == ("", answer, [])


def test_deep_json_is_no_trouble() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    answer = f'<tool_call>{{"name": "get_weather", "arguments": {{"city": {deep}}}}}</tool_call>'
    assert read([answer], "hermes") == ("", "", [("get_weather", f'{{"city": {deep}}}')])
    nested = '<tool_call>{"function": ' * 3000
    assert read([nested], "hermes")[2] == []
    functions = "<tool_call>" + '{"function": ' * 3000
    assert read([functions], "hermes") == ("", functions, [])
    coder = f"<tool_call>\n<function=get_weather>\n<parameter=where>\n{deep}\n</parameter>\n</function>"
    assert json.loads(read([coder], "coder")[2][0][1]) == {"where": deep}
    with pytest.raises(Malformed):
        gemma_arguments("{a:" + deep + "}")
    assert gemma_arguments('{a:"\\u00007",b:<escape>"<escape>}') == {"a": "\x007", "b": '"'}


@pytest.mark.parametrize("value", (None, True, 1, "a", [], {}, [[]], [{}], {"a": 1}))
@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("llama", "<|python_tag|>f(a=1)"),
        ("llama", "<|python_tag|>f(1)"),
        ("coder", "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"),
    ],
)
def test_a_tool_s_schema_may_be_anything(kind: str, answer: str, value: Any) -> None:
    """A call by position needs the names of the parameters; any other is a call whatever the schema says."""
    for schema in (
        {"properties": value},
        {"properties": {"a": {"type": value}}},
        {"properties": {"a": value}},
    ):
        names = schema["properties"] if isinstance(schema["properties"], dict) else {}
        _, text, calls = read([answer], kind, tools={"f": schema})
        if answer.endswith("f(1)") and "a" not in names:
            assert text == answer
        else:
            ((name, arguments),) = calls
            assert name == "f" and json.loads(arguments) in ({"a": 1}, {"a": "1"})


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("llama", r"<|python_tag|>f(a='\ud83d\ude00 \ud800')"),
        ("functiongemma", r'<start_function_call>call:f{a:"\ud83d\ude00 \ud800"}<end_function_call>'),
        ("hermes", r'<tool_call>{"arguments": "{\"a\": \"\ud83d\ude00 \ud800\"}", "name": "f"}</tool_call>'),
    ],
)
def test_escaped_surrogates_are_characters(kind: str, answer: str) -> None:
    """Python takes two escapes for two characters; no response could be encoded that has them."""
    ((name, arguments),) = read([answer], kind, tools={"f": {}})[2]
    assert name == "f" and json.loads(arguments) == {"a": "😀 \ufffd"}
    assert arguments.encode()


UNCLOSED = {
    "gemma": ("[f(", "[f(a={'", "[f('", '{"id": ['),
    "hermes": ('<tool_call>{"x":[',),
    "kimi": ("<|tool_call_begin|>",),
    "llama": ("<|python_tag|>f(",),
    "granite": ('<tool_calls>[{"id":{',),
    "functiongemma": ("<start_function_call>call:f{",),
}


@pytest.mark.parametrize(("kind", "part"), [(kind, one) for kind, some in UNCLOSED.items() for one in some])
def test_calls_that_never_end_are_read_in_linear_time(kind: str, part: str) -> None:
    """On the event loop, where four times the text was sixteen times the time: a minute for 24,000 characters."""

    def seconds(count: int) -> float:
        text, one = (part * count)[:count], parser(kind, tools={"f": {}})
        start = time.thread_time()
        pieces = one.push(text) + one.flush()
        taken = time.thread_time() - start
        assert one.called or "".join(piece.text for piece in pieces) == text
        return taken

    short, long = (min(seconds(count) for _ in range(3)) for count in (4_000, 16_000))
    assert long < 8 * short
