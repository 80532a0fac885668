"""Which way a model writes its tool calls: chosen by its chat template, which was trained with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tpjax.server.parsing import harmony
from tpjax.server.parsing.model_parsers import (
    DeepSeekParser,
    GemmaParser,
    JsonArrayParser,
    KimiParser,
    LlamaParser,
    MistralParser,
    PythonicParser,
    TaggedParser,
)
from tpjax.server.parsing.tool_call_parser import ToolCallParser

Calls = Sequence[tuple[str, dict[str, Any]]]  # names and arguments


@dataclass(frozen=True)
class Shape:
    """What stands round the names and arguments of calls; ``~`` is white space that may be there.

    A call is ``head NAME middle ARGUMENTS tail``; all of them are ``opens call (between call)* closes``.
    """

    opens: str
    head: str
    middle: str
    tail: str
    between: str
    closes: str = ""


@dataclass(frozen=True)
class ToolCallFormat:
    """One way to write calls.

    Attributes:
        name: of the format.
        reader: tells calls from text.
        shape: what a grammar holds an answer to that has to be a call.
        free: an answer that may be a call is not held to the shape: the model's own is another.
        marks: special tokens that have to be visible in the text.
        stops: tokens that end an answer, besides the model's own.
        instructions: for a template that does not describe tools.
        spell: calls as text, for a template that has no place for them.
    """

    name: str
    reader: type[ToolCallParser]
    shape: Shape
    free: bool = False
    marks: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    instructions: str = ""
    spell: Callable[[Calls], str] = lambda calls: spell_hermes(calls)


def spell_hermes(calls: Calls) -> str:
    """Calls between ``<tool_call>`` tags."""
    return "\n".join(f"<tool_call>\n{_object(*call)}\n</tool_call>" for call in calls)


def _object(name: str, arguments: dict[str, Any]) -> str:
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def _spell_listed(calls: Calls) -> str:
    return f"<|tool_call|>[{', '.join(_object(*call) for call in calls)}]"


def _spell_python(calls: Calls) -> str:
    written = (
        f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})" for name, arguments in calls
    )
    return f"<|tool_call_start|>[{', '.join(written)}]<|tool_call_end|>"


_TAGS = """For each call, write a JSON object with its name and arguments between these tags:
<tool_call>
{"name": <function-name>, "arguments": <arguments-object>}
</tool_call>"""
_TOKENS = """For each call, write its name and a JSON object of its arguments between these tokens:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>FUNCTION_NAME
```json
ARGUMENTS_OBJECT
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"""

_MEMBERS = '{~"name":~"', '",~"arguments":~', "~}"
_HERMES = Shape("<tool_call>~", _MEMBERS[0], _MEMBERS[1], "~}~</tool_call>", "~<tool_call>~")
_DEEPSEEK = Shape(
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "function<｜tool▁sep｜>", "\n```json\n",
    "\n```<｜tool▁call▁end｜>", "~<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>",
)  # fmt: skip
_DEEPSEEK_3_1 = Shape(
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "", "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>",
)  # fmt: skip

