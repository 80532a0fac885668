"""Tool-call parsers of the models' formats: tags, special tokens, fences, bare objects."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import ClassVar

from tpjax.server.json_types import Json, JsonObject
from tpjax.server.parsing.incremental import Malformed, Parsing
from tpjax.server.parsing.tool_call_parser import NAME, ToolCallParser


class TaggedParser(ToolCallParser):
    """Parses calls between ``<tool_call>`` tags.

    An object (Qwen, Hermes), ``<function=NAME>`` (Qwen3-Coder), or ``NAME`` and ``<arg_key>`` (GLM).
    """

    marks: ClassVar[tuple[str, ...]] = ("<tool_call>", "<function=")
    tails: ClassVar[tuple[str, ...]] = ("</tool_call>",)

    def call(self, mark: str) -> Parsing[None]:
        """Reads one call, or an array of them."""
        if mark == "<function=":
            yield from self._function()
            return
        yield from self.spaces()
        if (yield from self.accept("<function=")):
            yield from self._function()
        elif (yield from self.follows("{", "[")):
            yield from self.objects()
        else:
            yield from self._keys_and_values()

    def _function(self) -> Parsing[None]:
        name = yield from self.run(NAME)
        yield from self.expect(">")
        yield from self.spaces()
        yield from self._pairs(name, "<parameter=", ">", "</parameter>", "<parameter=", "</function>")
        yield from self.accept("</function>")

    def _keys_and_values(self) -> Parsing[None]:
        name = yield from self.run(NAME)
        yield from self.spaces()
        if not name or (yield from self.follows("<arg_key>", "</tool_call>")) is None:
            raise Malformed
        yield from self._pairs(name, "<arg_key>", "</arg_key>", "</arg_value>", "<arg_key>", "</tool_call>")

    def _pairs(self, name: str, opens: str, closes: str, *ends: str) -> Parsing[None]:
        """Reads a call's parameters; emits each when it is complete."""
        if not name or (yield from self.follows(opens, *ends[1:])) is None:
            raise Malformed
        self.begin_call(name)
        separator = "{"
        while (yield from self.accept(opens)):
            key: list[str] = []
            yield from self.until((closes,), key.append)
            yield from self.spaces_before_value()
            yield from self.accept("<arg_value>")
            text: list[str] = []
            if (yield from self.until((ends[0],), text.append)) is None:
                return  # truncated: the arguments stay open, as JSON would
            pair = (
                "".join(key).strip(),
                self.typed(name, "".join(key).strip(), "".join(text).removesuffix("\n")),
            )
            written = [json.dumps(one, ensure_ascii=False) for one in pair]
            self.append_arguments(separator + ": ".join(written))
            separator = ", "
            yield from self.spaces()
        self.append_arguments("{}" if separator == "{" else "}")

    def spaces_before_value(self) -> Parsing[None]:
        """Reads the line break between a key and its value."""
        yield from self.accept("\n")


class LlamaParser(ToolCallParser):
    """Parses Llama 3's calls: bare objects with ``;`` between, or anything after ``<|python_tag|>``."""

    marks: ClassVar[tuple[str, ...]] = ("<|python_tag|>", "{")

    def call(self, mark: str) -> Parsing[None]:
        """Reads one call or more."""
        if mark == "{":
            self._at -= 1
            yield from self.objects(";", known=True)
            return
        yield from self.spaces()
        if (yield from self.follows("{", "[")):
            yield from self.objects(";")
        else:
            yield from self.python()


class MistralParser(ToolCallParser):
    """Parses Mistral's calls: an array of objects, or ``NAME[ARGS]{...}`` from tokenizer version 11 on."""

    marks: ClassVar[tuple[str, ...]] = ("[TOOL_CALLS]",)

    def call(self, mark: str) -> Parsing[None]:
        """Reads an array, or one call."""
        yield from self.spaces()
        if (yield from self.follows("[{", "[ ", "[\n", "{")):
            yield from self.objects()
            return
        name = yield from self.run(NAME)
        if (yield from self.accept("[CALL_ID]")):
            yield from self.run(NAME)
        yield from self.accept("[ARGS]")
        yield from self.spaces()
        if not name or (yield from self.follows("{")) is None:
            raise Malformed
        yield from self.arguments(name)


class DeepSeekParser(ToolCallParser):
    """Parses DeepSeek's calls: V3, R1 ``function<sep>NAME`` and fenced JSON, V3.1 ``NAME<sep>{...}``."""

    marks: ClassVar[tuple[str, ...]] = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")
    tails: ClassVar[tuple[str, ...]] = ("<｜tool▁calls▁end｜>", "<｜tool▁call▁end｜>")

    def call(self, mark: str) -> Parsing[None]:
        """Reads one call."""
        yield from self.spaces()
        if mark == self.marks[0]:
            yield from self.expect(self.marks[1])
        name = yield from self.run(NAME)
        yield from self.expect("<｜tool▁sep｜>")
        if (yield from self.follows("{")) is None:
            name = yield from self.run(NAME)
            yield from self.spaces()
            yield from self.accept("```json", "```")
            yield from self.spaces()
        if not name or (yield from self.follows("{")) is None:
            raise Malformed
        yield from self.arguments(name)
        yield from self.spaces()
        yield from self.accept("```")


