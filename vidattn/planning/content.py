"""Queries and keys of one call as a method looks at them: in blocks, with figures about these.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, n slots to a block, nv video
blocks, nb all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.engines import MASSES, choose
from vidattn.grid import Grid, Layout
from vidattn.inputs import check_inputs
from vidattn.kernels.scoring.pooling import block_means
from vidattn.plan import AnyPlan, Plan
from vidattn.planning.batch import stack
from vidattn.planning.reading import Memory, Reading
from vidattn.planning.rectification import is_coherent, trust


@dataclass(frozen=True, eq=False)
class Content:
    """Queries and keys of one call in the blocks of a layout; every figure is float32 or more.

    Means are over the true tokens of a block, and the mean of all keys is taken off the keys, which
    no softmax notices.

    Args:
        q: (B, H, S, D).
        k: (B, K, S, D), H a multiple of K.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.
        last: what the same method remembered of each sample when it planned for the same place.
        rectify: whether ``plan`` adds an estimate of what is not read.
    """

    grid: Grid
    layout: Layout
    q: Tensor
    k: Tensor
    scale: float
    key_mask: Tensor | None = None
    last: Memory = ()
    rectify: bool = False

    @classmethod
    def of(
        cls,
        grid: Grid,
        layout_on: Callable[[torch.device], Layout],
        reading: Reading | None,
        *,
        rectify: bool = False,
    ) -> Content:
        """The content of a call, without its gradients.

        A sample none of whose keys may be read is looked at as if all might: its output is 0.

        Raises:
            ValueError: no reading, or anything in it that does not fit together or the grid.
        """
        if reading is None or reading.q is None or reading.k is None:
            raise ValueError("this method reads content: give q and k, (B, H, S, D)")
        q, k, scale, key_mask = reading.q, reading.k, reading.scale, reading.key_mask
        check_inputs(grid, (q, k), scale, key_mask)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        if key_mask is not None:
            key_mask = key_mask | ~key_mask.any(-1, keepdim=True)
        dtype = torch.promote_types(q.dtype, k.dtype)
        q, k = q.detach().to(dtype), k.detach().to(dtype)
        return cls(grid, layout_on(q.device), q, k, scale, key_mask, reading.last, rectify)

    @property
    def memory(self) -> Tensor | None:
        """What is remembered of the first sample."""
        return self.last[0] if self.last else None

    def by_sample(
        self, search: Callable[[Content], tuple[AnyPlan, Tensor | None]]
    ) -> tuple[AnyPlan, Memory]:
        """The plan of all samples by a search in each of them alone, with what these remember.

        So what a sample reads never depends on its company, not even by a rounding error.
        """
        plans, memories = zip(*map(search, self.samples()))
        memory = tuple(x for x in memories if x is not None)
        return stack(plans, self.q.shape[1]), memory

    def samples(self) -> Iterator[Content]:
        """The content of one sample after the other."""
        for b in range(len(self.q)):
            one = slice(b, b + 1)
            mask = None if self.key_mask is None else self.key_mask[one]
            yield replace(self, q=self.q[one], k=self.k[one], key_mask=mask, last=self.last[one])

    def on(self, layout: Layout) -> Content:
        """The same content in the blocks of another layout."""
        return replace(self, layout=layout)

    def of_heads(self, heads: Tensor) -> Content:
        """The content of some query heads, (h,) int64, each with its own keys."""
        group = self.q.shape[1] // self.k.shape[1]
        return replace(self, q=self.q[:, heads], k=self.k[:, heads // group])

    def rows(self) -> Iterator[Content]:
        """The content of one head of one sample after the other, samples first."""
        for sample in self.samples():
            for head in range(self.q.shape[1]):
                yield sample.of_heads(torch.tensor([head], device=self.q.device))

    @property
    def num_blocks(self) -> int:
        """nv."""
        return self.layout.num_video_blocks

    @cached_property
    def own(self) -> Tensor:
        """(nv, nv) bool, a block and itself."""
        return torch.eye(self.num_blocks, dtype=torch.bool, device=self.q.device)

    @property
    def tokens(self) -> Tensor:
        """(nv,) int64 true tokens of each block."""
        return self.layout.tokens_per_block[: self.num_blocks]

    @cached_property
    def queries(self) -> Tensor:
        """(B, H, nv, D) mean queries."""
        means, _ = block_means(self.q, self.layout.order, self.layout.block)
        return means[:, :, : self.num_blocks]

    @cached_property
    def _key_means(self) -> tuple[Tensor, Tensor]:
        given = (self.k, self.layout.order, self.layout.block, self.key_mask)
        return tuple(x[:, :, : self.num_blocks] for x in block_means(*given))

    @property
    def counts(self) -> Tensor:
        """(B|1, 1, nv) keys that may be read in each block."""
        return self._key_means[1]

    @cached_property
    def _center(self) -> Tensor:
        """(B, K, 1, D) mean of the keys of the video."""
        means, counts = self._key_means
        weights = counts / counts.sum(-1, keepdim=True).clamp_min(1)
        return (means * weights[..., None]).sum(2, keepdim=True)

    @cached_property
    def keys(self) -> Tensor:
        """(B, H, nv, D) mean keys."""
        return self._for_queries(self._key_means[0] - self._center)

    @cached_property
    def text_keys(self) -> Tensor:
        """(B, H, text, D) keys of the text, one by one."""
        text = slice(self.grid.text_start, self.grid.text_start + self.grid.text)
        return self._for_queries(self.k[:, :, text].to(self._center.dtype) - self._center)

    @cached_property
    def scores(self) -> Tensor:
        """(B, H, nv, nv) scaled scores of the means, plus the log of the keys in each block."""
        scores = self.scale * self.queries @ self.keys.mT
        return scores + self.counts.log()[..., None, :]

    @cached_property
    def shares(self) -> Tensor:
        """(B, H, nv, nv) the attention that each query block gives each key block of the video.

        The softmax is over the blocks and, one by one, the keys of the text: with text the rows sum
        to less than 1.
        """
        total = self.scores.logsumexp(-1, keepdim=True)
        if self.grid.text:
            text = self.scale * self.queries @ self.text_keys.mT
            if self.key_mask is not None:
                start = self.grid.text_start
                readable = self.key_mask[:, start : start + self.grid.text]
                text = text.masked_fill(~readable[:, None, None], -torch.inf)
            total = torch.logaddexp(total, text.logsumexp(-1, keepdim=True))
        return (self.scores - total).exp()

    @cached_property
    def is_coherent(self) -> Tensor:
        """(B, H, nv, nv) bool, whether the score of the means speaks for two blocks."""
        return is_coherent(self.q, self.k, self.layout, self.queries, self.keys, self.key_mask)

    def mass(self, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The attention that every block really gives every other, in a pass over all pairs.

        Args:
            lse: (B, H, S) log-sum-exp of the scaled scores, from an earlier step; that of these
                queries and keys where none is given, for half a pass more.

        Returns:
            (B, H, nv, nb) float32, sums over the queries of a block; (B, H, S) the log-sum-exp.
        """
        given = (self.layout.order, self.layout.block)
        options = {"scale": self.scale, "key_mask": self.key_mask}
        engine = MASSES[choose("the mass of blocks", MASSES, (self.q, self.k), options)]
        if lse is None:
            mass, lse = engine.dense_mass(self.q, self.k, *given, **options)
        else:
            mass = engine.block_mass(self.q, self.k, lse, *given, **options)
        return mass[:, :, : self.num_blocks], lse

    def plan(self, blocks: Tensor, *, shares: Tensor | None = None) -> Plan:
        """The plan that reads some blocks of the video, rectified where the method is.

        Every block reads itself, whatever the search chose.

        Args:
            blocks: (B|1, H|1, nv, nv) bool, whether a query block reads a key block.
            shares: (B, H, nv, nv) of attention from block to block, where the method knows better
                than ``shares`` of this.
        """
        plan = Plan.from_blocks(self.grid, self.layout, blocks | self.own)
        return self.rectified(plan, shares)

    def rectified(self, plan: Plan, shares: Tensor | None = None) -> Plan:
        """A plan in these blocks with an estimate of what it does not read, where one is wanted.

        Rectified SpaAttn (Liu et al.): blocks that are not read though their means speak for them
        enter the output as their share of attention times their mean value, and what was read
        keeps the rest of the attention. Of a block that is read in part, the other part does. Each
        head adds as much of that as ``trust`` says, ours.

        Args:
            shares: as in ``plan``.
        """
        if not self.rectify:
            return plan
        means = self._key_means[0]
        shares = (self.shares if shares is None else shares).to(means.dtype)
        rest = (shares * (1 - plan.read_share)).masked_fill(~self.is_coherent, 0)
        given = (self.q, self.k, plan, rest, means)
        factor = trust(*given, scale=self.scale, key_mask=self.key_mask)
        rest = rest * factor[..., None, None]
        beside = self.layout.num_blocks - self.num_blocks
        gain = F.pad(1 - rest.sum(-1), (0, beside), value=1.0)
        return replace(plan, gain=gain, rest=F.pad(rest, (0, beside, 0, beside)))

    def _for_queries(self, x: Tensor) -> Tensor:
        """(B, K, ...) of the keys as (B, H, ...)."""
        return x.repeat_interleave(self.q.shape[1] // self.k.shape[1], dim=1)
