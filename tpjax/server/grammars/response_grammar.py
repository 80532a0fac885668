"""What an answer may be, as a grammar in llguidance's dialect of Lark.

An answer is reasoning, where the model reasons, and then a call, an answer in the format asked for, or text.
Text holds no special token, so where a format has some of its own, they are named by their ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpjax.server.grammars.compiler import WHITESPACE
from tpjax.server.grammars.json_schemas import Schema
from tpjax.server.parsing.harmony import CHANNEL, CONSTRAIN, END, MESSAGE, START
from tpjax.server.parsing.reasoning import ReasoningFormat
from tpjax.server.parsing.tool_call_formats import HARMONY, ToolCallFormat
from tpjax.server.protocol import ChatBody, NamedTool, ResponseFormat, Tool


@dataclass(frozen=True)
class ResponseConstraints:
    """What a request wants of its answer.

    Attributes:
        tools: the model may call, or has to.
        must_call: it has to.
        many: it may call several.
        form: what an answer that is no call follows; ``None``: any text.
    """

    tools: list[Tool] = field(default_factory=list)
    must_call: bool = False
    many: bool = False
    form: Schema | None = None

    @classmethod
    def of(cls, body: ChatBody) -> ResponseConstraints:
        """Reads a request."""
        choice, tools = body.tool_choice or "auto", list(body.tools or ())
        if choice == "none":
            tools = []
        named = isinstance(choice, NamedTool)
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        many = body.parallel_tool_calls is not False and not named
        return cls(tools, bool(tools) and choice != "auto", many, form_schema(body.response_format))

    @property
    def advice(self) -> bool:
        """Whether the answer may as well be anything: nothing has to be enforced."""
        return not self.must_call and self.form is None and not any(one.function.strict for one in self.tools)

    @property
    def schemas(self) -> list[Schema]:
        """The tools' schemas, then the form's."""
        found = [
            Schema(
                one.function.parameters or {"type": "object"},
                bool(one.function.strict),
                f"the parameters of {one.function.name}",
                replaceable=True,
            )
            for one in self.tools
        ]
        return found + ([self.form] if self.form else [])


def _symbols(text: str) -> str:
    """JSON as Lark has it, a lexeme for each of its symbols; ``~`` as white space that may be there."""
    found = re.findall(r'~|[{}\[\]:,]|"[^"]*"', text)
    return " ".join("ws" if one == "~" else json.dumps(one, ensure_ascii=False) for one in found)


def form_schema(form: ResponseFormat | None) -> Schema | None:
    """The schema of a ``response_format``; ``None`` where that is any text."""
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return Schema({"type": "object"}, False, "response_format")
    value = form.json_schema.schema_
    value = {} if value is True else value  # the same to JSON Schema, and options are put in an object
    return Schema(value, bool(form.json_schema.strict), "response_format")


def response_grammar(
    wanted: ResponseConstraints,
    form: ToolCallFormat,
    reasoning: ReasoningFormat | None,
    inside: bool,
    special: Mapping[str, int],
) -> Callable[[Sequence[Any]], str] | None:
    """Writes the grammar of an answer.

    Args:
        wanted: what it is to be.
        form: how the model writes calls.
        reasoning: how it reasons, if it does.
        inside: the prompt has opened the reasoning.
        special: special tokens by their text.

    Returns:
        From the schemas of ``wanted``, made ready, to Lark; ``None`` where anything goes.
    """
    if not wanted.tools and wanted.form is None:
        return None
    if form is not HARMONY and form.free and not wanted.must_call and wanted.form is None:
        return None

    def write(schemas: Sequence[Any]) -> str:
        writer = _Writer(wanted, form, special, schemas)
        if form is HARMONY:
            return writer.harmony()
        return writer.plain(reasoning, inside)

    return write


class _Writer:
    def __init__(
        self,
        wanted: ResponseConstraints,
        form: ToolCallFormat,
        special: Mapping[str, int],
        schemas: Sequence[Any],
    ) -> None:
        self._wanted, self._form, self._special = wanted, form, special
        self._schemas = [json.dumps(schema, ensure_ascii=False, separators=(",", ":")) for schema in schemas]
        self._lines = [f"ws: /{WHITESPACE}/", r"TEXT: /(.|\n)*/", r"sp: /\s{0,8}/"]
        marks = sorted(special, key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join(map(re.escape, marks))}|~)" if marks else "(~)")

    def plain(self, reasoning: ReasoningFormat | None, inside: bool) -> str:
        """Reasoning between marks, and then the answer."""
        before = self._reasoning(reasoning, inside) if reasoning else ""
        ways = self._answers()
        self._lines.append(f"start: {before} ({' | '.join(ways)})")
        return "\n".join(self._lines)

    def harmony(self) -> str:
        """Messages on channels."""
        wanted = self._wanted
        lit = self._literal
        turn = f"TEXT {lit(END)} {lit(START + 'assistant')}"
        self._lines += [
            f'before: {lit(CHANNEL)} ("analysis" | "commentary") {lit(MESSAGE)} {turn}',
            f'json: (ws {lit(CONSTRAIN)})? ws "json" | {lit(CONSTRAIN)}? "json"',
        ]
        ways = []
        for i, tool in enumerate(wanted.tools):
            to = json.dumps(f"to=functions.{tool.function.name}")
            head = f'{lit(CHANNEL)} "commentary" ws {to} json? | ws {to} {lit(CHANNEL)} "commentary" json?'
            self._lines.append(f"head{i}: {head}")
            ways.append(f"head{i} {lit(MESSAGE)} %json {self._schemas[i]}")
        if not wanted.must_call:
            body = f"%json {self._schemas[-1]}" if wanted.form else "TEXT"
            ways.append(f'{lit(CHANNEL)} "final" json? {lit(MESSAGE)} {body}')
        self._lines.append(f"start: before* ({' | '.join(ways)})")
        return "\n".join(self._lines)

    def _reasoning(self, form: ReasoningFormat, inside: bool) -> str:
        closes = self._special.get(form.closes)
        opens = "" if inside else self._literal(form.opens)
        if closes is None:
            self._lines.append(f"ended[lazy]: TEXT {json.dumps(form.closes)}")
            self._lines.append(f"thought: {opens} ended sp")
        else:
            self._lines.append(f"thought: {opens} TEXT <[{closes}]> sp")
        return "thought" if inside else "thought?"

    def _answers(self) -> list[str]:
        wanted, shape = self._wanted, self._form.shape
        ways = [] if wanted.form is None or wanted.must_call else [f"%json {self._schemas[-1]}"]
        if not wanted.tools:
            return ways
        opens = self._literal(shape.opens)
        calls = self._calls()
        if wanted.must_call:
            return [f"{opens} {calls}"]
        if wanted.form is not None and not opens:
            return [*ways, *self._bare_calls()]
        if wanted.form is not None:
            loose = self._form.free and not opens.startswith("<[")
            return [*ways, f"{opens} TEXT" if loose else f"{opens} {calls}"]
        if not opens:  # a bare object: what begins as one has to go on as one, and the longer lexeme wins
            begins = "".join(
                WHITESPACE if part == "~" else re.escape(part) for part in self._split(shape.head)
            )
            self._lines.append(f"BEGIN: /{begins}/")
            self._lines.append(rf"FREE: TEXT & ~/{begins}(.|\n)*/")
            marks = [self._literal(mark) for mark in self._form.marks if mark in self._special]
            return ["FREE", f"BEGIN {calls.removeprefix('head ')}", *(f"{mark} {calls}" for mark in marks)]
        if opens.startswith("<["):
            return ["TEXT", f"TEXT? {opens} {calls}"]
        first, rest = shape.opens.split("~", 1) if "~" in shape.opens else (shape.opens, None)
        self._lines.append(f"trigger[lazy]: TEXT {json.dumps(first)}")
        return ["TEXT", f"trigger {self._literal('~' + rest) if rest is not None else ''} {calls}"]

    def _bare_calls(self) -> list[str]:
        """One call as a bare object beside another object: symbol by symbol, since the longer lexeme wins."""
        shape = self._form.shape
        ways = []
        for i, tool in enumerate(self._wanted.tools):
            before = _symbols(shape.head + tool.function.name + shape.middle)
            ways.append(
                f"{before} %json {self._schemas[i]} {_symbols(shape.tail)} {self._literal(shape.closes)}"
            )
        return ways

    def _calls(self) -> str:
        shape = self._form.shape
        for i, tool in enumerate(self._wanted.tools):
            before, after = self._literal(tool.function.name + shape.middle), self._literal(shape.tail)
            self._lines.append(f"call{i}: {before} %json {self._schemas[i]} {after}")
        self._lines.append(f"call: {' | '.join(f'call{i}' for i in range(len(self._wanted.tools)))}")
        self._lines.append(f"head: {self._literal(shape.head) or json.dumps('')}")
        more = f"({self._literal(shape.between)} head call)*" if self._wanted.many else ""
        return f"head call {more} {self._literal(shape.closes)}"

    def _literal(self, text: str) -> str:
        """Text as Lark has it, special tokens by id, ``~`` as white space that may be there."""
        parts = []
        for part in self._split(text):
            if part == "~":
                parts.append("ws")
            elif part in self._special:
                parts.append(f"<[{self._special[part]}]>")
            elif part:
                parts.append(json.dumps(part, ensure_ascii=False))
        return " ".join(parts)

    def _split(self, text: str) -> list[str]:
        return self._tokens.split(text)
