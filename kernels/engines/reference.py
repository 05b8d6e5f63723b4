"""Dense masked attention in float64: what every engine is measured against.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.library import mask_of

TAKES = ("scale", "key_mask", "key_bias")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over listed blocks.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, Sk, D), H a multiple of K.
        lists: which key blocks each query block reads.
        scale: factor of the scores.
        key_mask: (B, Sk) bool, False for keys that nobody may read.
        key_bias: (B|1, H|1, Sk) added to the scaled scores, -inf for keys that nobody may read.

    Returns:
        (B, H, S, D) in the dtype of ``q``; (B, H, S) float32 log-sum-exp, -inf for no keys.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask = mask_of(lists, q.shape[2], k.shape[2])
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
    if key_bias is not None:
        key_bias = key_bias[:, :, None]
        mask = mask & (key_bias != -math.inf)
    return masked_attention(q, k, v, mask, scale, key_bias)


def obstacle(*call: object, **options: object) -> None:
    """Nothing keeps this engine from a call."""


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible keys; a query that sees none gives 0.

    Args:
        q: (B, H, S, D).
        k, v: (B, H, Sk, D).
        mask: bool, broadcastable to (B, H, S, Sk), query by key.
        bias: added to the scaled scores where ``mask`` says so, broadcastable likewise.

    Returns:
        (B, H, S, D) in the dtype of ``q``, and the (B, H, S) float32 log-sum-exp, -inf where
        nothing is visible.
    """
    scores = q.double() @ k.double().mT * scale
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return (weights @ v.double()).to(q.dtype), lse.float()
