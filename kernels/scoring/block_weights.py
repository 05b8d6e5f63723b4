"""Exact softmax attention of every pair of blocks, its sum and its largest weight, by one pass.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, N slots, n slots to a block,
nb blocks, G query blocks in flight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.kernels.slots import Slots

# bytes of scores in flight
BUDGET = 32 << 20


def block_weights(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    block: int,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum and maximum of the softmax weights in every pair of blocks.

    Args:
        q: (B, H, S, D).
        k: (B, K, S, D), H a multiple of K.
        order: (N,) int32, token in each slot, -1 for an empty slot.
        block: slots to a block.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        Two (B, H, nb, nb) float32, query block by key block; a row of the first sums to the queries
        in its block.
    """
    B, H, _, D = q.shape
    slots = Slots(order, block, key_mask)
    nb, group = slots.num_blocks, H // k.shape[1]
    queries = slots.fill(q).view(B, H, nb, block, D).float()
    keys = slots.fill(k).view(B, k.shape[1], nb * block, D).float()
    live = order >= 0
    readable = live[None] if slots.readable is None else slots.readable
    total, peak = q.new_empty(2, B, H, nb, nb, dtype=torch.float32)
    step = max(1, BUDGET // (nb * block * block * 4))
    for b in range(B):
        hidden = ~readable[b % len(readable)]
        for h in range(H):
            key = keys[b, h // group].mT
            for rows in torch.arange(nb, device=q.device).split(step):
                scores = scale * queries[b, h, rows].flatten(0, 1) @ key  # (G n, N)
                weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
                weights.masked_fill_(~live.view(nb, block)[rows].view(-1, 1), 0)
                weights = weights.nan_to_num_(0).view(-1, block, nb, block)
                total[b, h, rows], peak[b, h, rows] = weights.sum((1, 3)), weights.amax((1, 3))
    return total, peak
