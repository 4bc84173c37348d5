"""Plain tables of text, for the terminal; without anything heavy to import."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def listing(rows: Iterable[Sequence[str]], *columns: str) -> Table:
    """With these rows of text."""
    made = headed(*columns)
    for row in rows:
        add(made, row)
    return made


def headed(*columns: str) -> Table:
    """Without rows; the last column may wrap."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, no_wrap=column != columns[-1])
    return made


def add(made: Table, cells: Iterable[str], style: str = "") -> None:
    """Cells are text, never markup: they hold names from outside."""
    made.add_row(*[Text(cell) for cell in cells], style=style)
