"""Tokens in the order of a layout: gathered into blocks before attention, put back after it.

Letters: B batch, H heads, S tokens, D head dim, N slots, n slots to a block, nb blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Slots:
    """The slots of one call.

    Args:
        order: (N,) int32, token in each slot, -1 for an empty slot.
        block: slots to a block.
        key_mask: (B, S) bool, False for keys that nobody may read.
    """

    def __init__(self, order: Tensor, block: int, key_mask: Tensor | None):
        self.block = block
        self.num_blocks = order.numel() // block
        self._token = order.long().clamp_min(0)
        live = order >= 0
        filled = live.nonzero().flatten()
        self._slot = torch.empty_like(filled)
        self._slot[self._token[filled]] = filled
        self._empty = None if filled.numel() == live.numel() else (~live).nonzero().flatten()
        # (1 or B, N) bool, whether a slot holds a key that may be read; None where all do
        self.readable: Tensor | None = None if self._empty is None else live[None]
        if key_mask is not None and not bool(key_mask.all()):
            self.readable = live & key_mask[:, self._token]

    def fill(self, x: Tensor) -> Tensor:
        """(B, H, S, D) tokens as (B * H * nb, n, D) blocks, 0 in empty slots."""
        blocks = x.index_select(2, self._token)
        if self._empty is not None:
            blocks.index_fill_(2, self._empty, 0)
        return blocks.view(-1, self.block, x.shape[-1])

    def read(self, blocks: Tensor, like: Tensor) -> Tensor:
        """(B * H * nb, n, D) blocks as tokens of the shape of ``like``."""
        slots = blocks.view(*like.shape[:2], -1, blocks.shape[-1])
        return slots.index_select(2, self._slot)
