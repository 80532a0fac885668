"""Tables and HTML of the reports of ``inspect/``."""

from __future__ import annotations

import io
import linecache
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.jupyter import JUPYTER_HTML_FORMAT
from rich.table import Table
from rich.text import Text

from tpjax.inspect.budget import BUDGETED_KINDS, measured
from tpjax.inspect.collectives import Collective
from tpjax.planning.plain_table import plain_table
from tpjax.runtime.memory import human_bytes


def as_html(report: RenderableType) -> str:
    """Renders a report for a notebook, as ``rich.print`` does there: a fixed font, no wrapped lines.

    The style stands with the table: what a notebook is exported to has no style sheet of JupyterLab's.
    """
    console = Console(record=True, file=io.StringIO(), width=110, force_jupyter=False)
    console.print(report)
    return console.export_html(inline_styles=True, code_format=JUPYTER_HTML_FORMAT)


def collective_table(name: str, collectives: Sequence[Collective], budget: dict[str, Any]) -> Table:
    """Lists the collectives of a program by source line, and their sums next to the budget.

    Bytes are those of the results on one device.
    """
    title = f"collectives of {name}\nalways: {_sums(measured(collectives))}"
    title += f"\nbudget: {_sums(budget)}: {budget['rule']}"
    table = plain_table(title, "kind", "result", numbers=("times", "bytes"))
    table.add_column("asked for by", overflow="ellipsis")
    table.columns[0].no_wrap = True
    for one in collectives:
        # the source text is shown for unconditional ones only: there may be many of the others
        text = "" if one.conditional else source_text(one.source)
        table.add_row(
            one.kind,
            one.shapes,
            str(one.count),
            human_bytes(one.bytes * one.count),
            Text.assemble(
                *([one.source] if one.source else []),
                (f"{', ' * bool(one.source)}if a request asks" if one.conditional else f"  {text}", "dim"),
                no_wrap=True,
                overflow="ellipsis",
            ),
        )
    if not collectives:
        table.add_row("none", "", "0", "", "")
    return table


def described_dtype(dtype: str, quantize: str | None, kv_dtype: str) -> str:
    """Names the dtype of a model and what weights and cache are kept in, if they are quantised."""
    parts = [] if quantize is None else [f"{quantize} weights"]
    parts += [] if kv_dtype == "auto" else [f"{kv_dtype} keys and values"]
    return f"{dtype} with {' and '.join(parts)}" if parts else dtype


def source_text(source: str) -> str:
    """Returns the text of a source line of this package, such as ``model.py:66``, right of an assignment.

    Empty if there is no such line.
    """
    file, _, line = source.partition(":")
    path = Path(__file__).parents[1] / file
    text = linecache.getline(str(path), int(line)) if line.isdecimal() else ""
    return re.sub(r"^[\w., ]+ = ", "", text.strip())


def _sums(figures: dict[str, Any]) -> str:
    parts = []
    for kind in BUDGETED_KINDS:
        name = kind.replace("-", "_")
        if count := figures[f"{name}s"]:
            parts.append(f"{count} {kind}{'s' * (count != 1)} ({human_bytes(figures[f'{name}_bytes'])})")
    if figures["others"]:
        parts.append(f"{figures['others']} others")
    return ", ".join(parts) or "none"
