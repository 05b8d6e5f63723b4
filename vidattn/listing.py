"""Block lists made of whole blocks, of windows along the axes, or of a rule on two positions.

In all of them text reads, and is read by, everything.

Letters: B batch, H heads, E listed blocks, n slots to a block, nv video blocks, nb all blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout, Size, dilation_order
from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.box import Box

# of each place of an axis, the first and the last place that it reads
Window = tuple[Tensor, Tensor]
# from (..., 3) query and key positions, whether one reads the other
Rule = Callable[[Tensor, Tensor], Tensor]
# pairs of blocks that are looked at together: on a GPU every piece is a wait
BLOCKS_AT_ONCE = {"cpu": 2**19, "cuda": 2**28}


def list_blocks(layout: Layout, blocks: Tensor) -> BlockLists:
    """The lists of whole blocks.

    Args:
        blocks: (B|1, H|1, nv, nv) bool, whether a query block reads a key block of the video.

    Raises:
        ValueError: ``blocks`` does not fit the layout.
    """
    nv, nb = layout.num_video_blocks, layout.num_blocks
    if blocks.dim() != 4 or blocks.shape[-2:] != (nv, nv) or blocks.dtype != torch.bool:
        raise ValueError(
            f"blocks must be bool of shape (batch, heads, {nv}, {nv}) for this layout, "
            f"got {blocks.dtype} {tuple(blocks.shape)}"
        )
    blocks = torch.nn.functional.pad(blocks, (0, nb - nv, 0, nb - nv), value=True)
    # some rows at a time: sum() and nonzero() take 8 and 16 bytes to a block
    pieces = blocks.flatten(0, 2).split(rows_at_once(blocks.device, nb))
    counts = torch.cat([rows.sum(-1) for rows in pieces])
    return BlockLists(
        order=layout.order,
        block=layout.block,
        batch=blocks.shape[0],
        heads=blocks.shape[1],
        row_start=_row_start(counts),
        num_full=counts.int(),
        key_block=torch.cat([rows.nonzero()[:, 1].int() for rows in pieces]),
    )


def list_windows(
    grid: Grid, layout: Layout, windows: tuple[Window, Window, Window], tile: Size, dilation: Size
) -> BlockLists:
    """The lists of a layout of tiles in which a pair is visible when it is so on every axis.

    Args:
        windows: for each axis two int64 tensors over its places in dilation order: the first and
            the last place that the query at a place reads.
        tile: edges of a block.
        dilation: step of each axis; it sets the order (see ``dilation_order``).
    """
    query = key = torch.zeros(1, dtype=torch.long)
    whole = torch.ones(1, dtype=torch.bool)
    for (first, last), edge in zip(windows, tile):
        axis_query, axis_key, axis_whole = _tile_pairs(first, last, edge)
        num_tiles = -(-first.numel() // edge)
        query = (query[:, None] * num_tiles + axis_query).flatten()
        key = (key[:, None] * num_tiles + axis_key).flatten()
        whole = (whole[:, None] & axis_whole).flatten()
    lists = _compress(layout, query, key, whole)
    return replace(lists, box=_pack(grid, layout, windows, dilation))


def list_rule(grid: Grid, layout: Layout, rule: Rule) -> BlockLists:
    """The lists of what a rule says; it visits every pair, so for small grids.

    Args:
        rule: takes (..., 3) query and key positions, gives a bool tensor of their shape broadcast
            together. Text is not asked about.
    """
    n, nv = layout.block, layout.num_video_blocks
    live = layout.live.view(-1, n)[:nv]
    coords = grid.coords()[layout.order[: nv * n].long().clamp_min(0)].view(nv, n, 3)
    real = live[:, None, :, None] & live[None, :, None, :]
    visible = torch.stack([rule(q[None, :, None], coords[:, None]) for q in coords])
    whole = (visible | ~real).all(-1).all(-1)
    visible &= real
    query, key = visible.any(-1).any(-1).nonzero(as_tuple=True)
    masks, mask_of_pair = torch.unique(visible[~whole], dim=0, return_inverse=True)
    mask_id = torch.full((layout.num_blocks,) * 2, -1, dtype=torch.int32)
    mask_id[:nv, :nv][~whole] = mask_of_pair.int()
    lists = _compress(layout, query, key, whole[query, key])
    ids = mask_id[lists.row_of_entry, lists.key_block.long()]
    return replace(lists, mask_id=ids, masks=masks)


def rows_at_once(device: torch.device, num_blocks: int) -> int:
    """How many rows of block lists to look at together."""
    return max(1, BLOCKS_AT_ONCE.get(device.type, BLOCKS_AT_ONCE["cpu"]) // num_blocks)


def _row_start(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _compress(layout: Layout, query: Tensor, key: Tensor, whole: Tensor) -> BlockLists:
    """The lists of (E,) video block pairs in any order, with the blocks of text added."""
    nv, nb = layout.num_video_blocks, layout.num_blocks
    blocks = torch.arange(nb)
    beside = torch.cartesian_prod(blocks[:nv], blocks[nv:]).view(-1, 2)
    below = torch.cartesian_prod(blocks[nv:], blocks).view(-1, 2)
    query = torch.cat([query, beside[:, 0], below[:, 0]])
    key = torch.cat([key, beside[:, 1], below[:, 1]])
    partial = torch.nn.functional.pad(~whole, (0, query.numel() - whole.numel()))
    order = ((query * 2 + partial) * nb + key).argsort()
    counts = torch.bincount(query, minlength=nb)
    num_full = torch.bincount(query[~partial], minlength=nb)
    return BlockLists(
        order=layout.order,
        block=layout.block,
        batch=1,
        heads=1,
        row_start=_row_start(counts),
        num_full=num_full.int(),
        key_block=key[order].int(),
    )


def _tile_pairs(first: Tensor, last: Tensor, edge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of one axis that see each other: query tiles, key tiles, whether every pair is seen."""
    begin = torch.arange(0, first.numel(), edge)
    end = (begin + edge).clamp(max=first.numel()) - 1
    some = (first[:, None] <= end) & (last[:, None] >= begin)
    every = (first[:, None] <= begin) & (last[:, None] >= end)
    some = torch.stack([rows.any(0) for rows in some.split(edge)])
    every = torch.stack([rows.all(0) for rows in every.split(edge)])
    query, key = some.nonzero(as_tuple=True)
    return query, key, every[query, key]


def _pack(grid: Grid, layout: Layout, windows: tuple[Window, ...], dilation: Size) -> Box:
    """The windows as one packed box to a query slot; the slots of text are never asked about."""
    coords = grid.coords()[layout.order.long().clamp_min(0)].clamp_min_(0)
    axes = []
    for axis, (extent, (first, last)) in enumerate(zip(grid.size, windows)):
        place = torch.empty(extent, dtype=torch.long)
        place[dilation_order(extent, dilation[axis])] = torch.arange(extent)
        here = place[coords[:, axis]]
        axes.append((extent, here, first[here], last[here]))
    return Box.pack(axes)
