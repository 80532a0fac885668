#!/usr/bin/env python
"""Rewrites README.md's table of model families from tpjax/families/registry.py, between its two markers."""

from __future__ import annotations

import re
from pathlib import Path

from tpjax.families.registry import FAMILIES

README = Path(__file__).resolve().parent.parent / "README.md"
MARKED = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->\n)", re.DOTALL)


def table() -> str:
    """One row a family, in the order of the registry."""
    rows = ["| `model_type` | for example | from |", "|---|---|---|"]
    for family in FAMILIES.values():
        formats = ["safetensors", *(f"GGUF `{gguf.name}`" for gguf in family.gguf)]
        rows.append(f"| `{family.model_type}` | {family.examples} | {', '.join(formats)} |")
    return "\n".join(rows) + "\n"


def rewritten(readme: str) -> str:
    """The README with the table of today."""
    return MARKED.sub(lambda markers: markers[1] + table() + markers[2], readme)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
