"""Windows along the axes of a grid: which box of places the token at each place reads.

Letters: P places of a grid, X tokens beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Edges = tuple[int, int, int]
# products that cost as much as the power of one score
POWER_COST = 20
# numbers of a head that the search for tiles supposes
HEAD_DIM = 64


@dataclass(frozen=True, eq=False)
class PlaceWindows:
    """For each axis, the first and the last place that its places read; a token reads their box.

    Places of an axis are its positions sorted by dilation group.
    """

    token: (
        Tensor  # (P + X,) int32, of each place; behind them those that read, and are read by, all
    )
    first: tuple[Tensor, Tensor, Tensor]  # (extent,) int64
    last: tuple[Tensor, Tensor, Tensor]

    @cached_property
    def size(self) -> Edges:
        """Places along each axis."""
        t, h, w = (x.numel() for x in self.first)
        return t, h, w

    @property
    def num_beside(self) -> int:
        """X."""
        return self.token.numel() - math.prod(self.size)

    @property
    def num_pairs(self) -> int:
        """Pairs of tokens that are kept."""
        of_axes = (int((last - first + 1).sum()) for first, last in zip(self.first, self.last))
        return math.prod(of_axes) + self.token.numel() ** 2 - math.prod(self.size) ** 2

    def tiles(self, queries: int, shared: int) -> PlaceTiles:
        """The tiles of up to so many queries with which windows cost least.

        Args:
            queries: whose scores are computed together, a power of two.
            shared: queries of them whose outputs are computed together, likewise.
        """
        axes = [_Axis(*axis) for axis in zip(self.first, self.last)]
        choices = itertools.product(_boxes(queries), _boxes(shared))
        fitting = [
            (edge, group) for edge, group in choices if all(e % g == 0 for e, g in zip(edge, group))
        ]

        def cost(choice: tuple[Edges, Edges]) -> float:
            edge, group = choice
            scores = math.prod(axis.keys(e, e) for axis, e in zip(axes, edge))
            sums = math.prod(axis.keys(e, g) for axis, e, g in zip(axes, edge, group))
            return scores * (HEAD_DIM + POWER_COST) + sums * shared * HEAD_DIM / queries

        edge, group = min(fitting, key=cost)
        return PlaceTiles(tuple(axis.cuts(e) for axis, e in zip(axes, edge)), edge, group)


@dataclass(frozen=True, eq=False)
class PlaceTiles:
    """Tiles of queries: every box of one piece of each axis."""

    cuts: tuple[list[int], list[int], list[int]]  # where the pieces begin, and the extent
    edge: Edges  # places of a piece, at most
    group: Edges  # of the boxes in a tile whose outputs are computed together


class _Axis:
    """One axis, cut in pieces of places."""

    def __init__(self, first: Tensor, last: Tensor):
        self.first, self.last = first, last
        # windows begin further back where a dilation group does
        starts = ((first[1:] < first[:-1]).nonzero().flatten() + 1).tolist()
        self.groups = list(itertools.pairwise([0, *starts, first.numel()]))
        self._cuts: dict[int, list[int]] = {}

    def cuts(self, edge: int) -> list[int]:
        """Where pieces of ``edge`` places begin, and the extent; the ends of a group may be less.

        Of the places where the first one may end, that with which fewest keys are read.
        """
        if edge not in self._cuts:
            found = []
            for begin, end in self.groups:
                offsets = range(min(edge, end - begin))
                ways = [[begin, *range(begin + (x or edge), end, edge)] for x in offsets]
                found += min(ways, key=lambda way: self._count(way, end))
            self._cuts[edge] = [*found, self.first.numel()]
        return self._cuts[edge]

    def keys(self, edge: int, group: int) -> int:
        """Keys that pieces read, each of which is cut again in parts of ``group`` places."""
        bounds = itertools.pairwise(self.cuts(edge))
        begins = [x for begin, end in bounds for x in range(begin, end, group)]
        return self._count(begins, self.first.numel())

    def _count(self, begins: list[int], end: int) -> int:
        # windows of a group move one way
        starts = torch.tensor(begins)
        lasts = torch.tensor([*begins[1:], end]) - 1
        return int((self.last[lasts] - self.first[starts] + 1).sum())


def _boxes(volume: int) -> Iterator[Edges]:
    """Every box of a power of two of places."""
    exponent = volume.bit_length() - 1
    for i, j in itertools.product(range(exponent + 1), repeat=2):
        if i + j <= exponent:
            yield 2**i, 2**j, 2 ** (exponent - i - j)
