"""Prepares clients' JSON schemas for llguidance, which enforces them.

An unknown ``format`` is an annotation. An object that lists its properties and says nothing about others is
closed, so that a model does not invent fields; ``disable_additional_properties`` of ``structured_outputs``
closes all such objects, or none. In a schema that is not strict, what llguidance cannot enforce is removed.
A keyword may have a value of any type: clients list the fields of an object without ``properties``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tpjax.server.json_types import Json

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then",
    "else", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_BRANCHES = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")
# Formats that llguidance enforces; any other is an annotation.
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)


@dataclass(frozen=True)
class Schema:
    """A schema that constrains a response.

    Attributes:
        value: the schema as the client wrote it.
        strict: all of it is enforced, or the request is refused.
        name: name for messages.
        replaceable: if it is not strict and not usable, any object is allowed instead.
        whitespace: expression of the white space between JSON tokens; ``None``: a little.
        closed: whether objects that list their properties may have no others; ``None``: where that is safe.
    """

    value: Json
    strict: bool
    name: str
    replaceable: bool = False
    whitespace: str | None = None
    closed: bool | None = None


def prepared(schema: Json, closed: bool | None = None) -> Json:
    """Returns a schema without unknown formats, and with closed objects.

    Args:
        schema: decoded schema.
        closed: close all objects that list properties, or none; ``None``: those that no other schema extends.
    """
    shared = _composed_references(schema)

    def change(one: dict[str, Json], composed: bool, path: str) -> dict[str, Json]:
        return _prepared(one, composed or path in shared, closed)

    return _mapped(schema, change, False, "#")


def without_patterns(schema: Json, unusable: frozenset[str]) -> Json:
    """Returns a schema without some patterns; property names that only they allowed become free."""

    def drop(one: dict[str, Json], composed: bool, path: str) -> dict[str, Json]:
        kept = dict(one)
        pattern = kept.get("pattern")
        if isinstance(pattern, str) and pattern in unusable:
            del kept["pattern"]
        names = kept.get("patternProperties")
        if isinstance(names, dict) and unusable & names.keys():
            kept["patternProperties"] = {key: value for key, value in names.items() if key not in unusable}
            kept["additionalProperties"] = True
        return kept

    return _mapped(schema, drop, False, "#")


def patterns(schema: Json) -> list[str]:
    """Returns the distinct patterns of a schema."""
    found: dict[str, None] = {}
    for one in _all(schema):
        pattern, names = one.get("pattern"), one.get("patternProperties")
        if isinstance(pattern, str):
            found[pattern] = None
        if isinstance(names, dict):
            found |= dict.fromkeys(names)
    return list(found)


def _prepared(schema: dict[str, Json], composed: bool, closed: bool | None) -> dict[str, Json]:
    kept = dict(schema)
    form = kept.get("format")
    if not isinstance(form, str) or form not in _FORMATS:
        kept.pop("format", None)
    if closed is not None:
        # vLLM's rule for `disable_additional_properties`
        lists = "properties" in kept or "patternProperties" in kept
        if closed and lists and "additionalProperties" not in kept:
            kept["additionalProperties"] = False
        return kept
    opened = any(key in kept for key in ("additionalProperties", "patternProperties"))
    spread = composed or "$ref" in kept or any(key in kept for key in _BRANCHES)
    names = kept.get("properties")
    required = _list(kept.get("required"))
    listed = isinstance(names, dict) and all(isinstance(one, str) and one in names for one in required)
    few = listed and isinstance(least := kept.get("minProperties", 0), int) and least <= len(names or ())
    if listed and few and not opened and not spread:
        # equivalent here to `unevaluatedProperties`, which llguidance does not know
        kept["additionalProperties"] = kept.pop("unevaluatedProperties", False)
    return kept


def _composed_references(schema: Json) -> frozenset[str]:
    """Returns references to definitions of partial objects, whose properties other schemas extend."""
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
    """Applies a function to each subschema, and not to values or names that look like one."""
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
