"""Grammars of whole responses: what they allow is what the parsers read, and schemas mean what clients mean."""

# ruff: noqa: E501 -- models\' own words and schemas, as they are

from __future__ import annotations

import asyncio
import json
import logging
import random
from typing import Any

import jsonschema_rs
import llguidance
import numpy as np
import pytest
from serving import tiny_checkpoint
from test_server_calls import SOURCES

from tpjax.server import chat
from tpjax.server.chat_format import ChatFormat
from tpjax.server.error_responses import ApiError, bad_request
from tpjax.server.grammars import json_schemas, structured_outputs
from tpjax.server.grammars.compiler import GrammarCompiler, TokenGrammar
from tpjax.server.grammars.response_grammar import ResponseConstraints, response_grammar
from tpjax.server.parsing.reasoning import reasoning_format
from tpjax.server.parsing.tool_call_formats import tool_call_format
from tpjax.server.protocol import ChatBody
from tpjax.text.loading import load_tokenizer
from tpjax.text.tokenizer import Tokenizer

MARKS = (
    "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|end|>",
    "<|start|>", "<|constrain|>", "<|call|>", "<|return|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|tool_call|>", "[CALL_ID]",
    "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<|tool_calls_section_end|>", "<|START_ACTION|>", "<|END_ACTION|>",
)  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
HI = [{"role": "user", "content": "hi"}]


