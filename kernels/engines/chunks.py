"""Chunks of block lists: query blocks with equally long lists, as many as a cache holds at once.

Letters: R plan rows, g rows of a chunk, nb query blocks of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists

# bytes of scores, keys and values in flight: few calls, and the last level cache still holds them
BUDGET = 6 << 20
# query blocks below which batched products lose speed: longer lists are cut before fewer are taken
MIN_ROWS = 2


@dataclass(frozen=True)
class Chunk:
    """Plan rows computed together, their lists cut into segments of ``segment`` blocks."""

    rows: Tensor  # (g,) int64, plan rows
    heads: Tensor  # (g,) int64, plan head of each, counted through the batch
    blocks: Tensor  # (g,) int64, query block of each
    first: Tensor  # (g, 1) int64, where the list of each begins
    count: int  # listed blocks of each
    first_partial: int  # blocks before this rank are whole in every row
    segment: int  # listed blocks in flight
    num_copies: int  # (sample, head) pairs in flight that share the rows

    def segments(self) -> list[tuple[int, int]]:
        """(first, last + 1) ranks of the listed blocks in flight, one after the other."""
        starts = range(0, self.count, self.segment)
        return [(begin, min(begin + self.segment, self.count)) for begin in starts]


def make_chunks(
    lists: BlockLists, block_bytes: int, num_copies: int, heads: tuple[int, int]
) -> list[Chunk]:
    """Chunks that cover every row with a block of some plan heads.

    Args:
        block_bytes: memory in flight of one listed block.
        num_copies: (sample, head) pairs that share each plan row.
        heads: first and last + 1 plan head, counted through the batch.
    """
    key = (block_bytes, num_copies, heads)
    if key not in lists.cache:
        lists.cache[key] = _make_chunks(lists, block_bytes, num_copies, heads)
    return lists.cache[key]


def _make_chunks(
    lists: BlockLists, block_bytes: int, num_copies: int, heads: tuple[int, int]
) -> list[Chunk]:
    nb = lists.num_blocks
    begin, end = heads[0] * nb, heads[1] * nb
    counts, num_full = lists.counts[begin:end], lists.num_full[begin:end].long()
    # equal counts together, and among them equal numbers of whole blocks
    order = (counts * (counts.max() + 1) + num_full).argsort(stable=True)
    sizes = torch.bincount(counts).tolist()
    in_flight = max(1, BUDGET // block_bytes)
    chunks, done = [], 0
    for count, size in enumerate(sizes):
        rows, done = order[done : done + size], done + size
        if not count or not size:
            continue
        least = min(MIN_ROWS, size * num_copies)
        num_segments = -(-count * least // in_flight)
        segment = -(-count // num_segments)
        together = max(1, in_flight // segment)
        fitting = [c for c in range(2, num_copies + 1) if num_copies % c == 0]
        copies = max([c for c in fitting if c * size <= together], default=1)
        for part in rows.tensor_split(-(-size // max(1, together // copies))):
            first_partial = int(num_full[part].min())
            part = part + begin
            first = lists.row_start[part][:, None]
            chunks.append(
                Chunk(part, part // nb, part % nb, first, count, first_partial, segment, copies)
            )
    return chunks
