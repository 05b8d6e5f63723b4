"""What a plan loses on given queries, keys and values: attention mass, and the output.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim, R sampled queries, n
slots to a block, nb blocks, E listed blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.kernels.scoring.pooling import block_means
from vidattn.plan import AnyPlan, Plan
from vidattn.planning.sampled import sampled_attention, sampled_scores
from vidattn.planning.visible import visible_keys

# scores in flight
BUDGET = 1 << 24


@dataclass(frozen=True, eq=False)
class Fidelity:
    """How close sparse attention comes to dense attention.

    Args:
        recall: (B, H) share of dense attention's mass on the pairs that are read.
        output_error: (B, H) root mean square of sparse minus dense output, relative to that of the
            dense output.
    """

    recall: Tensor
    output_error: Tensor


def fidelity(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AnyPlan,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: Tensor | None = None,
) -> Fidelity:
    """Compare what a plan computes with dense attention, query by query and in float32.

    The compensation and the sharpness of a plan are in it; what a quantized engine adds is not. It
    costs what dense attention of the queries does: a sample of them makes it cheap at any length.

    Args:
        q: (B, H, S, D) in sequence order.
        k: (B, K, Sk, D), H a multiple of K.
        v: likewise.
        scale: factor of the scores; D ** -0.5 by default.
        key_mask: (B, Sk) bool, False for keys that nobody may read.
        queries: (R,) int64 tokens to look at; all of them by default.
    """
    queries = torch.arange(q.shape[2], device=q.device) if queries is None else queries
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    key_head = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    found = []
    for part, samples, heads in plan.parts():
        mask = None if key_mask is None else key_mask[samples].flatten(0, -2)
        k_of, v_of = (x[samples, key_head[heads]].float() for x in (k, v))
        given = (q[samples, heads].float(), k_of, v_of)
        found.append(_fidelity(*given, part, scale, mask, queries))
    return Fidelity(*map(plan.put_back, zip(*found)))


def recall(
    q: Tensor,
    k: Tensor,
    plan: AnyPlan,
    queries: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The ``recall`` of ``fidelity`` alone, cheap enough to be looked at in passing.

    Args:
        q: (B, H, S, D) in sequence order.
        k: (B, K, Sk, D), H a multiple of K.
        queries: (R,) int64 tokens to look at.
        scale: factor of the scores; D ** -0.5 by default.
        key_mask: (B, Sk) bool, False for keys that nobody may read.

    Returns:
        (B, H) float32 share of dense attention's mass on the pairs that are read.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kept = q.new_zeros(q.shape[:2], dtype=torch.float32)
    step = max(1, BUDGET // (q.shape[0] * q.shape[1] * k.shape[2]))
    for some in queries.split(step):
        weights = sampled_attention(q, k, some, scale=scale, key_mask=key_mask)
        kept += plan.put_back(
            [
                (weights[samples, heads] * visible_keys(part, some)).sum((2, 3))
                for part, samples, heads in plan.parts()
            ]
        )
    return kept / len(queries)


def _fidelity(q, k, v, plan: Plan, scale: float, key_mask, queries: Tensor) -> tuple:
    """Recall and output error, (B, H) each, of one plan for all these heads."""
    layout, shift = plan.layout, None
    if plan.rest is not None:
        shift = plan.rest @ block_means(v, layout.order, layout.block, key_mask)[0]
    mass, error, size = q.new_zeros(3, *q.shape[:2])
    step = max(1, BUDGET // (q.shape[0] * q.shape[1] * k.shape[2]))
    for some in queries.split(step):
        scores = sampled_scores(q, k, some, scale=scale, key_mask=key_mask)
        weights = scores.softmax(-1)
        visible, dense = visible_keys(plan, some), weights @ v
        mass += (weights * visible).sum((2, 3))
        if plan.sharpness != 1:
            weights = scores.mul_(plan.sharpness).softmax(-1)
        weights *= visible
        kept = weights.sum(-1, keepdim=True)
        out = weights @ v / kept.clamp_min(torch.finfo(kept.dtype).tiny)
        block = layout.slot_of_token[some] // layout.block
        if plan.gain is not None:
            out *= plan.gain[..., block, None]
        if shift is not None:
            out += shift[..., block, :]
        error += (out - dense).square().sum((2, 3))
        size += dense.square().sum((2, 3))
    return mass / len(queries), (error / size).sqrt()
