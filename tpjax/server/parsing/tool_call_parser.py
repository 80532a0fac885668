"""The base of the tool-call parsers: JSON objects, Python calls, and text between tags.

A call is emitted when its name is certain and its arguments have started; they follow as they come. Text that
starts like a call and turns out not to be one stays text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from tpjax.server.json_types import Json, JsonObject, well_formed
from tpjax.server.parsing.incremental import IncrementalParser, Malformed, ParsedDelta, Parsing

NAME = re.compile(r"[a-zA-Z0-9_.-]+")
_NAMES, _ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")
_MAX_PYTHON_CHARS = 64 << 10
_OTHER_KEYS = ("id", "type", "tool_call_id", "index")  # other keys that models write

Schemas = Mapping[str, Mapping[str, Json]]


class ToolCallParser(IncrementalParser):
    """Separates text from tool calls.

    Args:
        tools: tool name -> schema of its parameters, for formats whose values are untyped text.

    Attributes:
        calls: number of calls so far.
        marks: texts that may each start one call or more.
        tails: texts that may follow a call and are dropped.
    """

    marks: ClassVar[tuple[str, ...]] = ()
    tails: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tools: Schemas | None = None) -> None:
        super().__init__()
        self.calls = 0
        self._tools = dict(tools or {})
        self._pending_space = ""  # white space before any text; it is text only if no call follows
        self._begun = False

    def read(self) -> Parsing[None]:
        """Reads text and calls, in any order."""
        while mark := (yield from self.until(self.marks, self._text_piece)):
            if not (yield from self.attempt(self.call(mark))):
                self._text_piece(mark)
                continue
            while True:
                yield from self.spaces()
                if not self.tails or not (yield from self.accept(*self.tails)):
                    break
        self.emit(ParsedDelta(self._pending_space))

    def call(self, mark: str) -> Parsing[None]:
        """Reads what follows a mark: one call or more.

        Raises:
            Malformed: no call follows.
        """
        raise NotImplementedError

    def begin_call(self, name: str) -> None:
        """Emits the start of a call."""
        self.commit()
        self.calls += 1
        self._pending_space, self._begun = "", True
        self.emit(ParsedDelta("", self.calls - 1, name))

    def append_arguments(self, text: str) -> None:
        """Emits text of the current call's arguments."""
        self.emit(ParsedDelta(well_formed(text), self.calls - 1))

    def complete_call(self, name: str, arguments: JsonObject) -> None:
        """Emits a whole call."""
        self.begin_call(name)
        self.append_arguments(json.dumps(arguments, ensure_ascii=False))

    def _text_piece(self, text: str) -> None:
        if not self._begun and not text.strip():
            self._pending_space += text
            return
        self.emit(ParsedDelta(self._pending_space + text))
        self._pending_space, self._begun = "", True

    # --- JSON

    def objects(self, *between: str, known: bool = False) -> Parsing[None]:
        """Reads an object, an array of objects, or several objects with separators.

        Args:
            *between: separators, besides white space and commas.
            known: accept only names of offered tools, since other JSON may be text.
        """
        listed = yield from self.accept("[")
        yield from self.spaces()
        yield from self.object(known=known)
        while (yield from self.attempt(self._next_object(between, known))):
            pass
        if listed:
            yield from self.attempt(self._end_of_list())

    def _next_object(self, between: Sequence[str], known: bool) -> Parsing[None]:
        yield from self.spaces()
        yield from self.accept(",", *between)
        yield from self.spaces()
        yield from self.object(known=known)

    def _end_of_list(self) -> Parsing[None]:
        yield from self.spaces()
        yield from self.expect("]")

    def object(self, *, known: bool = False) -> Parsing[None]:
        """Reads ``{"name": ..., "arguments": {...}}``, the keys in any order."""
        started = self.calls
        name, arguments = yield from self._members(known, outer=True)
        if self.calls == started:
            if name is None or (known and arguments is None):
                raise Malformed
            self.begin_call(name)
            self.append_arguments("{}" if arguments is None else arguments)

    def _members(self, known: bool, outer: bool = False) -> Parsing[tuple[str | None, str | None]]:
        """Reads the members of a call's object; emits the call at once if its name comes first."""
        name: str | None = None
        arguments: str | None = None
        yield from self.expect("{")
        yield from self.spaces()
        while not (yield from self.accept("}")):
            key = yield from self.json_string()
            yield from self.spaces()
            yield from self.expect(":")
            yield from self.spaces()
            if key in _NAMES:
                name = yield from self.json_string()
                if not NAME.fullmatch(name) or (known and name not in self._tools):
                    raise Malformed
            elif key in _ARGUMENTS:
                arguments = yield from self.arguments(name)
            elif key == "function" and outer and (yield from self.follows("{")):
                name, arguments = yield from self._members(known)
            elif known and key not in _OTHER_KEYS:
                raise Malformed
            else:
                yield from self.json_value(lambda _: None)
            yield from self.spaces()
            if not (yield from self.accept(",")):
                yield from self.expect("}")
                break
            yield from self.spaces()
        return name, arguments

    def arguments(self, name: str | None) -> Parsing[str | None]:
        """Reads a call's arguments, an object or one in a string; starts the call if its name is known."""
        if (yield from self.follows('"')):
            text = yield from self.json_string()
            if not _is_object(text):
                raise Malformed
        elif (yield from self.follows("{")):
            if not (yield from self.ahead(self.object_begins())):
                raise Malformed
            if name is not None:
                self.begin_call(name)
                yield from self.json_value(self.append_arguments)
                return None
            parts: list[str] = []
            yield from self.json_value(parts.append)
            text = "".join(parts)
        else:
            yield from self.expect("null")
            text = "{}"
        if name is not None:
            self.begin_call(name)
            self.append_arguments(text)
            return None
        return text

    def object_begins(self) -> Parsing[bool]:
        """Reads the start of an object; returns whether it is JSON, and not another language's."""
        yield from self.expect("{")
        yield from self.spaces()
        return (yield from self.follows('"', "}")) is not None

    # --- Python

    def python(self, *ends: str, known: bool = False) -> Parsing[None]:
        """Reads ``[f(a=1), g()]`` or ``f(a=1)``, up to one of some end marks or the closing bracket."""
        parts: list[str] = []
        if ends:
            if (yield from self.until(ends, parts.append)) is None and known:
                raise Malformed
        else:
            yield from self._balanced(parts)
        for name, arguments in self._python_calls("".join(parts).strip(), known):
            self.complete_call(name, arguments)

    def _balanced(self, parts: list[str]) -> Parsing[None]:
        """Reads up to the bracket that closes the first one."""
        depth, quote, escaped = 0, "", False
        while (yield from self.more()):
            for end, char in enumerate(self._text[self._at :], self._at + 1):
                if escaped:
                    escaped = False
                elif quote:
                    escaped = char == "\\"
                    quote = "" if char == quote else quote
                elif char in "'\"":
                    quote = char
                elif char in "([{":
                    depth += 1
                elif char in ")]}":
                    depth -= 1
                    if depth == 0:
                        parts.append(self._text[self._at : end])
                        self._at = end
                        return
            parts.append(self._text[self._at :])
            self._at = len(self._text)
        raise Malformed

    def _python_calls(self, text: str, known: bool) -> list[tuple[str, JsonObject]]:
        if len(text) > _MAX_PYTHON_CHARS:
            raise Malformed
        try:
            nodes = ast.parse(text).body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise Malformed from error
        found = []
        for node in nodes:
            value = node.value if isinstance(node, ast.Expr) else None
            elements = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
            found += [self._python_call(one, known) for one in elements]
        if not found:
            raise Malformed
        return found

    def _python_call(self, node: ast.expr | None, known: bool) -> tuple[str, JsonObject]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            node = node.args[0] if len(node.args) == 1 else None  # Gemma prints the result of a call
        if not isinstance(node, ast.Call):
            raise Malformed
        name = _dotted(node.func).removesuffix(".call")
        if not NAME.fullmatch(name) or (known and name not in self._tools):
            raise Malformed
        names = list(self._properties(name))
        try:
            values = dict(zip(names, map(_literal, node.args), strict=False))
            values |= {str(one.arg): _literal(one.value) for one in node.keywords}
            json.dumps(values, allow_nan=False)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise Malformed from error
        if len(node.args) > len(names) or any(one.arg is None for one in node.keywords):
            raise Malformed
        return name, values

    def _properties(self, name: str) -> JsonObject:
        properties = self._tools.get(name, {}).get("properties")
        return properties if isinstance(properties, dict) else {}

    # --- text between tags

    def typed(self, name: str, key: str, text: str) -> Json:
        """Converts a value written as bare text to the type in the tool's schema."""
        schema = self._properties(name).get(key)
        kinds = _kinds(schema) if isinstance(schema, dict) else ["string"]
        if "string" in kinds and not ("null" in kinds and text == "null"):
            return text
        try:
            value = json.loads(text)
            json.dumps(value, allow_nan=False)
        except (ValueError, RecursionError):
            return {"True": True, "False": False, "None": None}.get(text, text)
        return value


def _kinds(schema: Mapping[str, Json]) -> list[str]:
    """Returns the types that a schema names, including those of its alternatives."""
    kind = schema.get("type")
    kinds = [one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str)]
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else ():
            kinds += (
                [branch["type"]] if isinstance(branch, dict) and isinstance(branch.get("type"), str) else []
            )
    values = schema.get("enum")
    strings = isinstance(values, list) and any(isinstance(one, str) for one in values)
    return kinds + (["string"] if strings or isinstance(schema.get("const"), str) else [])


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _literal(node: ast.expr) -> Json:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    return ast.literal_eval(node)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
