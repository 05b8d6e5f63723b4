"""Exact attention mass of every pair of blocks, by one pass that keeps no scores.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, N slots, n slots to a block,
nb blocks, G query blocks in flight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.kernels.engines.partial_bias import HIDDEN
from vidattn.kernels.slots import Slots

# bytes of scores in flight, which stay in a cache of the second level, and queries they are of
BUDGET, ROWS = 1 << 19, 256
TAKES = ("scale", "key_mask")


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    order: Tensor,
    block: int,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Sum of exp(scale * q.k - lse) over the pairs of tokens of every pair of blocks.

    With the log-sum-exp of dense attention this is the exact share of attention that each query
    block gives each key block, times the queries in it; with one from an earlier step, AdaSpa's
    estimate of it (Xia et al., 2502.21079, section 4). Memory is a few MiB beside the result.

    Args:
        q: (B, H, S, D).
        k: (B, K, S, D), H a multiple of K.
        lse: (B, H, S) natural log-sum-exp of the scaled scores.
        order: (N,) int32, token in each slot, -1 for an empty slot.
        block: slots to a block.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        (B, H, nb, nb) float32, query block by key block.
    """
    return _mass(q, k, lse, order, block, scale, key_mask)[0]


def dense_mass(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    block: int,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``block_mass`` of dense attention, and the log-sum-exp of it, in one pass.

    Args:
        q, k, order, block, scale, key_mask: as in ``block_mass``.

    Returns:
        (B, H, nb, nb) float32, query block by key block; (B, H, S) float32, or float64 for float64,
        -inf for no keys.
    """
    return _mass(q, k, None, order, block, scale, key_mask)


def obstacle(*call: object, **options: object) -> None:
    """Nothing keeps this engine from a call."""


def _mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    order: Tensor,
    block: int,
    scale: float,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Masses by a log-sum-exp, or by that of dense attention where none is given."""
    B, H, S, D = q.shape
    slots = Slots(order, block, key_mask)
    nb, groups = slots.num_blocks, H // k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = slots.fill(q).view(B * H, nb, block, D)
    keys = slots.fill(k).view(B * k.shape[1], nb * block, D)
    dense = lse is None
    # a query without keys has no mass
    lse = q.new_zeros(B, H, S) if dense else lse.masked_fill(lse == -torch.inf, torch.inf)
    loss = slots.fill(lse[..., None].to(dtype)).view(B * H, nb, block, 1)
    live = (order >= 0).view(nb, block, 1)
    mass = q.new_empty(B * H, nb, nb, dtype=torch.float32)
    step = max(1, ROWS // block)
    for head in range(B * H):
        key = keys[head // groups].to(dtype)
        hidden = None if slots.readable is None else ~slots.readable[_sample(slots, head, H)]
        for begin in range(0, nb, step):
            rows = slice(begin, begin + step)
            query = queries[head, rows].to(dtype) * scale  # (G, n, D)
            top = None if dense else loss[head, rows]
            weights, top = _weights(query, key, hidden, top, block)
            if dense:
                total = weights.sum(-1, keepdim=True).masked_fill_(top <= HIDDEN, torch.inf)
                weights /= total
                loss[head, rows] = top + total.log()
            mass[head, rows] = weights.masked_fill_(~live[rows], 0).sum(1)
    lse = slots.read(loss.view(-1, block, 1), q)[..., 0]
    return mass.view(B, H, nb, nb), lse.masked_fill(lse == torch.inf, -torch.inf)


def _weights(
    query: Tensor, key: Tensor, hidden: Tensor | None, top: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """(G, n, nb) sums of exp(score - top) over the keys of each block, and the (G, n, 1) top.

    Args:
        query: (G, n, D) scaled.
        key: (N, D).
        hidden: (N,) bool.
        top: the largest score of each query where it is not given.
    """
    step = max(1, BUDGET // (query[..., 0].numel() * block * key.itemsize)) * block
    sums, tops = [], []
    for begin in range(0, len(key), step):
        scores = query @ key[begin : begin + step].mT
        if hidden is not None:
            scores.masked_fill_(hidden[begin : begin + step], HIDDEN)
        tops.append(scores.amax(-1, keepdim=True) if top is None else top)
        sums.append(scores.sub_(tops[-1]).exp_().unflatten(-1, (-1, block)).sum(-1))
    if top is None:
        top = torch.cat(tops, -1).amax(-1, keepdim=True)
        sums = [part * (of_part - top).exp_() for part, of_part in zip(sums, tops)]
    return torch.cat(sums, -1), top


def _sample(slots: Slots, head: int, num_heads: int) -> int:
    return 0 if slots.readable.shape[0] == 1 else head // num_heads
