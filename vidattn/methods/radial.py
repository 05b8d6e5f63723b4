"""Radial attention: the further apart two frames, the smaller the window they share.

Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
Generation", arXiv:2506.19852. Between frames at distance d with g = bit_length(d), a token reads a
band of L = 2 ** bit_length(P) / 2 ** g * decay tokens to either side, with P tokens to a frame.
Once L is below the block length only every (block / L)-th frame distance is kept. Here a block pair
is kept or left whole, by the distance of the two block centers. The paper's band runs along the
raster of a frame (``window="raster"``); ``window="tile"`` gives its tokens the shape of the frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout, Size, block_tokens, frame_layout, tile_layout, usual_tile
from vidattn.method import as_size
from vidattn.pattern import PatternMethod
from vidattn.plan import Plan
from vidattn.registry import unknown


@dataclass(frozen=True)
class Radial(PatternMethod):
    """Windows that halve whenever the distance in frames doubles.

    Args:
        density: kept share of the video pairs, between 0 and 1; sets ``decay`` to come as close to
            it as whole blocks allow.
        decay: factor on the width of every window, used when no density is given.
        window: "tile" for windows in two dimensions, "raster" for the paper's band.
        near: frames up to this distance read each other whole.
        sink: whether every frame reads the first frame whole.
        tile: tokens of one block along (t, h, w), with t = 1; chosen for the grid when not given.
        rectify: add an estimate of what is not read to the output, from queries and keys.

    Raises:
        ValueError: a value out of range; from ``plan``, a density below what ``near`` and ``sink``
            keep on that grid.
    """

    density: float | None = None
    decay: float = 1.0
    window: str = "tile"
    near: int = 1
    sink: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(
                f"density must be above 0 and at most 1, got {self.density}: it is the share of "
                "pairs kept, 0.25 reads a quarter of them"
            )
        if not 0 < self.decay < math.inf:
            raise ValueError(f"decay must be positive, got {self.decay}")
        if self.window not in ("tile", "raster"):
            raise unknown("window", self.window, ("tile", "raster"))
        if self.near < 0:
            raise ValueError(f"near must be a number of frames, at least 0, got {self.near}")
        if self.tile is not None and as_size("tile", self.tile)[0] != 1:
            raise ValueError(f"tile must be one frame deep, (1, h, w), got {self.tile}")

    def tile_of(self, grid: Grid) -> Size:
        """One frame deep; large blocks run faster, but in a small frame no window would show."""
        if self.tile is not None:
            return super().tile_of(grid)
        tokens = 128 if grid.h * grid.w >= 1024 else block_tokens(grid.size)
        return usual_tile(grid.size, tokens, is_flat=True)

    def pattern(self, grid: Grid) -> Plan:
        """Whole blocks, by their distance in time and space."""
        tile = self.tile_of(grid)
        block = math.prod(tile)
        per_frame = tile_layout(Grid(1, grid.h, grid.w), tile)
        layout = tile_layout(grid, tile)
        if self.window == "raster":
            per_frame = frame_layout(Grid(1, grid.h, grid.w), block)
            layout = frame_layout(grid, block)
        reach = _reach(grid, per_frame, self.window)
        share = _shares(grid, per_frame)
        decay = self.decay
        if self.density is not None:
            decay = self._solve(grid, reach, share, block)
        by_distance = self._keep(grid, reach, block, decay)
        frame = torch.arange(grid.t)
        blocks = by_distance[(frame[:, None] - frame).abs()]
        if self.sink:
            blocks[:, 0] = True
        nv = layout.num_video_blocks
        return Plan.from_blocks(grid, layout, blocks.transpose(1, 2).reshape(1, 1, nv, nv))

    def _keep(self, grid: Grid, reach: Tensor, block: int, decay: float) -> Tensor:
        """(t, m, m) bool: which of the m blocks of a frame read which, at each frame distance."""
        distance = torch.arange(grid.t)
        halvings = torch.tensor([int(d).bit_length() for d in distance])
        width = 2.0 ** ((grid.h * grid.w).bit_length() - halvings) * decay
        every = (block / width).clamp(min=1).round()
        seen = (distance % every == 0) | (distance <= self.near)
        keep = (reach <= width.clamp(min=block)[:, None, None]) & seen[:, None, None]
        return keep | (distance <= self.near)[:, None, None]

    def _solve(self, grid: Grid, reach: Tensor, share: Tensor, block: int) -> float:
        """The decay whose density is nearest to the wanted one."""
        frames = torch.arange(grid.t)
        pairs = torch.bincount((frames[:, None] - frames).abs().flatten(), minlength=grid.t)

        def density(decay: float) -> float:
            keep = self._keep(grid, reach, block, decay)
            by_distance = (keep * share).sum((1, 2)).double()
            kept = (by_distance * pairs).sum()
            if self.sink:
                kept += (1 - by_distance).sum()
            return kept.item() / grid.t**2

        steps = [2 ** (exponent / 8) for exponent in range(-16 * 8, 6 * 8 + 1)]
        found = [density(decay) for decay in steps]
        if min(found) > self.density + 0.005 and min(found) > self.density * 1.05:
            raise ValueError(
                f"radial cannot go down to density {self.density} on {grid.size}: frames up to "
                f"near={self.near} apart{' and the first frame' if self.sink else ''} are read "
                f"whole, which alone keeps {min(found):.3f}; lower near, set sink=False or ask for "
                "more"
            )
        best = min(range(len(steps)), key=lambda i: abs(found[i] - self.density))
        low, high = steps[max(best - 1, 0)], steps[min(best + 1, len(steps) - 1)]
        fine = [low * (high / low) ** (i / 32) for i in range(33)]
        return min(fine, key=lambda decay: abs(density(decay) - self.density))


def _reach(grid: Grid, per_frame: Layout, window: str) -> Tensor:
    """(m, m) float: the band width at which a block of a frame begins to read another."""
    live = per_frame.live.view(-1, per_frame.block)
    coords = Grid(1, grid.h, grid.w).coords()[per_frame.order.long().clamp_min(0)].float()
    coords = coords.view(*live.shape, 3) * live[..., None]
    center = coords.sum(1) / live.sum(1, keepdim=True)
    y, x = ((center[:, None, i] - center[:, i]) for i in (1, 2))
    if window == "raster":
        return (y * grid.w + x).abs()
    # a window of 2 L tokens with the shape of the frame reaches sqrt(L / 2 * h / w) rows
    return 2 * torch.maximum(y**2 * grid.w / grid.h, x**2 * grid.h / grid.w)


def _shares(grid: Grid, per_frame: Layout) -> Tensor:
    """(m, m) float: the share of a frame pair's token pairs in each block pair."""
    tokens = per_frame.tokens_per_block.double() / (grid.h * grid.w)
    return tokens[:, None] * tokens
