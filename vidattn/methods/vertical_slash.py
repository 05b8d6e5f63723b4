"""Vertical-slash attention: a few keys that everybody reads, and tiles at a few distances.

Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic
Sparse Attention", arXiv:2407.02490, which estimates from the exact attention of the last queries
which columns (vertical lines) and which diagonals (slash lines) of the map hold most of it. A video
has no last queries, so some spread over all of it are taken. A vertical line is one key; it is
moved, by head, into blocks that every query reads. A slash line is a distance (dt, dh, dw) between
tiles. MInference sets the number of either kind by a search beforehand; here the lines of a head
compete for one density by the attention they hold for the pairs they cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.grid import Size, with_text
from vidattn.head_plan import HeadPlan
from vidattn.plan import AnyPlan, Plan
from vidattn.planning.content import Content
from vidattn.planning.content_method import ContentMethod
from vidattn.planning.method import check_share
from vidattn.planning.sampled import sample, sampled_attention
from vidattn.planning.selection import select_until
from vidattn.planning.tiles import tile_counts


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(ContentMethod):
    """Keys that every query reads, and tiles at distances that hold much attention.

    Heads with vertical lines have orders of their own and run on their own.

    Args:
        density: kept share of the video pairs, above 0 and at most 1; a tile reads itself in any
            case.
        vertical: share of the density that vertical lines may take at most, 0 for none.
        samples: queries whose attention is looked at.

    Raises:
        ValueError: a value out of range.
    """

    density: float = 0.25
    vertical: float = 0.25
    samples: int = 128
    # every other step of fifty
    every: int | float = 0.04

    def __post_init__(self):
        super().__post_init__()
        check_share("density", self.density)
        if not 0 <= self.vertical <= 1:
            raise ValueError(f"vertical must be a share between 0 and 1, got {self.vertical!r}")
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples must be an integer of at least 1, got {self.samples!r}")

    def search(self, content: Content) -> tuple[AnyPlan, None]:
        """The lines that hold the most attention for the pairs they cost."""
        N, block = content.grid.num_video_tokens, content.layout.block
        offset = offsets(tile_counts(content.grid.size, self.tile_of(content.grid)))
        offset = offset.to(content.q.device)
        samples = sample(N, self.samples).to(content.q.device)
        attention = attention_of(content, samples)
        budget = self.density * N**2
        every = torch.ones(1, 1, N, dtype=torch.bool, device=samples.device)
        lines = Diagonals.of(content, offset, samples, attention, every)
        # keys that are worth a line though the best diagonals are there
        columns = columns_of(attention.masked_fill(lines.covered(budget), 0))
        count = _num_columns(columns, lines, budget)
        # a line down costs its column, and its row since its query reads all
        count = count.clamp(max=int(self.vertical * budget / (2 * N))) // block * block
        ranked = columns.argsort(-1, descending=True)
        rank = torch.arange(N, device=count.device)
        is_column = torch.zeros_like(ranked, dtype=torch.bool)
        is_column.scatter_(-1, ranked, rank < count[..., None])
        attention = attention.masked_fill(is_column[..., None, :], 0)
        lines = Diagonals.of(content, offset, samples, attention, ~is_column)
        kept = lines.select(budget - ((2 * N - count) * count)[..., None].double())
        if not bool(count.any()):
            return content.plan(kept[..., offset]), None
        heads = zip(
            content.rows(), kept.flatten(0, 1), ranked.flatten(0, 1), count.flatten().tolist()
        )
        plans = [_with_columns(row, x[offset], tokens[:n]) for row, x, tokens, n in heads]
        number = torch.arange(len(plans), device=count.device)
        return HeadPlan(tuple(plans), number.view(count.shape)), None


@dataclass(frozen=True, eq=False)
class Diagonals:
    """What the distances between tiles hold, and cost, in every head."""

    mass: Tensor  # (B, H, O) attention of the sampled queries
    cost: Tensor  # (B|1, H|1, O) pairs of tokens
    own: Tensor  # (O,) bool, the distance of a tile to itself
    of_pair: Tensor  # (R, N), from a sampled query to a key
    doubt: float  # pairs of tokens that one sampled query stands for at one distance

    @classmethod
    def of(
        cls, content: Content, offset: Tensor, samples: Tensor, attention: Tensor, counts: Tensor
    ) -> Diagonals:
        """From what sampled queries attend to.

        Args:
            offset: (nv, nv) number of the distance from a query tile to a key tile.
            samples: (R,) tokens of the video.
            attention: (B, H, R, N).
            counts: (B|1, H|1, N) bool, the tokens of the video that have a price.
        """
        block = block_of_token(content)
        tokens = _sums(counts.to(torch.float64), block, content.num_blocks)
        pairs = (tokens[..., :, None] * tokens[..., None, :]).flatten(-2)
        per_block = _sums(attention, block, content.num_blocks)
        num_offsets = int(offset.max()) + 1
        mass = _sums(per_block.flatten(-2), offset[block[samples]].flatten(), num_offsets)
        own = torch.zeros(num_offsets, dtype=torch.bool, device=offset.device)
        own[offset[0, 0]] = True
        cost = _sums(pairs, offset.flatten(), num_offsets)
        doubt = content.layout.block * len(block) / len(samples)
        return cls(mass, cost, own, offset[block[samples]][:, block], doubt)

    @property
    def rate(self) -> Tensor:
        """(B, H, O) attention for each pair, as if one more query had found none.

        Distances of few pairs are seen by few samples, or by one that was lucky.
        """
        return self.mass / (self.cost + self.doubt)

    def select(self, budget: Tensor | float) -> Tensor:
        """(B, H, O) bool, the best distances within a number of pairs, or (B, H, 1) of them."""
        return select_until(self.rate, self.cost, budget - self.cost[..., self.own], self.own)

    def covered(self, budget: float) -> Tensor:
        """(B, H, R, N) bool, the keys that the best distances give to sampled queries."""
        return self.select(budget)[..., self.of_pair]


def _num_columns(columns: Tensor, lines: Diagonals, budget: float) -> Tensor:
    """(B, H) int64, vertical lines among the best lines of either kind within a number of pairs.

    Args:
        columns: (B, H, N) attention that vertical lines would add.
    """
    N = columns.shape[-1]
    columns = columns.masked_fill(columns == 0, -torch.inf)
    rates = torch.cat([columns / (2 * N), lines.rate.to(columns.dtype)], -1)
    costs = torch.cat([lines.cost.new_full((1, 1, N), 2 * N), lines.cost], -1)
    always = torch.cat([torch.zeros(N, dtype=torch.bool, device=lines.own.device), lines.own])
    need = budget - lines.cost[..., lines.own]
    return select_until(rates, costs, need, always)[..., :N].sum(-1)


def _with_columns(row: Content, blocks: Tensor, columns: Tensor) -> Plan:
    """The plan of one head in which every query reads some keys, and their queries all keys.

    Args:
        blocks: (nv, nv) bool, which tile reads which.
        columns: (c,) tokens of the video, c a multiple of the block.
    """
    layout, nv = row.layout, row.num_blocks
    order = layout.order[: nv * layout.block].clone()
    start = row.grid.video_start
    order[layout.slot_of_token[start + columns]] = -1
    order = torch.cat([order, (start + columns).to(order.dtype)])
    beside = len(columns) // layout.block
    blocks = torch.nn.functional.pad(blocks, (0, beside, 0, beside), value=True)
    return row.on(with_text(row.grid, order, layout.block)).plan(blocks[None, None])


def attention_of(content: Content, samples: Tensor) -> Tensor:
    """(B, H, R, N) share of attention that R queries of the video give each of its N keys."""
    given = {"scale": content.scale, "key_mask": content.key_mask}
    start = content.grid.video_start
    shares = sampled_attention(content.q, content.k, start + samples, **given)
    return shares[..., start : start + content.grid.num_video_tokens]


def columns_of(attention: Tensor) -> Tensor:
    """(..., N) what each key gets from sampled queries (..., R, N), and surely from others too.

    It is twice what the half of the samples that looks at it less gives: a key that few of them
    happen to need is no line.
    """
    return 2 * torch.minimum(attention[..., ::2, :].sum(-2), attention[..., 1::2, :].sum(-2))


def offsets(counts: Size) -> Tensor:
    """(nv, nv) int64 number of the distance (dt, dh, dw) from a query tile to a key tile."""
    places = torch.cartesian_prod(*map(torch.arange, counts)).view(-1, 3)
    number = torch.zeros(len(places), len(places), dtype=torch.long)
    for axis, count in enumerate(counts):
        along = places[:, axis] - places[:, axis, None]
        number = number * (2 * count - 1) + along + count - 1
    return number


def block_of_token(content: Content) -> Tensor:
    """(N,) int64, the block of each token of the video."""
    start = content.grid.video_start
    slots = content.layout.slot_of_token[start : start + content.grid.num_video_tokens]
    return slots // content.layout.block


def _sums(x: Tensor, index: Tensor, size: int) -> Tensor:
    """(..., size) sums of the entries of the last axis by their number in ``index``."""
    return x.new_zeros(*x.shape[:-1], size).index_add_(-1, index, x)
