"""Chunks of block lists: query blocks with equally long lists, as many as a cache holds at once.

Letters: R plan rows, g rows of a chunk, c copies, nb blocks, n slots to a block, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists

# bytes of scores, keys and values in flight: the L2 caches of two to four cores
BUDGET = 4 << 20
# rows below which a batched product loses speed: longer lists are cut before fewer rows are taken
MIN_ROWS = 4


@dataclass(frozen=True)
class Chunk:
    """Plan rows computed together, their lists cut into segments of ``segment`` blocks."""

    rows: Tensor  # (g,) int64
    count: int  # listed blocks of each row
    first_partial: int  # blocks before this rank are whole in every row
    segment: int  # listed blocks in flight
    num_copies: int  # copies in flight


def make_chunks(lists: BlockLists, block: int, block_bytes: int, num_copies: int) -> list[Chunk]:
    """Chunks that cover every row with a block.

    Args:
        block_bytes: memory in flight of one listed block.
        num_copies: (sample, head) pairs that share each plan row.
    """
    key = (block, block_bytes, num_copies)
    if key not in lists.cache:
        lists.cache[key] = _make_chunks(lists, block_bytes, num_copies)
    return lists.cache[key]


def _make_chunks(lists: BlockLists, block_bytes: int, num_copies: int) -> list[Chunk]:
    counts, num_full = lists.counts, lists.num_full.long()
    # equal counts together, and among them equal numbers of whole blocks
    order = (counts * (counts.max() + 1) + num_full).argsort(stable=True)
    sizes = torch.bincount(counts)
    chunks, begin = [], 0
    in_flight = max(1, BUDGET // block_bytes)
    for count, size in enumerate(sizes.tolist()):
        rows, begin = order[begin : begin + size], begin + size
        if not count or not size:
            continue
        least = min(MIN_ROWS, size * num_copies)
        pieces = -(-count * least // in_flight)
        segment = -(-count // pieces)
        together = max(1, in_flight // segment)
        fitting = [c for c in range(2, num_copies + 1) if num_copies % c == 0]
        copies = max([c for c in fitting if c * size <= together], default=1)
        num_chunks = -(-size // max(1, together // copies))
        for part in rows.tensor_split(num_chunks):
            first_partial = int(num_full[part].min())
            chunks.append(Chunk(part, count, first_partial, segment, copies))
    return chunks
