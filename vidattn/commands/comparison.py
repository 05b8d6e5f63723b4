"""The table of `vidattn compare`: one row of figures for each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from vidattn.commands.likeness import Measure

COLUMNS = ("density", "in all", "step", "speed-up", "whole run")


@dataclass(frozen=True)
class Row:
    """The figures of one method over all prompts.

    Args:
        density: of its plans; density_in_all counts the layers and steps that stay dense too.
        step_ms: median of a denoising step; total_ms is that of a whole run.
        attention_share: self-attention's part of the time of the steps.
        figures: of the chosen measures, by key.
    """

    label: str
    density: float
    density_in_all: float
    step_ms: float
    total_ms: float
    attention_share: float
    figures: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        """Everything as plain types, for JSON."""
        return {x: y for x, y in vars(self).items() if x != "figures"} | self.figures


def print_table(console: Console, rows: Sequence[Row], measures: Sequence[Measure]) -> None:
    """Print the table on a terminal; the first row is dense attention."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", overflow="fold")
    for column in _columns(measures):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.label.replace(":", "\n  "), *_cells(row, rows[0], measures))
    console.print(table)


def _columns(measures: Sequence[Measure]) -> list[str]:
    return [*COLUMNS, *[measure.title for measure in measures]]


def to_markdown(rows: Sequence[Row], measures: Sequence[Measure]) -> str:
    """The same table in Markdown."""
    columns = _columns(measures)
    lines = [["method", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[f"`{row.label}`", *_cells(row, rows[0], measures)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row, dense: Row, measures: Sequence[Measure]) -> list[str]:
    figures = [
        "" if row is dense and measure.is_likeness else measure.cell(row.figures[measure.key])
        for measure in measures
    ]
    times = [f"{dense.step_ms / row.step_ms:.2f}x", seconds(row.total_ms)]
    densities = [f"{row.density:.3f}", f"{row.density_in_all:.3f}"]
    return [*densities, seconds(row.step_ms), *times, *figures]


def seconds(ms: float) -> str:
    """A time in words."""
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.0f} ms"
