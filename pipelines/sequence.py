"""Where the video stands in the sequence of one attention call.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidattn.grid import Grid, Size
from vidattn.kernels.engines.dense import dense_attention
from vidattn.pipelines.family import Family
from vidattn.pipelines.heads import Heads, context_parallel, heads_here
from vidattn.pipelines.hooks import masks
from vidattn.pipelines.passes import Pass
from vidattn.plan import AnyPlan


class Call(NamedTuple):
    """What one attention call is about.

    Args:
        num_moved: how many tokens at the front of the sequence stand at the end of the grid.
        num_silent: how many of those at the front have keys, and no queries.
        keys: (B, S) bool, those that may be read, in the order of the grid.
        weight: (B, 1, S) how much each of them weighs; None for all the same.
        beside: (B|1, 1, T, S) mask of the T queries beside the video, where it is not that of the
            video's; in the order of the grid.
        scale: factor of the scores, None for the usual one.
        heads: which of the model's it has.
        chunk: frames that wait for those before them together; None where nothing waits.
        asks_from: the first token whose query is asked.
    """

    grid: Grid
    num_moved: int
    num_silent: int
    keys: Tensor | None
    weight: Tensor | None
    beside: Tensor | None
    scale: float | None
    heads: Heads
    chunk: int | None = None
    asks_from: int = 0

    def turns(self) -> Iterator[Call]:
        """What is attended to together: all, or one chunk after the other with what is before it.

        To each chunk the video ends with it, so that nothing hangs on what comes later.
        """
        if self.chunk is None:
            yield self
            return
        for first in range(0, self.grid.t, self.chunk):
            grid = replace(self.grid, t=first + self.chunk)
            yield self._replace(grid=grid, asks_from=first * grid.h * grid.w)

    def of_turn(self, plan: AnyPlan) -> AnyPlan:
        """What a plan has for the queries that are asked in this turn."""
        if not self.asks_from:
            return plan
        return plan.of_queries(lambda _: self._asked(plan))

    def density(self, plans: Sequence[AnyPlan]) -> float:
        """Kept pairs of video tokens in the plans of all turns, over all pairs of the video."""
        if self.chunk is None:
            return plans[0].density
        turns = zip(self.turns(), plans)
        return sum(self._share(turn) * plan.density_of(turn._asked(plan)) for turn, plan in turns)

    def visited_density(self, plans: Sequence[AnyPlan]) -> float:
        """The same of pairs in visited blocks."""
        return sum(self._share(turn) * x.visited_density for turn, x in zip(self.turns(), plans))

    def _share(self, turn: Call) -> float:
        """Pairs of video tokens of a turn over those of all."""
        return (turn.grid.t / self.grid.t) ** 2

    def _asked(self, plan: AnyPlan) -> Tensor:
        """(S,) bool, whose queries are asked in this turn, where a plan is."""
        return torch.arange(self.grid.num_tokens, device=plan.device) >= self.asks_from

    def to_grid(self, x: Tensor) -> Tensor:
        """(B, H, S, ...) of the sequence in the order of the grid, 0 for queries that are none."""
        x = x[:, :, : self.grid.num_tokens]
        if silent := self.grid.num_tokens - x.shape[2]:
            x = torch.cat([x.new_zeros(*x.shape[:2], silent, *x.shape[3:]), x], dim=2)
        return x.roll(-self.num_moved, 2) if self.num_moved else x

    def from_grid(self, x: Tensor) -> Tensor:
        """(B, H, s, ...) of those that are asked, as the sequence has them, of all of the grid."""
        x = x.roll(self.num_moved, 2) if self.num_moved else x
        return x[:, :, self.num_silent + self.asks_from :]

    def with_beside(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The outputs with those of the queries beside the video by their own mask, if any.

        All are (B, H, S, D) in the order of the grid.
        """
        if self.beside is None:
            return out
        video, text = self.grid.video_start, self.grid.text_start
        rows = slice(text, text + self.grid.text)
        texts = dense_attention(q[:, :, rows], k, v, mask=self.beside, scale=self.scale)
        videos = out[:, :, video : video + self.grid.num_video_tokens]
        return torch.cat([texts, videos] if self.grid.text_first else [videos, texts], 2)

    def check_shared(self) -> None:
        """Refuse a mask of its own for queries beside the video where processes share queries.

        Raises:
            ValueError: there is one.
        """
        if self.beside is not None:
            raise ValueError("its mask differs between queries, which processes share: use Ulysses")


