"""Print tables and texts on standard output without truncating cells on narrow terminals or rows in files."""

from __future__ import annotations

from textwrap import TextWrapper

from rich.columns import Columns
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_tables(console: Console, *tables: Table) -> None:
    """Print tables, side by side if there is enough width.

    On a terminal that is too narrow for columns that must not wrap, the terminal breaks the rows. In a pipe or a file
    every row is one line, however long.
    """
    width = console.width
    try:
        console.width = max(width, *(_least_width(console, table) for table in tables))
        console.print(tables[0] if len(tables) == 1 else Columns(tables, padding=(0, 3)))
    finally:
        console.width = width


def print_text(console: Console, text: str, *, indent: int = 0) -> None:
    """Print a line of words. On a terminal it is broken between words, further lines behind ``indent`` columns; in a
    pipe or a file it is one line, however long."""
    if not console.is_terminal:
        console.print(text, soft_wrap=True, markup=False, highlight=False)
        return
    words = TextWrapper(console.width, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
    for line in words.wrap(text):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _least_width(console: Console, table: Table) -> int:
    # Measured against more than the width: rich takes a table to need no more than there is.
    unlimited = console.options.update(max_width=10**6)
    if not console.is_terminal:
        return Measurement.get(console, unlimited, table).maximum
    unbroken = [column for column in table.columns if column.no_wrap]
    for column in unbroken:
        cells = (column.header, *column.cells)
        column.min_width = max(Measurement.get(console, unlimited, cell).maximum for cell in cells)
    return Measurement.get(console, unlimited, table).minimum if unbroken else 0
