"""Tokens in the order of a layout: gathered into blocks before attention, put back after it.

Letters: B batch, H heads, S tokens of one side, D head dim, N slots, n slots to a block, nb blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """A (B, H, S, D) tensor seen as rows of D numbers, wherever its strides put them."""

    def __init__(self, x: Tensor):
        B, H, S, D = x.shape
        if x.stride(-1) != 1 or any(stride % D for stride in x.stride()[:3]):
            x = x.contiguous()
        b, h, self.step = self.strides = tuple(stride // D for stride in x.stride()[:3])
        # the tensor itself, or a copy where its strides do not fit
        self.tensor = x
        length = 1 + (B - 1) * b + (H - 1) * h + (S - 1) * self.step
        self.flat = x.as_strided((length, D), (D, 1))
        samples = torch.arange(B, device=x.device)[:, None] * b
        # (B * H,) where each head begins
        self.start = (samples + torch.arange(H, device=x.device) * h).flatten()


class Slots:
    """The slots of one call.

    Args:
        order: (N,) int32, token in each slot, -1 for an empty slot.
        block: slots to a block.
        key_mask: (B, S) bool, False for keys that nobody may read.
    """

    def __init__(self, order: Tensor, block: int, key_mask: Tensor | None):
        self.order, self.block = order, block
        self.num_blocks = order.numel() // block
        live = order >= 0
        filled = live.nonzero().flatten()
        self._token = order.long().clamp_min(0)
        self._slot = torch.empty_like(filled)
        self._slot[self._token[filled]] = filled
        self._empty = None if filled.numel() == live.numel() else (~live).nonzero().flatten()
        # (1 or B, N) bool, whether a slot holds a key that may be read; None where all do
        self.readable: Tensor | None = None if self._empty is None else live[None]
        if key_mask is not None and not bool(key_mask.all()):
            self.readable = live & key_mask[:, self._token]
        self._token_of, self._is_live = self._token.view(-1, block), live.view(-1, block)

    def fill(self, x: Tensor) -> Tensor:
        """(B, H, S, D) tokens as (B * H * nb, n, D) blocks, 0 in empty slots."""
        blocks = x.index_select(2, self._token)
        if self._empty is not None:
            blocks.index_fill_(2, self._empty, 0)
        return blocks.view(-1, self.block, x.shape[-1])

    def of_tokens(self, x: Tensor) -> Tensor:
        """(B, H, S) numbers of tokens as (B, H, N), any in empty slots."""
        return x.index_select(2, self._token)

    def read(self, blocks: Tensor, like: Tensor) -> Tensor:
        """(B * H * nb, n, D) blocks as tokens of the shape of ``like``."""
        slots = blocks.view(*like.shape[:2], -1, blocks.shape[-1])
        return slots.index_select(2, self._slot)

    def index(self, rows: Rows, heads: Tensor, blocks: Tensor) -> Tensor:
        """(G, n) the row of each slot of the blocks (G,) of the heads (G,), any in empty slots."""
        return rows.start[heads][:, None] + self._token_of[blocks] * rows.step

    def live(self, blocks: Tensor) -> Tensor | None:
        """(G, n) bool, which slots of the blocks hold a token; None where all do."""
        live = self._is_live[blocks]
        return None if self._empty is None or bool(live.all()) else live
