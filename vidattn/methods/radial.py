"""Radial attention: the further apart two frames, the smaller the window they share.

Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
Generation", arXiv:2506.19852. Between frames at distance d with g = bit_length(d), a token reads a
band of L = 2 ** bit_length(P) / 2 ** g * decay tokens to either side, with P tokens to a frame;
once L is below one token, only every ceil(1 / L)-th frame distance is kept. The paper's band runs
along the raster of a frame (``window="raster"``); ``window="tile"`` gives its tokens the shape of
the frame.

Here a block pair is kept or left whole, by the distance of the two block centers, and a block reads
at least the one at its own place in every frame that its tokens read. The authors' code makes no
window smaller than a block; in return it keeps only every (block / L)-th frame distance once L is
below the block length, which is what keeps the cost of long videos low. So it is done here when
``decay`` is given, as their settings are; a ``density`` is met by windows smaller than a block, so
that every frame is read.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout, Size, frame_layout, tile_layout
from vidattn.plan import Plan
from vidattn.planning.method import as_size, check_share
from vidattn.planning.pattern import PatternMethod
from vidattn.planning.tile_size import block_tokens, usual_tile
from vidattn.support.registry import unknown

# share of a density that frames read whole may take; on the bundled model windows put the rest to
# better use
MOST_WHOLE = 0.75
# tokens of a frame from which on blocks of 128 are fine enough for windows in two dimensions
LARGE = 4096


@dataclass(frozen=True, kw_only=True)
class Radial(PatternMethod):
    """Windows that halve whenever the distance in frames doubles.

    Args:
        density: kept share of the video pairs, between 0 and 1; sets ``decay`` to come as close to
            it as whole blocks allow.
        decay: factor on the width of every window, used when no density is given.
        window: "tile" for windows in two dimensions, "raster" for the paper's band.
        near: frames up to this distance read each other whole. When not given 1, or with a density
            1, 0 or none at all, so that what is read whole takes at most three quarters of it and
            leaves something for every frame.
        sink: whether every frame reads the first frame whole. When not given true, or with a
            density only where that leaves as much.
        tile: tokens of one block along (t, h, w), with t = 1; chosen for the grid when not given.

    Raises:
        ValueError: a value out of range; from ``plan``, a density below what one block, or a
            ``near`` or ``sink`` that was given, keeps on that grid.
    """

    density: float | None = None
    decay: float = 1.0
    window: str = "tile"
    near: int | None = None
    sink: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        check_share("density", self.density)
        if not 0 < self.decay < math.inf:
            raise ValueError(f"decay must be positive, got {self.decay}")
        if self.window not in ("tile", "raster"):
            raise unknown("window", self.window, ("tile", "raster"))
        if self.near is not None and self.near < 0:
            raise ValueError(f"near must be a number of frames, at least 0, got {self.near}")
        if self.tile is not None and as_size("tile", self.tile)[0] != 1:
            raise ValueError(f"tile must be one frame deep, (1, h, w), got {self.tile}")

    def tile_of(self, grid: Grid) -> Size:
        """One frame deep; large blocks run faster, but in a small frame no window would show."""
        if self.tile is not None:
            return super().tile_of(grid)
        large = 1024 if self.window == "raster" else LARGE
        tokens = 128 if grid.h * grid.w >= large else block_tokens(grid.size)
        return usual_tile(grid.size, tokens, is_flat=True)

    def check(self, grid: Grid) -> None:
        """Refuse a density that is out of reach."""
        _settle(self, grid)

    def pattern(self, grid: Grid) -> Plan:
        """Whole blocks, by their distance in time and space."""
        keep, sink = _settle(self, grid)
        frame = torch.arange(grid.t)
        blocks = keep[(frame[:, None] - frame).abs()]
        if sink:
            blocks[:, 0] = True
        layout = self._layout(grid, self.tile_of(grid))
        nv = layout.num_video_blocks
        return Plan.from_blocks(grid, layout, blocks.transpose(1, 2).reshape(1, 1, nv, nv))

    def _layout(self, grid: Grid, tile: Size) -> Layout:
        if self.window == "raster":
            return frame_layout(grid, math.prod(tile))
        return tile_layout(grid, tile)


@lru_cache(maxsize=8)
def _settle(method: Radial, grid: Grid) -> tuple[Tensor, bool]:
    """(t, m, m) bool, which of the m blocks of a frame read which at each frame distance; the sink.

    Raises:
        ValueError: no pattern has a density as low as the one that is asked for.
    """
    widths = _Widths.of(method, grid)
    near, sink = _whole_frames(method, grid.t, widths.share.diagonal().sum().item())
    widths = replace(widths, near=near)
    if method.density is None:
        return widths.keep(torch.tensor(method.decay, dtype=torch.float32)), sink
    # from windows below a token to windows of the whole frame, in steps of a hundredth
    highest = max(6, grid.t.bit_length() + 2)
    decays = torch.linspace(-16, highest, 64 * (16 + highest) + 1, dtype=torch.float32).exp2()
    distance = torch.arange(grid.t)
    # pairs of frames at each distance, to both sides; all but those with the first frame
    frames = torch.where(distance == 0, grid.t, 2 * (grid.t - distance)) - int(sink)
    need = method.density * grid.t**2 - sink * grid.t
    kept = widths.kept(decays)
    total = kept @ frames.double()
    if (least := float(total[0] + sink * grid.t) / grid.t**2) > _most(method.density):
        raise ValueError(_out_of_reach(method, grid, least))
    # the widest windows that keep no more than needed, and the next wider ones
    below = int((total <= need).nonzero().max()) if total[0] <= need else 0
    narrow, wide = (widths.keep(x) for x in decays[below : below + 2].expand(2))
    return widths.between(narrow, wide, frames, need), sink


def _most(density: float) -> float:
    """What still passes for a density."""
    return max(density + 0.005, density * 1.05)


def _whole_frames(method: Radial, num_frames: int, own: float) -> tuple[int, bool]:
    """``near``, -1 for no frame, and ``sink``: as given, or as much as the density has room for.

    Args:
        own: share of two frames that blocks at the same place are, which every frame is to get.
    """
    nears = (1, 0, -1) if method.near is None else (method.near,)
    sinks = (True, False) if method.sink is None else (method.sink,)
    if method.density is None:
        return nears[0], sinks[0]
    frame = torch.arange(num_frames)
    apart = (frame[:, None] - frame).abs()
    for near, sink in itertools.product(nears, sinks):
        whole = ((apart <= near) | (frame == 0) & sink).double().mean().item()
        if whole <= MOST_WHOLE * method.density and whole + (1 - whole) * own <= method.density:
            break
    return near, sink


@dataclass(frozen=True, eq=False)
class _Widths:
    """What windows of any width keep of the frames of a grid, at each distance."""

    reach: Tensor  # (m, m) float32, the width at which a block of a frame begins to read another
    gap: Tensor  # (m, m) float32, distance of their centers, next to the shape of the frame
    share: Tensor  # (m, m) float64, the share of a frame pair's token pairs in each block pair
    width: Tensor  # (t,) float32, L at each frame distance for a decay of 1
    least: int  # tokens below which no window goes, and frames are left out
    near: int = -1

    @classmethod
    def of(cls, method: Radial, grid: Grid) -> _Widths:
        per_frame = method._layout(Grid(1, grid.h, grid.w), method.tile_of(grid))
        bits = (grid.h * grid.w).bit_length()
        width = [2.0 ** (bits - distance.bit_length()) for distance in range(grid.t)]
        tokens = per_frame.tokens_per_block.double() / (grid.h * grid.w)
        reach, gap = _reach(grid, per_frame, method.window)
        return cls(
            reach=reach,
            gap=gap,
            share=tokens[:, None] * tokens,
            width=torch.tensor(width, dtype=torch.float32),
            least=per_frame.block if method.density is None else 0,
        )

    def windows(self, decay: Tensor) -> tuple[Tensor, Tensor]:
        """(..., t) widths, and bool whether a frame at that distance is read, for decays (...)."""
        width, distance = self.width * decay[..., None], torch.arange(len(self.width))
        if self.least:
            every = (self.least / width).clamp(min=1).round()
        else:
            every = (1 / width).clamp(min=1).ceil()
        return width.clamp(min=self.least), distance % every == 0

    def keep(self, decay: Tensor) -> Tensor:
        """(t, m, m) bool, which blocks of a frame read which."""
        width, seen = self.windows(decay)
        keep = (self.reach <= width[:, None, None]) & seen[:, None, None]
        return keep | (torch.arange(len(width)) <= self.near)[:, None, None]

    def kept(self, decays: Tensor) -> Tensor:
        """(A, t) float64 kept share of the pairs of two frames with each of A decays."""
        width, seen = self.windows(decays)
        reach, order = self.reach.flatten().sort()
        within = torch.nn.functional.pad(self.share.flatten()[order].cumsum(0), (1, 0))
        kept = within[torch.searchsorted(reach, width, right=True)] * seen
        return kept.masked_fill(torch.arange(len(self.width)) <= self.near, 1)

    def between(self, narrow: Tensor, wide: Tensor, frames: Tensor, need: float) -> Tensor:
        """(t, m, m) bool, the narrow windows and as much of the wide ones as fills a need.

        The wide windows go to the nearest frames, at the last distance to the nearest blocks.

        Args:
            narrow, wide: (t, m, m) bool.
            frames: (t,) pairs of frames at each distance.
            need: to be kept of all pairs of frames.
        """
        added, keep = wide & ~narrow, narrow.clone()
        left = need - ((narrow * self.share).sum((1, 2)) * frames).sum().item()
        for distance, count in enumerate(frames.tolist()):
            some, place = self.gap[added[distance]].unique(return_inverse=True)
            shares = self.share.new_zeros(len(some)).index_add_(
                0, place, self.share[added[distance]]
            )
            sums = torch.nn.functional.pad(count * shares.cumsum(0), (1, 0))
            best = int((sums - left).abs().argmin())
            if best:
                keep[distance] |= added[distance] & (self.gap <= some[best - 1])
            left -= sums[best].item()
            if best < len(some):
                break
        return keep


def _out_of_reach(method: Radial, grid: Grid, least: float) -> str:
    """What keeps the density up, and what can be done about it."""
    reasons, advice = [], []
    if method.near is not None:
        reasons.append(f"frames up to near={method.near} apart")
        advice.append("lower near" if method.near else "leave out near")
    if method.sink:
        reasons.append("the first frame")
        advice.append("set sink=False")
    cause = f"{' and '.join(reasons)} are read whole" if reasons else "every block reads itself"
    if math.prod(method.tile_of(grid)) > 1 and not reasons:
        advice.append("set a smaller tile")
    return (
        f"radial cannot go down to density {method.density} on {grid.size}: {cause}, which alone "
        f"keeps {least:.3g}; {', '.join([*advice, 'or ask for more'])}"
    )


def _reach(grid: Grid, per_frame: Layout, window: str) -> tuple[Tensor, Tensor]:
    """Two (m, m) float32: the width at which a block begins to read another, and how far it is."""
    live = per_frame.live.view(-1, per_frame.block)
    coords = Grid(1, grid.h, grid.w).coords()[per_frame.order.long().clamp_min(0)].float()
    coords = coords.view(*live.shape, 3) * live[..., None]
    center = coords.sum(1) / live.sum(1, keepdim=True)
    y, x = ((center[:, None, i] - center[:, i]) for i in (1, 2))
    if window == "raster":
        reach = (y * grid.w + x).abs()
        return reach, reach
    # a window of 2 L tokens with the shape of the frame reaches sqrt(L / 2 * h / w) rows
    rows, columns = 2 * y**2 * grid.w / grid.h, 2 * x**2 * grid.h / grid.w
    return torch.maximum(rows, columns), rows + columns
