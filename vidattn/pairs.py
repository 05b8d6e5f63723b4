"""How many pairs of tokens of the video block lists hold.

Letters: n slots to a block, nv video blocks, nb all blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.grid import Layout
from vidattn.kernels.block_lists import BlockLists, partial_mask
from vidattn.listing import rows_at_once

# partial blocks taken together where all of them would need much memory
BLOCKS_AT_ONCE = 512


def num_visible(lists: BlockLists, layout: Layout) -> int:
    """Pairs that are read."""
    if lists.box is not None:
        video = layout.live[: layout.num_video_blocks * layout.block].nonzero().flatten()
        # one box for all samples and heads
        return lists.box.num_visible(video).sum().item() * lists.batch * lists.heads
    pairs = num_listed(lists, layout)
    return pairs if lists.masks is None else pairs - _num_masked(lists, layout)


def num_listed(lists: BlockLists, layout: Layout) -> int:
    """Pairs in the listed blocks, counted some rows at a time."""
    tokens, nb, total = _video_tokens(layout), layout.num_blocks, 0
    queries = tokens.repeat(lists.batch * lists.heads)
    step = rows_at_once(tokens.device, nb)
    for row in range(0, lists.num_rows, step):
        starts = lists.row_start[row : row + step + 1]
        first, last = starts[[0, -1]].tolist()
        keys = tokens.index_select(0, lists.key_block[first:last])
        sums = torch.nn.functional.pad(keys.cumsum(0), (1, 0))[starts - first].diff()
        total += int((sums * queries[row : row + step]).sum())
    return total


def _num_masked(lists: BlockLists, layout: Layout) -> int:
    """Pairs in the listed blocks that a mask hides."""
    tokens = _video_tokens(layout)
    partial = lists.is_partial.nonzero().flatten()
    query = lists.row_of_entry[partial] % layout.num_blocks
    pairs = tokens[query] * tokens[lists.key_block[partial].long()]
    seen = lists.masks.sum((1, 2))[lists.mask_id[partial].long()]
    return int((pairs - seen)[pairs > 0].sum())


def visible_share(lists: BlockLists, layout: Layout) -> Tensor:
    """(B|1, H|1, nv, nv) float32, the visible share of the pairs of each two blocks."""
    n, nb = layout.block, layout.num_blocks
    share = torch.zeros(lists.num_rows, nb, device=layout.order.device)
    row, key = lists.row_of_entry, lists.key_block.long()
    share[row, key] = 1
    live = layout.live.view(nb, n)
    whole = lists.box is None and lists.masks is None
    partial = row[:0] if whole else lists.is_partial.nonzero().flatten()
    for begin in range(0, partial.numel(), BLOCKS_AT_ONCE):
        some = partial[begin : begin + BLOCKS_AT_ONCE]
        query = row[some] % nb
        pairs = live[query][:, :, None] & live[key[some]][:, None]
        seen = partial_mask(lists, query, some[:, None])[:, :, 0] & pairs
        share[row[some], key[some]] = seen.sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)
    nv = layout.num_video_blocks
    return share.view(lists.batch, lists.heads, nb, nb)[..., :nv, :nv]


def _video_tokens(layout: Layout) -> Tensor:
    """(nb,) int64, video tokens in each block."""
    tokens = layout.tokens_per_block.clone()
    tokens[layout.num_video_blocks :] = 0
    return tokens
