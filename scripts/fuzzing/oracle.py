"""Attention in float64 from an explicit mask, and how far from it a result may be.

Nothing here is shared with the planners and engines: a plan is read from its tensors by the words
of its documentation, by other means than theirs.

Letters: B batch, H query heads, S tokens, D head dim, n slots to a block, nb blocks, E listed
blocks, R rows of lists.
"""

from dataclasses import dataclass

import torch
from fuzzing.cases import Wrong
from torch import Tensor

from vidattn.kernels.box import Box
from vidattn.plan import AnyPlan, Plan

# relative root mean square, outputs and gradients alike
TOLERANCE = {
    torch.float64: 1e-7,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
# rounding of sums, and how often scores are rounded on their way to a weight
FLOAT32, ROUNDINGS = 2.0**-24, 8


@dataclass
class Truth:
    """What a plan says, token by token; the first two axes are 1 where it says so for all."""

    mask: Tensor  # (B|1, H|1, S, S) bool, query by key
    gain: Tensor | None  # (B|1, H|1, S, 1) float64, factor of what is read
    rest: Tensor | None  # (B|1, H|1, S, nb) float64, share of the mean of each block of values
    member: Tensor | None  # (B|1, H|1, nb, S) bool, tokens of these blocks
    sharpness: Tensor | float  # factor of the scale, (1|B, H, 1, 1) where heads differ


def read_plan(plan: AnyPlan, batch: int, heads: int) -> Truth:
    """What a plan says to samples and heads."""
    if isinstance(plan, Plan):
        return _read_one(plan)
    table = plan.plan_of_head if plan.plan_of_head.dim() == 2 else plan.plan_of_head[None]
    parts = [_read_one(x) for x in plan.plans]
    tokens, width = plan.grid.num_tokens, max(x.member.shape[2] for x in parts)
    whole = Truth(
        torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool),
        torch.ones(batch, heads, tokens, 1, dtype=torch.float64),
        torch.zeros(batch, heads, tokens, width, dtype=torch.float64),
        torch.zeros(batch, heads, width, tokens, dtype=torch.bool),
        torch.ones(batch, heads, 1, 1, dtype=torch.float64),
    )
    by_sample, before = plan.plan_of_head.dim() == 2, []
    for b, row in enumerate(table.expand(batch, heads).tolist()):
        for h, number in enumerate(row):
            part = parts[number]
            # a head is a sample of its plan where samples have plans of their own
            place = (before.count(number), 0) if by_sample else (b, row[:h].count(number))
            before.append(number)
            whole.mask[b, h] = _pick(part.mask, *place)
            whole.sharpness[b, h] = part.sharpness
            if part.gain is not None:
                whole.gain[b, h] = _pick(part.gain, *place)
            if part.rest is not None:
                blocks = part.rest.shape[-1]
                whole.rest[b, h, :, :blocks] = _pick(part.rest, *place)
                whole.member[b, h, :blocks] = _pick(part.member, 0, 0)
    return whole


def _pick(x: Tensor, b: int, h: int) -> Tensor:
    return x[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]


def _read_one(plan: Plan) -> Truth:
    lists, n, nb = plan.lists, plan.layout.block, plan.layout.order.numel() // plan.layout.block
    order, tokens = plan.layout.order.long(), plan.grid.num_tokens
    counts = lists.row_start[1:] - lists.row_start[:-1]
    row = torch.arange(len(counts)).repeat_interleave(counts)
    key = lists.key_block.long()
    partial = torch.arange(len(key)) >= (lists.row_start[:-1] + lists.num_full)[row]
    seen = torch.zeros(len(counts), nb, n, n, dtype=torch.bool)
    seen[row[~partial], key[~partial]] = True
    if partial.any() and lists.box is not None:
        slots = torch.arange(nb * n).view(nb, n)
        seen[row[partial], key[partial]] = _in_box(
            lists.box, slots[row[partial] % nb], slots[key[partial]]
        )
    elif partial.any():
        seen[row[partial], key[partial]] = lists.masks[lists.mask_id[partial].long()]
    by_slot = seen.view(-1, nb, nb, n, n).transpose(2, 3).reshape(-1, nb * n, nb * n)
    if sorted(order[order >= 0].tolist()) != list(range(tokens)):
        raise Wrong("a layout does not hold every token once")
    slot = torch.empty(tokens, dtype=torch.long)
    slot[order[order >= 0]] = torch.arange(nb * n)[order >= 0]
    mask = by_slot[:, slot][:, :, slot].unflatten(0, (lists.batch, lists.heads))
    of_token = slot // n
    gain = None if plan.gain is None else plan.gain.double()[..., of_token, None]
    rest = None if plan.rest is None else plan.rest.double()[..., of_token, :]
    member = (of_token == torch.arange(nb)[:, None])[None, None]
    return Truth(mask, gain, rest, member, plan.sharpness)


