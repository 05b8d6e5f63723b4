"""Windows cut into tiles of queries, each with the halo of keys that its queries read.

Tiles that look alike - the same windows, seen from the tile - and stand at equal distances form a
run: their queries and halos are strided views of the tensors, and one table serves them all. Away
from the borders of the video that is nearly every tile.

Letters: l queries of a tile along one axis, m keys of its halo, c tiles of a run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# what the table marks a hidden pair with
HIDDEN_PAIR = -1
# edges of a tile that are tried, and the most queries of a tile
EDGES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 24, 32, 64, 128, 256)
MAX_QUERIES = 256
# costs next to that of one score: gathering a key with its value, and beginning a run
KEY_COST = 16
RUN_COST = 4096


@dataclass
class Run:
    """Tiles of one axis that look alike and stand at equal distances."""

    first_query: int
    first_key: int
    # (l, m) int64, key place minus query place plus the reach of the window, or HIDDEN_PAIR
    table: Tensor
    query_step: int = 1
    key_step: int = 1
    count: int = 1

    @property
    def queries(self) -> tuple[int, int, int, int]:
        """First place, step from tile to tile, tiles, length of a tile."""
        return self.first_query, self.query_step, self.count, self.table.shape[0]

    @property
    def keys(self) -> tuple[int, int, int, int]:
        """First place, step from tile to tile, tiles, length of a halo."""
        return self.first_key, self.key_step, self.count, self.table.shape[1]


@dataclass(frozen=True)
class Axis:
    """One axis in tiles; places are positions sorted by dilation group.

    Args:
        order: (extent,) int64, the position at each place; None where that is the place itself.
        reach: keys further than this from a query are never read; a table counts from it.
    """

    runs: tuple[Run, ...]
    reach: int
    order: Tensor | None = None

    @property
    def back(self) -> Tensor | None:
        """(extent,) int64, the place of each position."""
        return None if self.order is None else self.order.argsort()


@dataclass(frozen=True)
class Halo:
    """Three axes in tiles."""

    axes: tuple[Axis, Axis, Axis]

    @property
    def table_size(self) -> tuple[int, int, int]:
        """Relative positions along each axis: the shape of a bias table."""
        t, h, w = (2 * axis.reach + 1 for axis in self.axes)
        return t, h, w

    @property
    def runs(self) -> Iterator[tuple[Run, Run, Run]]:
        """Every kind of tile."""
        return itertools.product(*(axis.runs for axis in self.axes))

    def pairs(self, runs: tuple[Run, Run, Run], device: torch.device) -> tuple[Tensor, bool]:
        """The relative position of every pair of a tile.

        Returns:
            (queries * keys,) int64 places in a flat bias table, its size for a hidden pair; whether
            there are hidden ones.
        """
        size = self.table_size
        index, hidden = torch.zeros((1,) * 6, dtype=torch.long), torch.zeros((), dtype=torch.bool)
        for axis, run in enumerate(runs):
            shape = [1] * 6
            shape[axis], shape[axis + 3] = run.table.shape
            table = run.table.view(shape)
            index = index * size[axis] + table
            hidden = hidden | (table == HIDDEN_PAIR)
        index = index.masked_fill_(hidden, math.prod(size)).flatten()
        return index.to(device), bool(hidden.any())


def window_axis(
    first: Sequence[int],
    last: Sequence[int],
    groups: Sequence[tuple[int, int]],
    edge: int,
    reach: int,
) -> tuple[Run, ...]:
    """The runs of an axis in tiles of up to ``edge`` queries.

    Args:
        first, last: the places that the query at each place reads, both included.
        groups: (first, last + 1) places of each dilation group; no tile crosses into a next one.
        reach: the longest distance of a key from its query.
    """
    runs: list[Run] = []
    shape_before: tuple = ()
    for group_begin, group_end in groups:
        for begin in range(group_begin, group_end, edge):
            end = min(begin + edge, group_end)
            low = min(first[begin:end])
            # the windows, seen from the tile
            shape = tuple(x - begin for x in (low, *first[begin:end], *last[begin:end]))
            if shape != shape_before or not _joins(runs[-1], begin, low):
                runs.append(Run(begin, low, _table(first, last, begin, end, reach)))
            shape_before = shape
    return tuple(runs)


def _joins(run: Run, query: int, key: int) -> bool:
    """Whether a tile stands one step behind the last tile of a run, which then takes it in."""
    steps = (
        query - run.first_query - (run.count - 1) * run.query_step,
        key - run.first_key - (run.count - 1) * run.key_step,
    )
    if run.count > 1 and steps != (run.query_step, run.key_step):
        return False
    run.query_step, run.key_step = steps
    run.count += 1
    return True


def _table(first: Sequence[int], last: Sequence[int], begin: int, end: int, reach: int) -> Tensor:
    low, high = min(first[begin:end]), max(last[begin:end])
    query, key = torch.arange(begin, end)[:, None], torch.arange(low, high + 1)
    starts, ends = (torch.tensor(x[begin:end])[:, None] for x in (first, last))
    table = key - query + reach
    return table.masked_fill_((key < starts) | (key > ends), HIDDEN_PAIR)


def every_pair(num_queries: int, num_keys: int) -> Halo:
    """All of ``num_queries`` queries read all of ``num_keys`` keys; both lie on the last axis."""
    one = Axis((Run(0, 0, torch.zeros(1, 1, dtype=torch.long)),), 0)
    runs = []
    for first, length, count in _cut(num_queries, MAX_QUERIES):
        table = torch.zeros(length, num_keys, dtype=torch.long)
        runs.append(Run(first, 0, table, length, 0, count))
    return Halo((one, one, Axis(tuple(runs), 0)))


def _cut(size: int, edge: int) -> Iterator[tuple[int, int, int]]:
    """First place, length and number of the whole pieces of an axis, then of the rest."""
    if size >= edge:
        yield 0, edge, size // edge
    if size % edge:
        yield size - size % edge, size % edge, 1


def choose_edges(tried: Sequence[dict[int, tuple[Run, ...]]]) -> tuple[int, int, int]:
    """The edges of a tile with which the windows cost least.

    Args:
        tried: for each axis, its runs with each edge.
    """
    costs = [{edge: _costs(runs) for edge, runs in axis.items()} for axis in tried]

    def cost(edges: tuple[int, ...]) -> float:
        scores, keys, runs = (math.prod(x) for x in zip(*(c[e] for c, e in zip(costs, edges))))
        return scores + KEY_COST * keys + RUN_COST * runs

    shapes = itertools.product(*tried)
    t, h, w = min((x for x in shapes if math.prod(x) <= MAX_QUERIES), key=cost)
    return t, h, w


def _costs(runs: tuple[Run, ...]) -> tuple[int, int, int]:
    """Scores and keys of all tiles of an axis, and its runs."""
    scores = sum(run.count * run.table.numel() for run in runs)
    return scores, sum(run.count * run.table.shape[1] for run in runs), len(runs)
