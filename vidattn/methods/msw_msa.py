"""MSW-MSA: a frame is cut into windows that read themselves alone, and lie elsewhere in each step.

Source: Zhang et al., "HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in
Pretrained Diffusion Models", arXiv:2311.17528. A frame of h rows is rolled by i / 4 of a window and
cut into windows of ceil(h / 2) rows, and likewise its columns, so that a window may hold tokens of
both edges. The authors' code draws i from 0 to 3 anew in every block, and resizes frames that two
windows do not divide; here step s rolls by i = s mod 4 in all blocks, and the last windows are
smaller. A window holds all frames of a video. Their RAU-Net, which resamples the features of a
UNet, is no attention.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vidattn.grid import Grid, Layout, Size, tile_layout
from vidattn.plan import Plan
from vidattn.planning.method import as_size, run_state
from vidattn.planning.pattern import PatternMethod
from vidattn.planning.tile_size import block_tokens, usual_tile
from vidattn.planning.tiles import chunk_of_tiles


@dataclass(frozen=True, kw_only=True)
class MswMsa(PatternMethod):
    """Windows side by side, which denoising steps put to other places in turn.

    Args:
        windows: how many there are along the rows and the columns of a frame, at most as many as
            tokens.
        shifts: places that steps put the windows to before they begin again; 1 for one place.

    Raises:
        ValueError: a value out of range.
    """

    is_exact: ClassVar[bool] = True

    windows: tuple[int, int] = (2, 2)
    shifts: int = 4
    # it moves the windows
    step: int = run_state(0)

    def __post_init__(self):
        super().__post_init__()
        if min(self.windows) < 1:
            raise ValueError(
                f"windows must be two counts of at least 1, of rows and columns: {self.windows}"
            )
        if self.shifts < 1:
            raise ValueError(f"shifts must be an integer of at least 1, got {self.shifts}")

    def in_step(self, step: int) -> MswMsa:
        """The method with the windows of a step."""
        return replace(self, step=step % self.shifts)

    def with_density(self, density: float, grid: Grid) -> MswMsa:
        """So many windows that each is about this share of a frame, and about as high as wide."""

        def misfit(windows: tuple[int, int]) -> float:
            rows, columns = windows
            edges = (grid.h / rows) / (grid.w / columns)
            return abs(math.log(rows * columns * density)) + 0.1 * abs(math.log(edges))

        most = math.ceil(1 / density)
        counts = (range(1, min(extent, most) + 1) for extent in (grid.h, grid.w))
        return replace(self, windows=min(itertools.product(*counts), key=misfit))

    def window_of(self, grid: Grid) -> Size:
        """Tokens of a window along (t, h, w); those at the far edges may be smaller."""
        h, w = (-(-extent // count) for extent, count in zip((grid.h, grid.w), self.windows))
        return grid.t, h, w

    def tile_of(self, grid: Grid) -> Size:
        """Tokens of one block along (t, h, w)."""
        if self.tile is not None:
            return as_size("tile", self.tile)
        return usual_tile(self.window_of(grid), block_tokens(grid.size) if self.rectify else 64)

    def pattern(self, grid: Grid) -> Plan:
        """Whole blocks of the own window."""
        window, tile = self.window_of(grid), self.tile_of(grid)
        layout = _rolled(
            tile_layout(grid, tile, chunk=window),
            grid,
            [edge * self.step // self.shifts for edge in window[1:]],
        )
        number, _ = chunk_of_tiles(grid.size, tile, window)
        return Plan.from_blocks(grid, layout, (number[:, None] == number)[None, None])


def _rolled(layout: Layout, grid: Grid, shift: list[int]) -> Layout:
    """A layout of frames that are rolled back along their rows and columns."""
    tokens = torch.arange(grid.num_video_tokens).view(grid.size)
    tokens = tokens.roll([-step for step in shift], (1, 2)).flatten().int() + grid.video_start
    video = layout.order[: layout.num_video_blocks * layout.block]
    places = (video - grid.video_start).clamp_min(0).long()
    moved = torch.where(video < 0, -1, tokens[places])
    return replace(layout, order=torch.cat([moved, layout.order[len(video) :]]))
