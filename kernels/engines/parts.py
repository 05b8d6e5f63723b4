"""Block lists of one call cut into parts: the query blocks in flight, with the keys they read.

Letters: B batch, H query heads, K key heads, Sk keys, n slots to a block, nb blocks of keys, c
copies in flight, g plan rows in flight, G = c * g query blocks in flight, L listed blocks, P of
them in flight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.engines.chunks import Chunk, make_chunks
from vidattn.kernels.engines.partial_bias import partial_bias
from vidattn.kernels.slots import Rows, Slots
from vidattn.kernels.workers import num_workers

# index tensors are kept for the next call up to so many numbers
MAX_KEPT = 4 << 20


@dataclass(frozen=True)
class Part:
    """G query blocks in flight with the lists they read, as indices."""

    segments: tuple[Tensor, ...]  # (G * P,) int64 each, key blocks, counted through heads and batch
    query_rows: Tensor  # (G * n,) int64, rows of D numbers in q
    lse_rows: Tensor  # (G * n,) int64, likewise in the log-sum-exp
    live: Tensor | None  # (G, n) bool, which slots hold a token, None where all do
    cells: Tensor  # (G, L) int64, key blocks, counted through what has biases of keys

    @property
    def num_blocks(self) -> int:
        """G."""
        return self.cells.shape[0]

    def take(self, rows: Tensor, index: Tensor) -> Tensor:
        """(G, n, D) the rows of an index."""
        return rows.index_select(0, index).view(self.num_blocks, -1, rows.shape[-1])

    def put(self, rows: Tensor, index: Tensor, values: Tensor) -> None:
        """Write the rows of an index, but those of empty slots."""
        values = values.view(-1, rows.shape[-1])
        if self.live is not None:
            live = self.live.flatten()
            index, values = index[live], values[live]
        rows.index_copy_(0, index, values)


@dataclass(frozen=True)
class Bias:
    """What is added to the scores of one part."""

    pairs: Tensor | None  # (g, n, (L - first_partial) * n), HIDDEN or less for hidden pairs
    keys: Tensor | None  # (G, L, n) base 2, -inf for keys nobody may read
    first_partial: int
    largest: float  # what the finite ones of keys add or take at most

    def add_to(self, scores: Tensor, begin: int, end: int) -> None:
        """Add to the scores (G, n, P * n) of the listed blocks begin to end."""
        n, first = scores.shape[1], self.first_partial
        if self.pairs is not None and end > first:
            start = max(begin, first)
            bias = self.pairs[..., (start - first) * n : (end - first) * n]
            rows = scores.view(-1, *self.pairs.shape[:2], scores.shape[-1])
            rows[..., (start - begin) * n :].add_(bias)
        if self.keys is not None:
            scores.add_(self.keys[:, begin:end].reshape(scores.shape[0], 1, -1))


class Parts:
    """The parts of one call, shared out to workers whose query and key heads are their own.

    Args:
        slots: of keys.
        q: rows of (B, H, S, D).
        lse: rows of (B, H, S, 1).
        num_key_heads: K.
        block_bytes: memory in flight of one listed block.
        dtype: of the scores.
        key_bias: (B|1, H|1, Sk) added to the scores of a key, base 2, or None.
    """

    def __init__(
        self,
        lists: BlockLists,
        slots: Slots,
        q: Rows,
        lse: Rows,
        num_key_heads: int,
        block_bytes: int,
        dtype: torch.dtype,
        key_bias: Tensor | None,
    ):
        self._lists, self._slots, self._block_bytes, self._dtype = lists, slots, block_bytes, dtype
        self._q, self._lse = q, lse
        self._queries = slots if lists.keys is None else Slots(lists.order, lists.block, None)
        B, H = q.tensor.shape[:2]
        self._index_heads(B, H, num_key_heads)
        self._find_bias(B, H, key_bias)
        limit = num_workers(lists.key_block.device)
        self._shares = self._share_out(limit)
        sizes = (B, H, num_key_heads, q.strides, lse.strides, slots.block, block_bytes, limit)
        self._key = ("parts", *sizes)

    @property
    def num_workers(self) -> int:
        """How many workers share the parts."""
        return len(self._shares)

    def _index_heads(self, B: int, H: int, K: int) -> None:
        """Tables (plan heads, copies): the query, key and sample each copy of a plan row is for.

        The samples are those that have biases of keys.
        """
        lists = self._lists
        b = torch.arange(B, device=lists.key_block.device)[:, None]
        h = torch.arange(H, device=lists.key_block.device)
        split = (lists.batch, B // lists.batch, lists.heads, H // lists.heads)

        def by_plan(x: Tensor) -> Tensor:
            return x.reshape(split).transpose(1, 2).reshape(lists.batch * lists.heads, -1)

        self._query_heads = by_plan(b * H + h)
        self._key_heads = by_plan(b * K + h // (H // K))
        self._samples = by_plan(b.expand(B, H))

    def _find_bias(self, B: int, H: int, key_bias: Tensor | None) -> None:
        """A bias of each block of keys: of all samples, of each, or of each of their heads."""
        readable = self._slots.readable
        self.largest_bias, self._key_bias = 0.0, None
        if key_bias is not None:
            bias = self._slots.of_tokens(key_bias.to(self._dtype).expand(B, H, -1))
            self.largest_bias = bias.masked_fill(bias.isinf(), 0).abs().amax().item()
            self._samples = self._query_heads
        elif readable is not None:
            bias = torch.zeros(len(readable), 1, readable.shape[1], device=readable.device)
            bias = bias.to(self._dtype)
            if len(readable) == 1:
                self._samples = torch.zeros_like(self._samples)
        else:
            return
        if readable is not None:
            bias.masked_fill_(~readable[:, None], -math.inf)
        self._key_bias = bias.view(-1, self._slots.block)
        self._is_biased = (self._key_bias != 0).any(-1)

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

    def of_worker(self, worker: int) -> Iterator[tuple[Chunk, Part, Bias | None]]:
        """The parts of one worker, in a fixed order."""
        for chunk, parts in self._chunks(worker):
            pairs = None
            if chunk.first_partial < chunk.count:
                entries = self._entries(chunk)[:, chunk.first_partial :]
                pairs = partial_bias(self._lists, chunk.rows, entries, self._dtype)
            for part in parts:
                keys = None
                if self._key_bias is not None and bool(self._is_biased[part.cells].any()):
                    keys = self._key_bias[part.cells]
                bias = None
                if pairs is not None or keys is not None:
                    bias = Bias(pairs, keys, chunk.first_partial, self.largest_bias)
                yield chunk, part, bias

    def _chunks(self, worker: int) -> Iterable[tuple[Chunk, Iterable[Part]]]:
        """Chunks of a worker with their parts, from the call before where they are few."""
        plan_heads, copies = self._shares[worker]
        tables = [x[:, copies] for x in (self._query_heads, self._key_heads, self._samples)]
        begin, end, _ = plan_heads.indices(tables[0].shape[0])
        num_copies = tables[0].shape[1]
        chunks = make_chunks(self._lists, self._block_bytes, num_copies, (begin, end))
        if self._lists.key_block.numel() * num_copies > MAX_KEPT:
            return ((chunk, self._parts(chunk, tables)) for chunk in chunks)
        key = (*self._key, worker, self._key_bias is not None and len(self._key_bias))
        if key not in self._lists.cache:
            self._lists.cache[key] = [(c, list(self._parts(c, tables))) for c in chunks]
        return self._lists.cache[key]

    def _entries(self, chunk: Chunk) -> Tensor:
        return chunk.first + torch.arange(chunk.count, device=chunk.first.device)

    def _parts(self, chunk: Chunk, tables: list[Tensor]) -> Iterator[Part]:
        nb = self._slots.num_blocks
        blocks = self._lists.key_block[self._entries(chunk)].long()
        splits = (table[chunk.heads].T.split(chunk.num_copies) for table in tables)
        for query_heads, key_heads, samples in zip(*splits):
            heads, query_blocks = (
                query_heads.flatten(),
                chunk.blocks.expand_as(query_heads).flatten(),
            )
            keys = (key_heads[..., None] * nb + blocks).flatten(0, 1)
            yield Part(
                segments=tuple(keys[:, a:b].flatten() for a, b in chunk.segments()),
                query_rows=self._queries.index(self._q, heads, query_blocks).flatten(),
                lse_rows=self._queries.index(self._lse, heads, query_blocks).flatten(),
                live=self._queries.live(query_blocks),
                cells=(samples[..., None] * nb + blocks).flatten(0, 1),
            )


def _slices(size: int, count: int) -> list[slice]:
    """``count`` equal slices of ``size`` things, none where they cannot be equal."""
    if size % count:
        return []
    step = size // count
    return [slice(begin, begin + step) for begin in range(0, size, step)]
