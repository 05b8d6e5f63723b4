"""Anchor attention: blocks are read whose best score comes close to the best one nearby.

Source: Zhang et al., "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity",
arXiv:2505.23520. For every block of queries the largest score with a few blocks that hold most of
the attention anyway, the anchor, tells how large a score has to be to matter: keys within ``theta``
of it are read. The paper's anchor is the first block of a causal sequence and a local window; here
it is the window around a tile and the same window in the first frame. The score of a key is that
with the mean query of a block, in the anchor too, so that like is compared with like. The paper
gathers single keys; here a block is read whole when its best key is within ``theta``: an engine
visits it in any case, and reading more of it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.grid import Size
from vidattn.kernels.scoring.pooling import best_scores
from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.method import as_size, check_share
from vidattn.planning.selection import select_share, select_until
from vidattn.planning.tiles import by_tile, distances, tile_counts

# share of a density that every block of queries gets, however its anchor outshines the rest
FLOOR = 0.5


@dataclass(frozen=True, kw_only=True)
class Anchor(ContentMethod):
    """The own tile, and those with a key about as good as the best one there.

    Args:
        theta: how far below the anchor's best score the best score of a block may be; 12 of the
            natural logarithm is e ** 12 times less attention.
        density: kept share of the video pairs, above 0 and at most 1; every block of queries
            gets half of it, the anchors first, and the rest sets ``theta`` for every head. The
            anchors, which are always kept, may exceed it.
        near: tiles up to this distance on every axis, a (t, h, w) tuple or one number, are anchors.

    Raises:
        ValueError: a value out of range.
    """

    theta: float = 12.0
    density: float | None = None
    near: int | Size = 0
    # every other step of fifty
    every: int | float = 0.04

    def __post_init__(self):
        super().__post_init__()
        if not self.theta >= 0:
            raise ValueError(f"theta must be a difference of scores, at least 0, got {self.theta}")
        check_share("density", self.density)
        as_size("near", self.near, least=0)

    def search(self, content: Content) -> tuple[Plan, None]:
        """The anchors, and the blocks whose best score is close to theirs."""
        counts = tile_counts(content.grid.size, self.tile_of(content.grid))
        anchors = _anchors(counts, as_size("near", self.near, least=0)).to(content.q.device)
        best = best_scores(
            content.queries,
            content.k,
            content.layout.order,
            content.layout.block,
            scale=content.scale,
            key_mask=content.key_mask,
        )[..., : content.num_blocks]
        top = best.masked_fill(~anchors, -torch.inf).amax(-1, keepdim=True)
        if self.density is None:
            return content.plan(anchors | (best >= top - self.theta)), None
        # the best blocks of every row, and for every head those that the smallest theta takes
        rank = (best - top).nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf).flatten(-2)
        pairs = (content.tokens[:, None] * content.tokens).flatten().double()
        first = best.masked_fill(anchors, torch.inf)
        always = anchors | select_share(first, content.tokens, FLOOR * self.density)
        always = always.flatten(-2)
        need = self.density * pairs.sum() - (always * pairs).sum(-1, keepdim=True)
        if self.density == 1:
            need = torch.full_like(need, torch.inf)
        blocks = select_until(rank, pairs, need, always)
        return content.plan(blocks.view(best.shape)), None


def _anchors(counts: Size, near: Size) -> Tensor:
    """(nv, nv) bool, tiles within reach, and those of the first frame within reach of its place."""
    t, h, w = (gap <= far for gap, far in zip(distances(counts), near))
    first = (torch.arange(counts[0]) == 0).view(1, 1, 1, -1, 1, 1)
    return by_tile(counts, (t | first) & h & w)