class InProcess:
    """Tries grammars as the worker does, without one."""

    def __init__(self) -> None:
        self.tried = 0

    async def check_grammar(self, grammar: str, param: str) -> None:
        self.tried += 1
        if wrong := llguidance.LLMatcher.validate_grammar(grammar):
            raise bad_request(f"the schema is not usable: {wrong[:500]}", param)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tiny one, with the special tokens of several kinds of models."""
    directory = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    content = json.loads((directory / "tokenizer.json").read_text())
    first = 1 + max(content["model"]["vocab"].values())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": first + i, "content": one, **flags} for i, one in enumerate(MARKS)]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(directory)
    assert loaded is not None and len(loaded.special_ids) > len(MARKS)
    return loaded


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, InProcess())  # type: ignore[arg-type]


def chat_format(kind: str, tokenizer: Tokenizer) -> ChatFormat:
    async def render(_: dict[str, Any]) -> str:
        raise bad_request("no template")

    found = asyncio.run(ChatFormat.of(SOURCES[kind], tokenizer, render, with_tools=False))
    assert (found.tool_calls, found.reasoning) == (
        tool_call_format(SOURCES[kind]),
        reasoning_format(SOURCES[kind]),
    )
    return found


def compiled(
    compiler: GrammarCompiler, tokenizer: Tokenizer, kind: str, *, inside: bool = False, **options: Any
) -> TokenGrammar | None:
    wanted = ResponseConstraints.of(ChatBody.model_validate({"messages": HI, **options}))
    one = chat_format(kind, tokenizer)
    write = response_grammar(wanted, one.tool_calls, one.reasoning, inside, one.special)
    return None if write is None else asyncio.run(compiler.compile(write, wanted.schemas, "tools", 1))[0]


def allowed(grammar: TokenGrammar) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")).tolist())


def functions(**schemas: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, **one}} for name, one in schemas.items()]


OFFERED = functions(f={"parameters": SCHEMA}, g={"parameters": SCHEMA})
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
NAMED = {"type": "function", "function": {"name": "g"}}

DS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)
ONE, TWO, OTHER = 0, 1, 2  # a call of f; of f and g; of g
WRITTEN = {
    "hermes": [
        '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>\n'
        '<tool_call>{"name":"g", "arguments": {"a":"y"}}</tool_call>',
        '<tool_call>\n{"name": "g", "arguments": {"a": "x"}}\n</tool_call>',
    ],
    "llama": [
        '{"name": "f", "parameters": {"a": "x"}}',
        '{"name": "f", "parameters": {"a": "x"}}; {"name": "g", "parameters": {"a": "x"}}',
        '{"name": "g", "parameters": {"a": "x"}}',
    ],
    "mistral": [
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": "x"}}]',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x"}}, {"name": "g", "arguments": {"a": "x"}}]',
        '[TOOL_CALLS][{"name": "g", "arguments": {"a": "x"}}]',
    ],
    "mistral-v11": [
        '[TOOL_CALLS]f[ARGS]{"a": "x"}',
        '[TOOL_CALLS]f[ARGS]{"a": "x"}[TOOL_CALLS]g[ARGS]{"a": "y"}',
        '[TOOL_CALLS]g[ARGS]{"a": "x"}',
    ],
    "deepseek-v3": [
        f'{DS[0]}{DS[1]}function{DS[2]}f\n```json\n{{"a": "x"}}\n```{DS[3]}{DS[4]}',
        f'{DS[0]}{DS[1]}function{DS[2]}f\n```json\n{{"a": "x"}}\n```{DS[3]}\n'
        f'{DS[1]}function{DS[2]}g\n```json\n{{"a": "x"}}\n```{DS[3]}{DS[4]}',
        f'{DS[0]}{DS[1]}function{DS[2]}g\n```json\n{{"a": "x"}}\n```{DS[3]}{DS[4]}',
    ],
    "deepseek-v3.1": [
        f'{DS[0]}{DS[1]}f{DS[2]}{{"a": "x"}}{DS[3]}{DS[4]}',
        f'{DS[0]}{DS[1]}f{DS[2]}{{"a": "x"}}{DS[3]}{DS[1]}g{DS[2]}{{"a": "x"}}{DS[3]}{DS[4]}',
        f'{DS[0]}{DS[1]}g{DS[2]}{{"a": "x"}}{DS[3]}{DS[4]}',
    ],
    "granite": [
        '<|tool_call|>[{"name": "f", "arguments": {"a": "x"}}]',
        '<|tool_call|>[{"name": "f", "arguments": {"a": "x"}}, {"name": "g", "arguments": {"a": "x"}}]',
        '<|tool_call|>[{"name": "g", "arguments": {"a": "x"}}]',
    ],
    "mistral-ids": [
        '[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{"a": "x"}',
        '[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{"a": "x"}[TOOL_CALLS]g[CALL_ID]987654321[ARGS]{"a": "y"}',
        '[TOOL_CALLS]g[CALL_ID]abcDEF123[ARGS]{"a": "x"}',
    ],
    "kimi": [
        f'{KIMI[0]}f:0{KIMI[1]}{{"a": "x"}}{KIMI[2]}{KIMI[3]}',
        f'{KIMI[0]}f:11{KIMI[1]}{{"a": "x"}}{KIMI[2]}<|tool_call_begin|>functions.g:12{KIMI[1]}{{"a": "y"}}'
        f'{KIMI[2]}{KIMI[3]}',
        f'{KIMI[0]}g:0{KIMI[1]}{{"a": "x"}}{KIMI[2]}{KIMI[3]}',
    ],
    "command": [
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "f", "parameters": {"a": "x"}}\n]<|END_ACTION|>',
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "f", "parameters": {"a": "x"}},\n'
        '    {"tool_call_id": "1", "tool_name": "g", "parameters": {"a": "x"}}\n]<|END_ACTION|>',
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "g", "parameters": {"a": "x"}}\n]<|END_ACTION|>',
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_grammar_takes_what_the_model_writes(
    kind: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    def takes(text: str, **options: Any) -> bool:
        walk = compiled(compiler, tokenizer, kind, tools=OFFERED, **options)
        assert walk is not None
        for token in tokenizer.encode(text, add_special_tokens=False):
            if walk.finished or token not in allowed(walk):
                return False
            walk.advance(token)
        return walk.finished or bool(tokenizer.eos_ids & allowed(walk))

    one, two, other = WRITTEN[kind]
    assert takes("hello") and takes(one) and takes(two)
    assert not takes(one.replace("f", "h", 1) if kind == "mistral-v11" else one.replace('"x"', '"z"'))
    assert takes(one, tool_choice="required") and takes(two, tool_choice="required")
    assert not takes("hello", tool_choice="required")
    assert not takes(two, tool_choice="required", parallel_tool_calls=False)
    assert takes(other, tool_choice=NAMED) and not takes(one, tool_choice=NAMED)
    assert not takes(two.replace('"f"', '"g"'), tool_choice=NAMED)
    # the model may call, or answer in the format
    assert takes("12", response_format=FORM) and takes(one, response_format=FORM)
    assert not takes("hello", response_format=FORM) and not takes(
        "12", response_format=FORM, tool_choice="required"
    )
    if kind not in ("llama", "mistral"):
        assert takes("so: " + one)


THOUGHTS = {
    "thinking": ("<think>\nHm {\n</think>\n\n", WRITTEN["hermes"][0]),
    "magistral": ("[THINK]Hm {[/THINK]", WRITTEN["mistral-v11"][0]),
    "harmony": (
        "<|channel|>analysis<|message|>Hm {<|end|><|start|>assistant",
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": "x"}',
    ),
}


@pytest.mark.parametrize("kind", THOUGHTS)
def test_reasoning_comes_before_what_the_grammar_holds(
    kind: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    def takes(text: str, **options: Any) -> bool:
        walk = compiled(compiler, tokenizer, kind, **options)
        assert walk is not None
        for token in tokenizer.encode(text, add_special_tokens=False):
            if walk.finished or token not in allowed(walk):
                return False
            walk.advance(token)
        return walk.finished or bool(tokenizer.eos_ids & allowed(walk))

    thought, call = THOUGHTS[kind]
    final = "<|channel|>final<|message|>" if kind == "harmony" else ""
    for before in ("", thought):
        assert takes(before + final + "12", response_format=FORM)
        assert not takes(before + final + "x", response_format=FORM)
        assert takes(before + call, tools=OFFERED, tool_choice="required")
        assert takes(before + call, tools=OFFERED) and takes(before + final + "well", tools=OFFERED)
        assert takes(before + call, tools=OFFERED, response_format=FORM)
        assert takes(before + final + "12", tools=OFFERED, response_format=FORM)
    assert not takes(thought, response_format=FORM)
    if kind != "harmony":
        opened = thought.split("Hm")[0]
        assert takes(thought.removeprefix(opened) + "12", response_format=FORM, inside=True)
        assert not takes("12", response_format=FORM, inside=True)


def test_formats_without_a_grammar_of_their_own_are_free(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    for kind in ("coder", "glm", "lfm2", "gemma4"):
        assert compiled(compiler, tokenizer, kind, tools=OFFERED) is None
        assert compiled(compiler, tokenizer, kind, tools=OFFERED, tool_choice="required") is not None
    assert compiled(compiler, tokenizer, "hermes", tools=OFFERED, tool_choice="none") is None
    assert compiled(compiler, tokenizer, "hermes") is None


# --- schemas


def walks(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    schema: Any,
    *,
    strict: bool | None = None,
    count: int = 25,
) -> list[Any]:
    """Random answers that a schema's grammar lets through."""
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": strict}}
    draw, found = random.Random(0), []
    for _ in range(count):
        walk = compiled(compiler, tokenizer, "hermes", response_format=form)
        assert walk is not None
        data = b""
        while not walk.finished and len(data) < 400:
            ids = allowed(walk)
            # what ends something goes first as the answer grows, so that it ends at all
            short = [i for i in ids if tokenizer.token_bytes(i) in (b'"', b"}", b"]")]
            end = list(tokenizer.eos_ids & ids)
            choice = end or short if end or (short and draw.random() < len(data) / 200) else sorted(ids)
            token = draw.choice(choice)
            if token not in tokenizer.eos_ids:
                data += tokenizer.token_bytes(token)
            walk.advance(token)
        if walk.finished and walk.error is None:
            found.append(json.loads(data))
    assert len(found) > count // 3
    return found


