"""Sliding tile attention: whole tiles read whole tiles around them.

Source: Zhang et al., "Fast Video Generation with Sliding Tile Attention", arXiv:2502.04507. It is
neighborhood attention whose window slides by a tile instead of a token, so that no block needs a
predicate: tile i of an axis with n tiles reads the w tiles from min(max(i - w // 2, 0), n - w) on.
The paper has tiles of 6 x 8 x 8 tokens and, on 30 x 48 x 80 tokens, windows of 3 x 3 x 3 tiles
(density 0.09). Here a grid may cut its last tiles.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from vidattn.grid import Grid, Size
from vidattn.kernels.box import check_packable
from vidattn.listing import Window
from vidattn.plan import Plan
from vidattn.planning.method import as_size, check_share
from vidattn.planning.pattern import PatternMethod
from vidattn.planning.tile_size import block_tokens
from vidattn.planning.tiles import fit_reach, tile_counts

TILE = (6, 8, 8)
# tokens of a block at most: a larger tile is read in pieces
LARGEST_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class SlidingTile(PatternMethod):
    """A window of whole tiles, which slides inward at the edges of the video.

    Args:
        window: tiles that a tile reads along (t, h, w), or one number for all three.
        density: kept share of the video pairs, between 0 and 1; sets ``window`` to come as close
            to it as whole tiles allow.
        tile: tokens of a tile along (t, h, w); (6, 8, 8) when not given, halved along an axis of
            fewer than four such tiles; on a grid of fewer than 8,192 tokens, the usual block.

    Raises:
        ValueError: a value out of range; from ``plan``, a density below that of one tile.
    """

    window: int | Size = 3
    density: float | None = None

    def __post_init__(self):
        super().__post_init__()
        as_size("window", self.window)
        check_share("density", self.density)

    def tile_of(self, grid: Grid) -> Size:
        """Tokens of a tile along (t, h, w)."""
        is_small = block_tokens(grid.size) < 64
        return super().tile_of(grid) if self.tile or is_small else _halved(grid.size)

    def check(self, grid: Grid) -> None:
        """Refuse a density below that of one tile, and a grid too large for a box."""
        check_packable(grid.size)
        self._window_on(grid)

    def pattern(self, grid: Grid) -> Plan:
        """Whole tiles, by their distance."""
        tile, window = self.tile_of(grid), self._window_on(grid)
        windows = tuple(map(axis_window, grid.size, window, tile))
        return Plan.from_windows(grid, windows, tile=_piece(tile), dilation=(1, 1, 1))

    def _window_on(self, grid: Grid) -> Size:
        """Tiles that a tile reads along each axis."""
        if self.density is None:
            return as_size("window", self.window)
        tile = self.tile_of(grid)
        t, h, w = fit_reach(
            self.density,
            tile_counts(grid.size, tile),
            lambda reach: math.prod(map(_share, grid.size, reach, tile)),
            f" with tiles of {tile}; set a smaller tile",
        )
        return t + 1, h + 1, w + 1


def axis_window(extent: int, window: int, edge: int) -> Window:
    """First and last place that the query at each place of an axis reads."""
    num_tiles = -(-extent // edge)
    window = min(window, num_tiles)
    tile = torch.arange(extent) // edge
    start = (tile - window // 2).clamp(min=0, max=num_tiles - window)
    return start * edge, ((start + window) * edge).clamp(max=extent) - 1


def _share(extent: int, reach: int, edge: int) -> float:
    """Kept share of the pairs of one axis with a window of a tile and ``reach`` more."""
    first, last = axis_window(extent, reach + 1, edge)
    return (last - first + 1).sum().item() / extent**2


def _halved(size: Size) -> Size:
    tile = list(TILE)
    for axis, extent in enumerate(size):
        while tile[axis] > 1 and 3 * tile[axis] >= extent:
            tile[axis] //= 2
    return tuple(tile)


def _piece(tile: Size) -> Size:
    """The largest box that fits a block and cuts a tile into equal pieces, as cubic as can be."""
    edges = ([edge for edge in range(1, n + 1) if n % edge == 0] for n in tile)
    boxes = (box for box in itertools.product(*edges) if math.prod(box) <= LARGEST_BLOCK)
    return max(boxes, key=lambda box: (math.prod(box), min(box)))
