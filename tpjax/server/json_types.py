"""Types of decoded JSON, and the strict decoder.

A recursive union would be exact, and would make every dict literal need an annotation (``dict`` is invariant)
and every access an ``isinstance`` that pydantic has already made.
"""

from __future__ import annotations

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