HERMES = ToolCallFormat(
    "hermes", TaggedParser, _HERMES, marks=(*TaggedParser.marks, *TaggedParser.tails), instructions=_TAGS
)
_CODER = ToolCallFormat("qwen3-coder", TaggedParser, _HERMES, True, HERMES.marks, instructions=_TAGS)
_GLM = ToolCallFormat(
    "glm",
    TaggedParser,
    _HERMES,
    True,
    (*HERMES.marks, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
_LLAMA = ToolCallFormat(
    "llama3",
    LlamaParser,
    Shape("", '{"name":~"', '",~"parameters":~', "~}", ";~"),
    marks=("<|python_tag|>",),
    stops=("<|eom_id|>", "<|eot_id|>"),
)
_MISTRAL_MARKS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
_MISTRAL = ToolCallFormat(
    "mistral", MistralParser, Shape("[TOOL_CALLS]~[~", *_MEMBERS, "~,~", "~]"), marks=_MISTRAL_MARKS
)
_MISTRAL_11 = ToolCallFormat(
    "mistral-v11",
    MistralParser,
    Shape("[TOOL_CALLS]", "", "[ARGS]", "", "[TOOL_CALLS]"),
    marks=_MISTRAL_MARKS,
)
_MISTRAL_IDS = ToolCallFormat("mistral-ids", MistralParser, _MISTRAL_11.shape, True, marks=_MISTRAL_MARKS)
_DEEPSEEK_MARKS = (*DeepSeekParser.marks, *DeepSeekParser.tails, "<｜tool▁sep｜>")
_DEEPSEEK_V3 = ToolCallFormat(
    "deepseek-v3", DeepSeekParser, _DEEPSEEK, marks=_DEEPSEEK_MARKS, instructions=_TOKENS
)
_DEEPSEEK_V3_1 = ToolCallFormat(
    "deepseek-v3.1", DeepSeekParser, _DEEPSEEK_3_1, marks=_DEEPSEEK_MARKS, instructions=_TOKENS
)
_KIMI = ToolCallFormat(
    "kimi-k2",
    KimiParser,
    Shape(
        "<|tool_calls_section_begin|><|tool_call_begin|>", "functions.", ":0<|tool_call_argument_begin|>",
        "<|tool_call_end|>", "<|tool_call_begin|>", "<|tool_calls_section_end|>",
    ),
    True,  # calls are numbered
    (*KimiParser.marks, *KimiParser.tails, KimiParser.sep),
)  # fmt: skip


def _listed(name: str, opens: str, closes: str, **more: Any) -> ToolCallFormat:
    shape = Shape(f"{opens}~[~", *_MEMBERS, "~,~", f"~]{closes}")
    return ToolCallFormat(
        name, JsonArrayParser, shape, marks=(*JsonArrayParser.marks, *JsonArrayParser.tails), **more
    )


_GRANITE = _listed("granite", "<|tool_call|>", "", spell=_spell_listed)
_PHI = _listed("phi4", "<|tool_call|>", "<|/tool_call|>", spell=_spell_listed)
_COMMAND = ToolCallFormat(
    "command",
    JsonArrayParser,
    Shape("<|START_ACTION|>~[~", '{~"tool_name":~"', '",~"parameters":~', "~}", "~,~", "~]<|END_ACTION|>"),
    True,  # it numbers its calls
    _GRANITE.marks,
)
_JAMBA = _listed("jamba", "<tool_calls>", "</tool_calls>")
_PYTHON = ToolCallFormat(
    "pythonic",
    PythonicParser,
    _HERMES,
    True,
    PythonicParser.marks + PythonicParser.tails,
    (),
    _TAGS,
    _spell_python,
)
_GEMMA = ToolCallFormat("gemma", GemmaParser, _HERMES, instructions=_TAGS)
_GEMMA_TOKENS = ToolCallFormat(
    "gemma-tokens",
    GemmaParser,
    _HERMES,
    True,
    (*GemmaParser.marks[6:], *GemmaParser.tails[1:], "<escape>", '<|"|>'),
    instructions=_TAGS,
)
HARMONY = ToolCallFormat(
    "harmony", harmony.HarmonyParser, _HERMES, marks=harmony.MARKS, stops=harmony.STOPS
)  # its syntax is not one of these: see grammars/response_grammar.py

# What stands in a template that writes calls so, the more particular first; all the texts of a row have to.
_SIGNS: tuple[tuple[tuple[str, ...], ToolCallFormat], ...] = (
    (("<|channel|>", "<|message|>", "commentary"), HARMONY),
    (("<｜tool▁calls▁begin｜>", "```json"), _DEEPSEEK_V3),
    (("<｜tool▁calls▁begin｜>",), _DEEPSEEK_V3_1),
    (("[TOOL_CALLS]", "[CALL_ID]"), _MISTRAL_IDS),
    (("[TOOL_CALLS]", "[ARGS]"), _MISTRAL_11),
    (("[TOOL_CALLS]",), _MISTRAL),
    (("<|tool_calls_section_begin|>",), _KIMI),
    (("<|tool_call>call:",), _GEMMA_TOKENS),
    (("<start_function_call>",), _GEMMA_TOKENS),
    (("<tool_call>", "<function="), _CODER),
    (("<tool_call>", "<arg_key>"), _GLM),
    (("<|START_ACTION|>",), _COMMAND),
    (("<|tool_call|>", "<|/tool_call|>"), _PHI),
    (("<|tool_call|>",), _GRANITE),
    (("<|tool_call_start|>",), _PYTHON),
    (("<tool_calls>",), _JAMBA),
    (("<tool_call>",), HERMES),
    (("<|python_tag|>",), _LLAMA),
    (("<|start_header_id|>", '"parameters": '), _LLAMA),
    (("<start_of_turn>",), _GEMMA),
)


def tool_call_format(source: str) -> ToolCallFormat:
    """How a model writes calls whose chat template this is; Hermes's tags where it does not say."""
    return next((form for signs, form in _SIGNS if all(sign in source for sign in signs)), HERMES)
