"""Video sparse attention: tiles read the tiles whose means match best, beside a gated coarse view.

Source: Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention",
arXiv:2505.13389. With the means of tiles q_c, k_c and v_c, the coarse output softmax(scale q_c
k_c^T) v_c of a tile goes to each of its tokens, times a gate: a linear map of what the token's
query was made of, ``to_gate_compress``, zero at first. Of the same scores, each tile reads the
ceil(density nv) best of nv tiles. Unlike there, a tile always reads itself, and tokens of a text
stand beside it all: they read, and are read by, everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.learned import LearnedMethod, Seen, mean_scores, zero_linear
from vidattn.planning.method import check_share
from vidattn.planning.selection import select_count


@dataclass(frozen=True, kw_only=True)
class VSA(LearnedMethod):
    """The tiles whose means match best, and a learned gate on attention between means.

    FastWan models were trained with density 0.2 and tile (4, 4, 4), in all layers and steps.

    Args:
        density: kept share of the tiles, above 0 and at most 1.

    Raises:
        ValueError: a value out of range.
    """

    parameters = "to_gate_compress"

    density: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        check_share("density", self.density)

    def search(self, content: Content) -> tuple[Plan, None]:
        """As many tiles for every tile."""
        scores = mean_scores(content)
        # 0.2 * 35 must not be rounded up to one more
        count = max(1, math.ceil(self.density * content.num_blocks - 1e-9))
        return content.plan(select_count(scores, count)), None

    def make(self, channels: int, num_heads: int, head_dim: int) -> nn.Linear:
        """The gate."""
        return zero_linear(channels, num_heads * head_dim)

    def beside(self, learned: Callable[[Tensor], Tensor], seen: Seen) -> Tensor:
        """The coarse output, gated."""
        q, k, v = map(seen.means, (seen.q, seen.k, seen.v))
        coarse = (seen.scale * q @ k.mT).softmax(-1) @ v
        gate = learned(seen.hidden).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        return gate * coarse[:, :, seen.block_of_token]
