"""Writes the grammar of a chat response in llguidance's dialect of Lark.

A response is reasoning, if the model reasons, and then tool calls, a response in the requested format, or
text. Text matches no special token, so the special tokens of a format are named by their ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tpjax.server.grammars.compiler import WHITESPACE
from tpjax.server.grammars.json_schemas import Schema
from tpjax.server.json_types import Json
from tpjax.server.parsing.harmony import CHANNEL, CONSTRAIN, END, MESSAGE, START
from tpjax.server.parsing.reasoning import ReasoningFormat
from tpjax.server.parsing.tool_call_formats import HARMONY, ToolCallFormat
from tpjax.server.protocol import ChatBody, NamedTool, ResponseFormat, Tool


@dataclass(frozen=True)
class ResponseConstraints:
    """What a request requires of its response.

    Attributes:
        tools: tools that the model may call.
        call_required: the response has to be a call.
        parallel: the response may hold several calls.
        format_schema: schema of a response that is not a call; ``None``: any text.
    """

    tools: list[Tool] = field(default_factory=list)
    call_required: bool = False
    parallel: bool = False
    format_schema: Schema | None = None

    @classmethod
    def of(cls, body: ChatBody) -> ResponseConstraints:
        """Returns the constraints of a request."""
        choice, tools = body.tool_choice or "auto", list(body.tools or ())
        if choice == "none":
            tools = []
        named = isinstance(choice, NamedTool)
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        parallel = body.parallel_tool_calls is not False and not named
        return cls(tools, bool(tools) and choice != "auto", parallel, format_schema(body.response_format))

    @property
    def strict_tools(self) -> bool:
        """Whether a tool asks that its schema is enforced."""
        return any(one.function.strict for one in self.tools)

    @property
    def optional(self) -> bool:
        """Whether the response may as well be unconstrained: nothing has to be enforced."""
        return not self.call_required and self.format_schema is None and not self.strict_tools

    @property
    def schemas(self) -> list[Schema]:
        """The schemas of the tools, then that of the response format."""
        found = [
            Schema(
                {**(one.function.parameters or {}), "type": "object"},  # arguments are, whatever it says
                bool(one.function.strict),
                f"the parameters of {one.function.name}",
                replaceable=True,
            )
            for one in self.tools
        ]
        return found + ([self.format_schema] if self.format_schema else [])


def _symbols(text: str) -> str:
    """Writes JSON in Lark, a lexeme for each symbol; ``~`` is optional white space."""
    found = re.findall(r'~|[{}\[\]:,]|"[^"]*"', text)
    return " ".join("ws" if one == "~" else json.dumps(one, ensure_ascii=False) for one in found)


def format_schema(form: ResponseFormat | None) -> Schema | None:
    """Returns the schema of a ``response_format``; ``None`` if it allows any text."""
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return Schema({"type": "object"}, False, "response_format")
    value = form.json_schema.schema_
    value = {} if value in (None, True) else value  # equivalent, or left out; the options need an object
    return Schema(value, bool(form.json_schema.strict), "response_format")


def response_grammar(
    constraints: ResponseConstraints,
    form: ToolCallFormat,
    reasoning: ReasoningFormat | None,
    inside: bool,
    special: Mapping[str, int],
) -> Callable[[Sequence[Json]], str] | None:
    """Returns a function that writes the grammar of a response.

    Args:
        constraints: what the request requires of the response.
        form: format of tool calls.
        reasoning: marks round the reasoning, if the model reasons.
        inside: the prompt ends inside the reasoning.
        special: text -> id of the special tokens.

    Returns:
        A function from the prepared schemas of ``constraints`` to Lark; ``None`` if nothing is constrained.
    """
    if not constraints.tools and constraints.format_schema is None:
        return None
    if not constraints.call_required and constraints.format_schema is None and form.own_syntax:
        return None

    def write(schemas: Sequence[Json]) -> str:
        writer = _Writer(constraints, form, special, schemas)
        if form is HARMONY:
            return writer.harmony()
        return writer.plain(reasoning, inside)

    return write


class _Writer:
    def __init__(
        self,
        constraints: ResponseConstraints,
        form: ToolCallFormat,
        special: Mapping[str, int],
        schemas: Sequence[Json],
    ) -> None:
        self._constraints, self._form, self._special = constraints, form, special
        self._schemas = [json.dumps(schema, ensure_ascii=False, separators=(",", ":")) for schema in schemas]
        self._lines = [f"ws: /{WHITESPACE}/", r"TEXT: /(.|\n)*/", r"sp: /\s{0,8}/", f"id: /{form.syntax.id}/"]
        marks = sorted(special, key=len, reverse=True)
        self._tokens = re.compile(f"({'|'.join((*map(re.escape, marks), '~', '#'))})")

    def plain(self, reasoning: ReasoningFormat | None, inside: bool) -> str:
        """Writes reasoning between marks, and then calls or text."""
        before = self._reasoning(reasoning, inside) if reasoning else ""
        ways = self._alternatives()
        self._lines.append(f"start: {before} ({' | '.join(ways)})")
        return "\n".join(self._lines)

    def harmony(self) -> str:
        """Writes messages on channels."""
        constraints = self._constraints
        lit = self._literal
        turn = f"TEXT {lit(END)} {lit(START + 'assistant')}"
        self._lines += [
            f'before: {lit(CHANNEL)} ("analysis" | "commentary") {lit(MESSAGE)} {turn}',
            f'json: (ws {lit(CONSTRAIN)})? ws "json" | {lit(CONSTRAIN)}? "json"',
        ]
        ways = []
        for i, tool in enumerate(constraints.tools):
            to = json.dumps(f"to=functions.{tool.function.name}")
            head = f'{lit(CHANNEL)} "commentary" ws {to} json? | ws {to} {lit(CHANNEL)} "commentary" json?'
            self._lines.append(f"head{i}: {head}")
            ways.append(f"head{i} {lit(MESSAGE)} %json {self._schemas[i]}")
        if not constraints.call_required:
            body = f"%json {self._schemas[-1]}" if constraints.format_schema else "TEXT"
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

    def _alternatives(self) -> list[str]:
        constraints, syntax = self._constraints, self._form.syntax
        ways = (
            []
            if constraints.format_schema is None or constraints.call_required
            else [f"%json {self._schemas[-1]}"]
        )
        if not constraints.tools:
            return ways
        opens = self._literal(syntax.opens)
        calls = self._calls()
        if constraints.call_required:
            return [f"{opens} {calls}"]
        if constraints.format_schema is not None and not opens:
            return [*ways, *self._bare_calls()]
        if constraints.format_schema is not None:
            loose = self._form.own_syntax and not opens.startswith("<[")
            return [*ways, f"{opens} TEXT" if loose else f"{opens} {calls}"]
        if not opens:  # a bare object: text that starts as one has to continue as one; the longer lexeme wins
            begins = "".join(
                WHITESPACE if part == "~" else re.escape(part) for part in self._split(syntax.head)
            )
            self._lines.append(f"BEGIN: /{begins}/")
            self._lines.append(rf"FREE: TEXT & ~/{begins}(.|\n)*/")
            marks = [self._literal(mark) for mark in self._form.marks if mark in self._special]
            return ["FREE", f"BEGIN {calls.removeprefix('head ')}", *(f"{mark} {calls}" for mark in marks)]
        if opens.startswith("<["):
            return ["TEXT", f"TEXT? {opens} {calls}"]
        first, rest = syntax.opens.split("~", 1) if "~" in syntax.opens else (syntax.opens, None)
        self._lines.append(f"trigger[lazy]: TEXT {json.dumps(first)}")
        return ["TEXT", f"trigger {self._literal('~' + rest) if rest is not None else ''} {calls}"]

    def _bare_calls(self) -> list[str]:
        """Writes a call as a bare object beside another object, symbol by symbol: the longer lexeme wins."""
        syntax = self._form.syntax
        ways = []
        for i, tool in enumerate(self._constraints.tools):
            before = _symbols(syntax.head + tool.function.name + syntax.middle)
            ways.append(
                f"{before} %json {self._schemas[i]} {_symbols(syntax.tail)} {self._literal(syntax.closes)}"
            )
        return ways

    def _calls(self) -> str:
        syntax = self._form.syntax
        for i, tool in enumerate(self._constraints.tools):
            before, after = self._literal(tool.function.name + syntax.middle), self._literal(syntax.tail)
            self._lines.append(f"call{i}: {before} %json {self._schemas[i]} {after}")
        self._lines.append(f"call: {' | '.join(f'call{i}' for i in range(len(self._constraints.tools)))}")
        self._lines.append(f"head: {self._literal(syntax.head) or json.dumps('')}")
        more = f"({self._literal(syntax.between)} head call)*" if self._constraints.parallel else ""
        return f"head call {more} {self._literal(syntax.closes)}"

    def _literal(self, text: str) -> str:
        """Writes text in Lark: special tokens by id, ``~`` as optional white space, ``#`` as a call's id."""
        parts = []
        for part in self._split(text):
            if part == "~":
                parts.append("ws")
            elif part == "#":
                parts.append("id")
            elif part in self._special:
                parts.append(f"<[{self._special[part]}]>")
            elif part:
                parts.append(json.dumps(part, ensure_ascii=False))
        return " ".join(parts)

    def _split(self, text: str) -> list[str]:
        return self._tokens.split(text)
