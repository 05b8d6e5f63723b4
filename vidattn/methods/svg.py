"""Sparse VideoGen: every head looks around in space or along time, found out while it runs.

Source: Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal
Sparsity", arXiv:2502.01776. A spatial head reads the frames next to its own, a temporal one the
places next to its own in all frames; for some models the first frame is read by all. Which of the
two a head is, the dense attention of some sampled queries tells.

Where this differs: the queries are sampled evenly from the whole video, so nobody's random numbers
move; heads are told apart by the attention they keep, in place of the error of their output, since
no method sees values; patterns are nearest tiles of one layout, in place of bands of two orders. A
band of the pictures one after the other is flat: it follows what moves sideways, but not what moves
up. So a temporal head may look around, along rows or along columns; and every head of every sample
finds out for itself whether the first frame is worth its price. On the bundled model all this keeps
more attention than the bands at equal density, on average over the layers; bands cut to the token
without a first frame come out ahead in single layers, by up to 0.04 at a quarter of the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.grid import Grid, Size, tile_layout_on
from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.method import check_share
from vidattn.planning.sampled import sample, sampled_attention
from vidattn.planning.selection import first_best, select_share
from vidattn.planning.tile_size import fit_tile
from vidattn.planning.tiles import by_tile, distances, tile_counts

# sampled queries whose scores are in memory together
ROWS_AT_ONCE = 16
# tokens of a frame from which on larger blocks, which run faster, are fine enough
LARGE = 1024


@dataclass(frozen=True, kw_only=True)
class Svg(ContentMethod):
    """The nearest frames, places, rows or columns, whichever keep most attention of a head.

    Args:
        density: kept share of the video pairs, above 0 and at most 1.
        rows: queries whose dense attention decides.
        sink: whether every frame reads the first frame whole, which counts as a part of the
            density; every head for itself when not given.

    Raises:
        ValueError: a value out of range.
    """

    density: float = 0.25
    rows: int = 64
    sink: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        check_share("density", self.density)
        if self.rows < 1:
            raise ValueError(f"rows must be a number of queries, at least 1, got {self.rows}")

    def tile_of(self, grid: Grid) -> Size:
        """One frame deep, so that a frame is a whole number of blocks."""
        if self.tile is not None:
            return super().tile_of(grid)
        tile = (1, 8, 8) if grid.h * grid.w >= LARGE else (1, 2, 4)
        return fit_tile((1, grid.h, grid.w), tile)

    def search(self, content: Content) -> tuple[Plan, None]:
        """The pattern of each head."""
        grid, sinks = content.grid, (False, True) if self.sink is None else (self.sink,)
        patterns = _patterns(grid, self.tile_of(grid), self.density, sinks, content.q.device)
        best = first_best(_kept(content, patterns, self.rows))
        return content.plan(patterns[best]), None


@lru_cache(maxsize=16)
def _patterns(
    grid: Grid, tile: Size, density: float, sinks: tuple[bool, ...], device: torch.device
) -> Tensor:
    """(P, nv, nv) bool, the tiles that a head may read, in each of P ways."""
    counts = tile_counts(grid.size, tile)
    t, h, w = (gap * edge for gap, edge in zip(distances(counts), tile))
    apart = h**2 + w**2
    # frames, places, rows and columns, nearest first; what is equally near by what comes next
    ways = (t, apart), (apart, t), (h, w, t), (w, h, t)
    patterns = [nearest(grid, tile, keys, density, sink) for keys in ways for sink in sinks]
    return torch.stack(patterns).to(device)


def nearest(grid: Grid, tile: Size, keys: tuple[Tensor, ...], density: float, sink: bool) -> Tensor:
    """(nv, nv) bool, the tiles nearest to every tile, with a sink the first frame before them.

    Args:
        keys: distances of tiles as in ``distances``; the first counts most.
    """
    counts = tile_counts(grid.size, tile)
    far = torch.zeros(1, dtype=torch.long)
    for key in keys:
        far = far * (key.max() + 1) + key
    far = by_tile(counts, far).clone()
    if sink:
        far[:, : counts[1] * counts[2]] = -1
    far.fill_diagonal_(-2)
    tokens = tile_layout_on(grid, tile, far.device).tokens_per_block[: len(far)]
    return select_share(-far, tokens, density)


def _kept(content: Content, patterns: Tensor, rows: int) -> Tensor:
    """(P, B, H) attention that sampled queries keep with each of P (nv, nv) patterns."""
    layout, grid, num_blocks = content.layout, content.grid, content.num_blocks
    token = grid.video_start + sample(grid.num_video_tokens, rows).to(content.q.device)
    row = layout.slot_of_token[token] // layout.block
    slots = layout.order[: num_blocks * layout.block].long()
    given, kept = {"scale": content.scale, "key_mask": content.key_mask}, 0
    for some, blocks in zip(token.split(ROWS_AT_ONCE), row.split(ROWS_AT_ONCE)):
        shares = sampled_attention(content.q, content.k, some, **given)
        shares = shares[..., slots.clamp_min(0)].masked_fill(slots < 0, 0)
        shares = shares.unflatten(-1, (num_blocks, -1)).sum(-1)
        kept = kept + torch.einsum("bhrj,prj->pbh", shares, patterns[:, blocks].to(shares.dtype))
    return kept
