"""Compiles ``response_format`` and vLLM's ``structured_outputs`` to grammars."""

from __future__ import annotations

import json

import llguidance

from tpjax.server.error_responses import bad_request
from tpjax.server.grammars.compiler import GrammarCompiler, TokenGrammar, check_size, grammar_of_schema
from tpjax.server.grammars.response_grammar import format_schema
from tpjax.server.json_types import Json, strict_json
from tpjax.server.protocol import ResponseFormat, Sampling, StructuredOutputs

_KINDS = ("json_", "json_object", "regex", "choice", "grammar")


async def grammars(compiler: GrammarCompiler | None, body: Sampling, count: int) -> list[TokenGrammar]:
    """Returns the grammars that a request asks for, one for each of ``count`` choices; an empty list if none.

    Raises:
        ApiError: 400, a schema, expression or grammar is not usable, or two are given.
    """
    form, structure = body.response_format, body.structure
    shaped = form is not None and form.type != "text"
    kinds = [name for name in _KINDS if structure and getattr(structure, name) not in (None, False)]
    if structure is not None and structure.structural_tag is not None:
        why = "structured_outputs: structural_tag is not supported: use a grammar"
        raise bad_request(why, "structured_outputs")
    param = "structured_outputs"
    if body.structured_outputs is None:
        param = f"guided_{kinds[0].rstrip('_')}" if kinds else "response_format"
    if len(kinds) > 1 or (kinds and shaped):
        every = [name.rstrip("_") for name in kinds] + ["response_format"] * shaped
        raise bad_request(f"{param}: {' and '.join(every)} cannot both shape the response: give one", param)
    if not kinds and not shaped:
        return []
    if compiler is None:
        raise bad_request("the model has no tokenizer: its responses cannot be constrained", param)
    if structure is not None and kinds:
        return await _structured(compiler, structure, kinds[0], param, count)
    assert form is not None
    return await _response_format(compiler, form, count)


async def _response_format(compiler: GrammarCompiler, form: ResponseFormat, count: int) -> list[TokenGrammar]:
    """Returns the grammars of a ``response_format`` that is not plain text.

    Raises:
        ApiError: 400, the schema is not usable.
    """
    schema = format_schema(form)
    assert schema is not None
    return await compiler.compile(grammar_of_schema, [schema], "response_format", count)


async def _structured(
    compiler: GrammarCompiler, asked: StructuredOutputs, kind: str, param: str, count: int
) -> list[TokenGrammar]:
    if kind in ("json_", "json_object"):
        schema = {"type": "object"} if kind == "json_object" else _schema(asked.json_, param)
        space = "" if asked.disable_any_whitespace else asked.whitespace_pattern
        closed = asked.disable_additional_properties
        return await compiler.schema(schema, param, count, whitespace=space, closed=closed)
    if kind == "regex":
        grammar = llguidance.LLMatcher.grammar_from_regex(asked.regex or "")
        return await compiler.grammar(grammar, param, count)
    if kind == "choice":
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in asked.choice or ())
        return await compiler.lark(f"start: {texts}", param, count)
    return await compiler.lark(await compiler.to_lark(asked.grammar or "", param), param, count)


def _schema(given: Json, param: str) -> Json:
    """Returns a schema, decoded if it came as text."""
    if isinstance(given, str):
        check_size(given, param)  # no limit of the body counts what is in a string
        try:
            given = strict_json(given)
        except ValueError as error:
            raise bad_request(f"{param}: json is not valid JSON: {error}"[:500], param) from error
    if not isinstance(given, dict | bool):
        raise bad_request(f"{param}: json is a {type(given).__name__}, and no schema", param)
    return {} if given is True else given
