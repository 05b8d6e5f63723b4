"""Dense attention of a few queries, which many questions about a plan are answered by.

Letters: B batch, H query heads, K key heads, S tokens, Sk keys, D head dim, R queries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sampled_attention(
    q: Tensor, k: Tensor, queries: Tensor, *, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """(B, H, R, Sk) share of attention that some queries give each key, in float32 or more.

    Args:
        q: (B, H, S, D) in sequence order.
        k: (B, K, Sk, D), H a multiple of K.
        queries: (R,) int64 tokens.
        scale: factor of the scores.
        key_mask: (B, Sk) bool, False for keys that nobody may read.
    """
    return sampled_scores(q, k, queries, scale=scale, key_mask=key_mask).softmax(-1)


def sampled_scores(
    q: Tensor, k: Tensor, queries: Tensor, *, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """What ``sampled_attention`` takes the softmax of, -inf for keys that nobody may read."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    # (B, K, H / K, R, D)
    rows = q[:, :, queries].to(dtype).unflatten(1, (k.shape[1], -1))
    scores = (scale * rows @ k.to(dtype)[:, :, None].mT).flatten(1, 2)
    if key_mask is not None:
        scores.masked_fill_(~key_mask[:, None, None], -torch.inf)
    return scores


def sample(num_tokens: int, count: int) -> Tensor:
    """Up to ``count`` places among ``num_tokens``, spread evenly at every scale."""
    steps = torch.arange(count, dtype=torch.float64) * (5**0.5 - 1) / 2
    return (steps % 1 * num_tokens).long().unique()
