"""Rectified sparse attention: critical blocks are read, an estimate of the others is added.

Source: Liu et al., "Rectified SpaAttn: Revisiting Attention Sparsity for Efficient Video
Generation", arXiv:2511.19835. A query block reads the blocks with the largest share of attention
between block means (text counts token by token), as many as a density allows and at least those
that hold a share of it; the 26 blocks around it; and, from the first frame, the first frame. The
estimate is ``Content.plan``'s. Published densities are 0.2 for HunyuanVideo and 0.25 for Wan 2.1,
for the largest shares alone; here the density is that of all that is read. Blocks are tiles, which
stand in for runs of a space-filling curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.grid import Size
from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.method import check_share
from vidattn.planning.selection import select_mass, select_share
from vidattn.planning.tiles import tile_counts, within


@dataclass(frozen=True, kw_only=True)
class Rectified(ContentMethod):
    """The best key blocks and the nearest ones, and an estimate of what is not read.

    Args:
        density: share of the video pairs to keep, above 0 and at most 1; near blocks, the first
            frame and ``mass`` may ask for more.
        mass: share of the pooled attention to the video that the blocks of a row hold at least.
        near: blocks up to this many tiles away on every axis are read; none for no such rule.
        first_frame: whether the blocks of the first frame read each other, where there are more.

    Raises:
        ValueError: a value out of range.
    """

    density: float = 0.25
    mass: float = 0.3
    near: int | None = 1
    first_frame: bool = True
    rectify: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_share("density", self.density)
        check_share("mass", self.mass)
        if self.near is not None and self.near < 0:
            raise ValueError(f"near must be a number of tiles, at least 0, or None: {self.near}")

    def search(self, content: Content) -> tuple[Plan, None]:
        """The blocks that are always read first, then the best."""
        counts = tile_counts(content.grid.size, self.tile_of(content.grid))
        always = _always(counts, self.near, self.first_frame, content.q.device)
        scores = content.scores.masked_fill(always | content.own, torch.inf)
        blocks = always | select_share(scores, content.tokens, self.density)
        return content.plan(blocks | select_mass(content.shares, self.mass)), None


@lru_cache(maxsize=16)
def _always(counts: Size, near: int | None, first_frame: bool, device: torch.device) -> Tensor:
    """(nv, nv) bool, the tiles that are read whatever they hold."""
    per_frame = counts[1] * counts[2]
    blocks = torch.zeros(counts[0] * per_frame, counts[0] * per_frame, dtype=torch.bool)
    if near is not None:
        blocks |= within(counts, (near, near, near))
    if first_frame and counts[0] > 1:
        blocks[:per_frame, :per_frame] = True
    return blocks.to(device)
