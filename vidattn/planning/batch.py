"""One plan for a batch, from the plans of its samples.

Letters: B batch, H heads, R rows, the heads of all samples in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from vidattn.grid import Layout
from vidattn.head_plan import HeadPlan
from vidattn.kernels.block_lists import BlockLists
from vidattn.plan import AnyPlan, Plan


def stack(plans: Sequence[AnyPlan], num_heads: int) -> AnyPlan:
    """The plan in which every sample of a batch follows its own.

    Args:
        plans: one for each sample, of ``num_heads`` heads, in the order of the samples.
    """
    first = plans[0]
    if len(plans) == 1:
        return first
    whole = [part for plan in plans for part, *_ in plan.parts() if part is plan]
    if len(whole) == len(plans) and all(_goes_with(plan, whole[0]) for plan in whole):
        return _together(whole)
    groups: list[tuple[list[Plan], list[int]]] = []
    for sample, plan in enumerate(plans):
        for part, heads in _by_head(plan, num_heads):
            rows = [sample * num_heads + head for head in heads]
            # rows of a plan stand in ascending order
            fits = (x for x in groups if _goes_with(part, x[0][0]) and x[1][-1] < rows[0])
            alike, of_alike = next(fits, ([], []))
            if not alike:
                groups.append((alike, of_alike))
            alike.append(part)
            of_alike += rows
    plan_of_row = torch.empty(len(plans) * num_heads, dtype=torch.long)
    for number, (_, rows) in enumerate(groups):
        plan_of_row[rows] = number
    found = tuple(_together(alike) for alike, _ in groups)
    return HeadPlan(found, plan_of_row.view(-1, num_heads).to(first.device))


def _by_head(plan: AnyPlan, num_heads: int) -> Iterator[tuple[Plan, list[int]]]:
    """The plans of one sample with the heads that follow them, which are samples of these plans."""
    every = torch.arange(num_heads, device=plan.device)
    for part, _, index in plan.parts():
        heads = every[index].flatten().tolist()
        lists, count = part.lists, len(heads)
        if lists.heads != count:
            lists = lists.of_heads(torch.zeros(count, dtype=torch.long, device=part.device))
        gain, rest = (
            None if x is None else x.expand(1, count, *x.shape[2:]).transpose(0, 1)
            for x in (part.gain, part.rest)
        )
        lists = replace(lists, batch=count, heads=1)
        yield replace(part, lists=lists, gain=gain, rest=rest), heads


def _goes_with(plan: Plan, other: Plan) -> bool:
    """Whether two plans can be lists of one."""
    shapes = ((x.lists.heads, x.gain is None, x.rest is None) for x in (plan, other))
    return len(set(shapes)) == 1 and _is_same(plan.layout, other.layout)


def _is_same(a: Layout, b: Layout) -> bool:
    if a.order is b.order:
        return a.block == b.block
    alike = (a.block, a.num_video_blocks, a.order.shape) == (
        b.block,
        b.num_video_blocks,
        b.order.shape,
    )
    return alike and torch.equal(a.order, b.order)


def _together(plans: Sequence[Plan]) -> Plan:
    """Plans that go with each other as the samples of one."""
    first = plans[0]
    if len(plans) == 1:
        return first
    gain = None if first.gain is None else torch.cat([plan.gain for plan in plans])
    rest = None if first.rest is None else torch.cat([plan.rest for plan in plans])
    lists = BlockLists.stack([plan.lists for plan in plans])
    return replace(first, lists=lists, gain=gain, rest=rest)