USER = {"type": "object", "title": "User", "properties": {"id": {"type": "integer"}}, "required": ["id"]}
CAT = {
    "type": "object",
    "properties": {"kind": {"const": "cat"}, "m": {"type": "boolean"}},
    "required": ["kind"],
}
DOG = {
    "type": "object",
    "properties": {"kind": {"const": "dog"}, "b": {"type": "null"}},
    "required": ["kind"],
}
ENFORCED: dict[str, Any] = {
    "definitions": {"properties": {"u": {"$ref": "#/$defs/U"}}, "required": ["u"], "type": "object", "$defs": {"U": USER}},
    "optional": {"type": "object", "properties": {"a": {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None}}},
    "discriminated": {
        "oneOf": [{"$ref": "#/$defs/C"}, {"$ref": "#/$defs/D"}],
        "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/C", "dog": "#/$defs/D"}},
        "$defs": {"C": CAT, "D": DOG},
    },
    "annotations": {"type": "integer", "title": "T", "description": "d", "default": 1, "examples": [2], "minimum": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["a"]}], "minItems": 2, "maxItems": 2},
    "dict": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "keys by pattern": {"type": "object", "patternProperties": {"^x": {"type": "boolean"}}, "additionalProperties": False},
    "min properties": {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2, "maxProperties": 3},
    "bounds": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
    "multiples": {"type": "integer", "multipleOf": 3},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[ab]{2,4}$"},
    "formats": {"type": "string", "format": "ipv4"},
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    "all of one": {"type": "object", "properties": {"u": {"allOf": [{"$ref": "#/$defs/U"}], "title": "u"}}, "$defs": {"U": USER}},
    "mixed constants": {"enum": [1, "a", None, {"b": [True]}]},
    "recursive": {
        "$ref": "#/$defs/N",
        "$defs": {"N": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}}},
    },
    "required and not listed": {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]},
    "beside": {"type": "object", "properties": {"a": {"type": "null"}}, "anyOf": [{"required": ["a"]}, {"properties": {"b": {"type": "null"}}, "required": ["b"]}]},
}  # fmt: skip


