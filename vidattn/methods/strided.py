"""Strided attention: each head reads a window and every s-th tile, another set of them per head.

Source: Lin et al., "S2-Attention: Hardware-Aware Context Sharding Among Attention Heads",
arXiv:2407.17678, which shards the context of a causal sequence over the heads: each head sees its
local blocks and a share of the rest, and the heads together see everything. Here the window lies
around a tile of the video, and tile (i, j, l) belongs to share (a i + b j + c l) mod s, so that
each share is spread evenly over time and space. Head h of layer n, with H heads, reads share
(n H + h) mod s: where there are fewer heads than shares, the next layers read what is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidattn.grid import Grid, Size
from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.method import as_size, check_share, run_state
from vidattn.planning.tiles import axis_share, fit_reach, tile_counts, within


@dataclass(frozen=True, kw_only=True)
class Strided(ContentMethod):
    """A window of tiles around each tile, and every ``stride``-th tile of the video.

    Of queries and keys it reads the number of heads alone, unless they are asked for an estimate of
    what is not read; so one plan serves all steps.

    Args:
        stride: tiles of which a head reads one; the others are read by other heads. When not
            given 8, or with a density as many as leave half of it for the window.
        near: tiles up to this distance on every axis, a (t, h, w) tuple or one number, read each
            other in every head.
        density: kept share of the video pairs, between 0 and 1; sets ``near`` to come as close to
            it as whole tiles allow.
        every: denoising steps that one plan serves where ``rectify`` is on; else one serves all.

    Raises:
        ValueError: a value out of range; from ``plan``, a density below that of the stride.
    """

    numbers_heads = True

    stride: int | None = None
    near: int | Size = 1
    density: float | None = None
    # it shifts the shares
    layer: int = run_state(0)

    def __post_init__(self):
        super().__post_init__()
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride must be an integer of at least 1, got {self.stride!r}")
        as_size("near", self.near, least=0)
        check_share("density", self.density)

    @property
    def strides(self) -> int:
        """Shares that the tiles are dealt out to."""
        if self.stride is not None:
            return self.stride
        return 8 if self.density is None else max(1, round(2 / self.density))

    def at(self, layer: int) -> Strided:
        """The method with the shares that the heads of a layer read."""
        return replace(self, layer=layer)

    def keeps(self, made: int, now: int, num_steps: int | None) -> bool:
        """Always, unless what is not read is estimated from the tokens."""
        return not self.rectify or super().keeps(made, now, num_steps)

    def check(self, grid: Grid) -> None:
        """Refuse a density below that of the stride."""
        self._near_on(grid)

    def search(self, content: Content) -> tuple[Plan, None]:
        """Whole tiles, by the number of the head."""
        counts = tile_counts(content.grid.size, self.tile_of(content.grid))
        num_heads = content.q.shape[1]
        shares = (self.layer * num_heads + torch.arange(num_heads)) % self.strides
        strided = share_of_tile(counts, self.strides) == shares[:, None]
        blocks = (strided[:, None] | within(counts, self._near_on(content.grid)))[None]
        return content.plan(blocks.to(content.q.device)), None

    def _near_on(self, grid: Grid) -> Size:
        """Tiles that the window reaches along each axis."""
        if self.density is None:
            return as_size("near", self.near, least=0)
        size, tile = grid.size, self.tile_of(grid)
        return fit_reach(
            self.density,
            tile_counts(size, tile),
            # outside of the window, a head reads one share of the tiles
            lambda box: 1 - (1 - 1 / self.strides) * (1 - _window_share(size, tile, box)),
            f" with stride {self.strides}; set a larger stride or a smaller tile",
        )


def share_of_tile(counts: Size, stride: int) -> Tensor:
    """(nv,) int64, the share that each tile belongs to."""
    steps = [_coprime(stride, part) for part in (0.62, 0.38, 0.0)]
    places = [torch.arange(count) * step for count, step in zip(counts, steps)]
    t, h, w = torch.meshgrid(*places, indexing="ij")
    return (t + h + w).flatten() % stride


def _window_share(size: Size, tile: Size, near: Size) -> float:
    """Share of the video pairs within a window of tiles."""
    axes = zip(size, tile, near)
    return math.prod(axis_share(n, edge, lambda gap, far=far: gap <= far) for n, edge, far in axes)


def _coprime(stride: int, part: float) -> int:
    """The number nearest to a part of the stride, at least 1, that shares no divisor with it."""
    numbers = [x for x in range(1, max(stride, 2)) if math.gcd(x, stride) == 1]
    return min(numbers, key=lambda x: abs(x - part * stride))
