"""Queries and keys of one head in the blocks of its plan, in float64.

Letters: S tokens, D head dim, N video tokens, nv video blocks.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from fuzzing.cases import Case
from fuzzing.inputs import Inputs, score_scale
from torch import Tensor

from vidattn.plan import AnyPlan

# as sure as float32 can be of a difference
SURE = 1e-4


@dataclass
class Blocks:
    """One head of one sample."""

    q: Tensor  # (S, D)
    k: Tensor  # (S, D)
    scale: float
    readable: Tensor  # (S,) bool
    member: Tensor  # (nv, N) float64, 1 where a block holds a video token
    video: slice
    text: slice
    size: int  # slots to a block

    @property
    def first(self) -> Tensor:
        """(nv,) a token, counted through the sequence, of every block."""
        return self.member.argmax(-1) + self.video.start

    @property
    def tokens(self) -> Tensor:
        """(nv,) float64 tokens of every block."""
        return self.member.sum(-1)

    def sums(self, x: Tensor) -> Tensor:
        """(nv, ...) sums over the tokens of blocks of (N, ...)."""
        return self.member @ x

    @cached_property
    def counts(self) -> Tensor:
        """(nv,) float64 keys of every block that may be read."""
        return self.sums(self.readable[self.video].double())

    @cached_property
    def queries(self) -> Tensor:
        """(nv, D) mean queries."""
        return self.sums(self.q[self.video]) / self.tokens[:, None]

    @cached_property
    def center(self) -> Tensor:
        """(D,) mean of the keys of the video that may be read."""
        keys = self.k[self.video] * self.readable[self.video, None]
        return keys.sum(0) / self.counts.sum().clamp_min(1)

    @cached_property
    def keys(self) -> Tensor:
        """(nv, D) mean keys over those that may be read, less the mean of all; 0 without any."""
        centered = (self.k - self.center)[self.video] * self.readable[self.video, None]
        return self.sums(centered) / self.counts.clamp_min(1)[:, None]

    @cached_property
    def scores(self) -> Tensor:
        """(nv, nv) scores of the means, plus the log of the keys."""
        return self.scale * self.queries @ self.keys.mT + self.counts.log()

    @cached_property
    def shares(self) -> Tensor:
        """(nv, nv) pooled attention: the softmax over the blocks and every key of the text."""
        text = self.scale * self.queries @ (self.k - self.center)[self.text].mT
        text = text.masked_fill(~self.readable[self.text], -torch.inf)
        return torch.cat([self.scores, text], -1).softmax(-1)[:, : len(self.member)].nan_to_num(0)

    @cached_property
    def weights(self) -> Tensor:
        """(S, S) dense attention."""
        scores = self.scale * self.q @ self.k.mT
        return scores.masked_fill(~self.readable, -torch.inf).softmax(-1).nan_to_num(0)

    @cached_property
    def mass(self) -> Tensor:
        """(nv, nv) dense attention that a block of the video gives another, summed over pairs."""
        return self.sums(self.sums(self.weights[self.video, self.video]).mT).mT

    def coherence(self) -> Tensor:
        """(nv, nv) 1 where the score of the means exceeds what spreads can change, -1 where it does
        not, 0 where rounding decides."""
        spread_q = self._spread(self.q, self.queries, torch.ones_like(self.readable))
        spread_k = self._spread(self.k, self.keys + self.center, self.readable)
        change = (spread_q @ self.keys.mT).abs() + (self.queries @ spread_k.mT).abs()
        score = (self.queries @ self.keys.mT).abs()
        largest = self.queries.abs() @ (self.keys.abs() + self.center.abs() + spread_k.abs()).mT
        doubt = SURE * (largest + spread_q.abs() @ self.keys.abs().mT)
        return (score > change + doubt).double() - (score < change - doubt).double()

    def _spread(self, x: Tensor, means: Tensor, counted: Tensor) -> Tensor:
        """(nv, D) mean distance of the tokens of a block from their mean."""
        of_token = self.member.argmax(0)
        away = (x[self.video] - means[of_token]).abs() * counted[self.video, None]
        return self.sums(away) / self.sums(counted[self.video].double()).clamp_min(1)[:, None]


def blocks_of(case: Case, inputs: Inputs, plan: AnyPlan, b: int, h: int) -> Blocks:
    """One head of one sample in the blocks of what it follows."""
    plan = plan.of_row(b, h)
    grid, n, layout = case.grid, case.grid.num_video_tokens, plan.layout
    video = slice(grid.video_start, grid.video_start + n)
    order = layout.order.long().view(-1, layout.block) - video.start
    member = torch.zeros(layout.num_video_blocks, n, dtype=torch.float64)
    for number, row in enumerate(order[: layout.num_video_blocks].tolist()):
        member[number, [x for x in row if 0 <= x < n]] = 1
    mask = inputs.key_mask
    readable = torch.ones(grid.num_tokens, dtype=torch.bool) if mask is None else mask[b]
    q, k = inputs.q[b, h].double(), inputs.k[b, h // case.group].double()
    scale = score_scale(case)
    scale *= plan.sharpness
    text = slice(grid.text_start, grid.text_start + grid.text)
    return Blocks(q, k, scale, readable, member, video, text, layout.block)
