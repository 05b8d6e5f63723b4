"""Tables and paragraphs of plain text that fit a terminal without breaking a word."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

GAP, INDENT = "  ", " "
WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
Row = Sequence[str]


def table(
    head: Row, rows: Sequence[Row], *, prose: Collection[str] = (), width: int | None = None
) -> str:
    """Rows under their head, in as many columns as fit.

    Text gives way first: it wraps at spaces. Then the first column goes on lines of its own, above
    the others, and last the columns go on in another table below. A word is never broken, so one
    that is longer than a line sticks out.

    Args:
        head: titles of the columns; a title or a cell may have several lines.
        rows: as many cells each.
        prose: titles of the columns that may wrap.
        width: of a line; that of the terminal when not given, 80 where there is none.

    >>> print(table(["method", "density"], [["dense", "1.000"], ["radial:density=0.3", "0.3"]]))
    method              density
    dense                 1.000
    radial:density=0.3      0.3
    """
    width = shutil.get_terminal_size().columns if width is None else width
    columns = [_Column(title, cells, title in prose) for title, *cells in zip(head, *rows)]
    columns[0].is_figure = False
    if _fits(columns, width):
        return _lay_out(columns, width)
    first, *others = columns
    blocks, width = [], width - len(INDENT)
    while others:
        count = max([n for n in range(1, len(others) + 1) if _fits(others[:n], width)], default=1)
        group, others = others[:count], others[count:]
        blocks.append(_lay_out(group, width, above=first))
    return "\n\n".join(blocks)


def fill(text: str, width: int | None = None) -> str:
    """A paragraph in lines that fit; a word is never broken.

    >>> print(fill("one two three", 9))
    one two
    three
    """
    width = shutil.get_terminal_size().columns if width is None else width
    return textwrap.fill(text, width, **WHOLE)


class _Column:
    """A title with its cells, and the widths they can have."""

    def __init__(self, title: str, cells: Sequence[str], is_prose: bool):
        self.cells, self.is_prose = [title, *cells], is_prose
        lines = [line for cell in self.cells for line in cell.split("\n")]
        self.most = max(map(len, lines))
        words = [word for line in lines for word in line.split()]
        self.least = max(map(len, words), default=0) if is_prose else self.most
        self.is_figure = not is_prose and all(_is_figure(cell) for cell in cells)

    def lines(self, row: int, width: int) -> list[str]:
        """The lines of a cell, wrapped to a width and filled up to it."""
        lines = self.cells[row].split("\n")
        if self.is_prose:
            lines = [x for line in lines for x in textwrap.wrap(line, width, **WHOLE) or [""]]
        return [line.rjust(width) if self.is_figure else line.ljust(width) for line in lines]


def _is_figure(cell: str) -> bool:
    return not cell or cell.lstrip("+-~")[:1].isdigit()


def _fits(columns: Sequence[_Column], width: int) -> bool:
    # text in a narrower column is hard to read
    least = [min(column.most, max(column.least, 24)) for column in columns]
    return sum(least) + len(GAP) * (len(columns) - 1) <= width


def _widths(columns: Sequence[_Column], width: int) -> list[int]:
    """As wide as they need to be; where that is too wide, the widest text gives way."""
    widths = [column.most for column in columns]
    excess = sum(widths) + len(GAP) * (len(columns) - 1) - width
    while excess > 0:
        loose = [i for i, x in enumerate(columns) if widths[i] > x.least]
        if not loose:
            break
        widths[max(loose, key=lambda i: widths[i])] -= 1
        excess -= 1
    return widths


def _lay_out(columns: Sequence[_Column], width: int, above: _Column | None = None) -> str:
    widths, lines = _widths(columns, width), []
    for row in range(len(columns[0].cells)):
        cells = [column.lines(row, size) for column, size in zip(columns, widths)]
        height = max(map(len, cells))
        if row == 0:
            # titles stand at the bottom of the head
            cells = [[""] * (height - len(cell)) + cell for cell in cells]
        if above is not None:
            lines += above.cells[row].split("\n")
        for i in range(height):
            words = [(cell[i] if i < len(cell) else "").ljust(n) for cell, n in zip(cells, widths)]
            lines.append((INDENT if above is not None else "") + GAP.join(words))
    return "\n".join(line.rstrip() for line in lines)
