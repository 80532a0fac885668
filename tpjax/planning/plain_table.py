"""The one style of table that reports use."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def plain_table(title: str, *names: str, numbers: Sequence[str] = ()) -> Table:
    """Makes an empty table.

    Args:
        title: its title.
        *names: headers of text columns.
        numbers: headers of columns to the right of these, aligned to the right.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
