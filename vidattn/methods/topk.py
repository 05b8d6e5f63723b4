"""Top-k attention: every query block reads the key blocks that the means say it attends to most.

Source: Zhang et al., "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any
Model Inference", arXiv:2502.18137, in its block selection: a count of blocks ("top-k"), or as many
as hold a share of the pooled softmax ("CDF", here with the block that crosses the share). Unlike
there, means are over true tokens, large blocks weigh by their tokens, and there is no test of the
likeness within a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.method import check_share
from vidattn.planning.selection import select_mass, select_share


@dataclass(frozen=True, kw_only=True)
class TopK(ContentMethod):
    """The best key blocks of every query block, by attention between block means.

    Args:
        density: kept share of the video pairs, above 0 and at most 1.
        mass: share of the pooled attention to the video that the blocks of a row are to hold, in
            place of a density.

    Raises:
        ValueError: a value out of range.
    """

    density: float = 0.5
    mass: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_share("density", self.density)
        check_share("mass", self.mass)

    def search(self, content: Content) -> tuple[Plan, None]:
        """The first blocks of every row by their scores."""
        if self.mass is not None:
            return content.plan(select_mass(content.shares, self.mass)), None
        scores = content.scores.masked_fill(content.own, torch.inf)
        return content.plan(select_share(scores, content.tokens, self.density)), None
