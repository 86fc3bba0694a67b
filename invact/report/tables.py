"""Tables for consoles of any width: with their columns side by side where these fit, else one row below the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_BETWEEN = 3  # characters from one column to the next
_EDGES = 2


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        least: the fewest characters that its text may be wrapped to; None if only its name may be wrapped.
    """

    name: str
    right: bool = False
    least: int | None = None

    def width(self, cells: Sequence[str]) -> int:
        """That takes every cell in one line."""
        return max(map(len, [self.name, *cells]))

    def least_width(self, cells: Sequence[str]) -> int:
        wrapped = max(map(len, [*self.name.split(), *cells]))
        return wrapped if self.least is None else min(self.width(cells), self.least)


def print_table(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    styles: Sequence[str | None] = (),
    grouped: bool = False,
) -> None:
    """Prints the rows as a table or, where that does not fit in the console, one below the other, cell by cell.

    Args:
        columns: one for every cell of a row; empty cells are left out of what stands below each other.
        styles: of each row; by default none.
        grouped: neighbours with the same first cell are a group, and the table shows that cell once.
    """
    styles = styles or [None] * len(rows)
    widths = _widths(columns, rows, console.width - _BETWEEN * (len(columns) - 1) - _EDGES)
    if widths is not None:
        console.print(_side_by_side(columns, widths, rows, styles, grouped))
    else:
        for row, style in zip(rows, styles, strict=True):
            console.print(Padding(_below_each_other(columns, row), (1, 0, 0, 1)), style=style)
        console.print()


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Of every column, together no more than there is room for; None if they do not fit even when wrapped."""
    cells = list(zip(*rows, strict=True))
    whole = [column.width(of_it) for column, of_it in zip(columns, cells, strict=True)]
    widths = [column.least_width(of_it) for column, of_it in zip(columns, cells, strict=True)]
    if sum(widths) > room:
        return None
    while sum(widths) < min(room, sum(whole)):
        # To the column that is wrapped into the most lines and, of several, to that which lacks least to a line fewer.
        lines = [math.ceil(all_of_it / width) for all_of_it, width in zip(whole, widths, strict=True)]
        neediest = max(range(len(widths)), key=lambda number: (lines[number], widths[number] - whole[number]))
        widths[neediest] += 1
    return widths


def _side_by_side(
    columns: Sequence[Column],
    widths: Sequence[int],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str | None],
    grouped: bool,
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column, width in zip(columns, widths, strict=True):
        table.add_column(
            column.name,
            justify="right" if column.right else "left",
            overflow="fold",
            width=width,
        )
    styled = list(zip(rows, styles, strict=True))
    for _, group in groupby(styled, lambda pair: pair[0][0]):
        members = list(group)
        for number, (row, style) in enumerate(members):
            repeated = grouped and number > 0
            cells = ["" if repeated else row[0], *row[1:]]
            table.add_row(*map(Text, cells), style=style, end_section=grouped and number == len(members) - 1)
    return table


def _below_each_other(columns: Sequence[Column], row: Sequence[str]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    for column, cell in zip(columns, row, strict=True):
        if cell:
            grid.add_row(column.name, Text(cell))
    return grid
