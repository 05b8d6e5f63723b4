"""The order of the axes in which a head's attention gathers in few blocks, and those blocks.

Source: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized
Attention in Visual Generation Models", arXiv:2506.16054.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, nv video blocks.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from vidattn.grid import Grid, raster_layout
from vidattn.head_plan import HeadPlan
from vidattn.kernels.scoring.block_weights import block_weights
from vidattn.plan import AnyPlan, Plan
from vidattn.planning.selection import select_share

# the axes t, h, w from the one that changes least to the one that changes most
ORDERS = tuple(itertools.permutations(range(3), 3))
# a block is sparse below this share of what uniform attention would give it
SPARSE = 0.1


def order_scores(
    grid: Grid, q: Tensor, k: Tensor, block: int, *, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """How well each order of the axes suits each head: (6, H), the best is the largest.

    Half of it is the share of blocks with next to no attention, the other half the inverse of the
    ratio of the largest to the mean weight in a block, which rounding suffers from; each relative
    to its sum over the orders, both as means over the samples.

    Args:
        q: (B, H, S, D).
        k: (B, K, S, D), H a multiple of K.
        block: tokens to a block.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.
    """
    sparse, even = [], []
    for axes in ORDERS:
        layout = raster_layout(grid, block, axes).to(q.device)
        nv = layout.num_video_blocks
        given: dict[str, Any] = {"scale": scale, "key_mask": key_mask}
        total, peak = block_weights(q, k, layout.order, block, **given)
        total, peak = total[..., :nv, :nv], peak[..., :nv, :nv]
        tokens = layout.tokens_per_block[:nv]
        pairs = tokens[:, None] * tokens
        sparse.append((total < SPARSE * pairs / grid.num_tokens).float().mean((0, 2, 3)))
        ratio = peak * pairs / total.clamp_min(torch.finfo(total.dtype).tiny)
        even.append(1 / ratio.mean((0, 2, 3)))
    return sum(x / x.sum(0).clamp_min(1e-30) / 2 for x in map(torch.stack, (sparse, even)))


def order_mass(
    grid: Grid,
    q: Tensor,
    k: Tensor,
    block: int,
    orders: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """(B, H, nv, nv) attention in the blocks of the video, each head in an order of its own.

    Args:
        q, k, block, scale, key_mask: as in ``order_scores``.
        orders: (H,) int64, indices into ``ORDERS``.
    """
    group, nv = q.shape[1] // k.shape[1], -(-grid.num_video_tokens // block)
    mass = q.new_empty(*q.shape[:2], nv, nv, dtype=torch.float32)
    for index in orders.unique().tolist():
        heads = (orders == index).nonzero().flatten()
        layout = raster_layout(grid, block, ORDERS[index]).to(q.device)
        some = q[:, heads], k[:, heads // group]
        total, _ = block_weights(*some, layout.order, block, scale=scale, key_mask=key_mask)
        mass[:, heads] = total[..., :nv, :nv]
    return mass


def select_blocks(grid: Grid, mass: Tensor, block: int, density: float) -> Tensor:
    """The blocks above one threshold for each head, which sets the density, as bool like ``mass``.

    A block reads itself whatever that holds. The order does not matter here: in each of them the
    last block alone may be short.

    Args:
        mass: (..., nv, nv).
    """
    tokens = raster_layout(grid, block).tokens_per_block[: mass.shape[-1]].to(mass.device)
    pairs = (tokens[:, None] * tokens).flatten()
    own = torch.eye(mass.shape[-1], dtype=torch.bool, device=mass.device)
    scores = mass.masked_fill(own, torch.inf).flatten(-2)
    return select_share(scores, pairs, density).view(mass.shape) | own


def ordered_plan(grid: Grid, blocks: Tensor, block: int, orders: Tensor) -> AnyPlan:
    """The plan in which each head reads its blocks, and every block itself, in its order.

    Args:
        blocks: (B|1, H, nv, nv) bool.
        orders: (H,) int64, indices into ``ORDERS``.
    """
    plans, groups = [], []
    blocks = blocks | torch.eye(blocks.shape[-1], dtype=torch.bool, device=blocks.device)
    for index in orders.unique().tolist():
        heads = (orders == index).nonzero().flatten()
        layout = raster_layout(grid, block, ORDERS[index]).to(blocks.device)
        plans.append(Plan.from_blocks(grid, layout, blocks[:, heads]))
        groups.append(heads.tolist())
    return plans[0] if len(plans) == 1 else HeadPlan.join(plans, groups)
