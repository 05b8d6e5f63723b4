"""Dense masked attention in float64: what every engine is measured against.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys; a query that sees none gives 0.

    Args:
        q, k, v: (B, H, S, D).
        mask: bool, broadcastable to (B, H, S, S), query by key.

    Returns:
        (B, H, S, D) in the dtype of ``q``, and the (B, H, S) float32 log-sum-exp, -inf where
        nothing is visible.
    """
    scores = q.double() @ k.double().mT * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return (weights @ v.double()).to(q.dtype), lse.float()
