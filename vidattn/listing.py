"""Block lists made of whole blocks, of windows along the axes, or of a rule on two positions.

In all of them text reads, and is read by, everything.

Letters: B batch, H heads, E listed blocks, n slots to a block, nv video blocks, nb all blocks, nvk
and nbk those of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout, Size, dilation_order
from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.box import Box
from vidattn.kernels.windows.place_windows import PlaceWindows

# of each place of an axis, the first and the last place that it reads
Window = tuple[Tensor, Tensor]
# from (..., 3) query and key positions, whether one reads the other
Rule = Callable[[Tensor, Tensor], Tensor]
# pairs of blocks that are looked at together: on a GPU every piece is a wait
BLOCKS_AT_ONCE = {"cpu": 2**19, "cuda": 2**28}


def list_blocks(layout: Layout, blocks: Tensor, keys: Layout | None = None) -> BlockLists:
    """The lists of whole blocks.

    Args:
        blocks: (B|1, H|1, nv, nvk) bool, whether a query block reads a key block of the video.
        keys: the layout of keys that are other tokens than the queries.

    Raises:
        ValueError: ``blocks`` does not fit the layouts, or they differ in the length of a block.
    """
    columns = layout if keys is None else keys
    wanted = (layout.num_video_blocks, columns.num_video_blocks)
    if blocks.dim() != 4 or blocks.shape[-2:] != wanted or blocks.dtype != torch.bool:
        raise ValueError(
            "blocks must be bool of shape (batch, heads, {}, {}) for this layout, got {} {}".format(
                *wanted, blocks.dtype, tuple(blocks.shape)
            )
        )
    if columns.block != layout.block:
        raise ValueError(
            f"blocks of queries and of keys must be equally long, got {layout.block} and "
            f"{columns.block} tokens"
        )
    beside = (layout.num_blocks - wanted[0], columns.num_blocks - wanted[1])
    blocks = torch.nn.functional.pad(blocks, (0, beside[1], 0, beside[0]), value=True)
    # some rows at a time: sum() and nonzero() take 8 and 16 bytes to a block
    pieces = blocks.flatten(0, 2).split(rows_at_once(blocks.device, columns.num_blocks))
    counts = torch.cat([rows.sum(-1) for rows in pieces])
    return BlockLists(
        order=layout.order,
        block=layout.block,
        batch=blocks.shape[0],
        heads=blocks.shape[1],
        row_start=_row_start(counts),
        num_full=counts.int(),
        key_block=torch.cat([rows.nonzero()[:, 1].int() for rows in pieces]),
        keys=None if keys is None else keys.order,
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
    lists = _compress(layout, layout, query, key, whole)
    lists = replace(lists, box=_pack(grid, layout, windows, dilation))
    # for engines that walk over windows instead of blocks
    lists.cache["windows"] = PlaceWindows(_places(grid, dilation), *zip(*windows))
    return lists


def list_rule(
    grid: Grid, layout: Layout, rule: Rule, keys: tuple[Grid, Layout] | None = None
) -> BlockLists:
    """The lists of what a rule says; it visits every pair, so for small grids.

    Args:
        rule: takes (..., 3) query and key positions, gives a bool tensor of their shape broadcast
            together. Text is not asked about.
        keys: grid and layout of keys that are other tokens than the queries.
    """
    columns = layout if keys is None else keys[1]
    nv, nvk = layout.num_video_blocks, columns.num_video_blocks
    coords, live = _video_blocks(grid, layout)
    key_coords, key_live = (coords, live) if keys is None else _video_blocks(*keys)
    real = live[:, None, :, None] & key_live[None, :, None, :]
    visible = torch.stack([rule(q[None, :, None], key_coords[:, None]) for q in coords])
    whole = (visible | ~real).all(-1).all(-1)
    visible &= real
    query, key = visible.any(-1).any(-1).nonzero(as_tuple=True)
    masks, mask_of_pair = torch.unique(visible[~whole], dim=0, return_inverse=True)
    mask_id = torch.full((layout.num_blocks, columns.num_blocks), -1, dtype=torch.int32)
    mask_id[:nv, :nvk][~whole] = mask_of_pair.int()
    lists = _compress(layout, columns, query, key, whole[query, key])
    ids = mask_id[lists.row_of_entry, lists.key_block.long()]
    key_order = None if keys is None else columns.order
    return replace(lists, mask_id=ids, masks=masks, keys=key_order)


def _video_blocks(grid: Grid, layout: Layout) -> tuple[Tensor, Tensor]:
    """(nv, n, 3) positions, any in empty slots, and (nv, n) whether a slot holds a token."""
    n, nv = layout.block, layout.num_video_blocks
    coords = grid.coords()[layout.order[: nv * n].long().clamp_min(0)]
    return coords.view(nv, n, 3), layout.live.view(-1, n)[:nv]


def rows_at_once(device: torch.device, num_blocks: int) -> int:
    """How many rows of block lists to look at together."""
    return max(1, BLOCKS_AT_ONCE.get(device.type, BLOCKS_AT_ONCE["cpu"]) // num_blocks)


def _row_start(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _compress(
    layout: Layout, columns: Layout, query: Tensor, key: Tensor, whole: Tensor
) -> BlockLists:
    """The lists of (E,) video block pairs in any order, with the blocks of text added."""
    nv, nb, nbk = layout.num_video_blocks, layout.num_blocks, columns.num_blocks
    blocks, key_blocks = torch.arange(nb), torch.arange(nbk)
    beside = torch.cartesian_prod(blocks[:nv], key_blocks[columns.num_video_blocks :]).view(-1, 2)
    below = torch.cartesian_prod(blocks[nv:], key_blocks).view(-1, 2)
    query = torch.cat([query, beside[:, 0], below[:, 0]])
    key = torch.cat([key, beside[:, 1], below[:, 1]])
    partial = torch.nn.functional.pad(~whole, (0, query.numel() - whole.numel()))
    order = ((query * 2 + partial) * nbk + key).argsort()
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


def _places(grid: Grid, dilation: Size) -> Tensor:
    """(S,) int32 tokens of the video in dilation order, those of the text behind them."""
    tokens = torch.arange(grid.num_video_tokens).view(grid.size) + grid.video_start
    for axis, (extent, step) in enumerate(zip(grid.size, dilation)):
        tokens = tokens.index_select(axis, dilation_order(extent, step))
    text = torch.arange(grid.text) + grid.text_start
    return torch.cat([tokens.flatten(), text]).int()
