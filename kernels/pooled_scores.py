"""Attention between block means, and which blocks it selects; nothing waits for the device.

Of entries with the same score, those that stand first are the best.

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


def pooled_scores(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    block: int,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax of the scores of block means, each key block weighed by its number of tokens.

    Args:
        q: (B, H, S, D).
        k: (B, K, S, D), H a multiple of K.
        order, block, scale, key_mask: as in ``block_means``; the scale multiplies the scores.

    Returns:
        (B, H, nb, nb) float32, query block by key block; rows sum to 1.
    """
    queries, _ = block_means(q, order, block)
    keys, counts = block_means(k, order, block, key_mask)
    keys = keys.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = scale * queries @ keys.mT + counts.log()[..., None, :]
    return scores.softmax(-1)


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
        order, block, scale, key_mask: as in ``pooled_scores``.

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


def select_count(scores: Tensor, count: int) -> Tensor:
    """The ``count`` best entries of every row as bool of the shape of ``scores``.

    Raises:
        ValueError: a count that no row has.
    """
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"count is {count}; it must be from 1 to {scores.shape[-1]}")
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def select_mass(scores: Tensor, mass: float) -> Tensor:
    """The best entries of every row that together reach a share of its sum, as bool.

    The entry that crosses the share is among them.

    Args:
        scores: (..., nb), none of them negative.
        mass: share of each row's sum, above 0 and at most 1.

    Raises:
        ValueError: a share outside that range.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}; it must be above 0 and at most 1")
    ranked, index = scores.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    # rounding must not drop an entry from a full share
    enough = mass * ranked.sum(-1, keepdim=True) if mass < 1 else torch.inf
    keep = (before < enough) & ((ranked > 0) | (mass == 1))
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def select_share(scores: Tensor, tokens: Tensor, share: float | Tensor) -> Tensor:
    """The best entries of every row whose tokens come nearest to a share of all, as bool.

    Every row has at least one, and a full share takes all.

    Args:
        scores: (..., nb), -inf for an entry that is worth nothing.
        tokens: (..., nb) tokens of each entry, broadcast to ``scores``.
        share: share of the tokens, above 0 and at most 1; a tensor broadcasts to ``scores``.

    Raises:
        ValueError: a share outside that range.
    """
    if not torch.is_tensor(share) and not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1")
    index = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = tokens.expand_as(scores).gather(-1, index)
    middle = ranked.cumsum(-1) - ranked / 2
    keep = middle <= share * tokens.sum(-1, keepdim=True)
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def select_until(scores: Tensor, worth: Tensor, need: Tensor, always: Tensor) -> Tensor:
    """Some entries of every row, and the best others that together reach a need, as bool.

    The entry that reaches the need is among them; without a need only the first are.

    Args:
        scores: (..., nb), -inf for an entry that is never taken.
        worth: (..., nb) what an entry adds, broadcast to ``scores``.
        need: (..., 1) what is to be reached beside the entries of ``always``.
        always: (..., nb) bool, broadcast to ``scores``.
    """
    scores = scores.masked_fill(always, -torch.inf)
    ranked, index = scores.sort(dim=-1, descending=True, stable=True)
    ranked_worth = worth.double().expand_as(scores).gather(-1, index)
    before = ranked_worth.cumsum(-1) - ranked_worth
    keep = (before < need) & (ranked > -torch.inf)
    return torch.zeros_like(keep).scatter_(-1, index, keep) | always
