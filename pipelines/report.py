"""What a patched model did: per layer, and where the time went."""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections import Counter
from dataclasses import dataclass

from vidattn.grid import Grid
from vidattn.support.table import table

HEAD = ("layer", "sparse", "dense", "density", "searches", "recall", "ms per call", "methods")
PROSE = ("dense", "methods")
SEARCHES = HEAD.index("searches")


@dataclass(frozen=True)
class LayerReport:
    """One self-attention layer.

    Args:
        name: where it stands, such as "transformer.blocks.3.attn1".
        num_sparse: calls that ran sparse.
        num_dense: calls that ran dense, by reason.
        methods: sparse calls by what the heads followed in them.
        engines: sparse calls by the engine that ran them, joined by "+" where heads need several.
        dense_engines: dense calls likewise; those that ran without us are in none.
        density: kept pairs over all pairs of video tokens, mean of the sparse calls; None without.
        num_searches: plans that were read from content; the other sparse calls used them again.
        recall: share of dense attention that the plans of the last searches kept when they were
            made, mean over heads and sampled queries; None without a search.
        attention_ms: time of all its calls, sparse and dense.
    """

    name: str
    num_sparse: int
    num_dense: dict[str, int]
    methods: dict[str, int]
    engines: dict[str, int]
    dense_engines: dict[str, int]
    density: float | None
    num_searches: int
    recall: float | None
    attention_ms: float


@dataclass(frozen=True)
class Report:
    """A generation, or for a bare transformer everything since it was patched.

    A generation is a call of a pipeline, with all sections of a long video.

    Args:
        method: the method with its options, or the name of the schedule.
        dense_layers, dense_steps: what stayed dense: counts or fractions.
        grids: the grids that were attended to.
        num_steps: denoising steps seen, of all sections.
        num_passes: forward passes of the transformers.
        layers: one entry per layer.
        transformer_ms: time in the transformers, with the next.
        plan_ms: time of making plans; those of methods that do not read content are kept.
        vae_ms, text_encoder_ms, rest_ms, total_ms: the rest of a call of the pipeline; None for a
            bare transformer.
    """

    method: str
    dense_layers: int | float
    dense_steps: int | float
    grids: tuple[Grid, ...]
    num_steps: int
    num_passes: int
    layers: tuple[LayerReport, ...]
    transformer_ms: float
    plan_ms: float
    vae_ms: float | None = None
    text_encoder_ms: float | None = None
    rest_ms: float | None = None
    total_ms: float | None = None

    @property
    def num_sparse(self) -> int:
        """Attention calls that ran sparse."""
        return sum(layer.num_sparse for layer in self.layers)

    @property
    def num_dense(self) -> int:
        """Attention calls that ran dense."""
        return sum(sum(layer.num_dense.values()) for layer in self.layers)

    @property
    def attention_ms(self) -> float:
        """Time of all self-attention calls."""
        return sum(layer.attention_ms for layer in self.layers)

    @property
    def engines(self) -> dict[str, int]:
        """Sparse attention calls by the engine that ran them."""
        return self._count("engines")

    @property
    def dense_engines(self) -> dict[str, int]:
        """Dense attention calls by the engine that ran them."""
        return self._count("dense_engines")

    def _count(self, what: str) -> dict[str, int]:
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(getattr(layer, what))
        return dict(total)

    @property
    def density(self) -> float | None:
        """Kept pairs over all pairs in all calls, dense ones counted whole; None without calls."""
        calls = self.num_sparse + self.num_dense
        kept = sum(layer.num_sparse * (layer.density or 0) for layer in self.layers)
        return (kept + self.num_dense) / calls if calls else None

    def to_dict(self) -> dict[str, object]:
        """Everything as plain types, for JSON."""
        sums = ("num_sparse", "num_dense", "attention_ms", "density", "engines", "dense_engines")
        found = dataclasses.asdict(self) | {name: getattr(self, name) for name in sums}
        return found | {"grids": [str(grid) for grid in self.grids]}

    def __str__(self) -> str:
        if not self.num_passes:
            return f"{self.method}: nothing has run yet"
        head, *rows = self._rows()
        return "\n".join([self._head(), table(head, rows, prose=PROSE), self._times()])

    def _repr_html_(self) -> str:
        """The report as notebooks show it."""
        if not self.num_passes:
            return f"<p>{html.escape(str(self))}</p>"
        head, *rows = self._rows()
        lines = [_html_row("th", head), *(_html_row("td", row) for row in rows)]
        before, after = (f"<p>{html.escape(x)}</p>" for x in (self._head(), self._times()))
        return f"{before}<table>{''.join(lines)}</table>{after}"

    def _rows(self) -> list[tuple[str, ...]]:
        """The table: its head, and a row for each run of layers that did the same."""
        rows: list[tuple[str, ...]] = [HEAD]
        for _, run in itertools.groupby(self.layers, key=_what_it_did):
            rows.append(_row(list(run)))
        if len({methods for layer in self.layers for methods in layer.methods}) < 2:
            # the head of the table says it
            rows = [row[:-1] for row in rows]
        if not any(layer.num_searches for layer in self.layers):
            rows = [row[:SEARCHES] + row[SEARCHES + 2 :] for row in rows]
        return rows

    def _head(self) -> str:
        """What ran, and where."""
        density = "none" if self.density is None else f"{self.density:.3f}"
        engines = "".join(f", sparse on {name}" for name in self.engines)
        engines += "".join(f", dense on {name}" for name in self.dense_engines)
        grids = ", ".join(map(str, self.grids)) or "no grid"
        return (
            f"{self.method} on {grids}: {self.num_steps} steps, "
            f"{self.num_passes} passes, density {density} with the dense calls{engines}"
        )

    def _times(self) -> str:
        parts = [f"transformer {self.transformer_ms / 1e3:.2f} s"]
        parts[0] += f" (self-attention {self.attention_ms / 1e3:.2f} s"
        parts[0] += f", plans {self.plan_ms / 1e3:.2f} s)"
        if self.total_ms is None:
            return parts[0]
        others = {"VAE": self.vae_ms, "text encoder": self.text_encoder_ms, "rest": self.rest_ms}
        parts += [f"{name} {ms / 1e3:.2f} s" for name, ms in others.items() if ms is not None]
        return f"{self.total_ms / 1e3:.2f} s in all: {', '.join(parts)}"


def _html_row(tag: str, row: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"


def _what_it_did(layer: LayerReport) -> tuple:
    dense, methods = (tuple(sorted(x.items())) for x in (layer.num_dense, layer.methods))
    return layer.num_sparse, dense, methods, layer.density, layer.num_searches, layer.recall


def _row(run: list[LayerReport]) -> tuple[str, ...]:
    """One line for neighboring layers that did the same."""
    first, last = run[0], run[-1]
    name = first.name if first is last else f"{first.name} ... {last.name}"
    why = ", ".join(f"{count} ({reason})" for reason, count in first.num_dense.items())
    calls = sum(layer.num_sparse + sum(layer.num_dense.values()) for layer in run)
    if not calls:
        return name, "0", "0, never ran", *[""] * (len(HEAD) - 3)
    each = f"{sum(layer.attention_ms for layer in run) / calls:.2f}"
    density = "" if first.density is None else f"{first.density:.3f}"
    recall = "" if first.recall is None else f"{first.recall:.3f}"
    methods = ", then ".join(first.methods)
    sparse, searches = str(first.num_sparse), str(first.num_searches)
    return name, sparse, why or "0", density, searches, recall, each, methods
