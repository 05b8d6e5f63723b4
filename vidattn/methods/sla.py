"""Sparse-linear attention: the best blocks are read, and linear attention stands in for others.

Source: Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear
Attention", arXiv:2509.24006. Of the means of blocks, each query block reads the share ``density``
of the key blocks that it matches best. With a feature map f, a query q adds to that the linear
attention f(q) (sum f(k)^T v) / (f(q) sum f(k)^T) through ``proj_l``, one linear map for all heads
of a layer, zero at first. The sums are over all keys, as in the released code and models; with
``negligible``, as in the paper, over those in blocks that are neither read nor among that share of
the worst. Unlike there, a block always reads itself, and a text reads, and is read by, everything;
it is no part of the sums.

Letters: B batch, H heads, S tokens, D head dim, n slots to a block, nv blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.learned import LearnedMethod, Seen, mean_scores, zero_linear
from vidattn.planning.method import check_share
from vidattn.planning.selection import select_count
from vidattn.support.registry import unknown

FEATURES = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
}
# of the sum that divides
TINY = 1e-5


@dataclass(frozen=True, kw_only=True)
class SLA(LearnedMethod):
    """The blocks whose means match best, and linear attention through a learned map.

    Args:
        density: kept share of the blocks, above 0 and at most 1.
        features: "softmax", "elu" or "relu", what queries and keys go through for linear attention.
        negligible: share of the blocks, those that match least, that linear attention leaves out
            with those that are read; everything is part of it when not given.

    Raises:
        ValueError: a value out of range.
    """

    parameters = "proj_l"

    density: float = 0.2
    features: str = "softmax"
    negligible: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_share("density", self.density)
        check_share("negligible", self.negligible)
        if self.features not in FEATURES:
            raise unknown("features", self.features, FEATURES)

    def search(self, content: Content) -> tuple[Plan, None]:
        """As many blocks for every block."""
        scores = mean_scores(content)
        count = max(1, math.floor(self.density * content.num_blocks + 1e-9))
        return content.plan(select_count(scores, count)), None

    def make(self, channels: int, num_heads: int, head_dim: int) -> nn.Linear:
        """The map of what linear attention gives."""
        return zero_linear(head_dim, head_dim)

    def beside(self, learned: Callable[[Tensor], Tensor], seen: Seen) -> Tensor:
        """Linear attention, mapped."""
        feature = FEATURES[self.features]
        q, k = feature(seen.q), feature(seen.k)
        if self.negligible is None:
            sums, total = k.mT @ seen.v, k.sum(2)[..., None]
            return learned((q @ sums) / (q @ total + TINY))
        return learned(self._of_the_rest(q, k, seen))

    def _of_the_rest(self, q: Tensor, k: Tensor, seen: Seen) -> Tensor:
        """(B, H, S, D) linear attention to blocks that are not read, and not negligible."""
        order, block = seen.layout.order, seen.layout.block
        q, k, v = (
            (x[:, :, order.clamp_min(0).long()] * seen.layout.live[:, None]).unflatten(
                2, (-1, block)
            )
            for x in (q, k, seen.v)
        )
        with torch.no_grad():
            scores = seen.scale * seen.means(seen.q) @ seen.means(seen.k).mT
            part = seen.plan.read_share == 0
            if count := math.floor(self.negligible * scores.shape[-1] + 1e-9):
                part = part & ~select_count(-scores, count)
            part = part.to(q.dtype).expand_as(scores)
        sums = (part @ (k.mT @ v).flatten(3)).unflatten(3, (k.shape[-1], v.shape[-1]))
        total = (part @ k.sum(3))[..., None]
        out = (q @ sums) / (q @ total + TINY)
        return out.flatten(2, 3)[:, :, seen.layout.slot_of_token]
