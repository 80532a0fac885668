"""Tool calls in the text of an answer, as models write them: JSON, tags, special tokens, Python.

A call is given out when its name is certain and its arguments have begun; they follow as they come. What
begins like a call and is none stays text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from tpjax.server.parsing.incremental import Malformed, ParsedDelta, Parsing, Reader

NAME = re.compile(r"[a-zA-Z0-9_.-]+")
_NAMES, _ARGUMENTS = ("name", "tool_name"), ("arguments", "parameters")
_MOST_PYTHON = 64 << 10  # characters of calls in Python
_BESIDE = ("id", "type", "tool_call_id", "index")  # what models write beside them

Schemas = Mapping[str, Mapping[str, Any]]


class ToolCallParser(Reader):
    """Tells text from calls.

    Args:
        tools: schemas of the parameters, by name of the tool; for formats whose values are untyped text.

    Attributes:
        calls: how many there have been.
    """

    marks: ClassVar[tuple[str, ...]] = ()  # each may begin a call, or several
    tails: ClassVar[tuple[str, ...]] = ()  # what may come after one, and is no text

    def __init__(self, tools: Schemas | None = None) -> None:
        super().__init__()
        self.calls = 0
        self._tools = dict(tools or {})
        self._blank = ""  # white space before any text: text only if no call follows
        self._begun = False

    def read(self) -> Parsing[None]:
        """Text and calls, in any order."""
        while mark := (yield from self.until(self.marks, self._text_piece)):
            if not (yield from self.attempt(self.call(mark))):
                self._text_piece(mark)
                continue
            while True:
                yield from self.spaces()
                if not self.tails or not (yield from self.accept(*self.tails)):
                    break
        self.give(ParsedDelta(self._blank))

    def call(self, mark: str) -> Parsing[None]:
        """Reads what follows a mark: one call or more.

        Raises:
            Malformed: it is none.
        """
        raise NotImplementedError

    def begin(self, name: str) -> None:
        """A call has begun."""
        self.commit()
        self.calls += 1
        self._blank, self._begun = "", True
        self.give(ParsedDelta("", self.calls - 1, name))

    def argue(self, text: str) -> None:
        """Adds to the arguments of the call that has begun."""
        self.give(ParsedDelta(text, self.calls - 1))

    def whole(self, name: str, arguments: Any) -> None:
        """A call, all at once."""
        self.begin(name)
        self.argue(json.dumps(arguments, ensure_ascii=False))

    def _text_piece(self, text: str) -> None:
        if not self._begun and not text.strip():
            self._blank += text
            return
        self.give(ParsedDelta(self._blank + text))
        self._blank, self._begun = "", True

    # --- JSON

    def objects(self, *between: str, known: bool = False) -> Parsing[None]:
        """Reads an object or an array of them, or several with something between them.

        Args:
            between: what may be between them, besides white space.
            known: only tools that there are; text that is JSON might be anything.
        """
        listed = yield from self.accept("[")
        yield from self.spaces()
        yield from self.object(known=known)
        while True:
            before = self._at
            yield from self.spaces()
            yield from self.accept(",", *between)
            yield from self.spaces()
            another = (yield from self.follows("{")) is not None
            if not another or not (yield from self.attempt(self.object(known=known))):
                self._at = before
                break
        yield from self.spaces()
        if not (listed and (yield from self.accept("]"))):
            self._at = before

    def object(self, *, known: bool = False) -> Parsing[None]:
        """Reads ``{"name": ..., "arguments": {...}}``, the keys in any order."""
        started = self.calls
        name, arguments = yield from self._members(known, outer=True)
        if self.calls == started:
            if name is None or (known and arguments is None):
                raise Malformed
            self.begin(name)
            self.argue("{}" if arguments is None else arguments)

    def _members(self, known: bool, outer: bool = False) -> Parsing[tuple[str | None, str | None]]:
        """The members of a call's object; given out at once where the name comes before the arguments."""
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
                name, arguments = yield from self._members(known, outer=True)
            elif known and key not in _BESIDE:
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
        """Reads the arguments of a call: an object, or one in a string; begins the call if it has a name."""
        if (yield from self.follows('"')):
            text = yield from self.json_string()
            if not _is_object(text):
                raise Malformed
        elif (yield from self.follows("{")):
            yield from self._opened()
            if name is not None:
                self.begin(name)
                yield from self.json_value(self.argue)
                return None
            parts: list[str] = []
            yield from self.json_value(parts.append)
            text = "".join(parts)
        else:
            yield from self.expect("null")
            text = "{}"
        if name is not None:
            self.begin(name)
            self.argue(text)
            return None
        return text

    def _opened(self) -> Parsing[None]:
        """Makes sure that an object of JSON opens here, and not another language's; reads nothing."""
        back = self._at
        self._at += 1
        yield from self.spaces()
        fine = yield from self.follows('"', "}")
        self._at = back
        if fine is None:
            raise Malformed

    # --- Python

    def python(self, *ends: str, known: bool = False) -> Parsing[None]:
        """Reads ``[f(a=1), g()]`` or ``f(a=1)``, up to one of some ends or its own."""
        parts: list[str] = []
        if ends:
            if (yield from self.until(ends, parts.append)) is None and known:
                raise Malformed
        else:
            yield from self._balanced(parts)
        for name, arguments in self._python_calls("".join(parts).strip(), known):
            self.whole(name, arguments)

    def _balanced(self, parts: list[str]) -> Parsing[None]:
        """Reads up to where the brackets are closed."""
        depth, quote = 0, ""
        while True:
            if not (yield from self.more()):
                raise Malformed
            char = self._text[self._at]
            self._at += 1
            parts.append(char)
            if char == "\\" and quote and (yield from self.more()):
                parts.append(self._text[self._at])
                self._at += 1
            elif quote:
                quote = "" if char == quote else quote
            elif char in "'\"":
                quote = char
            elif char in "([{":
                depth += 1
            elif char in ")]}":
                depth -= 1
                if depth == 0:
                    return

    def _python_calls(self, text: str, known: bool) -> list[tuple[str, dict[str, Any]]]:
        if len(text) > _MOST_PYTHON:
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

    def _python_call(self, node: ast.expr | None, known: bool) -> tuple[str, dict[str, Any]]:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            node = node.args[0] if len(node.args) == 1 else None  # Gemma's way to show a result
        if not isinstance(node, ast.Call):
            raise Malformed
        name = _dotted(node.func).removesuffix(".call")
        if not NAME.fullmatch(name) or (known and name not in self._tools):
            raise Malformed
        names = list(self._tools.get(name, {}).get("properties", {}))
        try:
            values = dict(zip(names, map(_literal, node.args), strict=False))
            values |= {str(one.arg): _literal(one.value) for one in node.keywords}
            json.dumps(values, allow_nan=False)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise Malformed from error
        if len(node.args) > len(names) or any(one.arg is None for one in node.keywords):
            raise Malformed
        return name, values

    # --- text between tags

    def typed(self, name: str, key: str, text: str) -> Any:
        """A value that was written as bare text, by what the tool's schema says of it."""
        properties = self._tools.get(name, {}).get("properties")
        schema = properties.get(key) if isinstance(properties, dict) else None
        kinds = _kinds(schema) if isinstance(schema, dict) else ["string"]
        if "string" in kinds and not ("null" in kinds and text == "null"):
            return text
        try:
            value = json.loads(text)
            json.dumps(value, allow_nan=False)
        except (ValueError, RecursionError):
            return {"True": True, "False": False, "None": None}.get(text, text)
        return value


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    """The types that a schema names, its alternatives' too."""
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


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    return ast.literal_eval(node)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
