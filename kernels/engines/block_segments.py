"""Block lists as the kernels of a GPU walk them: clear blocks first, blocks of even length.

A clear block is visible as a whole and has no empty slot, so that its tiles need no test. Behind
the clear blocks of a row stand the other whole ones, then the partial ones.

Letters: R rows, E listed blocks, N slots of queries, Nk of keys, n slots to a block, M distinct
masks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists

# rows of a tile of the kernels, largest first
TILES = (128, 64, 32, 16)
# tiles up to this many rows keep the tensor cores waiting
SLOW_TILE = 32
log = logging.getLogger("vidattn")


@dataclass(frozen=True, eq=False)
class Segments:
    """Layouts and their lists, or the transposed lists, in the form the kernels take."""

    block: int  # n
    order: Tensor  # (N,) int32, token in each slot of queries, -1 for an empty slot
    key_order: Tensor  # (Nk,) int32, likewise of keys: ``order`` where they are the same tokens
    row_start: Tensor  # (R + 1,) int64
    num_clear: Tensor  # (R,) int32
    num_whole: Tensor  # (R,) int32, the clear ones among them
    listed: Tensor  # (E,) int32
    mask_id: Tensor | None  # (E,) int32
    masks: Tensor | None  # (M, n, n) uint8
    box: tuple[Tensor, Tensor, Tensor] | None  # key (Nk,), low and high (N,), int32
    is_transposed: bool

    @property
    def own_order(self) -> Tensor:
        """The order of what has the rows."""
        return self.key_order if self.is_transposed else self.order

    @property
    def listed_order(self) -> Tensor:
        """The order of what the rows list."""
        return self.order if self.is_transposed else self.key_order


def even_block(block: int, smallest: int = TILES[-1]) -> int:
    """The smallest length from ``block`` on that a tile divides well: at most a quarter wasted.

    Args:
        smallest: tile of ``TILES``, which divides the length however much is wasted.
    """
    least = -(-block // smallest) * smallest
    evens = (-(-block // tile) * tile for tile in TILES if tile >= smallest)
    return next((even for even in evens if even * 4 <= block * 5), least)


def segments(
    lists: BlockLists, *, transposed: bool = False, smallest_tile: int = TILES[-1]
) -> Segments:
    """The segments of block lists, or of the transposed lists; made once.

    Args:
        lists: which key blocks each query block reads.
        smallest_tile: see ``even_block``.
    """
    key = ("segments", transposed, smallest_tile)
    if key in lists.cache:
        return lists.cache[key]
    block = lists.block
    even = even_block(block, smallest_tile)
    _warn_of_small_tiles(block, even)
    order = key_order = pad_blocks(lists.order, block, even, -1)
    if lists.keys is not None:
        key_order = pad_blocks(lists.keys, block, even, -1)
    has_gap = ((order if transposed else key_order).view(-1, even) < 0).any(-1)
    rows = _clear_first(lists.transposed() if transposed else lists, has_gap)
    masks = None
    if lists.masks is not None and len(lists.masks):
        masks = F.pad(lists.masks.to(torch.uint8), (0, even - block, 0, even - block))
    box = _box(lists, key_order, even)
    lists.cache[key] = Segments(even, order, key_order, *rows, masks, box, transposed)
    return lists.cache[key]


@lru_cache
def _warn_of_small_tiles(block: int, even: int) -> None:
    """Say, once for a length, that blocks of it run in tiles smaller than a shorter block's."""
    tile = even & -even
    if block > SLOW_TILE >= tile:
        log.warning(
            "blocks of %d tokens run in tiles of %d on a GPU, several times slower than blocks of "
            "64 or 128: choose a tile of so many tokens",
            block,
            tile,
        )


def pad_blocks(x: Tensor, block: int, even: int, value: int) -> Tensor:
    """(N,) slots in longer blocks, ``value`` in the new ones."""
    return F.pad(x.view(-1, block), (0, even - block), value=value).flatten()


def _box(lists: BlockLists, key_order: Tensor, even: int) -> tuple[Tensor, ...] | None:
    box = lists.box
    if box is None:
        return None
    key, low, high = (pad_blocks(x, lists.block, even, 0) for x in (box.key, box.low, box.high))
    # no box holds the guard bits themselves
    return torch.where(key_order < 0, box.guard, key), low, high


def _clear_first(lists: BlockLists, has_gap: Tensor) -> tuple[Tensor | None, ...]:
    """Row starts, clear and whole blocks of each row, listed blocks and their masks."""
    start, rows = lists.row_start, lists.row_of_entry
    is_clear = ~lists.is_partial & ~has_gap[lists.key_block.long()]
    # a stable partition of every row, by counting
    before = F.pad(is_clear.cumsum(0), (1, 0))
    num_clear = before[start[1:]] - before[start[:-1]]
    rank = before[:-1] - before[start[:-1]][rows]
    entry = torch.arange(is_clear.numel(), device=start.device)
    place = torch.where(is_clear, start[rows] + rank, num_clear[rows] + entry - rank)
    listed, mask_id = (
        None if x is None else torch.empty_like(x).scatter_(0, place, x)
        for x in (lists.key_block, lists.mask_id)
    )
    return start, num_clear.int(), lists.num_full, listed, mask_id
