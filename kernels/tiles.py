"""One call of block-sparse attention in pieces: queries, keys, values and scores of a few blocks.

Letters: B batch, H query heads, K key heads, D head dim, n slots to a block, nb blocks, c copies in
flight, g plan rows in flight, G = c * g query blocks in flight, L listed blocks, P of them in flight.
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

LOG2E = math.log2(math.e)
# Scores up to this, base 2, need no maximum subtracted: 2 ** 100 times a million keys is finite,
# and 2 ** -100 still has all its digits.
MAX_PLAIN_SCORE = 100.0
# Scores rounded to bfloat16 are off by at most 2 ** -6 up to here: 0.6 % of a weight in the mean.
MAX_ROUNDED_SCORE = 8.0
# below every score that is real, above every score that is hidden
FLOOR = -1e20


@dataclass(frozen=True)
class Part:
    """G query blocks in flight with the lists they read."""

    chunk: Chunk
    rows: Tensor  # (G,) int64, query blocks of the whole batch
    keys: Tensor  # (G, L) int64, key blocks of the whole batch
    key_bias: Tensor | None  # (G, L, n), -inf for keys nobody may read
    bias: Tensor | None  # (g, n, (L - first_partial) * n), -inf or below FLOOR for hidden pairs

    def segments(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) ranks of the listed blocks in flight, one after the other."""
        for begin in range(0, self.chunk.count, self.chunk.segment):
            yield begin, min(begin + self.chunk.segment, self.chunk.count)