class KimiParser(ToolCallParser):
    """Parses Kimi K2's calls: ``functions.NAME:0`` between special tokens."""

    marks: ClassVar[tuple[str, ...]] = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    tails: ClassVar[tuple[str, ...]] = ("<|tool_calls_section_end|>", "<|tool_call_end|>")
    sep = "<|tool_call_argument_begin|>"

    def call(self, mark: str) -> Parsing[None]:
        """Reads one call."""
        yield from self.spaces()
        if mark == self.marks[0]:
            yield from self.expect(self.marks[1])
        name: list[str] = []
        if (yield from self.until((self.sep,), name.append)) is None:
            raise Malformed
        bare = re.sub(r":\d+$", "", "".join(name).strip()).removeprefix("functions.")
        yield from self.spaces()
        if not NAME.fullmatch(bare) or (yield from self.follows("{")) is None:
            raise Malformed
        yield from self.arguments(bare)


class JsonArrayParser(ToolCallParser):
    """Parses an array of objects between tokens: Granite, Phi-4-mini, Command R, Jamba."""

    marks: ClassVar[tuple[str, ...]] = ("<|tool_call|>", "<tool_call>", "<|START_ACTION|>", "<tool_calls>")
    tails: ClassVar[tuple[str, ...]] = ("<|/tool_call|>", "</tool_call>", "<|END_ACTION|>", "</tool_calls>")

    def call(self, mark: str) -> Parsing[None]:
        """Reads an array, or one call."""
        yield from self.spaces()
        yield from self.objects()


class GemmaParser(ToolCallParser):
    """Parses Gemma's calls, in every form that its documentation and its training show.

    Its templates do not describe tools. The forms are fences of ``tool_code`` or JSON, a bare object, Python
    calls in brackets, the tags that this server's instructions ask for (``<tool_call>``), and the special
    tokens of FunctionGemma and Gemma 4.
    """

    marks: ClassVar[tuple[str, ...]] = (
        "<tool_call>", "```tool_code", "```json", "```", "{", "[", "<start_function_call>", "<|tool_call>",
    )  # fmt: skip
    tails: ClassVar[tuple[str, ...]] = ("</tool_call>", "<end_function_call>", "<tool_call|>")

    def call(self, mark: str) -> Parsing[None]:
        """Reads one call or more."""
        if mark in ("<start_function_call>", "<|tool_call>"):
            yield from self._native("<end_function_call>" if mark == self.marks[6] else "<tool_call|>")
        elif mark == "```tool_code":
            yield from self.python("```", known=True)
        elif mark in ("{", "["):
            self._at -= 1
            python = mark == "[" and (yield from self.ahead(self._python_begins()))
            yield from self.python(known=True) if python else self.objects(";", known=True)
        else:
            yield from self.spaces()
            yield from self.objects(known=mark != "<tool_call>")
            yield from self.spaces()
            if mark != "<tool_call>":
                yield from self.accept("```")

    def _python_begins(self) -> Parsing[bool]:
        yield from self.expect("[")
        yield from self.spaces()
        name = yield from self.run(NAME)
        return bool(name) and (yield from self.follows("(")) is not None

    def _native(self, end: str) -> Parsing[None]:
        """Reads ``call:NAME{key:value,...}``."""
        yield from self.expect("call:")
        name = yield from self.run(NAME)
        if not name or (yield from self.follows("{")) is None:
            raise Malformed
        parts: list[str] = []
        yield from self.until((end,), parts.append)
        self.complete_call(name, gemma_arguments("".join(parts)))


def gemma_arguments(text: str) -> JsonObject:
    """Decodes Gemma's notation of an object: bare keys, strings between ``<escape>`` or ``<|"|>``.

    Raises:
        Malformed: the text is not an object in this notation.
    """
    strings: dict[str, str] = {}  # placeholder -> string

    def keep(match: re.Match[str]) -> str:
        placeholder = f"\0{len(strings)}"
        strings[placeholder] = match[2]
        return json.dumps(placeholder)

    plain = re.sub(r'(<escape>|<\|"\|>)(.*?)\1', keep, text, flags=re.DOTALL)
    plain = re.sub(r"([{,]\s*)([A-Za-z_][\w.-]*)\s*:", r'\1"\2":', plain)
    try:
        value: JsonObject = _restored(json.loads(plain), strings)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise Malformed from error
    if not isinstance(value, dict):
        raise Malformed
    return value


def _restored(value: Json, strings: Mapping[str, str]) -> Json:
    if isinstance(value, str):
        return strings.get(value, value)
    if isinstance(value, dict):
        return {key: _restored(one, strings) for key, one in value.items()}
    return [_restored(one, strings) for one in value] if isinstance(value, list) else value


class PythonicParser(TaggedParser):
    """Parses Python calls between tokens (LFM2), or the tags that this server's instructions ask for."""

    marks: ClassVar[tuple[str, ...]] = ("<|tool_call_start|>", *TaggedParser.marks)
    tails: ClassVar[tuple[str, ...]] = ("<|tool_call_end|>", *TaggedParser.tails)

    def call(self, mark: str) -> Parsing[None]:
        """Reads a list of calls."""
        if mark == "<|tool_call_start|>":
            yield from self.python("<|tool_call_end|>")
        else:
            yield from super().call(mark)