def is_of_prefix(family: Family, current: Pass, k: Tensor) -> bool:
    """Whether (B, K, S, D) keys are of what stands before the video, and attends alone."""
    return family.prefix and k.shape[2] <= current.num_before


def find_video(
    family: Family,
    module: nn.Module,
    current: Pass,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float | None,
    model: nn.Module,
) -> Call:
    """Find the video among the (B, H, S, D) queries of a layer.

    Raises:
        ValueError: the sequence has no grid, its mask is none of chunks, or not one of keys for the
            whole video, or some heads are unknown.
    """
    length, (t, h, w) = k.shape[2], current.size
    while family.halves and length < t * h * w:
        h, w = -(-h // 2), -(-w // 2)
    silent = length - q.shape[2]
    beside = length - t * h * w
    if beside < 0 or silent < 0 or silent and not family.prefix:
        raise ValueError(
            f"its {q.shape[2]} queries and {length} keys do not fit the video of {t}x{h}x{w}"
        )
    # some layers see the video alone, whatever others see beside it
    before = current.num_before if beside else 0
    if before < 0:
        before = beside if family.beside == "before" else 0
    after = beside - before
    if after < 0 or after and family.beside == "nothing":
        raise ValueError(
            f"its sequence of {length} is not the video of {t}x{h}x{w} = {t * h * w} tokens"
        )
    chunk = None if family.chunk is None else family.chunk(model)
    if chunk is not None:
        _check_chunks(mask, (q.shape[2], length), current.size, chunk)
        if context_parallel(module.processor, model) is not None:
            raise ValueError("frames that wait for each other are not spread over processes")
        mask = None
    # a grid has its text on one side; attention does not mind turning the sequence
    num_moved = before if after else 0
    grid = Grid(t, h, w, text=beside, text_first=bool(before) and not num_moved)
    found = _masks(mask, grid, (q.shape[0], length), num_moved, silent, family.paired_mask)
    return Call(grid, num_moved, silent, *found, scale, heads_here(module, q, model), chunk)


def _masks(
    mask: Tensor | None,
    grid: Grid,
    shape: tuple[int, int],
    num_moved: int,
    silent: int,
    paired: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``keys``, ``weight`` and ``beside`` of a call."""
    weight = beside = None
    try:
        keys = masks.key_mask(mask, shape, paired)
    except ValueError:
        mask = masks.full(mask)
        if silent or mask.shape[2] != shape[1]:
            raise
        # the video's queries share one, which text does not
        tokens = (torch.arange(shape[1], device=mask.device) + num_moved) % shape[1]
        video = tokens[grid.video_start : grid.video_start + grid.num_video_tokens]
        text = tokens[grid.text_start : grid.text_start + grid.text]
        keys, weight = masks.shared_mask(mask[:, :, video], shape)
        beside = mask[:, :, text][..., tokens] if grid.text else None
    if keys is not None and num_moved:
        keys = keys.roll(-num_moved, 1)
        weight = None if weight is None else weight.roll(-num_moved, 2)
    return keys, weight, beside


def _check_chunks(mask: Tensor | None, shape: tuple[int, int], size: Size, chunk: int) -> None:
    """Look at the mask of a model whose frames wait for each other.

    Raises:
        ValueError: it is none of chunks of whole frames, or there are other tokens.
    """
    is_video = shape == (math.prod(size),) * 2 and size[0] % chunk == 0
    if mask is None or mask.dtype != torch.bool or mask.shape != (1, 1, *shape) or not is_video:
        found = None if mask is None else f"{mask.dtype} of {tuple(mask.shape)}"
        raise ValueError(
            f"frames of a video of {size} that wait for each other in chunks of {chunk} have a "
            f"bool mask of {(1, 1, *shape)}, and it has {found}"
        )