class Tiles:
    """Blocks of q, k and v, buffers that every part reuses, and the scores of a part.

    Args:
        q: (B, H, S, D); k, v: (B, K, S, D).
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, slots: Slots, lists: BlockLists, scale):
        self.slots, self.lists, self.scale = slots, lists, scale
        self.dtype = q.dtype
        self.score_dtype = torch.float32 if q.dtype == torch.bfloat16 else q.dtype
        self.q, self.k, self.v = (slots.fill(x) for x in (q, k, v))
        self.k_rows, self.v_rows = self.k.flatten(1), self.v.flatten(1)
        top = self._norm(self.q) * self._norm(self.k) * abs(scale) * LOG2E
        self.is_plain = bool(top <= MAX_PLAIN_SCORE)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._tries = self._misses = 0
        self._index_heads(q.shape[0], q.shape[1], k.shape[1])
        self._find_unreadable()
        n, D, size = slots.block, q.shape[-1], q.element_size()
        self.block_bytes = n * (n * self.score_dtype.itemsize + 2 * D * size)
        self.chunks = make_chunks(lists, n, self.block_bytes, self._query_heads.shape[1])

    def _norm(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, dtype=self.score_dtype).amax()

    def _index_heads(self, B: int, H: int, K: int) -> None:
        """Tables (plan heads, copies): the query, key and sample each copy of a plan row is for."""
        device, lists = self.q.device, self.lists
        b = torch.arange(B, device=device)[:, None]
        h = torch.arange(H, device=device)
        split = (lists.batch, B // lists.batch, lists.heads, H // lists.heads)

        def by_plan(x: Tensor) -> Tensor:
            return x.view(split).transpose(1, 2).reshape(lists.batch * lists.heads, -1)

        self._query_heads = by_plan(b * H + h)
        self._key_heads = by_plan(b * K + h // (H // K))
        self._samples = by_plan(b.expand(B, H).contiguous())

    def _find_unreadable(self) -> None:
        readable = self.slots.readable
        self._key_bias = None
        if readable is None:
            return
        bias = torch.zeros(readable.shape, dtype=self.score_dtype, device=readable.device)
        bias.masked_fill_(~readable, -math.inf)
        self._key_bias = bias.view(-1, self.slots.block)
        self._is_biased = ~readable.view(-1, self.slots.block).all(-1)
        if readable.shape[0] == 1:
            self._samples = torch.zeros_like(self._samples)

    def parts(self, chunk: Chunk) -> Iterator[Part]:
        """A chunk for all the heads and samples that share it."""
        lists, nb = self.lists, self.slots.num_blocks
        rank = torch.arange(chunk.count, device=chunk.rows.device)
        entries = lists.row_start[chunk.rows][:, None] + rank
        blocks = lists.key_block[entries].long()
        head, block = chunk.rows // nb, chunk.rows % nb
        bias = None
        if chunk.first_partial < chunk.count:
            partial = entries[:, chunk.first_partial :]
            bias = partial_bias(lists, self.slots.block, block, partial, self.score_dtype)
        tables = (self._query_heads, self._key_heads, self._samples)
        splits = (table[head].T.split(chunk.num_copies) for table in tables)
        for query_heads, key_heads, samples in zip(*splits):
            rows = (query_heads * nb + block).flatten()
            keys = (key_heads[..., None] * nb + blocks).flatten(0, 1)
            key_bias = None
            if self._key_bias is not None:
                cells = (samples[..., None] * nb + blocks).flatten(0, 1)
                if bool(self._is_biased[cells].any()):
                    key_bias = self._key_bias[cells]
            yield Part(chunk, rows, keys, key_bias, bias)

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that stays valid until the name is asked for again."""
        size = math.prod(shape)
        held = self._buffers.get((name, dtype))
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=dtype, device=self.q.device)
            self._buffers[name, dtype] = held
        return held[:size].view(shape)

    def gather(self, name: str, blocks: Tensor, keys: Tensor) -> Tensor:
        """(G, P * n, D) the blocks ``keys`` (G, P) of (K blocks, n * D)."""
        index = keys.flatten()
        into = self.buffer(name, (index.numel(), blocks.shape[1]), blocks.dtype)
        torch.index_select(blocks, 0, index, out=into)
        return into.view(keys.shape[0], -1, self.q.shape[-1])

    def cast(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` in ``dtype``, in a buffer of that name where it is not already."""
        return x if x.dtype == dtype else self.buffer(name, x.shape, dtype).copy_(x)

    def queries(self, part: Part) -> Tensor:
        """(G, n, D) queries in the dtype of the scores, scaled for base 2."""
        q = self.q.index_select(0, part.rows).to(self.score_dtype)
        return q.mul_(self.scale * LOG2E)

    def scores(self, q: Tensor, k: Tensor, part: Part, begin: int, end: int) -> Tensor:
        """(G, n, P * n) scores, base 2, of the listed blocks begin to end; low where hidden.

        Args:
            q: (G, n, D) scaled queries in the dtype of the scores.
            k: (G, P * n, D) keys.
        """
        shape = (*q.shape[:2], k.shape[1])
        scores = self.buffer("scores", shape, self.score_dtype)
        rounded = self.dtype != self.score_dtype
        if rounded and self._misses <= 1 + self._tries // 4:
            product = self.buffer("rounded scores", shape, self.dtype)
            torch.bmm(self.cast("rounded q", q, self.dtype), k.mT, out=product)
            self._hide(scores.copy_(product), part, begin, end)
            self._tries += 1
            if self._is_roundable(scores):
                return scores
            self._misses += 1
        torch.bmm(q, self.cast("exact k", k, self.score_dtype).mT, out=scores)
        return self._hide(scores, part, begin, end)

    def _hide(self, scores: Tensor, part: Part, begin: int, end: int) -> Tensor:
        n, first = self.slots.block, part.chunk.first_partial
        if part.bias is not None and end > first:
            rows = scores.view(-1, *part.bias.shape[:2], scores.shape[-1])
            start = max(begin, first)
            bias = part.bias[..., (start - first) * n : (end - first) * n]
            rows[..., (start - begin) * n :].add_(bias)
        if part.key_bias is not None:
            scores.add_(part.key_bias[:, begin:end].reshape(scores.shape[0], 1, -1))
        return scores

    def _is_roundable(self, scores: Tensor) -> bool:
        """Whether bfloat16 held the scores well enough.

        What counts is the error of the largest score of each row: lesser ones weigh less. A few
        rows may go up to twice the limit.
        """
        top = scores.amax(-1)
        size = top.abs().masked_fill_(top < FLOOR, 0)
        few = (size > MAX_ROUNDED_SCORE).sum() * 16 <= size.numel()
        return bool(few and size.amax() <= 2 * MAX_ROUNDED_SCORE)
