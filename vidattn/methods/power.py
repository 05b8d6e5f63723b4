"""Power attention: tiles at distances 1, 2, 4, 8 and so on, so that few layers reach everything.

Source: Li et al., "LogSparse Transformer" (NeurIPS 2019), and Chen et al., "PowerAttention:
Exponentially Scaling of Receptive Fields", arXiv:2503.03588, which reads a window and the blocks at
power-of-two distances of a causal sequence. In a video, distances are counted in tiles, to both
sides and along each axis. With ``axes=1`` a tile reads, beside the window around it, the lines
through it along t, h and w; with ``axes=3`` the distances on all axes may be powers at once. Two
tiles are apart by a sum of powers on each axis, so log2 of the longest axis is the number of layers
after which every token has heard of every other with ``axes=3``, three times that with ``axes=1``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.grid import Grid, Size, tile_layout
from vidattn.plan import Plan
from vidattn.planning.method import as_size, check_share
from vidattn.planning.pattern import PatternMethod
from vidattn.planning.tile_size import block_tokens, usual_tile
from vidattn.planning.tiles import axis_share, by_tile, distances, fit_reach, tile_counts, within


@dataclass(frozen=True, kw_only=True)
class Power(PatternMethod):
    """A window of tiles, and tiles at power-of-two distances along the axes.

    Args:
        near: tiles up to this distance on every axis, a (t, h, w) tuple or one number, read each
            other.
        axes: along how many axes at once, 1 to 3, tiles a power of two apart read each other.
        density: kept share of the video pairs, between 0 and 1; sets ``near`` to come as close to
            it as whole tiles allow.
        tile: tokens of one block along (t, h, w); chosen for the grid when not given, and smaller
            where the powers alone would exceed ``density``.

    Raises:
        ValueError: a value out of range; from ``plan``, a density below what the powers keep.
    """

    near: int | Size = 1
    axes: int = 1
    density: float | None = None

    def __post_init__(self):
        super().__post_init__()
        as_size("near", self.near, least=0)
        if self.axes not in (1, 2, 3):
            raise ValueError(f"axes must be 1, 2 or 3, got {self.axes}")
        check_share("density", self.density)

    def check(self, grid: Grid) -> None:
        """Refuse a density below what the powers keep."""
        self._near_on(grid)

    def pattern(self, grid: Grid) -> Plan:
        """Whole tiles, by their distance."""
        tile = self.tile_of(grid)
        counts = tile_counts(grid.size, tile)
        blocks = within(counts, self._near_on(grid)) | _powers(counts, self.axes)
        return Plan.from_blocks(grid, tile_layout(grid, tile), blocks[None, None])

    def tile_of(self, grid: Grid) -> Size:
        """The usual tile, or the largest whose powers alone stay within the density."""
        if self.tile is not None:
            return super().tile_of(grid)
        size, room = grid.size, self.density or 1.0
        most = block_tokens(size)
        found = [usual_tile(size, tokens) for tokens in (64, 32, 16, 8) if tokens <= most]
        fits = (x for x in found if _density(size, x, self.axes, (0, 0, 0)) <= room)
        return next(fits, found[0])

    def _near_on(self, grid: Grid) -> Size:
        """Tiles that the window reaches along each axis."""
        if self.density is None:
            return as_size("near", self.near, least=0)
        tile = self.tile_of(grid)
        return fit_reach(
            self.density,
            tile_counts(grid.size, tile),
            lambda box: _density(grid.size, tile, self.axes, box),
            f" with tiles of {tile}; set fewer axes or a smaller tile",
        )


def is_power(gap: Tensor) -> Tensor:
    """Whether a distance is a power of two."""
    return (gap > 0) & ((gap & (gap - 1)) == 0)


def _powers(counts: Size, axes: int) -> Tensor:
    """(nv, nv) bool, tiles apart by a power of two on at most so many axes, by 0 on the others."""
    gaps = distances(counts)
    t, h, w = ((gap == 0) | is_power(gap) for gap in gaps)
    moved = sum((gap > 0).to(torch.uint8) for gap in gaps)
    return by_tile(counts, t & h & w & (moved <= axes))


def _density(size: Size, tile: Size, axes: int, near: Size) -> float:
    """Kept share of the video pairs: of the window and of the powers, counted once."""
    pairs = list(zip(size, tile, near))
    window = [axis_share(n, edge, lambda gap, far=far: gap <= far) for n, edge, far in pairs]
    still = [axis_share(n, edge, lambda gap: gap == 0) for n, edge, _ in pairs]
    apart = [axis_share(n, edge, is_power) for n, edge, _ in pairs]
    inside = [
        axis_share(n, edge, lambda gap, far=far: is_power(gap) & (gap <= far))
        for n, edge, far in pairs
    ]
    powers = both = 0.0
    for moved in itertools.product((False, True), repeat=3):
        if sum(moved) <= axes:
            powers += math.prod(map(_pick, moved, apart, still))
            both += math.prod(map(_pick, moved, inside, still))
    return math.prod(window) + powers - both


def _pick(moved: bool, apart: float, still: float) -> float:
    return apart if moved else still