@pytest.mark.parametrize("name", ENFORCED)
def test_answers_follow_their_schema(name: str, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """Of strict schemas and others, by another implementation of JSON Schema."""
    validator = jsonschema_rs.validator_for(ENFORCED[name], validate_formats=True)
    for strict in (True, None):
        for answer in walks(compiler, tokenizer, ENFORCED[name], strict=strict, count=12):
            assert validator.is_valid(answer), answer


def follows(grammar: TokenGrammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a grammar lets a text through, up to its end."""
    for token in tokenizer.encode(text, add_special_tokens=False):
        if grammar.finished or token not in allowed(grammar):
            return False
        grammar.advance(token)
    return grammar.finished or bool(tokenizer.eos_ids & allowed(grammar))


@pytest.mark.parametrize(
    ("beside", "disable", "closed"),
    (
        ({}, None, True),
        ({}, True, True),
        ({}, False, False),
        ({"anyOf": [{"required": ["a"]}]}, None, False),
        ({"anyOf": [{"required": ["a"]}]}, True, True),
        ({"additionalProperties": True}, True, False),
    ),
)
def test_additional_properties_are_disabled_by_request(
    compiler: GrammarCompiler, tokenizer: Tokenizer, beside: Any, disable: bool | None, closed: bool
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], **beside}
    asked = {"json": schema, "disable_additional_properties": disable}
    body = ChatBody.model_validate({"messages": HI, "structured_outputs": asked})
    one, other = asyncio.run(structured_outputs.grammars(compiler, body, 2))
    assert follows(one, tokenizer, '{"a":null}')
    assert follows(other, tokenizer, '{"a":null,"c":1}') != closed


@pytest.mark.parametrize(
    ("kind", "choice", "warned"), (("glm", "auto", 1), ("glm", "required", 0), ("hermes", "auto", 0))
)
def test_strict_tools_that_are_not_enforced_are_told(
    compiler: GrammarCompiler, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture,
    kind: str, choice: str, warned: int,
) -> None:  # fmt: skip
    """Once for each format: GLM's own way to write calls has no grammar."""
    chat._warn_not_enforced.cache_clear()
    tools = functions(f={"parameters": SCHEMA, "strict": True})
    for strict in (False, True, True):
        tools[0]["function"]["strict"] = strict
        body = ChatBody.model_validate({"messages": HI, "tools": tools, "tool_choice": choice})
        asyncio.run(chat._grammars(compiler, body, chat_format(kind, tokenizer), inside=False))
        if not strict:
            assert not caplog.messages
    told = f"tool-call format {kind}: strict tools are enforced only if tool_choice requires a call"
    assert caplog.messages == [told] * warned


def test_objects_are_closed_unless_the_schema_opens_them(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    listed: dict[str, Any] = {"a": {"type": "null"}, "b": {"type": "null"}}
    plain = {"type": "object", "properties": listed}
    assert all(answer.keys() <= {"a", "b"} for answer in walks(compiler, tokenizer, plain))
    nested = {"type": "array", "items": plain, "maxItems": 2}
    assert all(one.keys() <= {"a", "b"} for answer in walks(compiler, tokenizer, nested) for one in answer)
    for opens in ({"additionalProperties": True}, {"additionalProperties": {"type": "null"}}):
        found = walks(compiler, tokenizer, plain | opens, count=40)
        assert any(answer.keys() - {"a", "b"} for answer in found)
    anything = walks(compiler, tokenizer, {"type": "object"}, count=40)
    assert any(anything)  # nothing is listed: any object
    assert walks(compiler, tokenizer, {"type": "object", "properties": {}}) == [{}] * 25


BESIDE_THE_ENGINE = {
    "uniqueItems": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "maxItems": 3},
    "oneOf": {"oneOf": [{"type": "integer", "maximum": 9}, {"type": "number", "minimum": 3, "maximum": 4}]},
    "not": {"type": "boolean", "not": {"const": True}},
    "if": {"type": "boolean", "if": {"const": True}, "then": False},
    "contains": {"type": "array", "items": {"type": "boolean"}, "contains": {"const": True}, "maxItems": 3},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}, "additionalProperties": {"type": "null"}},
    "dependentRequired": {"type": "object", "properties": {"a": {"type": "null"}}, "dependentRequired": {"a": ["b"]}},
}  # fmt: skip


