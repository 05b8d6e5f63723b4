"""Sparse VideoGen: every head looks around in space or along time, found out while it runs.

Source: Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal
Sparsity", arXiv:2502.01776. A spatial head reads the frames next to its own, a temporal one the
places next to its own in all frames; the first frame is read by all. Which of the two a head is,
the dense attention of some sampled queries tells.

Where this differs: the queries are sampled evenly from the whole video, so nobody's random numbers
move; heads are told apart by the attention they keep, in place of the error of their output, since
no method sees values; both patterns are nearest tiles of one layout, in place of bands of two
orders, so windows are near on both axes of the picture, do not shrink at its edges, and every
sample is free to choose for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.content import Content, ContentMethod, check_share, tiles
from vidattn.grid import Grid, Size, fit_tile
from vidattn.kernels.pooled_scores import select_share
from vidattn.plan import Plan
from vidattn.tiles import by_tile, distances, tile_counts

# sampled queries whose scores are in memory together
ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Svg(ContentMethod):
    """The nearest frames or the nearest places, whichever keeps more attention of a head.

    Args:
        density: kept share of the video pairs, above 0 and at most 1.
        rows: queries whose dense attention decides.
        sink: whether every frame reads the first frame whole.
        tile: tokens of one block along (t, h, w); chosen for the grid when not given.
        every: denoising steps that one plan serves, as a count or a fraction of them all; a
            fraction is 1 step where nobody knows how many there are.
        rectify: add an estimate of what is not read to the output.

    Raises:
        ValueError: a value out of range.
    """

    density: float = 0.25
    rows: int = 64
    sink: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_share("density", self.density)
        if self.rows < 1:
            raise ValueError(f"rows must be a number of queries, at least 1, got {self.rows}")

    def tile_of(self, grid: Grid) -> Size:
        """One frame deep, so that a frame is a whole number of blocks."""
        if self.tile is not None:
            return super().tile_of(grid)
        return fit_tile((1, grid.h, grid.w), (1, 8, 8))

    def search(self, content: Content) -> Plan:
        """The pattern of each head."""
        tile = self.tile_of(content.grid)
        options = (self.density, self.sink, content.q.device)
        spatial, temporal = (nearest(content.grid, tile, kind, *options) for kind in (0, 1))
        kept = _kept(content, torch.stack([spatial, temporal]), self.rows)
        is_temporal = (kept[1] > kept[0])[..., None, None]
        return content.plan(torch.where(is_temporal, temporal, spatial))


@lru_cache(maxsize=32)
def nearest(
    grid: Grid, tile: Size, temporal: bool, density: float, sink: bool, device: torch.device
) -> Tensor:
    """(nv, nv) bool, the tiles nearest to every tile, the first frame before them.

    Args:
        temporal: whether distance in the picture counts more than that in time, or less.
    """
    counts = tile_counts(grid.size, tile)
    t, h, w = distances(counts)
    apart = (h * tile[1]) ** 2 + (w * tile[2]) ** 2
    # whole numbers in which the second distance only decides between equal first ones
    far = apart * counts[0] + t if temporal else t * (apart.max() + 1) + apart
    far = by_tile(counts, far)
    if sink:
        far[:, : counts[1] * counts[2]] = -1
    tokens = tiles(grid, tile, far.device).tokens_per_block[: len(far)]
    return select_share(-far, tokens, density).to(device)


def _kept(content: Content, patterns: Tensor, rows: int) -> Tensor:
    """(P, B, H) attention that sampled queries keep with each of P (nv, nv) patterns."""
    layout, grid, num_blocks = content.layout, content.grid, content.num_blocks
    rows = min(rows, grid.num_video_tokens)
    middle = (torch.arange(rows, device=content.q.device) * 2 + 1) * grid.num_video_tokens
    token = grid.video_start + middle // (2 * rows)
    row = layout.slot_of_token[token] // layout.block
    slots = layout.order[: num_blocks * layout.block].long()
    # (B, K, H / K, S, D)
    q = content.q.unflatten(1, (content.k.shape[1], -1))
    kept = 0
    for some, blocks in zip(token.split(ROWS_AT_ONCE), row.split(ROWS_AT_ONCE)):
        scores = content.scale * (q[:, :, :, some] @ content.k[:, :, None].mT).flatten(1, 2).float()
        if content.key_mask is not None:
            scores = scores.masked_fill(~content.key_mask[:, None, None], -torch.inf)
        shares = scores.softmax(-1)[..., slots.clamp_min(0)].masked_fill(slots < 0, 0)
        shares = shares.unflatten(-1, (num_blocks, -1)).sum(-1)
        kept = kept + torch.einsum("bhrj,prj->pbh", shares, patterns[:, blocks].to(shares.dtype))
    return kept
