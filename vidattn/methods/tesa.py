"""TESA: windows side by side, small within a frame and long in time, moved in every other layer.

Source: Wang et al., "LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with
Linear Computational Complexity", arXiv:2412.09856, whose TEmporal Swin Attention this is: shifted
windows, as in Video Swin (Liu et al., arXiv:2106.13230), over tokens that are near within a frame
and at some distance in time. Windows of odd layers lie half a window further along each axis that
one does not cover, so that two layers pass on what one keeps apart. Those at the edges are smaller,
for windows that go round the edges would need masks. LinGen has a trained state-space model beside
them for what is farther; without one, they are a method for some layers of a schedule, or for
training.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vidattn.grid import Grid, Size
from vidattn.kernels.box import check_packable
from vidattn.listing import Window
from vidattn.plan import Plan
from vidattn.planning.method import as_size, run_state
from vidattn.planning.pattern import PatternMethod
from vidattn.planning.tile_size import usual_tile

# frames of a window to a token of its edge
LENGTH = 4


@dataclass(frozen=True, kw_only=True)
class Tesa(PatternMethod):
    """The own one of windows side by side, which odd layers move by half a window.

    Args:
        window: tokens of a window along (t, h, w), or one number for all three.

    Raises:
        ValueError: a value out of range.
    """

    is_exact: ClassVar[bool] = True

    window: int | Size = (16, 4, 4)
    # whether it is an odd one
    layer: int = run_state(0)

    def __post_init__(self):
        super().__post_init__()
        as_size("window", self.window)

    def at(self, layer: int) -> Tesa:
        """The method with the windows of a layer."""
        return replace(self, layer=layer % 2)

    def with_density(self, density: float, grid: Grid) -> Tesa:
        """Windows of about this share of the grid, four times as long as wide where they can be."""

        def misfit(window: Size) -> float:
            t, h, w = window
            kept = sum(math.prod(map(_share, grid.size, window, (i, i, i))) for i in (0, 1)) / 2
            shape = abs(math.log(h / w)) + abs(math.log(t / (LENGTH * math.sqrt(h * w))))
            return abs(math.log(kept / density)) + 0.02 * shape

        # edges that cut an axis into a number of windows
        edges = ({-(-extent // n) for n in range(1, extent + 1)} for extent in grid.size)
        return replace(self, window=min(itertools.product(*edges), key=misfit))

    def check(self, grid: Grid) -> None:
        """Refuse a grid too large for a box."""
        check_packable(grid.size)

    def tile_of(self, grid: Grid) -> Size:
        """Tokens of one block along (t, h, w); where they can be, no window cuts one."""
        if self.tile is not None or self.rectify:
            return super().tile_of(grid)
        t, h, w = (
            max(1, min(edge // 2, extent))
            for edge, extent in zip(as_size("window", self.window), grid.size)
        )
        return usual_tile((t, h, w), min(64, 2 ** ((t * h * w).bit_length() - 1)))

    def pattern(self, grid: Grid) -> Plan:
        """The own window of every query."""
        window = as_size("window", self.window)
        windows = tuple(axis_window(*axis, self.layer) for axis in zip(grid.size, window))
        return Plan.from_windows(grid, windows, tile=self.tile_of(grid), dilation=(1, 1, 1))


def axis_window(extent: int, window: int, is_moved: int) -> Window:
    """First and last place that the query at each place of an axis reads."""
    shift = window // 2 * is_moved if window < extent else 0
    first = (torch.arange(extent) + shift) // window * window - shift
    return first.clamp(min=0), (first + window).clamp(max=extent) - 1


def _share(extent: int, window: int, is_moved: int) -> float:
    """Kept share of the pairs of one axis."""
    first, last = axis_window(extent, window, is_moved)
    return (last - first + 1).sum().item() / extent**2
