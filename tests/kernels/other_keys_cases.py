"""Plans in which the keys are other tokens than the queries, and keys that stand for several."""

import torch

from tests.kernels.attention_cases import striped
from vidattn.attention import attend
from vidattn.grid import Grid, tile_layout
from vidattn.kernels.block_lists import BlockLists
from vidattn.methods import create_method
from vidattn.plan import Plan

# queries of a chunk, and keys of a cache with text; ragged tiles on both sides
CHUNK, CACHE = Grid(2, 5, 7, text=3), Grid(5, 5, 7, text=6, text_first=True)
TILE = (1, 4, 4)


def dense(chunk=CHUNK, cache=CACHE) -> Plan:
    return Plan.dense(chunk, cache, block=32)


def blocks(chunk=CHUNK, cache=CACHE, *, batch=2, heads=4) -> Plan:
    """Another choice for every sample and head; one block of queries reads only text."""
    layout, keys = tile_layout(chunk, TILE), tile_layout(cache, TILE)
    table = torch.rand(batch, heads, layout.num_video_blocks, keys.num_video_blocks) < 0.4
    table[:, :, 1] = False
    return Plan.from_blocks(chunk, layout, table, keys=(cache, keys))


def rule(chunk=CHUNK, cache=CACHE) -> Plan:
    layout, keys = tile_layout(chunk, TILE), tile_layout(cache, (2, 4, 2))
    return Plan.from_rule(chunk, layout, striped, keys=(cache, keys))


def box(h=6, w=7) -> Plan:
    """A window of the last frames of a video: rows of its lists, of which one reads nothing."""
    grid, chunk = Grid(5, h, w), Grid(2, h, w)
    whole = create_method("neighborhood", window=(3, 3, 5), tile=TILE).plan(grid)
    lists = whole.lists
    first = 3 * lists.num_blocks // 5
    start = lists.row_start[first]
    order = lists.order[first * lists.block :]
    order = torch.where(order < 0, order, order - 3 * h * w)
    num_full, row_start = lists.num_full[first:].clone(), lists.row_start[first:] - start
    # the last row gives its blocks away
    row_start[-1], num_full[-1] = row_start[-2], 0
    end = start + row_start[-1]
    packed = lists.box
    queries = slice(first * lists.block, None)
    mine = BlockLists(
        order=order,
        block=lists.block,
        batch=1,
        heads=1,
        row_start=row_start,
        num_full=num_full,
        key_block=lists.key_block[start:end],
        box=type(packed)(packed.key, packed.low[queries], packed.high[queries], packed.guard),
        keys=lists.order,
    )
    layout = type(whole.layout)(order, lists.block, mine.num_blocks)
    return Plan(chunk, layout, mine, keys=(grid, whole.layout))


PLANS = {"dense": dense, "blocks": blocks, "rule": rule, "box": box}


def weights_of(plan: Plan, key_heads=2, *, batch=2) -> torch.Tensor:
    """(B, K, Sk) counts; a head of the cache holds little, and one nothing."""
    weights = torch.randint(0, 5, (batch, key_heads, plan.key_grid.num_tokens)).float()
    weights[0, 0, 9:] = 0
    weights[-1, -1] = 0
    return weights


def merging(backend: str, dtype, *, queries=37, keys=53, heads=4, key_heads=2, head_dim=64, **plan):
    """Output, log-sum-exp and gradients with equal keys, and with these merged, in pairs.

    Keys are equal in groups of 1 to 4, whose members stand anywhere in the sequence.
    """
    counts = torch.randint(1, 5, (2, key_heads, keys))
    counts[..., -1] += 4 * keys - counts.sum(-1)
    member = torch.stack(
        [
            torch.arange(keys).repeat_interleave(row)[torch.randperm(4 * keys)]
            for row in counts.flatten(0, 1)
        ]
    ).view(2, key_heads, -1, 1)
    q = torch.randn(2, heads, queries, head_dim).to(dtype)
    distinct = torch.randn(2, key_heads, keys, head_dim).to(dtype)
    values = torch.randn(2, key_heads, 4 * keys, head_dim).to(dtype)
    d_out, d_lse = torch.randn(q.shape), torch.randn(q.shape[:3])
    pairs = []
    for merged in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, distinct, values)]
        index = member.expand(-1, -1, -1, head_dim)
        if merged:
            sums = torch.zeros_like(distinct, dtype=torch.float64)
            sums = sums.scatter_add(2, index, leaves[2].double())
            k, v = leaves[1], (sums / counts[..., None]).to(dtype)
            weight = counts.float()
        else:
            k, v, weight = leaves[1].gather(2, index), leaves[2], None
        dense = Plan.dense(Grid(1, 1, queries), k.shape[2], **plan)
        given = {"key_weight": weight, "backend": backend}
        out, lse = attend(leaves[0], k, v, dense, return_lse=True, **given)
        pulled = (out * d_out).sum(dtype=torch.float64) + (lse * d_lse).sum()
        pairs.append([out.detach(), lse.detach(), *torch.autograd.grad(pulled, leaves)])
    return dict(zip(("out", "lse", "dq", "dk", "dv"), zip(*pairs)))