def _in_box(box: Box, query: Tensor, key: Tensor) -> Tensor:
    """(E, n, n) bool of (E, n) slots; every axis is a field of bits below a bit of the guard."""
    visible, shift = torch.ones(*query.shape, key.shape[1], dtype=torch.bool), 0
    low, high = box.low[query].long() + box.guard, box.high[query].long()
    here = box.key[key].long()
    for bit in range(31):
        if box.guard >> bit & 1:
            first, last, place = (x >> shift & (1 << bit - shift) - 1 for x in (low, high, here))
            place = place[:, None]
            visible &= (first[..., None] <= place) & (place <= last[..., None])
            shift = bit + 1
    return visible


@dataclass
class Answer:
    """Results in float64, and for each the size of the terms that it sums."""

    values: dict[str, Tensor]
    terms: dict[str, float]
    largest_score: float


def attention(
    q: Tensor, k: Tensor, v: Tensor, truth: Truth, scale: float, key_mask: Tensor | None,
    pulls: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None,
    table: Tensor | None = None,
) -> Answer:  # fmt: skip
    """Masked softmax attention, and its gradients.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, S, D).
        scale: factor of the scores, before the plan sharpens it.
        key_mask: (B, S) bool.
        pulls: gradients of the output (B, H, S, D) and of the log-sum-exp (B, H, S).
        bias: (H, S, S) float64 added to the scores, made of the leaf ``table``.
    """
    scale = scale * truth.sharpness
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    queries, (keys, values) = leaves[0], (x.repeat_interleave(group, 1) for x in leaves[1:])
    mask = truth.mask
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
    scores = scale * queries @ keys.mT
    if bias is not None:
        scores = scores + bias
        leaves.append(table)
    scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).nan_to_num(0, 0, 0)
    raw = (scores - top).exp()
    total = raw.sum(-1, keepdim=True)
    weights = raw / torch.where(total > 0, total, 1)
    lse = torch.where(total > 0, total, 1).log()[..., 0] + top[..., 0]
    # (B, H, S, S) what each value enters each output with
    mix = weights if truth.gain is None else weights * truth.gain
    if truth.rest is not None:
        member = truth.member.double()
        if key_mask is not None:
            member = member * key_mask[:, None, None]
        mix = mix + truth.rest @ (member / member.sum(-1, keepdim=True).clamp_min(1))
    out = mix @ values
    empty = (total == 0)[..., 0]
    found = {"out": out.detach(), "lse": lse.detach().masked_fill(empty, -torch.inf)}
    terms = {"out": _size(mix, values), "lse": max(lse.numel(), 1) ** 0.5}
    if pulls is not None:
        d_out, d_lse = (x.double() for x in pulls)
        pulled = (out * d_out).sum() + (lse * d_lse.masked_fill(empty, 0)).sum()
        grads = torch.autograd.grad(pulled, leaves)
        found |= dict(zip(("dq", "dk", "dv", "dbias"), grads))
        terms |= _gradient_terms(weights, mix, queries, keys, values, out, d_out, d_lse, scale)
    largest = (scale * (queries.abs() @ keys.abs().mT)).abs().detach()
    largest = largest.masked_fill(~mask, 0)
    return Answer(found, terms, largest.max().item() if largest.numel() else 0.0)


def _size(left: Tensor, right: Tensor) -> float:
    """Root of the sum of squared terms of a product: what its rounding errors are relative to."""
    return (left.detach().square() @ right.detach().square()).sum().sqrt().item()


def _gradient_terms(weights, mix, q, k, v, out, d_out, d_lse, scale) -> dict[str, float]:
    """As ``Answer.terms``, of the gradients."""
    pulled = d_out.square() @ v.detach().square().mT
    lost = (out.detach() * d_out).square().sum(-1) + d_lse.square()
    change = scale * (weights.detach().square() * (pulled + lost[..., None])).sqrt()
    sizes = {"dq": _size(change, k), "dk": _size(change.mT, q), "dv": _size(mix.mT, d_out)}
    return sizes | {"dbias": (change / scale).nan_to_num(0).norm().item()}


def off_by(name: str, actual: Tensor, answer: Answer, tolerance: float) -> str | None:
    """What is wrong with a result, None where it is as near to the answer as it has to be.

    The error is relative to the answer or, where its terms cancel, to them; rounding of large
    scores is let through.
    """
    expected, given = answer.values[name], actual.double()
    if given.shape != expected.shape:
        return f"{tuple(given.shape)} in place of {tuple(expected.shape)}"
    infinite = expected.isinf()
    if not torch.equal(given.isinf(), infinite) or given.isnan().any():
        return f"{int(given.isnan().sum())} NaN, {int(given.isinf().sum())} infinite"
    error = (given - expected).masked_fill(infinite, 0).norm().item()
    size = max(expected.masked_fill(infinite, 0).norm().item(), answer.terms[name])
    allowed = tolerance + ROUNDINGS * FLOAT32 * answer.largest_score
    if error > allowed * size + 1e-30:
        return f"relative error {error / max(size, 1e-30):.2e}, allowed {allowed:.2e}"
    return None
