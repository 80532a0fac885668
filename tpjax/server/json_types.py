"""Types of decoded JSON.

A recursive union would be exact, and would make every dict literal need an annotation (``dict`` is invariant)
and every access an ``isinstance`` that pydantic has already made.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Json: TypeAlias = Any
JsonObject: TypeAlias = dict[str, Any]
