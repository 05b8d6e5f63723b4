"""Where the video stands in the sequence of one attention call.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vidattn.grid import Grid
from vidattn.pipelines.family import Family
from vidattn.pipelines.heads import Heads, heads_here
from vidattn.pipelines.hooks import masks
from vidattn.pipelines.passes import Pass


class Call(NamedTuple):
    """What one attention call is about.

    Args:
        num_moved: how many tokens at the front of the sequence stand at the end of the grid.
        num_silent: how many of those at the front have keys, and no queries.
        keys: (B, S) bool, those that may be read, in the order of the grid.
        scale: factor of the scores, None for the usual one.
        heads: which of the model's it has.
    """

    grid: Grid
    num_moved: int
    num_silent: int
    keys: Tensor | None
    scale: float | None
    heads: Heads

    def to_grid(self, x: Tensor) -> Tensor:
        """(B, H, S, ...) of the sequence in the order of the grid, 0 for queries that are none."""
        if silent := self.grid.num_tokens - x.shape[2]:
            x = torch.cat([x.new_zeros(*x.shape[:2], silent, *x.shape[3:]), x], dim=2)
        return x.roll(-self.num_moved, 2) if self.num_moved else x

    def from_grid(self, x: Tensor) -> Tensor:
        """(B, H, S, ...) in the order of the grid as the sequence has it."""
        x = x.roll(self.num_moved, 2) if self.num_moved else x
        return x[:, :, self.num_silent :] if self.num_silent else x


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
        ValueError: the sequence has no grid, its mask is none of keys, or some heads are unknown.
    """
    length, (t, h, w) = k.shape[2], current.size
    silent = length - q.shape[2]
    beside = length - t * h * w
    if beside < 0 or silent < 0 or silent and not family.prefix:
        raise ValueError(
            f"its {q.shape[2]} queries and {length} keys do not fit the video of {t}x{h}x{w}"
        )
    before = current.num_before
    if before < 0:
        before = beside if family.beside == "before" else 0
    after = beside - before
    if after < 0 or after and family.beside == "nothing":
        raise ValueError(
            f"its sequence of {length} is not the video of {t}x{h}x{w} = {t * h * w} tokens"
        )
    keys = masks.key_mask(mask, (q.shape[0], length), family.paired_mask)
    # a grid has its text on one side; attention does not mind turning the sequence
    num_moved = before if after else 0
    grid = Grid(t, h, w, text=beside, text_first=bool(before) and not num_moved)
    if keys is not None and num_moved:
        keys = keys.roll(-num_moved, 1)
    return Call(grid, num_moved, silent, keys, scale, heads_here(module, q, model))
