"""What each of several processes sends and reads in one attention call, without making it.

A sequence is spread over ``ring`` groups of ``ulysses`` processes, in turn. Letters: S tokens, H
heads, D head dim; w processes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vidattn.pipelines.hooks.ring import turns
from vidattn.plan import AnyPlan, Plan


def shares(total: int, num: int) -> list[int]:
    """Tokens of each of some processes: the first ones have one more where it does not come out."""
    return [total // num + (i < total % num) for i in range(num)]


def heads_of(num_heads: int, ulysses: int) -> list[int]:
    """Heads of each process of a group: equally many, but for the last ones."""
    each = -(-num_heads // ulysses)
    return [min(each, max(0, num_heads - i * each)) for i in range(ulysses)]


def bytes_sent(
    lengths: Sequence[int],
    ulysses: int,
    *,
    num_heads: int,
    head_dim: int,
    itemsize: int,
    owner: Tensor | None = None,
) -> list[int]:
    """Bytes that each process sends to others in the forward pass of one attention call.

    Args:
        lengths: (w,) tokens of each process.
        ulysses: processes that exchange heads for tokens; the others of a group are its ring.
        num_heads: of queries, keys and values.
        owner: (S,) int64, which group attends with each query; None for its own.
    """
    heads, ring, sent = heads_of(num_heads, ulysses), len(lengths) // ulysses, []
    groups = torch.arange(ring).repeat_interleave(torch.tensor(lengths).view(ring, -1).sum(1))
    owner = groups if owner is None else owner
    for process, length in enumerate(lengths):
        group, rank = divmod(process, ulysses)
        near = sum(lengths[group * ulysses : (group + 1) * ulysses])
        # q, k and v of the heads of others, then the output of the tokens of others
        values = 3 * length * (num_heads - heads[rank]) + (near - length) * heads[rank]
        # q, k and v to all others of the ring, then the outputs of their queries
        leaving = int(((owner == group) & (groups != group)).sum())
        values += (3 * (ring - 1) * near + leaving) * heads[rank]
        sent.append(values * head_dim * itemsize)
    return sent


def visited_pairs(plan: AnyPlan, num_samples: int, num_heads: int) -> int:
    """Pairs of slots in the blocks that an engine visits, over samples and heads."""
    total = 0
    for part, _, heads in plan.parts():
        lists = part.lists
        if isinstance(heads, slice):
            rows = num_samples * num_heads
        else:
            # where samples have plans of their own, all that follow one are counted in ``heads``
            rows = heads.numel() * (1 if plan.by_sample else num_samples)
        blocks = lists.key_block.numel() * lists.block**2
        total += blocks * rows // (lists.batch * lists.heads)
    return total


def pairs_of_ranks(plan: Plan, ring: int, ulysses: int, num_heads: int) -> list[int]:
    """``visited_pairs`` of each process, of a plan that all heads share."""
    dealt = [plan.of_queries(lambda x, i=i: turns(x, ring) == i) for i in range(ring)]
    return [visited_pairs(mine, 1, n) for mine in dealt for n in heads_of(num_heads, ulysses)]


def balance(counts: Sequence[float]) -> float:
    """The largest over the mean: 1 where all are equal."""
    return max(counts) * len(counts) / sum(counts)
