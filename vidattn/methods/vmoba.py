"""VMoBA: queries read their own chunk of the video and the chunks whose mean key suits them.

Source: Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv:2506.23858.
Layers cut the video in turn into chunks of frames, of columns through all frames, and of cubes. The
gate of a query s and a chunk c is g = <mean key of c, q_s>. With ``select="global"``, the gates of
a head are brought to 0 ... 1 by their extremes; of all pairs of a query and a chunk not its own,
those of the largest gates are kept until they, and the own chunks, hold the share ``tau`` of the
sum over all pairs. ``select="query"`` does so for each query, ``select="topk"`` keeps a number of
chunks. Here every sample is on its own, the mean of all keys is taken off the keys first, which no
softmax notices, and chunks at the edges may be smaller.

With ``granularity="block"`` a block of queries chooses by its mean and counts for its queries: the
plan is one of whole blocks. With "query", as in the paper, each query of a block may choose other
chunks: an engine visits every block that any of them chose and hides the rest by masks. That is
exact, but visits more, and the masks take up to queries x chunks x (tokens of a block) bytes for
each head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout, Size, tile_layout_on
from vidattn.kernels.block_lists import BlockLists
from vidattn.plan import Plan
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.method import as_size, check_share
from vidattn.planning.selection import select_count, select_until
from vidattn.planning.tile_size import block_tokens, usual_tile
from vidattn.planning.tiles import chunk_of_tiles
from vidattn.support.registry import unknown

PARTITIONS = ("time", "space", "cube")
SELECTIONS = ("global", "query", "topk")
GRANULARITIES = ("block", "query")


@dataclass(frozen=True, kw_only=True)
class VMoBA(ContentMethod):
    """The own chunk of every query, and the chunks that a gate chooses.

    Args:
        partition: "time" (frames), "space" (columns through all frames), "cube", or "cycle", which
            takes them in turn from layer to layer and is "time" where there is no layer.
        select: "global" (the best pairs of a head), "query" (the best chunks of each query, or of
            each block of them), or "topk" (so many chunks beside the own one).
        tau: share of the sum of all gates that the kept pairs reach, for "global" and "query".
        topk: chunks beside the own one, for "topk".
        density: kept share of the video pairs, above 0 and at most 1, in place of ``tau``; the own
            chunks, which are always kept, may exceed it.
        granularity: "block" or "query", who chooses.
        chunks: into how many chunks, roughly, the video is cut.
        tile: tokens of one block along (t, h, w); chosen for the chunks when not given.

    Raises:
        ValueError: a value out of range.
    """

    partition: str = "cycle"
    select: str = "global"
    tau: float = 0.25
    topk: int = 3
    density: float | None = None
    granularity: str = "block"
    chunks: int = 64

    def __post_init__(self):
        super().__post_init__()
        known = {
            "partition": (*PARTITIONS, "cycle"),
            "select": SELECTIONS,
            "granularity": GRANULARITIES,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise unknown(name, getattr(self, name), values)
        check_share("tau", self.tau)
        check_share("density", self.density)
        for name, least in (("topk", 0), ("chunks", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.density is not None and self.select == "topk":
            raise ValueError("density goes with select='global' or 'query', 'topk' has topk")

    def at(self, layer: int) -> VMoBA:
        """The method with the partition of a layer."""
        if self.partition != "cycle":
            return self
        return replace(self, partition=PARTITIONS[layer % len(PARTITIONS)])

    def tile_of(self, grid: Grid) -> Size:
        """Tokens of one block along (t, h, w)."""
        if self.tile is not None:
            return as_size("tile", self.tile)
        return usual_tile(self.chunk_of(grid), block_tokens(grid.size))

    def layout(self, grid: Grid, device: torch.device) -> Layout:
        """Tiles that lie in one chunk each."""
        return tile_layout_on(grid, self.tile_of(grid), device, self.chunk_of(grid))

    def chunk_of(self, grid: Grid) -> Size:
        """Tokens of a chunk along (t, h, w); those at the far edges may be smaller."""
        t, h, w = grid.size
        partition = PARTITIONS[0] if self.partition == "cycle" else self.partition
        if partition == "time" and t > 1:
            return math.ceil(t / self.chunks), h, w
        if partition == "cube":
            edge = max(1, round((t * h * w / self.chunks) ** (1 / 3)))
            return min(edge, t), min(edge, h), min(edge, w)
        # one frame has no time to cut
        edge = max(1, round((h * w / self.chunks) ** 0.5))
        return t, min(edge, h), min(edge, w)

    def search(self, content: Content) -> tuple[Plan, None]:
        """The chunks that every query, or block of queries, chooses."""
        grid = content.grid
        sizes = grid.size, self.tile_of(grid), self.chunk_of(grid)
        chunk, num_chunks = _chunks(*sizes, content.q.device)
        keys, tokens = _chunk_means(content, chunk, num_chunks)
        if self.granularity == "block":
            queries, weights, home = content.queries, content.tokens, chunk
        else:
            layout, video = content.layout, slice(content.num_blocks * content.layout.block)
            order = layout.order[video].long().clamp_min(0)
            queries, weights = content.q[:, :, order].to(keys.dtype), layout.live[video].long()
            home = chunk.repeat_interleave(layout.block)
        own = home[:, None] == torch.arange(num_chunks, device=home.device)
        kept = self._select(queries @ keys.mT, weights, own, tokens)
        if self.granularity == "block":
            return content.plan(kept[..., chunk]), None
        return _by_query(content, kept & (weights > 0)[:, None], chunk), None

    def _select(self, gates: Tensor, weights: Tensor, own: Tensor, tokens: Tensor) -> Tensor:
        """(B, H, Q, C) bool from the gates of Q queries, or blocks of them, and C chunks.

        Args:
            weights: (Q,) how many queries a row stands for, 0 for an empty slot.
            own: (Q, C) bool.
            tokens: (C,) tokens of each chunk.
        """
        if self.select == "topk":
            count = min(self.topk + 1, gates.shape[-1])
            return select_count(gates.masked_fill(own, torch.inf), count)
        together = (-2, -1) if self.select == "global" else (-1,)
        empty = (weights == 0)[:, None]
        low = gates.masked_fill(empty, torch.inf).amin(together, keepdim=True)
        high = gates.masked_fill(empty, -torch.inf).amax(together, keepdim=True)
        gates = (gates - low) / (high - low).clamp_min(torch.finfo(gates.dtype).tiny)
        gates = gates.masked_fill(empty, 0)
        worth = gates.double() * weights[:, None]
        share = self.tau
        if self.density is not None:
            worth, share = (weights[:, None] * tokens).double().expand_as(gates), self.density
        # what is worth nothing is part of a full share
        need = share * worth.sum(together, keepdim=True) if share < 1 else torch.inf
        need = need - (worth * own).sum(together, keepdim=True)
        rank = gates.masked_fill(empty, -torch.inf)
        if self.select == "query":
            return select_until(rank, worth, need, own)
        flat = (x.flatten(-2) for x in (rank, worth, need))
        return select_until(*flat, own.flatten()).view(gates.shape)


@lru_cache(maxsize=16)
def _chunks(size: Size, tile: Size, chunk: Size, device: torch.device) -> tuple[Tensor, int]:
    """(nv,) int64 chunk of each block, and how many chunks there are; made once."""
    number, total = chunk_of_tiles(size, tile, chunk)
    return number.to(device), total


def _chunk_means(content: Content, chunk: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    """(B, H, C, D) mean key of each chunk over the keys that may be read, and (C,) its tokens."""
    sums = content.keys * content.counts[..., None]
    means = sums.new_zeros(*sums.shape[:2], num_chunks, sums.shape[-1]).index_add_(2, chunk, sums)
    counts = content.counts.new_zeros(*content.counts.shape[:2], num_chunks)
    counts.index_add_(2, chunk, content.counts)
    tokens = content.tokens.new_zeros(num_chunks).index_add_(0, chunk, content.tokens)
    return means / counts.clamp_min(1)[..., None], tokens


def _by_query(content: Content, kept: Tensor, chunk: Tensor) -> Plan:
    """The plan in which the queries of a block read chunks of their own.

    Args:
        kept: (B, H, nv * n, C) bool, False for empty slots.
        chunk: (nv,) chunk of each block.
    """
    block, nv = content.layout.block, content.num_blocks
    live = content.layout.live[: nv * block].view(nv, block)
    # (B, H, nv, C, n): who reads a chunk
    readers = kept.unflatten(2, (nv, block)).transpose(-1, -2)
    some = readers.any(-1)
    partial = some & ~(readers | ~live[:, None]).all(-1)
    patterns, pattern = torch.unique(readers[partial], dim=0, return_inverse=True)
    gaps, gap = torch.unique(live, dim=0, return_inverse=True)
    masks = (patterns[:, None, :, None] & gaps[None, :, None, :]).flatten(0, 1)
    number = torch.full(some.shape, -1, device=some.device)
    number[partial] = pattern * len(gaps)
    number = number[..., chunk]
    number = torch.where(number < 0, -1, number + gap)
    plan = Plan.from_blocks(content.grid, content.layout, some[..., chunk])
    lists = _masked(plan.lists, _of_entries(plan, number), masks)
    return content.rectified(replace(plan, lists=lists))


def _of_entries(plan: Plan, number: Tensor) -> Tensor:
    """(E,) from (B, H, nv, nv) what is said about each listed block, -1 for text."""
    beside = plan.layout.num_blocks - plan.layout.num_video_blocks
    number = torch.nn.functional.pad(number, (0, beside, 0, beside), value=-1)
    return number.flatten(0, 2)[plan.lists.row_of_entry, plan.lists.key_block.long()]


def _masked(lists: BlockLists, mask_id: Tensor, masks: Tensor) -> BlockLists:
    """Lists of whole blocks with some of them decided by masks.

    Args:
        mask_id: (E,) int64, -1 for a block that stays whole.
        masks: (M, n, n) bool, query by key, False in empty slots.
    """
    rows, partial = lists.row_of_entry, mask_id >= 0
    order = (rows * 2 + partial).argsort(stable=True)
    num_partial = torch.bincount(rows[partial], minlength=lists.num_rows)
    return replace(
        lists,
        num_full=(lists.counts - num_partial).int(),
        key_block=lists.key_block[order],
        mask_id=mask_id[order].int(),
        masks=masks,
    )
