"""The table of `vidattn compare`: one row of figures for each method."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vidattn.quality.measures import Measure
from vidattn.support.table import table

COLUMNS = ("speed-up", "whole run", "step", "step speed-up", "density", "in all")


@dataclass(frozen=True)
class Row:
    """The figures of one method over all prompts.

    Args:
        density: of its plans; density_in_all counts the layers and steps that stay dense too.
        steps_ms: times of the denoising steps; total_ms is the median of a whole run.
        attention_share: self-attention's part of the time of the steps.
        figures: of the chosen measures, by key.
    """

    label: str
    density: float
    density_in_all: float
    steps_ms: list[float]
    total_ms: float
    attention_share: float
    figures: dict[str, float]

    @property
    def step_ms(self) -> float:
        """Median time of a denoising step."""
        return statistics.median(self.steps_ms)

    @property
    def middle_ms(self) -> tuple[float, float]:
        """The quartiles of the steps: start-up and the few steps that stay dense lie outside."""
        if len(self.steps_ms) < 2:
            return self.step_ms, self.step_ms
        low, _, high = statistics.quantiles(self.steps_ms, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, object]:
        """Everything as plain types, for JSON."""
        plain = {x: y for x, y in vars(self).items() if x not in ("figures", "steps_ms")}
        steps = {"step_ms": self.step_ms, "step_ms_middle_half": list(self.middle_ms)}
        return plain | steps | self.figures


def to_text(rows: Sequence[Row], measures: Sequence[Measure]) -> str:
    """The table for a terminal; the first row is dense attention."""
    # narrow, so that all of them fit into 80 columns
    heads = [re.sub(r",? |(?<=MS-)", "\n", column) for column in _columns(measures)]
    return table(["method", *heads], _lines(rows, measures))


def to_markdown(rows: Sequence[Row], measures: Sequence[Measure]) -> str:
    """The same table in Markdown."""
    columns = _columns(measures)
    lines = [["method", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[f"`{label}`", *cells] for label, *cells in _lines(rows, measures)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _columns(measures: Sequence[Measure]) -> list[str]:
    return [*COLUMNS, *[measure.column for measure in measures]]


def _lines(rows: Sequence[Row], measures: Sequence[Measure]) -> list[list[str]]:
    return [[row.label, *_cells(row, rows[0], measures)] for row in rows]


def _cells(row: Row, dense: Row, measures: Sequence[Measure]) -> list[str]:
    figures = [
        "" if row is dense and measure.is_likeness else measure.cell(row.figures[measure.key])
        for measure in measures
    ]
    whole = [f"{dense.total_ms / row.total_ms:.2f}x", seconds(row.total_ms)]
    low, high = row.middle_ms
    half = (high - low) / row.step_ms / 2
    step = [f"{seconds(row.step_ms)} ±{half:.0%}", f"{dense.step_ms / row.step_ms:.2f}x"]
    return [*whole, *step, f"{row.density:.3f}", f"{row.density_in_all:.3f}", *figures]


def seconds(ms: float) -> str:
    """A time in words."""
    if ms >= 1e5:
        return f"{ms / 1e3:.0f} s"
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.0f} ms"
