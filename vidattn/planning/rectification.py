"""How far an estimate of what is not read can be trusted.

The estimate and its test block by block are those of Liu et al., "Rectified SpaAttn",
arXiv:2511.19835; the factor of a head is ours.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, R sampled queries, nv video
blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.grid import Layout
from vidattn.kernels.scoring.pooling import block_deviations
from vidattn.plan import Plan
from vidattn.planning.sampled import sample, sampled_attention
from vidattn.planning.visible import visible_keys

# queries that an estimate is judged by
NUM_SAMPLES = 64
# those of them whose scores with all keys are held at once
ROWS_AT_ONCE = 16


def is_coherent(
    q: Tensor, k: Tensor, layout: Layout, queries: Tensor, keys: Tensor, key_mask: Tensor | None
) -> Tensor:
    """Whether the score of the means speaks for the pairs of two blocks.

    It does where it exceeds what the spread of the queries and that of the keys can change
    ("gain-aware").

    Args:
        q: (B, H, S, D).
        k: (B, K, S, D), H a multiple of K.
        queries: (B, H, nv, D) mean queries.
        keys: (B, H, nv, D) mean keys, less the mean of all.
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        (B, H, nv, nv) bool.
    """
    video, blocks = slice(layout.num_video_blocks), (layout.order, layout.block)
    query_spread = block_deviations(q, *blocks)[:, :, video]
    key_spread = block_deviations(k, *blocks, key_mask)[:, :, video]
    key_spread = key_spread.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    spread = (query_spread @ keys.mT).abs() + (queries @ key_spread.mT).abs()
    return (queries @ keys.mT).abs() > spread


def trust(
    q: Tensor,
    k: Tensor,
    plan: Plan,
    rest: Tensor,
    means: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The factor on an estimate that brings sparse attention closest to dense attention.

    Block means stand for the keys that attention finds in a block only where it spreads over them;
    where it has peaks, what was read often resembles them more. How much is right shows in a few
    queries with all their keys: dense attention of the *keys* themselves is compared with sparse
    attention of them, and the factor, between 0 and 1, is the least squares fit of the difference
    by that which the estimate makes. Keys stand in for the values, which no search sees.

    Args:
        q: (B, H, S, D).
        k: (B, K, S, D), H a multiple of K.
        plan: what is read.
        rest: (B, H, nv, nv) share of attention estimated for what is not read of each block.
        means: (B, K, nv, D) mean keys.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        (B, H), 0 where the estimate makes no difference.
    """
    grid, layout = plan.grid, plan.layout
    queries = grid.video_start + sample(grid.num_video_tokens, NUM_SAMPLES).to(q.device)
    keys = k.to(means.dtype)
    fit = size = 0
    for some in queries.split(ROWS_AT_ONCE):
        weights = sampled_attention(q, keys, some, scale=scale, key_mask=key_mask)
        kept = weights * visible_keys(plan, some)
        left = rest[:, :, layout.slot_of_token[some] // layout.block]
        kept = kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)
        missing = _average(weights - kept, keys)
        change = _average(left, means) - left.sum(-1, keepdim=True) * _average(kept, keys)
        fit = fit + (missing * change).sum((2, 3))
        size = size + change.square().sum((2, 3))
    return (fit / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp(0, 1)


def _average(weights: Tensor, keys: Tensor) -> Tensor:
    """(B, H, R, D) of weights (B, H, R, N) and (B, K, N, D)."""
    return (weights.unflatten(1, (keys.shape[1], -1)) @ keys[:, :, None]).flatten(1, 2)
