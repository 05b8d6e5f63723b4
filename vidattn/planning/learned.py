"""Methods with parameters of their own in every layer, which are trained.

Letters: B batch, H heads, S tokens of the video, C channels, D head dim, nv blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vidattn.grid import Layout
from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod


class Seen(NamedTuple):
    """One call of a layer, of the video alone, in the order of the grid, float32 or more.

    Args:
        hidden: (B, S, C), what queries, keys and values were made of.
        q, k, v: (B, H, S, D).
        scale: factor of the scores.
        layout: the blocks of the video.
        plan: what was read.
    """

    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    layout: Layout
    plan: Plan

    def means(self, x: Tensor) -> Tensor:
        """(B, H, nv, D) means of (B, H, S, D) over the tokens of each block, with a gradient."""
        slots, live = self.layout.order.clamp_min(0).long(), self.layout.live
        padded = x[:, :, slots] * live[:, None]
        sums = padded.unflatten(2, (-1, self.layout.block)).sum(3)
        return sums / self.layout.tokens_per_block[:, None]

    @property
    def block_of_token(self) -> Tensor:
        """(S,) int64."""
        return self.layout.slot_of_token // self.layout.block


@dataclass(frozen=True, kw_only=True)
class LearnedMethod(ContentMethod):
    """A method that adds something learned to what a layer reads; where nothing is learned, zero.

    Its plan is that of any other method, and all there is outside of a patched model.
    """

    # what its parameters are called, in the attention of a layer and in files
    parameters: ClassVar[str]

    @abstractmethod
    def make(self, channels: int, num_heads: int, head_dim: int) -> nn.Module:
        """The parameters of one layer, zero.

        Args:
            channels: C.
        """

    @abstractmethod
    def beside(self, learned: Callable[[Tensor], Tensor], seen: Seen) -> Tensor:
        """(B, H, S, D), what is added to the output of a call.

        Args:
            learned: the parameters of the layer, as ``make`` gave them.
        """


def mean_scores(content: Content) -> Tensor:
    """(B, H, nv, nv) scores of the means of blocks; -inf for blocks that nobody may read."""
    scores = content.scale * content.queries @ content.keys.mT
    return scores.masked_fill(content.counts[..., None, :] == 0, -torch.inf)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that gives zero."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    return layer
