"""Methods that read queries and keys: their common options, and what one call tells them.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, n slots to a block, nv video
blocks, nb all blocks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.batch import stack
from vidattn.engines import MASSES, choose
from vidattn.grid import Grid, Layout, Size, tile_layout, usual_tile
from vidattn.head_plan import HeadPlan
from vidattn.inputs import check_inputs
from vidattn.kernels.pooling import block_means
from vidattn.method import Method, as_size
from vidattn.plan import Plan
from vidattn.rectification import is_coherent, trust


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
        last: what the same method planned for the same place at an earlier step.
        rectify: whether ``plan`` adds an estimate of what is not read.
        first: number of the first sample in the batch that ``last`` was planned for.
    """

    grid: Grid
    layout: Layout
    q: Tensor
    k: Tensor
    scale: float
    key_mask: Tensor | None = None
    last: Plan | HeadPlan | None = None
    rectify: bool = False
    first: int = 0

    @classmethod
    def of(
        cls,
        grid: Grid,
        layout_on: Callable[[torch.device], Layout],
        q: Tensor | None,
        k: Tensor | None,
        scale: float | None,
        key_mask: Tensor | None,
        *beside: object,
    ) -> Content:
        """The content of a call, without its gradients; without a scale, it is that of D.

        A sample none of whose keys may be read is looked at as if all might: its output is 0.

        Raises:
            ValueError: q and k missing, or anything that does not fit together or the grid.
        """
        if q is None or k is None:
            raise ValueError("this method reads content: give q and k, (B, H, S, D)")
        check_inputs(grid, (q, k), scale, key_mask)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        if key_mask is not None:
            key_mask = key_mask | ~key_mask.any(-1, keepdim=True)
        dtype = torch.promote_types(q.dtype, k.dtype)
        given = (q.detach().to(dtype), k.detach().to(dtype), scale, key_mask)
        return cls(grid, layout_on(q.device), *given, *beside)

    @property
    def memory(self) -> Tensor | None:
        """What ``last`` remembers of this sample."""
        held = () if self.last is None else self.last.memory
        return held[self.first] if len(held) > self.first else None

    def by_sample(self, search: Callable[[Content], Plan | HeadPlan]) -> Plan | HeadPlan:
        """The plan of all samples by a search in each of them alone.

        So what a sample reads never depends on its company, not even by a rounding error.
        """
        return stack([search(sample) for sample in self.samples()], self.q.shape[1])

    def samples(self) -> Iterator[Content]:
        """The content of one sample after the other."""
        for b in range(len(self.q)):
            one = slice(b, b + 1)
            mask = None if self.key_mask is None else self.key_mask[one]
            yield replace(self, q=self.q[one], k=self.k[one], key_mask=mask, first=self.first + b)

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

    def plan(
        self,
        blocks: Tensor,
        *,
        shares: Tensor | None = None,
        memory: tuple[Tensor, ...] = (),
    ) -> Plan:
        """The plan that reads some blocks of the video, rectified where the method is.

        Every block reads itself, whatever the search chose.

        Args:
            blocks: (B|1, H|1, nv, nv) bool, whether a query block reads a key block.
            shares: (B, H, nv, nv) of attention from block to block, where the method knows better
                than ``shares`` of this.
            memory: what the next plan for this place starts from (see ``Plan``).
        """
        plan = Plan.from_blocks(self.grid, self.layout, blocks | self.own, memory=memory)
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


@dataclass(frozen=True, kw_only=True)
class ContentMethod(Method):
    """A method that reads queries and keys; a subclass says in ``search`` who reads whom.

    Every sample is planned on its own, every block of queries reads at least itself, and ties are
    broken by the number of a block or head.

    Args:
        tile: tokens of one block along (t, h, w); chosen for the grid when not given.
        every: denoising steps that one plan serves, as a count or a fraction of them all; a
            fraction is 1 step where nobody knows how many there are.
        rectify: add an estimate of what is not read to the output.

    Raises:
        ValueError: a value out of range.
    """

    reads_content: ClassVar[bool] = True

    tile: Size | None = None
    every: int | float = 1
    rectify: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.tile is not None:
            as_size("tile", self.tile)
        share = isinstance(self.every, float) and 0 < self.every <= 1
        if not (share or type(self.every) is int and self.every >= 1):
            raise ValueError(
                "every must be a number of steps of at least 1, or a fraction of them above 0.0 "
                f"and at most 1.0, got {self.every!r}: 1 plans anew at every step"
            )

    @abstractmethod
    def search(self, content: Content) -> Plan | HeadPlan:
        """The plan of one sample; ``content.plan`` makes it from the blocks to read."""

    def tile_of(self, grid: Grid) -> Size:
        """Tokens of one block along (t, h, w)."""
        return usual_tile(grid.size) if self.tile is None else as_size("tile", self.tile)

    def layout(self, grid: Grid, device: torch.device) -> Layout:
        """The blocks that ``search`` is given."""
        return tiles(grid, self.tile_of(grid), device)

    def plan(
        self,
        grid: Grid,
        q: Tensor | None = None,
        k: Tensor | None = None,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        last: Plan | HeadPlan | None = None,
    ) -> Plan | HeadPlan:
        """Who reads whom, for every sample and head of ``q`` on its own.

        Args:
            q: (B, H, S, D).
            k: (B, K, S, D), H a multiple of K.
            scale: factor of the scores; D ** -0.5 by default.
            key_mask: (B, S) bool, False for keys that nobody may read, such as padded text.
            last: the plan for the same place (layer and pass) at an earlier step, if there is one.

        Raises:
            ValueError: q and k missing, anything that does not fit together or the grid, or a grid
                that the method cannot serve.
        """
        self.check(grid)
        given = (partial(self.layout, grid), q, k, scale, key_mask, last, self.rectify)
        return Content.of(grid, *given).by_sample(self.search)

    def keeps(self, made: int, now: int, num_steps: int | None) -> bool:
        """Whether fewer than ``every`` steps have gone by."""
        steps = self.every
        if isinstance(steps, float):
            # 0.4 * 50 and its like must not be rounded up to one more
            steps = math.ceil(steps * (num_steps or 0) - 1e-9) or 1
        return now < made + steps


@lru_cache(maxsize=32)
def tiles(grid: Grid, tile: Size, device: torch.device, chunk: Size | None = None) -> Layout:
    """``tile_layout`` on a device, made once."""
    return tile_layout(grid, tile, chunk=chunk).to(device)
