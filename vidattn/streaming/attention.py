"""Attention of the queries of a chunk to what a cache gives them.

Letters: B batch, H query heads, K key heads, S queries, N keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.attention import attend
from vidattn.grid import Grid
from vidattn.kernels.engines.dense import dense_attention
from vidattn.plan import Plan
from vidattn.streaming.cache import Part
from vidattn.streaming.policy import QueryPolicy


def read(
    q: Tensor,
    parts: Sequence[Part],
    num_key_heads: int,
    scale: float | None = None,
    policy: QueryPolicy | None = None,
) -> Tensor:
    """(B, H, S, D): what the queries read, in their dtype.

    A key of weight w is read as w equal ones, one of weight 0 by nobody.

    Args:
        q: (B, H, S, D); H is a multiple of the key heads.
        parts: cover each of the ``num_key_heads`` once.
        scale: factor of the scores; D ** -0.5 by default.
        policy: which of the keys a query reads; None for all of them.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if len(parts) == 1 and parts[0].heads is None:
        return _read(q, parts[0], scale, policy)
    group = q.shape[1] // num_key_heads
    out = torch.empty_like(q)
    for part in parts:
        assert part.heads is not None
        own = (part.heads[:, None] * group + torch.arange(group, device=q.device)).flatten()
        out[:, own] = _read(q[:, own], part, scale, policy)
    return out


def _read(q: Tensor, part: Part, scale: float, policy: QueryPolicy | None) -> Tensor:
    if policy is not None:
        return policy.attend(q, part, scale)
    if part.weight is None:
        return dense_attention(q, part.k, part.v, scale=scale)
    plan = _everything(q.shape[2], part.k.shape[2])
    return attend(q, part.k, part.v, plan, scale=scale, key_weight=part.weight)


@lru_cache(maxsize=64)
def _everything(num_queries: int, num_keys: int) -> Plan:
    """Every query reads every key."""
    return Plan.dense(Grid(1, 1, num_queries), num_keys)
