"""Which pairs of tokens block lists hold, and how many.

Letters: B batch, H heads, S queries, Sk keys, N slots, n to a block, nv video blocks, nb all,
nvk video blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout
from vidattn.kernels.block_lists import BlockLists, partial_mask
from vidattn.listing import rows_at_once

# partial blocks taken together where all of them would need much memory
BLOCKS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Pairs:
    """Block lists over a layout of the tokens of a grid.

    Where ``lists.batch`` or ``lists.heads`` is 1, all samples or heads share it. Keys are the same
    tokens, or those of ``keys``.

    Raises:
        ValueError: lists of another layout.
    """

    grid: Grid
    layout: Layout
    lists: BlockLists
    # where keys sit that are other tokens than the queries
    keys: tuple[Grid, Layout] | None = field(default=None, kw_only=True)

    def __post_init__(self):
        lists = self.lists
        orders = (lists.order, lists.key_order)
        for order, layout in zip(orders, (self.layout, self.key_layout)):
            if order is not layout.order or lists.block != layout.block:
                raise ValueError(
                    f"the lists are of another layout, {order.numel()} slots by {lists.block}, "
                    f"than the plan's {layout.order.numel()} by {layout.block}: make them with its "
                    "order and its block"
                )

    @property
    def key_grid(self) -> Grid:
        """Where the keys sit: ``grid`` where they are the queries' own tokens."""
        return self.grid if self.keys is None else self.keys[0]

    @property
    def key_layout(self) -> Layout:
        """The layout of the keys: ``layout`` where they are the queries' own tokens."""
        return self.layout if self.keys is None else self.keys[1]

    @property
    def num_samples(self) -> int:
        """B, or 1 where all samples share what is read."""
        return self.lists.batch

    @property
    def num_heads(self) -> int:
        """H, or 1 where all heads share what is read."""
        return self.lists.heads

    @cached_property
    def density(self) -> float:
        """Kept pairs over all pairs of video tokens, mean over the heads, counted exactly."""
        if self.lists.box is None and self.lists.masks is None:
            return self.visited_density
        return self._share(_num_visible(self, self.layout.live))

    def density_of(self, queries: Tensor) -> float:
        """``density`` of the pairs of (S,) bool queries, over the pairs of all."""
        live = self.layout.live & queries[self.layout.order.clamp_min(0).long()]
        return self._share(_num_visible(self, live))

    @cached_property
    def visited_density(self) -> float:
        """Pairs in visited blocks over all pairs of video tokens: what an engine has to compute."""
        return self._share(_num_listed(self, self.layout.live))

    def _share(self, pairs: int) -> float:
        every = self.grid.num_video_tokens * self.key_grid.num_video_tokens
        return pairs / (every * self.num_samples * self.num_heads)

    def mask(self) -> Tensor:
        """(B|1, H|1, S, Sk) bool in sequence order, query by key; for tests and pictures."""
        return self.lists.mask(self.grid.num_tokens, self.key_grid.num_tokens)

    @cached_property
    def read_share(self) -> Tensor:
        """(B|1, H|1, nv, nvk) float32, the visible share of the pairs of tokens of video blocks."""
        return _visible_share(self)


def _num_visible(pairs: Pairs, asked: Tensor) -> int:
    """Pairs that the queries in (N,) bool slots read."""
    lists, layout = pairs.lists, pairs.layout
    if lists.box is not None:
        # one box for all samples and heads; rows without blocks were left out
        slots = torch.arange(layout.num_video_blocks * layout.block, device=layout.order.device)
        boxes = lists.box.num_visible(slots) * asked[: slots.numel()]
        rows = lists.counts.view(-1, layout.num_blocks)[:, : layout.num_video_blocks] > 0
        return int((boxes.view(-1, layout.block).sum(-1) * rows).sum())
    listed = _num_listed(pairs, asked)
    return listed if lists.masks is None else listed - _num_masked(pairs, asked)


def _num_listed(pairs: Pairs, asked: Tensor) -> int:
    """Pairs of the queries in some slots in the listed blocks, counted some rows at a time."""
    lists, total = pairs.lists, 0
    queries, tokens = _video_tokens(pairs.layout, asked), _video_tokens(pairs.key_layout)
    queries = queries.repeat(lists.batch * lists.heads)
    step = rows_at_once(tokens.device, lists.num_key_blocks)
    for row in range(0, lists.num_rows, step):
        starts = lists.row_start[row : row + step + 1]
        first, last = starts[[0, -1]].tolist()
        keys = tokens.index_select(0, lists.key_block[first:last])
        sums = torch.nn.functional.pad(keys.cumsum(0), (1, 0))[starts - first].diff()
        total += int((sums * queries[row : row + step]).sum())
    return total


def _num_masked(pairs: Pairs, asked: Tensor) -> int:
    """Pairs of the queries in some slots in the listed blocks that a mask hides."""
    lists = pairs.lists
    partial = lists.is_partial.nonzero().flatten()
    query, key = lists.row_of_entry[partial] % lists.num_blocks, lists.key_block[partial].long()
    queries, keys = _video_tokens(pairs.layout, asked), _video_tokens(pairs.key_layout)
    listed = queries[query] * keys[key]
    seen = lists.masks.sum(2)[lists.mask_id[partial].long()] * asked.view(-1, lists.block)[query]
    return int((listed - seen.sum(1))[listed > 0].sum())


def _visible_share(pairs: Pairs) -> Tensor:
    """(B|1, H|1, nv, nvk) float32, the visible share of the pairs of each two blocks."""
    lists, layout, columns = pairs.lists, pairs.layout, pairs.key_layout
    n, nb = layout.block, layout.num_blocks
    share = torch.zeros(lists.num_rows, columns.num_blocks, device=layout.order.device)
    row, key = lists.row_of_entry, lists.key_block.long()
    share[row, key] = 1
    live, key_live = layout.live.view(-1, n), columns.live.view(-1, n)
    whole = lists.box is None and lists.masks is None
    partial = row[:0] if whole else lists.is_partial.nonzero().flatten()
    for begin in range(0, partial.numel(), BLOCKS_AT_ONCE):
        some = partial[begin : begin + BLOCKS_AT_ONCE]
        query = row[some] % nb
        real = live[query][:, :, None] & key_live[key[some]][:, None]
        seen = partial_mask(lists, query, some[:, None])[:, :, 0] & real
        share[row[some], key[some]] = seen.sum((1, 2)) / real.sum((1, 2)).clamp_min(1)
    share = share.view(lists.batch, lists.heads, nb, -1)
    return share[..., : layout.num_video_blocks, : columns.num_video_blocks]


def _video_tokens(layout: Layout, asked: Tensor | None = None) -> Tensor:
    """(nb,) int64, video tokens in each block, of those in (N,) bool slots."""
    tokens = (layout.live if asked is None else asked).view(-1, layout.block).sum(-1)
    tokens[layout.num_video_blocks :] = 0
    return tokens
