"""Blocks of tokens as single numbers: means, deviations, best scores; nothing waits for the device.

Letters: B batch, H heads, S tokens, D head dim, N slots, n slots to a block, nb blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_means(
    x: Tensor, order: Tensor, block: int, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of every block, over their true number.

    Args:
        x: (B, H, S, D).
        order: (N,) int32, token in each slot, -1 for an empty slot.
        block: slots to a block.
        key_mask: (B, S) bool, False for tokens that do not count.

    Returns:
        (B, H, nb, D) float32, or float64 for float64, 0 for a block without tokens; (B|1, 1, nb)
        counts of the same dtype.
    """
    blocks, weights = _blocks(x, order, block, key_mask)
    counts = weights.sum((-2, -1))
    return _mean(blocks, weights, counts), counts


def block_deviations(
    x: Tensor, order: Tensor, block: int, key_mask: Tensor | None = None
) -> Tensor:
    """Mean distance of the tokens of every block from their mean, channel by channel.

    Args:
        x, order, block, key_mask: as in ``block_means``.

    Returns:
        (B, H, nb, D) float32, or float64 for float64, 0 for a block without tokens.
    """
    blocks, weights = _blocks(x, order, block, key_mask)
    counts = weights.sum((-2, -1))
    mean = _mean(blocks, weights, counts)
    return _mean((blocks - mean[..., None, :]).abs_(), weights, counts)


def _blocks(x: Tensor, order: Tensor, block: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, H, nb, n, D) tokens and (B|1, 1, nb, n, 1) whether each counts, in float32 or more."""
    live, token = (order >= 0)[None], order.long().clamp_min(0)
    if key_mask is not None:
        live = live & key_mask[:, token]
    live = live.view(live.shape[0], 1, -1, block, 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    # a gather of all slots: to look for the empty ones would be to wait for the device
    blocks = x.index_select(2, token).unflatten(2, (-1, block)).to(dtype)
    return blocks.masked_fill(~live, 0), live.to(dtype)


def _mean(blocks: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    return (blocks * weights).sum(-2) / counts.clamp_min(1)[..., None]


def best_scores(
    queries: Tensor,
    k: Tensor,
    order: Tensor,
    block: int,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The best score of each query with the keys of every block.

    Args:
        queries: (B, H, nq, D).
        k: (B, K, S, D), H a multiple of K.
        order, block, key_mask: as in ``block_means``.
        scale: factor of the scores.

    Returns:
        (B, H, nq, nb) of the dtype of ``queries``, -inf for a block without keys.
    """
    token = order.long().clamp_min(0)
    readable = (order >= 0)[None]
    if key_mask is not None:
        readable = readable & key_mask[:, token]
    group = queries.shape[1] // k.shape[1]
    best = []
    # one head at a time: there are as many scores as queries times keys
    for head in range(queries.shape[1]):
        keys = k[:, head // group, token].to(queries.dtype)
        scores = scale * queries[:, head] @ keys.mT
        scores = scores.masked_fill(~readable[:, None], -torch.inf)
        best.append(scores.unflatten(-1, (-1, block)).amax(-1))
    return torch.stack(best, 1)
