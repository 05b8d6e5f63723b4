"""Block lists of one call cut into parts: the query blocks in flight, with the keys they read.

Letters: B batch, H query heads, K key heads, n slots to a block, nb blocks, c copies in flight,
g plan rows in flight, G = c * g query blocks in flight, L listed blocks, P of them in flight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists, partial_bias
from vidattn.kernels.chunks import Chunk, make_chunks
from vidattn.kernels.slots import Slots
from vidattn.kernels.workers import num_workers


@dataclass(frozen=True)
class Part:
    """G query blocks in flight with the lists they read."""

    chunk: Chunk
    heads: Tensor  # (G,) int64, query heads, counted through the batch
    blocks: Tensor  # (G,) int64, query blocks
    keys: Tensor  # (G, L) int64, key blocks, counted through heads and batch
    key_bias: Tensor | None  # (G, L, n), -inf for keys nobody may read
    bias: Tensor | None  # (g, n, (L - first_partial) * n), HIDDEN or less for hidden pairs

    def hide(self, scores: Tensor, begin: int, end: int) -> None:
        """Lower the scores (G, n, P * n) of hidden pairs of the listed blocks begin to end."""
        n, first = scores.shape[1], self.chunk.first_partial
        if self.bias is not None and end > first:
            start = max(begin, first)
            bias = self.bias[..., (start - first) * n : (end - first) * n]
            rows = scores.view(-1, *self.bias.shape[:2], scores.shape[-1])
            rows[..., (start - begin) * n :].add_(bias)
        if self.key_bias is not None:
            scores.add_(self.key_bias[:, begin:end].reshape(scores.shape[0], 1, -1))


class Parts:
    """The parts of one call, shared out to workers whose query and key heads are their own.

    Args:
        batch: samples, query heads and key heads.
        block_bytes: memory in flight of one listed block.
    """

    def __init__(
        self,
        lists: BlockLists,
        slots: Slots,
        batch: tuple[int, int, int],
        block_bytes: int,
        dtype: torch.dtype,
    ):
        self._lists, self._slots, self._block_bytes, self._dtype = lists, slots, block_bytes, dtype
        self._index_heads(*batch)
        self._find_unreadable()
        self._shares = self._share_out(num_workers(lists.key_block.device))

    @property
    def num_workers(self) -> int:
        """How many workers share the parts."""
        return len(self._shares)

    def _index_heads(self, B: int, H: int, K: int) -> None:
        """Tables (plan heads, copies): the query, key and sample each copy of a plan row is for."""
        lists = self._lists
        b = torch.arange(B, device=lists.key_block.device)[:, None]
        h = torch.arange(H, device=lists.key_block.device)
        split = (lists.batch, B // lists.batch, lists.heads, H // lists.heads)

        def by_plan(x: Tensor) -> Tensor:
            return x.reshape(split).transpose(1, 2).reshape(lists.batch * lists.heads, -1)

        self._query_heads = by_plan(b * H + h)
        self._key_heads = by_plan(b * K + h // (H // K))
        self._samples = by_plan(b.expand(B, H))

    def _find_unreadable(self) -> None:
        readable = self._slots.readable
        self._key_bias = None
        if readable is None:
            return
        bias = torch.zeros(readable.shape, dtype=self._dtype, device=readable.device)
        bias.masked_fill_(~readable, -math.inf)
        self._key_bias = bias.view(-1, self._slots.block)
        self._is_biased = ~readable.view(-1, self._slots.block).all(-1)
        if readable.shape[0] == 1:
            self._samples = torch.zeros_like(self._samples)

    def _share_out(self, limit: int) -> list[tuple[slice, slice]]:
        """Plan heads and copies of each worker: equal shares without a key head in common.

        Gradients of keys are then summed by one worker, in a fixed order.
        """
        heads, copies = self._key_heads.shape
        for count in range(limit, 1, -1):
            by_heads = [(piece, slice(None)) for piece in _slices(heads, count)]
            by_copies = [(slice(None), piece) for piece in _slices(copies, count)]
            for shares in (by_copies, by_heads):
                owned = [set(self._key_heads[share].flatten().tolist()) for share in shares]
                if shares and sum(map(len, owned)) == len(set().union(*owned)):
                    return shares
        return [(slice(None), slice(None))]

    def of_worker(self, worker: int) -> Iterator[Part]:
        """The parts of one worker, in a fixed order."""
        plan_heads, copies = self._shares[worker]
        tables = [x[:, copies] for x in (self._query_heads, self._key_heads, self._samples)]
        begin, end, _ = plan_heads.indices(tables[0].shape[0])
        for chunk in make_chunks(self._lists, self._block_bytes, tables[0].shape[1], (begin, end)):
            yield from self._parts(chunk, tables)

    def _parts(self, chunk: Chunk, tables: list[Tensor]) -> Iterator[Part]:
        lists, nb = self._lists, self._slots.num_blocks
        entries = chunk.first + torch.arange(chunk.count, device=chunk.first.device)
        blocks = lists.key_block[entries].long()
        bias = None
        if chunk.first_partial < chunk.count:
            partial = entries[:, chunk.first_partial :]
            bias = partial_bias(lists, self._slots.block, chunk.rows, partial, self._dtype)
        splits = (table[chunk.heads].T.split(chunk.num_copies) for table in tables)
        for query_heads, key_heads, samples in zip(*splits):
            query_blocks = chunk.blocks.expand_as(query_heads).flatten()
            keys = (key_heads[..., None] * nb + blocks).flatten(0, 1)
            key_bias = None
            if self._key_bias is not None:
                cells = (samples[..., None] * nb + blocks).flatten(0, 1)
                if bool(self._is_biased[cells].any()):
                    key_bias = self._key_bias[cells]
            yield Part(chunk, query_heads.flatten(), query_blocks, keys, key_bias, bias)


def _slices(size: int, count: int) -> list[slice]:
    """``count`` equal slices of ``size`` things, none where they cannot be equal."""
    if size % count:
        return []
    step = size // count
    return [slice(begin, begin + step) for begin in range(0, size, step)]
