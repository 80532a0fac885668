"""Types of decoded JSON, the strict decoder, and the encoder of responses.

A recursive union would be exact, and would make every dict literal need an annotation (``dict`` is invariant)
and every access an ``isinstance`` that pydantic has already made.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from pydantic_core import from_json

Json: TypeAlias = Any
JsonObject: TypeAlias = dict[str, Any]


def strict_json(data: str | bytes) -> Json:
    """Decodes JSON from a client: no NaN, no lone surrogates, no ten thousand nested brackets.

    Raises:
        ValueError: the data is not valid JSON.
    """
    return from_json(data, allow_inf_nan=False)


def json_bytes(value: Json) -> bytes:
    """Encodes a response as JSON; the strings in it may have surrogates."""
    return utf8(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def utf8(text: str) -> bytes:
    """Encodes a text, well formed or not."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return well_formed(text).encode()


def well_formed(text: str) -> str:
    """Joins pairs of surrogates and replaces lone ones by U+FFFD: neither can be encoded.

    A model writes an emoji in Python as two escapes, and a client's template raises what it likes.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
