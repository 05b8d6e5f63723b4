"""A plan for each group of heads, where one layout does not suit them all.

Letters: B batch, H heads, S tokens, R rows, the heads of one sample or of all samples in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from vidattn.grid import Grid
from vidattn.plan import Plan


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """Plans of one grid, and which of them each head follows.

    A plan with lists per head holds one for each of the heads that follow it, in their order. Where
    samples differ too, ``plan_of_head`` has a row for each, and to a plan every head of a sample
    that follows it is a sample of one head.

    Args:
        plans: for one grid.
        plan_of_head: (H,) or (B, H) int64, index into ``plans``; every plan has a head.
        memory: as in ``Plan``.

    Raises:
        ValueError: no plans, plans of several grids, or heads that do not match them.
    """

    plans: tuple[Plan, ...]
    plan_of_head: Tensor
    memory: tuple[Tensor, ...] = ()
    # for each plan the (h,) int64 heads that follow it, as rows b * H + h by sample
    heads: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self):
        if len({plan.grid for plan in self.plans}) != 1:
            grids = [str(plan.grid) for plan in self.plans]
            raise ValueError(f"the plans of the heads must be for one grid, got {grids}")
        counts = torch.bincount(self.plan_of_head.flatten(), minlength=len(self.plans)).tolist()
        wanted = [plan.lists.heads for plan in self.plans]
        if self.by_sample:
            if any(heads > 1 for heads in wanted):
                raise ValueError(
                    "where samples have plans of their own, a plan must have one list for all "
                    "heads that follow it, or one for each as a sample of one head"
                )
            wanted = [plan.lists.batch for plan in self.plans]
        if len(counts) != len(wanted) or not all(
            count and want in (1, count) for count, want in zip(counts, wanted)
        ):
            raise ValueError(
                f"{len(wanted)} plans for {wanted} heads (1 fits any number) do not match the "
                f"heads that follow each: {counts}"
            )
        heads = self.plan_of_head.flatten().argsort(stable=True).split(counts)
        object.__setattr__(self, "heads", tuple(heads))

    @property
    def grid(self) -> Grid:
        """What the plans are for."""
        return self.plans[0].grid

    @property
    def by_sample(self) -> bool:
        """Whether every sample has plans of its own."""
        return self.plan_of_head.dim() == 2

    @property
    def num_heads(self) -> int:
        """H."""
        return self.plan_of_head.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.plans[0].device

    @property
    def is_dense(self) -> bool:
        """Whether every token reads every token in every head."""
        return all(plan.is_dense for plan in self.plans)

    @property
    def density(self) -> float:
        """Kept pairs over all pairs of video tokens, mean over the heads."""
        return self._mean("density")

    @property
    def visited_density(self) -> float:
        """Pairs in visited blocks over all pairs of video tokens, mean over the heads."""
        return self._mean("visited_density")

    def _mean(self, what: str) -> float:
        total = sum(getattr(plan, what) * len(heads) for plan, heads in zip(self.plans, self.heads))
        return total / self.plan_of_head.numel()

    def mask(self) -> Tensor:
        """(B|1, H, S, S) bool in sequence order, query by key; for tests and pictures."""
        masks = [plan.mask() for plan in self.plans]
        if self.by_sample:
            masks = [mask.transpose(0, 1) for mask in masks]
        batch = max(mask.shape[0] for mask in masks)
        whole = masks[0].new_empty(batch, self.plan_of_head.numel(), *masks[0].shape[2:])
        for mask, heads in zip(masks, self.heads):
            whole[:, heads] = mask
        return whole.view(-1, self.num_heads, *whole.shape[2:])

    def of_head(self, head: int) -> tuple[Plan, int]:
        """The plan that a head of the first sample follows, and its number among those that do.

        Raises:
            ValueError: no such head.
        """
        if not 0 <= head < self.num_heads:
            raise ValueError(f"head must be from 0 to {self.num_heads - 1}, got {head}")
        index = int(self.plan_of_head.flatten()[head])
        return self.plans[index], int((self.heads[index] < head).sum())

    def summary(self) -> dict[str, float | int]:
        """Figures worth printing: densities, blocks and memory."""
        parts = [plan.summary() for plan in self.plans]
        sums = ("num_blocks", "num_partial_blocks", "memory_mib")
        figures = {"num_tokens": self.grid.num_tokens, "num_plans": len(parts)}
        figures |= {"density": self.density, "visited_density": self.visited_density}
        return figures | {name: sum(part[name] for part in parts) for name in sums}

    def with_precision(self, precision: str | None) -> HeadPlan:
        """The same plans, executed in another precision (see ``Plan.with_precision``)."""
        plans = tuple(plan.with_precision(precision) for plan in self.plans)
        return replace(self, plans=plans)

    def to(self, device: torch.device | str) -> HeadPlan:
        """The same plans with their tensors on ``device``: these, or copies that are made once."""
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        if device not in self._copies:
            plans = tuple(plan.to(device) for plan in self.plans)
            memory = tuple(x.to(device) for x in self.memory)
            self._copies[device] = HeadPlan(plans, self.plan_of_head.to(device), memory)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, HeadPlan]:
        return {}

    def of_heads(self, heads: Sequence[int]) -> HeadPlan:
        """The plans of some heads, in ascending order, numbered anew."""
        if self.by_sample:
            samples = range(len(self.plan_of_head))
            rows = tuple(_of_one(self, sample, head) for sample in samples for head in heads)
            table = torch.arange(len(rows), device=self.device).view(len(samples), -1)
            return HeadPlan(rows, table)
        parts, numbers = [], []
        for plan, mine in zip(self.plans, self.heads):
            rank = {head: i for i, head in enumerate(mine.tolist())}
            if chosen := [head for head in heads if head in rank]:
                parts.append(select_heads(plan, [rank[head] for head in chosen]))
                numbers.append([heads.index(head) for head in chosen])
        return join(parts, numbers)


def select_heads(plan: Plan | HeadPlan, heads: Sequence[int]) -> Plan | HeadPlan:
    """The plan of some heads, in ascending order, numbered anew.

    Raises:
        ValueError: a head that the plan does not have.
    """
    total = plan.num_heads if isinstance(plan, HeadPlan) else plan.lists.heads
    if total > 1 and max(heads) >= total:
        raise ValueError(f"the plan is for {total} heads, got head {max(heads)}")
    if isinstance(plan, HeadPlan):
        return plan.of_heads(heads)
    if total == 1 and plan.gain is None and plan.rest is None:
        return plan
    index = torch.tensor(heads, device=plan.device)
    lists = plan.lists if total == 1 else plan.lists.of_heads(index)
    gain, rest = (
        x if x is None or x.shape[1] == 1 else x[:, index] for x in (plan.gain, plan.rest)
    )
    return replace(plan, lists=lists, gain=gain, rest=rest)


def join(plans: Sequence[Plan | HeadPlan], heads: Sequence[Sequence[int]]) -> HeadPlan:
    """One plan for all heads from the plans of groups of them.

    Args:
        heads: for each plan the heads that follow it, in ascending order; together 0, 1, ...

    Raises:
        ValueError: plans of several grids, or heads that do not match them.
    """
    by_sample = [x for x in plans if isinstance(x, HeadPlan) and x.by_sample]
    if by_sample:
        return _join_by_sample(plans, heads, len(by_sample[0].plan_of_head))
    flat: list[tuple[Plan, Sequence[int]]] = []
    for plan, mine in zip(plans, heads):
        if isinstance(plan, HeadPlan):
            groups = [[mine[i] for i in group.tolist()] for group in plan.heads]
            flat += zip(plan.plans, groups)
        else:
            flat.append((plan, mine))
    plan_of_head = torch.empty(sum(len(mine) for _, mine in flat), dtype=torch.long)
    for i, (_, mine) in enumerate(flat):
        plan_of_head[list(mine)] = i
    return HeadPlan(tuple(plan for plan, _ in flat), plan_of_head.to(plans[0].device))


def _join_by_sample(
    plans: Sequence[Plan | HeadPlan], heads: Sequence[Sequence[int]], num_samples: int
) -> HeadPlan:
    """One plan for all heads of all samples, which go by plans of their own."""
    parts: list[Plan] = []
    table = torch.empty(num_samples, sum(map(len, heads)), dtype=torch.long)
    for plan, mine in zip(plans, heads):
        for sample in range(num_samples):
            for i, head in enumerate(mine):
                table[sample, head] = len(parts)
                parts.append(_of_one(plan, sample, i))
    return HeadPlan(tuple(parts), table.to(plans[0].device))


def _of_one(plan: Plan | HeadPlan, sample: int, head: int) -> Plan:
    """The plan that one head of one sample follows, with one list."""
    if isinstance(plan, HeadPlan) and plan.by_sample:
        index, row = int(plan.plan_of_head[sample, head]), sample * plan.num_heads + head
        # each head is a sample of this plan
        sample, plan = int((plan.heads[index] < row).sum()), plan.plans[index]
        head = 0
    elif isinstance(plan, HeadPlan):
        plan, head = plan.of_head(head)
    plan = select_heads(plan, [head])
    lists = plan.lists
    if lists.batch > 1:
        lists = lists.of_heads(torch.zeros(1, dtype=torch.long, device=plan.device), sample)
    gain, rest = (
        x if x is None or len(x) == 1 else x[sample, None] for x in (plan.gain, plan.rest)
    )
    return replace(plan, lists=lists, gain=gain, rest=rest)
