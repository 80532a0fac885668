"""Tool-call formats: how a model writes tool calls, detected from its chat template.

To add a format: add a ``ToolCallFormat`` and a row to ``_SIGNS`` at the end, and, if no existing parser reads
it, a parser to ``model_parsers.py``.

Some models write calls in a syntax that no :class:`CallSyntax` describes: Qwen3-Coder, GLM, LFM2, Gemma 4 and
FunctionGemma (``own_syntax``). A grammar holds them to ``syntax`` only if a call is required. With
``tool_choice`` "auto" their calls are not constrained, and a tool's ``strict`` is not enforced; a warning in
the log says so, once per format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tpjax.server.json_types import JsonObject
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

Calls = Sequence[tuple[str, JsonObject]]  # names and arguments


@dataclass(frozen=True)
class CallSyntax:
    """The text round the names and arguments of calls; ``~`` is optional white space, ``#`` a call's id.

    A call is ``head NAME middle ARGUMENTS tail``; all calls are ``opens call (between call)* closes``. ``id``
    is a regular expression.
    """

    opens: str
    head: str
    middle: str
    tail: str
    between: str
    closes: str = ""
    id: str = "[0-9]{1,4}"


@dataclass(frozen=True)
class ToolCallFormat:
    """One format of tool calls.

    Attributes:
        name: name of the format.
        parser: separates calls from text.
        syntax: syntax of a response in which a grammar requires a call.
        own_syntax: the model was trained with another syntax, so a response that may be a call is not held to
            ``syntax``.
        marks: special tokens that have to be visible in the text.
        stops: tokens that end a response, besides the model's EOS.
        instructions: added to the prompt if the template does not describe tools.
        render: writes calls as text, for a template that does not render them.
    """

    name: str
    parser: type[ToolCallParser]
    syntax: CallSyntax
    own_syntax: bool = False
    marks: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    instructions: str = ""
    render: Callable[[Calls], str] = lambda calls: render_hermes(calls)


def render_hermes(calls: Calls) -> str:
    """Returns calls between ``<tool_call>`` tags."""
    return "\n".join(f"<tool_call>\n{_object(*call)}\n</tool_call>" for call in calls)


def _object(name: str, arguments: JsonObject) -> str:
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def _render_array(calls: Calls) -> str:
    return f"<|tool_call|>[{', '.join(_object(*call) for call in calls)}]"


def _render_python(calls: Calls) -> str:
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
_HERMES = CallSyntax("<tool_call>~", _MEMBERS[0], _MEMBERS[1], "~}~</tool_call>", "~<tool_call>~")
_DEEPSEEK = CallSyntax(
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "function<｜tool▁sep｜>", "\n```json\n",
    "\n```<｜tool▁call▁end｜>", "~<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>",
)  # fmt: skip
_DEEPSEEK_3_1 = CallSyntax(
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
    CallSyntax("", '{"name":~"', '",~"parameters":~', "~}", ";~"),
    marks=("<|python_tag|>",),
    stops=("<|eom_id|>", "<|eot_id|>"),
)
_MISTRAL_MARKS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
_MISTRAL = ToolCallFormat(
    "mistral", MistralParser, CallSyntax("[TOOL_CALLS]~[~", *_MEMBERS, "~,~", "~]"), marks=_MISTRAL_MARKS
)
_MISTRAL_11 = ToolCallFormat(
    "mistral-v11",
    MistralParser,
    CallSyntax("[TOOL_CALLS]", "", "[ARGS]", "", "[TOOL_CALLS]"),
    marks=_MISTRAL_MARKS,
)
_MISTRAL_IDS = ToolCallFormat(
    "mistral-ids",
    MistralParser,
    CallSyntax("[TOOL_CALLS]", "", "[CALL_ID]#[ARGS]", "", "[TOOL_CALLS]", id="[a-zA-Z0-9]{9}"),
    marks=_MISTRAL_MARKS,
)
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
    CallSyntax(
        "<|tool_calls_section_begin|><|tool_call_begin|>", "functions.", ":#<|tool_call_argument_begin|>",
        "<|tool_call_end|>", "<|tool_call_begin|>", "<|tool_calls_section_end|>",
    ),
    marks=(*KimiParser.marks, *KimiParser.tails, KimiParser.sep),
)  # fmt: skip


def _array(
    name: str, opens: str, closes: str, render: Callable[[Calls], str] = render_hermes
) -> ToolCallFormat:
    syntax = CallSyntax(f"{opens}~[~", *_MEMBERS, "~,~", f"~]{closes}")
    return ToolCallFormat(
        name, JsonArrayParser, syntax, marks=(*JsonArrayParser.marks, *JsonArrayParser.tails), render=render
    )


_GRANITE = _array("granite", "<|tool_call|>", "", render=_render_array)
_PHI = _array("phi4", "<|tool_call|>", "<|/tool_call|>", render=_render_array)
_COMMAND = ToolCallFormat(
    "command",
    JsonArrayParser,
    CallSyntax(
        "<|START_ACTION|>~[~", '{~"tool_call_id":~"#",~"tool_name":~"', '",~"parameters":~', "~}", "~,~",
        "~]<|END_ACTION|>",
    ),
    marks=_GRANITE.marks,
)  # fmt: skip
_JAMBA = _array("jamba", "<tool_calls>", "</tool_calls>")
_PYTHON = ToolCallFormat(
    "pythonic",
    PythonicParser,
    _HERMES,
    True,
    PythonicParser.marks + PythonicParser.tails,
    (),
    _TAGS,
    _render_python,
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

# Texts in the source of a template -> its format. The first row counts whose texts are all in the source, so
# the more specific rows come first.
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
    """Returns the format of a chat template, from its source; Hermes's tags if no row matches."""
    return next((form for signs, form in _SIGNS if all(sign in source for sign in signs)), HERMES)