@pytest.mark.parametrize("keyword", BESIDE_THE_ENGINE)
def test_what_cannot_be_enforced_is_passed_over_or_refused(
    keyword: str, compiler: GrammarCompiler, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    schema = BESIDE_THE_ENGINE[keyword]
    rest = jsonschema_rs.validator_for({"type": schema.get("type", "number")})
    with caplog.at_level(logging.WARNING):
        assert all(
            rest.is_valid(answer) for answer in walks(compiler, tokenizer, schema, strict=False, count=6)
        )
    assert any(keyword in record.getMessage() for record in caplog.records)
    with pytest.raises(ApiError, match=keyword) as caught:
        walks(compiler, tokenizer, schema, strict=True)
    assert caught.value.status == 400 and "\n" not in caught.value.message


@pytest.mark.parametrize("pattern", (r"^(?=a)b", r"(a)\1", r"(?<!x)y", r"\bx\b", "("))
def test_patterns_the_engine_cannot_enforce(
    pattern: str, compiler: GrammarCompiler, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    properties = {"a": {"type": "string", "pattern": pattern, "maxLength": 5}, "pattern": {"enum": ["x"]}}
    schema = {"type": "object", "properties": properties, "required": ["a", "pattern"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with caplog.at_level(logging.WARNING):
        for offered in (None, functions(f={"parameters": schema})):
            options = {"tool_choice": "required", "tools": offered} if offered else {"response_format": form}
            assert compiled(compiler, tokenizer, "hermes", **options) is not None
        answers = walks(compiler, tokenizer, schema)
    assert all(len(one["a"]) <= 5 and one["pattern"] == "x" for one in answers)  # the rest still holds
    assert any(repr(pattern) in record.getMessage() for record in caplog.records)
    for options in (
        {"tools": functions(f={"parameters": schema, "strict": True})},
        {"response_format": {"type": "json_schema", "json_schema": form["json_schema"] | {"strict": True}}},  # type: ignore[operator]
    ):
        with pytest.raises(ApiError) as caught:
            compiled(compiler, tokenizer, "hermes", **options)
        assert caught.value.status == 400 and "\n" not in caught.value.message
        assert "pattern" in caught.value.message or "lookarounds" in caught.value.message


def test_patterns_of_keys_that_cannot_be_enforced_open_the_object(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    names = {"^(?=x)": {"type": "null"}, "^y": {"type": "null"}}
    schema = {"type": "object", "patternProperties": names, "additionalProperties": False}
    assert any(not key.startswith("y") for one in walks(compiler, tokenizer, schema, count=40) for key in one)


def test_an_unknown_format_is_an_annotation(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for name in ("uri-reference", "binary", "int32", "path", "phone", "ipv4network"):
        schema = {
            "type": "object",
            "properties": {"format": {"type": "string", "format": name, "maxLength": 2}},
        }
        answers = walks(compiler, tokenizer, schema | {"required": ["format"]}, strict=True, count=6)
        assert all(len(one["format"]) <= 2 for one in answers)


ANY_TYPE: tuple[Any, ...] = (None, True, 1, "a", [], {}, [[]], [{}])
KEYWORDS = (
    "$ref", "type", "format", "pattern", "required", "minProperties", "enum", "const",
    *json_schemas._MAPS, *json_schemas._SINGLE, *json_schemas._BRANCHES[:3],
)  # fmt: skip


@pytest.mark.parametrize("keyword", sorted(set(KEYWORDS)))
def test_a_keyword_may_have_a_value_of_any_type(
    keyword: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """It may be the name of a field, in a tool whose parameters list the fields without ``properties``."""
    for value in ANY_TYPE:
        for schema in ({keyword: value}, {"properties": {"a": {}}, "allOf": [{}, {}], keyword: value}):
            for closed in (None, True, False):
                ready = json_schemas.prepared({"items": schema, **schema}, closed)
                found = json_schemas.patterns(ready)
                json_schemas.without_patterns(ready, frozenset(found))
    fields = {"type": "object", keyword: {"type": "string"}, "city": {"type": "string"}}
    offered = functions(f={"parameters": fields})
    assert compiled(compiler, tokenizer, "hermes", tools=offered, tool_choice="required")


def test_a_tool_whose_schema_is_of_no_use_takes_any_object(
    compiler: GrammarCompiler, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "https://example.com/schema"}}}
    offered = functions(f={"parameters": schema}, g={"parameters": SCHEMA})
    with caplog.at_level(logging.WARNING):
        assert compiled(compiler, tokenizer, "hermes", tools=offered, tool_choice="required") is not None
    assert any("the parameters of f cannot be used" in record.getMessage() for record in caplog.records)
    offered[0]["function"]["strict"] = True
    with pytest.raises(ApiError, match=r"https://example\.com/schema"):
        compiled(compiler, tokenizer, "hermes", tools=offered, tool_choice="required")


LOOSE: dict[str, Any] = {
    "no type": {"properties": {"a": {"enum": ["x"]}}, "required": ["a"]},
    "nothing": {},
    "none": None,
    "a reference": {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {"enum": ["x"]}}}}},
    "one of several": {"anyOf": [{"properties": {"a": {"enum": ["x"]}}}, {"type": "string"}]},
    "or null": {"type": ["object", "null"], "properties": {"a": {"enum": ["x"]}}},
    "a list": {"type": "array", "items": {"type": "integer"}},
    "a constant": {"const": 3},
}


@pytest.mark.parametrize("name", LOOSE)
def test_arguments_are_an_object_whatever_the_schema_allows(
    name: str, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """What is no object could not be read as a call's arguments."""
    offered = functions(f={"parameters": LOOSE[name]})
    walk = compiled(compiler, tokenizer, "hermes", tools=offered, tool_choice="required")
    assert walk is not None
    before, call = '<tool_call>\n{"name": "f", "arguments": ', '{"a": "x"}}\n</tool_call>'
    for token in tokenizer.encode(before, add_special_tokens=False):
        walk.advance(token)
    assert {tokenizer.token_bytes(i).lstrip()[:1] for i in allowed(walk)} <= {b"{", b""}
    for token in tokenizer.encode(call, add_special_tokens=False):
        assert token in allowed(walk)
        walk.advance(token)


def test_pydantic_s_own_schemas(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """A model of everything its users write; each answer is valid by pydantic itself."""
    import datetime
    import decimal
    import enum
    import uuid
    from typing import Annotated, Literal

    from pydantic import BaseModel, Field

    class Color(enum.Enum):
        red = "r"
        blue = "b"

    class Inner(BaseModel):
        flag: bool | None = None

    class Model(BaseModel):
        color: Color
        day: datetime.date
        tags: Annotated[set[Literal["a", "b", "c"]], Field(max_length=3)]
        pair: tuple[bool, Literal[1]]
        inner: list[Inner] = Field(max_length=2)
        price: decimal.Decimal | None = Field(default=None, max_digits=3)
        key: uuid.UUID | None
        table: Annotated[dict[Literal["k"], Inner], Field(max_length=1)] = {}

    schema = Model.model_json_schema()
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    draw = random.Random(1)
    done = 0
    for _ in range(20):
        walk = compiled(compiler, tokenizer, "hermes", response_format=form)
        assert walk is not None
        data = b""
        while not walk.finished and len(data) < 1500:
            ids = sorted(allowed(walk) - tokenizer.eos_ids) or sorted(allowed(walk))
            closing = [i for i in ids if tokenizer.token_bytes(i) in (b'"', b"}", b"]", b"n")]
            token = draw.choice(closing if closing and draw.random() < 0.6 else ids)
            data += b"" if token in tokenizer.eos_ids else tokenizer.token_bytes(token)
            walk.advance(token)
        if walk.finished and walk.error is None:
            done += 1
            answer = json.loads(data)
            answer["tags"] = sorted(set(answer["tags"]))  # uniqueness is what is passed over
            # the pattern of decimals looks ahead, so any text may stand there
            Model.model_validate(answer | {"price": None})
    assert done >= 5
