"""Attention with its operands rounded to integers, by the words of ``Plan.with_precision``.

Letters: B batch, H query heads, K key heads, S tokens, D head dim.
"""

from fuzzing.oracle import Answer, Truth, attention
from torch import Tensor

from vidattn.plan import AnyPlan, Plan

# A number on the edge of two integers may become either; the weights of a row, which stay exact
# here, are rounded to one of 127 parts, or of 15, of the largest near by.
ROUGHNESS = {"int8_qk": 2e-3, "int8": 1e-2, "int8_qk_int4_pv": 1e-1}
LEVELS = {"int8": 127, "int8_qk_int4_pv": 7}


def rounded_attention(
    q: Tensor, k: Tensor, v: Tensor, truth: Truth, scale: float, key_mask: Tensor | None,
    plan: AnyPlan, precision: str,
) -> Answer:  # fmt: skip
    """Attention of queries, keys and values that integers stand for; weights stay exact.

    Queries and keys have one scale to a block and head, keys after their mean is taken off; values
    one to a channel. The log-sum-exp is that of the scores with the mean put back.
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    mean = k.mean(2, keepdim=True)
    rough_q, rough_k = q.clone(), k.repeat_interleave(group, 1)
    off = (k - mean).repeat_interleave(group, 1)
    for b in range(q.shape[0]):
        for h, blocks in enumerate(_blocks_of_head(plan, b, q.shape[1])):
            for tokens in blocks:
                rough_q[b, h, tokens] = _rounded(q[b, h, tokens], 127, (0, 1))
                rough_k[b, h, tokens] = _rounded(off[b, h, tokens], 127, (0, 1))
    rough_v = v.repeat_interleave(group, 1)
    if precision in LEVELS:
        rough_v = _rounded(rough_v, LEVELS[precision], 2)
    answer = attention(rough_q, rough_k, rough_v, truth, scale, key_mask)
    back = (q * mean.repeat_interleave(group, 1)).sum(-1) * scale
    answer.values["lse"] = answer.values["lse"] + back * _flat(truth)
    return answer


def _flat(truth: Truth) -> Tensor | float:
    sharpness = truth.sharpness
    return sharpness[..., 0] if isinstance(sharpness, Tensor) else sharpness


def _blocks_of_head(plan: AnyPlan, b: int, heads: int) -> list[list[list[int]]]:
    """For every head the tokens of each block."""
    if isinstance(plan, Plan):
        return [_blocks(plan)] * heads
    table = plan.plan_of_head
    row = table[b] if table.dim() == 2 else table
    return [_blocks(plan.plans[number]) for number in row.tolist()]


def _blocks(plan: Plan) -> list[list[int]]:
    slots = plan.layout.order.view(-1, plan.layout.block).tolist()
    return [tokens for tokens in ([x for x in row if x >= 0] for row in slots) if tokens]


def _rounded(x: Tensor, levels: int, dim: int | tuple[int, ...]) -> Tensor:
    """Numbers as multiples of one part in so many of the largest along some axes."""
    if not x.numel():
        return x
    peak = x.abs().amax(dim, keepdim=True).clamp_min(1e-30)
    return (x * (levels / peak) + 0.5).floor() * peak / levels
