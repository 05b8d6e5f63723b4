"""Patterns of whole tiles: which tile reads which, by their places in the grid of tiles.

Letters: nt, nh, nw tiles along each axis, nv = nt * nh * nw.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from vidattn.grid import Size


def tile_counts(size: Size, tile: Size) -> Size:
    """(nt, nh, nw), the cut tiles at the edges counted."""
    nt, nh, nw = (-(-extent // edge) for extent, edge in zip(size, tile))
    return nt, nh, nw


def chunk_of_tiles(size: Size, tile: Size, chunk: Size) -> tuple[Tensor, int]:
    """(nv,) int64 chunk of each tile of ``tile_layout`` with chunks, and how many there are."""
    number, total = torch.zeros(1, dtype=torch.long), 1
    for extent, edge, length in zip(size, tile, chunk):
        count = -(-extent // length)
        along = torch.arange(count).repeat_interleave(-(-length // edge))
        number = (number[:, None] * count + along).flatten()
        total *= count
    return number, total


def distances(counts: Size) -> tuple[Tensor, Tensor, Tensor]:
    """The distance of two tiles along each axis, three tensors that broadcast.

    Together they are (nt, nh, nw, nt, nh, nw) int64, query tile by key tile.
    """
    tables = []
    for axis, count in enumerate(counts):
        place = torch.arange(count)
        shape = [1] * 6
        shape[axis] = shape[axis + 3] = count
        tables.append((place[:, None] - place).abs().view(shape))
    return tuple(tables)


def within(counts: Size, reach: Size) -> Tensor:
    """(nv, nv) bool, tiles at most ``reach`` tiles apart on every axis."""
    t, h, w = (gap <= far for gap, far in zip(distances(counts), reach))
    return by_tile(counts, t & h & w)


def by_tile(counts: Size, pairs: Tensor) -> Tensor:
    """(nv, nv) from a table that broadcasts to (nt, nh, nw, nt, nh, nw)."""
    num_tiles = counts[0] * counts[1] * counts[2]
    return pairs.expand(*counts, *counts).reshape(num_tiles, num_tiles)


def reaches(counts: Size) -> list[Size]:
    """Boxes from one tile to the whole grid, one axis growing at a time, each inside the next.

    Their shape stays as close to that of the grid as whole tiles allow.
    """
    last = [count - 1 for count in counts]
    # at which share of the whole way each axis takes its next step
    steps = sorted(((i + 0.5) / n, axis) for axis, n in enumerate(last) for i in range(n))
    boxes = [(0, 0, 0)]
    for _, axis in steps:
        t, h, w = (far + (i == axis) for i, far in enumerate(boxes[-1]))
        boxes.append((t, h, w))
    return boxes


def axis_share(extent: int, edge: int, keep: Callable[[Tensor], Tensor]) -> float:
    """Kept share of the pairs of tokens of one axis, in tiles of ``edge`` tokens.

    Args:
        keep: whether tiles at a distance, an int64 tensor, read each other, as bool.
    """
    place = torch.arange(-(-extent // edge))
    tokens = (extent - place * edge).clamp(max=edge)
    kept = keep((place[:, None] - place).abs()) * tokens * tokens[:, None]
    return kept.sum().item() / extent**2


def fit_reach(wanted: float, counts: Size, density: Callable[[Size], float], advice: str) -> Size:
    """The box of tiles whose density is nearest to the wanted one, shaped like the grid.

    Args:
        density: of a pattern with a box of this reach; it grows with the box.
        advice: what to do about a density that is out of reach.

    Raises:
        ValueError: one tile alone is clearly denser than wanted.
    """
    boxes, density = reaches(counts), cache(density)

    def rank(box: Size) -> tuple[float, int]:
        miss = density(box) - wanted
        # what changes nothing leads on to what does
        return round(abs(miss), 12), -sum(box) if miss < 0 else sum(box)

    best = boxes[bisect_left(boxes, wanted, hi=len(boxes) - 1, key=density)]
    # boxes of the list grow in coarse steps: from one to a nearer one beside it, till none is
    while best != (near := min([best, *_beside(best, counts)], key=rank)):
        best = near
    least = density(boxes[0])
    if best == boxes[0] and least > max(wanted + 0.005, wanted * 1.05):
        raise ValueError(f"density {wanted} is out of reach: the least is {least:.3f}{advice}")
    return best


def _beside(box: Size, counts: Size) -> list[Size]:
    """The boxes that differ from one by a tile at most on every axis."""
    axes = ([far for far in (x - 1, x, x + 1) if 0 <= far < n] for x, n in zip(box, counts))
    return [(t, h, w) for t, h, w in itertools.product(*axes)]
