"""What a plan loses on given queries, keys and values: attention mass, and the output.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, R sampled queries, n slots to a
block, nb blocks, E listed blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.head_plan import HeadPlan
from vidattn.kernels.pooling import block_means
from vidattn.plan import Plan
from vidattn.visible import visible_keys

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
    plan: Plan | HeadPlan,
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
        k: (B, K, S, D), H a multiple of K.
        v: likewise.
        scale: factor of the scores; D ** -0.5 by default.
        key_mask: (B, S) bool, False for keys that nobody may read.
        queries: (R,) int64 tokens to look at; all of them by default.
    """
    queries = torch.arange(q.shape[2], device=q.device) if queries is None else queries
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    recall, error = q.new_empty(2, *q.shape[:2], dtype=torch.float32)
    for part, sample, head in _members(plan, q):
        mask = None if key_mask is None else key_mask[sample].flatten(0, -2)
        k_of, v_of = (x[sample, head // group].float() for x in (k, v))
        found = _fidelity(q[sample, head].float(), k_of, v_of, part, scale, mask, queries)
        recall[sample, head], error[sample, head] = found
    return Fidelity(recall, error)


def recall(
    q: Tensor,
    k: Tensor,
    plan: Plan | HeadPlan,
    queries: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The ``recall`` of ``fidelity`` alone, cheap enough to be looked at in passing.

    Args:
        q: (B, H, S, D) in sequence order.
        k: (B, K, S, D), H a multiple of K.
        queries: (R,) int64 tokens to look at.
        scale: factor of the scores; D ** -0.5 by default.
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        (B, H) float32 share of dense attention's mass on the pairs that are read.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    kept = q.new_zeros(q.shape[:2], dtype=torch.float32)
    step = max(1, BUDGET // (q.shape[0] * q.shape[1] * q.shape[2]))
    for some in queries.split(step):
        rows = q[:, :, some].unflatten(1, (-1, group))
        scores = (scale * rows @ k[:, :, None].mT).flatten(1, 2).float()
        if key_mask is not None:
            scores.masked_fill_(~key_mask[:, None, None], -torch.inf)
        weights = scores.softmax(-1)
        for part, sample, head in _members(plan, q):
            read = weights[sample, head] * visible_keys(part, some)
            kept[sample, head] += read.sum((2, 3))
    return kept / len(queries)


def _members(plan: Plan | HeadPlan, q: Tensor) -> Iterator[tuple[Plan, slice | Tensor, Tensor]]:
    """Every plan with the samples and the heads that follow it, an index of (B, H, ...)."""
    if not isinstance(plan, HeadPlan):
        yield plan, slice(None), torch.arange(q.shape[1], device=q.device)
        return
    for part, rows in zip(plan.plans, plan.heads):
        if plan.by_sample:
            # each as a sample of one head
            yield part, rows[:, None] // q.shape[1], rows[:, None] % q.shape[1]
        else:
            yield part, slice(None), rows


def _fidelity(q, k, v, plan: Plan, scale: float, key_mask, queries: Tensor) -> tuple:
    """Recall and output error, (B, H) each, of one plan for all these heads."""
    layout, shift = plan.layout, None
    if plan.rest is not None:
        shift = plan.rest @ block_means(v, layout.order, layout.block, key_mask)[0]
    mass, error, size = q.new_zeros(3, *q.shape[:2])
    step = max(1, BUDGET // (q.shape[0] * q.shape[1] * q.shape[2]))
    for some in queries.split(step):
        scores = scale * q[:, :, some] @ k.mT
        if key_mask is not None:
            scores.masked_fill_(~key_mask[:, None, None], -torch.inf)
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
