"""AdaSpa: exact block masses, searched rarely, with the density where the heads need it.

Source: Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video
Generation", arXiv:2502.21079. Which blocks matter and the log-sum-exp of the scores hardly change
between denoising steps. So the first search measures, for all pairs of blocks, the attention that
one gives the other; a later one takes over the log-sum-exp of the search before it; and the steps
between take over the blocks. Every row of a head keeps equally many tokens. Published settings: the
first 10 of 50 steps dense (``dense_steps``), searches at steps 10 and 30 (``every=0.4``), density
0.2, blocks of 64 tokens. The blocks are tiles here, in place of runs of the raster, and a
generation searches twice, wherever its dense steps end: a search costs about as much as dense
attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.method import check_share
from vidattn.planning.selection import select_share


@dataclass(frozen=True, kw_only=True)
class AdaSpa(ContentMethod):
    """The blocks that hold most attention by an exact search, more of them in the hardest heads.

    Args:
        density: kept share of the video pairs, mean over the heads, above 0 and at most 1.
        recall: share of its attention that a head has to keep before it gives half its blocks to
            the head that keeps least; none leaves all heads alike.
        every: denoising steps from one search to the next, as a count or a fraction of them all.

    Raises:
        ValueError: a value out of range.
    """

    density: float = 0.2
    recall: float | None = 0.8
    every: int | float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_share("density", self.density)
        check_share("recall", self.recall)

    def by_head(self) -> AdaSpa:
        """The method with one density for all heads."""
        return replace(self, recall=None)

    def search(self, content: Content) -> tuple[Plan, Tensor]:
        """The best blocks of every row by their mass, with the densities of the heads."""
        lse = content.memory
        if lse is not None and lse.shape != content.q.shape[:3]:
            lse = None
        mass, lse = content.mass(lse)
        mass = mass / mass.sum(-1, keepdim=True)
        shares, tokens = mass[..., : content.num_blocks], content.tokens
        # every block reads itself
        scores = shares.masked_fill(content.own, torch.inf)
        blocks = select_share(scores, tokens, self.density)
        if self.recall is not None:
            lost = shares.masked_fill(blocks, 0).sum(-1) @ tokens.to(mass.dtype)
            recall = 1 - lost / content.grid.num_video_tokens
            density = spread_density(recall, self.density, self.recall)
            blocks = select_share(scores, tokens, density[..., None, None])
        return content.plan(blocks, shares=shares), lse


def spread_density(recall: Tensor, density: float, enough: float) -> Tensor:
    """(B, H) densities of the heads, with the mean that is asked for.

    Args:
        recall: (B, H) share of its attention that each head keeps at that density.
        enough: as many heads as keep more than this give half of their density, the best ones, to
            equally many of the worst.
    """
    num_heads = recall.shape[1]
    num_giving = (recall > enough).sum(-1, keepdim=True).clamp(max=num_heads // 2)
    rank = recall.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    taken = (rank >= num_heads - num_giving).to(recall.dtype)
    given = (rank < num_giving).to(recall.dtype)
    return density + min(density / 2, 1 - density) * (taken - given)
