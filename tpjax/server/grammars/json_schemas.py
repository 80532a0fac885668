"""JSON schemas as clients write them, made ready for the engine that enforces them.

An unknown ``format`` is an annotation. Objects are closed where they list their properties and say nothing
about others: no model is to invent fields. Where a schema is not strict, what the engine cannot enforce is
passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Json = Any

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then",
    "else", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_BRANCHES = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")
# What llguidance enforces: any other format is an annotation.
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)


@dataclass(frozen=True)
class Schema:
    """A schema that shapes an answer.

    Attributes:
        value: the schema, as the client wrote it.
        strict: all of it is enforced, or the request is refused.
        name: what it is, for messages.
        replaceable: where it is not strict and cannot be used at all, any object will do.
        whitespace: expression of what may stand between tokens of JSON; ``None``: a little.
    """

    value: Json
    strict: bool
    name: str
    replaceable: bool = False
    whitespace: str | None = None


def ready(schema: Json) -> Json:
    """A schema without annotations that the engine would trip over, its objects closed."""
    shared = _composed_references(schema)
    return _mapped(schema, lambda one, composed, path: _ready(one, composed or path in shared), False, "#")


def without_patterns(schema: Json, unusable: frozenset[str]) -> Json:
    """A schema without some of its patterns; names of properties that only they allow are free."""

    def drop(one: dict[str, Json], composed: bool, path: str) -> dict[str, Json]:
        kept = dict(one)
        if kept.get("pattern") in unusable:
            del kept["pattern"]
        names = kept.get("patternProperties")
        if isinstance(names, dict) and unusable & names.keys():
            kept["patternProperties"] = {key: value for key, value in names.items() if key not in unusable}
            kept["additionalProperties"] = True
        return kept

    return _mapped(schema, drop, False, "#")


def patterns(schema: Json) -> list[str]:
    """Every pattern in a schema, once."""
    found: dict[str, None] = {}
    for one in _all(schema):
        pattern, names = one.get("pattern"), one.get("patternProperties")
        if isinstance(pattern, str):
            found[pattern] = None
        if isinstance(names, dict):
            found |= dict.fromkeys(names)
    return list(found)


def _ready(schema: dict[str, Json], composed: bool) -> dict[str, Json]:
    kept = dict(schema)
    if kept.get("format") not in _FORMATS:
        kept.pop("format", None)
    opened = any(key in kept for key in ("additionalProperties", "patternProperties"))
    spread = composed or "$ref" in kept or any(key in kept for key in _BRANCHES)
    names = kept.get("properties")
    listed = isinstance(names, dict) and all(name in names for name in _list(kept.get("required")))
    few = listed and isinstance(least := kept.get("minProperties", 0), int) and least <= len(names or ())
    if listed and few and not opened and not spread:
        # the same here as `unevaluatedProperties`, which the engine does not know
        kept["additionalProperties"] = kept.pop("unevaluatedProperties", False)
    return kept


def _composed_references(schema: Json) -> frozenset[str]:
    """Definitions that only say a part of what an object is: other schemas add to its properties."""
    found = set()
    for one in _all(schema):
        beside = "$ref" in one and any(key in one for key in ("properties", *_BRANCHES))
        branches = [one] if beside else []
        parts = [part for key in _BRANCHES[:3] for part in _list(one.get(key))]
        alone = len(parts) == 1 or "allOf" not in one
        if "properties" in one or not alone:
            branches += [part for part in parts if isinstance(part, dict)]
        found |= {str(part["$ref"]) for part in branches if "$ref" in part}
    return frozenset(found)


def _mapped(
    schema: Json, change: Callable[[dict[str, Json], bool, str], dict[str, Json]], composed: bool, path: str
) -> Json:
    """Changes each schema inside a schema, and nothing that only looks like one: values, names."""
    if not isinstance(schema, dict):
        return schema
    # branches of an object that has properties itself, and those of `allOf`, describe one object together
    together = "properties" in schema or len(_list(schema.get("allOf"))) > 1 or composed
    new: dict[str, Json] = {}
    for key, value in schema.items():
        inner = together if key in _BRANCHES else False
        here = f"{path}/{key}"
        if key in _MAPS and isinstance(value, dict):
            new[key] = {name: _mapped(one, change, inner, f"{here}/{name}") for name, one in value.items()}
        elif key in _LISTS and isinstance(value, list):
            new[key] = [_mapped(one, change, inner, f"{here}/{i}") for i, one in enumerate(value)]
        elif key in _SINGLE:
            new[key] = _mapped(value, change, inner, here)
        else:
            new[key] = value
    return change(new, composed, path)


def _all(schema: Json) -> Iterator[dict[str, Json]]:
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        inner: list[Json] = []
        if key in _MAPS and isinstance(value, dict):
            inner = list(value.values())
        elif key in _LISTS and isinstance(value, list):
            inner = value
        elif key in _SINGLE:
            inner = [value]
        for one in inner:
            yield from _all(one)


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []
