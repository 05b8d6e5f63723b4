"""A plan for each group of heads, where one layout does not suit them all.

Letters: B batch, H heads, S tokens, R rows, the heads of one sample or of all samples in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vidattn.grid import Grid
from vidattn.plan import AnyPlan, Index, Plan


@dataclass(frozen=True, eq=False)
class HeadPlan(AnyPlan):
    """Plans of one grid, and which of them each head follows.

    A plan with lists per head holds one for each of the heads that follow it, in their order. Where
    samples differ too, ``plan_of_head`` has a row for each, and to a plan every head of a sample
    that follows it is a sample of one head.

    Args:
        plans: for one grid.
        plan_of_head: (H,) or (B, H) int64, index into ``plans``; every plan has a head.

    Raises:
        ValueError: no plans, plans of several grids, or heads that do not match them.
    """

    plans: tuple[Plan, ...]
    plan_of_head: Tensor
    # for each plan the (h,) int64 heads that follow it, as rows b * H + h by sample
    heads: tuple[Tensor, ...] = field(init=False)
    grid: Grid = field(init=False)
    is_dense: bool = field(init=False)
    by_sample: bool = field(init=False)

    def __post_init__(self):
        if len({(plan.grid, plan.key_grid) for plan in self.plans}) != 1:
            grids = [str(plan.grid) for plan in self.plans]
            grids += [f"keys of {plan.key_grid}" for plan in self.plans if plan.keys is not None]
            raise ValueError(f"the plans of the heads must be for one grid, got {grids}")
        by_sample = self.plan_of_head.dim() == 2
        counts = torch.bincount(self.plan_of_head.flatten(), minlength=len(self.plans)).tolist()
        wanted = [plan.num_heads for plan in self.plans]
        if by_sample:
            if any(heads > 1 for heads in wanted):
                raise ValueError(
                    "where samples have plans of their own, a plan must have one list for all "
                    "heads that follow it, or one for each as a sample of one head"
                )
            wanted = [plan.num_samples for plan in self.plans]
        if len(counts) != len(wanted) or not all(
            count and want in (1, count) for count, want in zip(counts, wanted)
        ):
            raise ValueError(
                f"{len(wanted)} plans for {wanted} heads (1 fits any number) do not match the "
                f"heads that follow each: {counts}"
            )
        heads = self.plan_of_head.flatten().argsort(stable=True).split(counts)
        object.__setattr__(self, "heads", tuple(heads))
        object.__setattr__(self, "grid", self.plans[0].grid)
        object.__setattr__(self, "is_dense", all(plan.is_dense for plan in self.plans))
        object.__setattr__(self, "by_sample", by_sample)

    @classmethod
    def join(cls, plans: Sequence[AnyPlan], heads: Sequence[Sequence[int]]) -> HeadPlan:
        """One plan for all heads from the plans of groups of them.

        Args:
            heads: for each plan the heads that follow it, in ascending order; together 0, 1, ...

        Raises:
            ValueError: plans of several grids, or heads that do not match them.
        """
        total, device = sum(map(len, heads)), plans[0].device
        parts: list[Plan] = []
        if any(plan.by_sample for plan in plans):
            samples = range(max(plan.num_samples for plan in plans))
            table = torch.empty(len(samples), total, dtype=torch.long)
            for plan, mine in zip(plans, heads):
                for sample in samples:
                    for i, head in enumerate(mine):
                        table[sample, head] = len(parts)
                        parts.append(plan.of_row(sample, i))
            return cls(tuple(parts), table.to(device))
        plan_of_head = torch.empty(total, dtype=torch.long, device=device)
        for plan, mine in zip(plans, heads):
            for part, _, group in plan.parts():
                plan_of_head[torch.tensor(mine, device=device)[group]] = len(parts)
                parts.append(part)
        return cls(tuple(parts), plan_of_head)

    @property
    def key_grid(self) -> Grid:
        return self.plans[0].key_grid

    @property
    def device(self) -> torch.device:
        return self.plans[0].device

    @property
    def num_samples(self) -> int:
        if self.by_sample:
            return len(self.plan_of_head)
        return max(plan.num_samples for plan in self.plans)

    @property
    def num_heads(self) -> int:
        return self.plan_of_head.shape[-1]

    @property
    def density(self) -> float:
        return self._mean([plan.density for plan in self.plans])

    def density_of(self, queries: Tensor) -> float:
        return self._mean([plan.density_of(queries) for plan in self.plans])

    @property
    def visited_density(self) -> float:
        return self._mean([plan.visited_density for plan in self.plans])

    def _mean(self, of_plans: Sequence[float]) -> float:
        total = sum(x * len(heads) for x, heads in zip(of_plans, self.heads))
        return total / self.plan_of_head.numel()

    def parts(self) -> list[tuple[Plan, Index, Index]]:
        if not self.by_sample:
            return [(plan, slice(None), heads) for plan, heads in zip(self.plans, self.heads)]
        rows = [rows[:, None] for rows in self.heads]
        num_heads = self.num_heads
        return [(plan, x // num_heads, x % num_heads) for plan, x in zip(self.plans, rows)]

    def put_back(self, found: Sequence[Tensor]) -> Tensor:
        # the heads stand in the order of the plans
        back = torch.cat(self.heads).argsort()
        if not self.by_sample:
            return torch.cat(tuple(found), dim=1)[:, back]
        return torch.cat(tuple(found))[back].view(-1, self.num_heads, *found[0].shape[2:])

    def check_counts(self, num_samples: int, num_heads: int) -> None:
        if self.num_heads != num_heads:
            raise ValueError(f"the plan is for {self.num_heads} heads, q has {num_heads}")
        if self.by_sample and self.num_samples != num_samples:
            raise ValueError(f"the plan is for {self.num_samples} samples, q has {num_samples}")
        if not self.by_sample:
            for plan, heads in zip(self.plans, self.heads):
                plan.check_counts(num_samples, len(heads))

    def mask(self) -> Tensor:
        masks = []
        for plan, heads in zip(self.plans, self.heads):
            shape = (len(heads), 1) if self.by_sample else (self.num_samples, len(heads))
            masks.append(plan.mask().expand(*shape, -1, -1))
        return self.put_back(masks)

    def of_head(self, head: int) -> tuple[Plan, int]:
        """The plan that a head of the first sample follows, and its number among those that do.

        Raises:
            ValueError: no such head.
        """
        if not 0 <= head < self.num_heads:
            raise ValueError(f"head must be from 0 to {self.num_heads - 1}, got {head}")
        index = int(self.plan_of_head.flatten()[head])
        return self.plans[index], int((self.heads[index] < head).sum())

    def of_row(self, sample: int, head: int) -> Plan:
        if not self.by_sample:
            plan, head = self.of_head(head)
            return plan.of_row(sample, head)
        index, row = int(self.plan_of_head[sample, head]), sample * self.num_heads + head
        # each head is a sample of this plan
        return self.plans[index].of_row(int((self.heads[index] < row).sum()), 0)

    def summary(self) -> dict[str, float | int | str]:
        parts = [plan.summary() for plan in self.plans]
        sums = ("num_blocks", "num_partial_blocks", "memory_mib")
        figures = {name: parts[0][name] for name in ("num_tokens", "num_keys") if name in parts[0]}
        figures["num_plans"] = len(parts)
        figures |= {"density": self.density, "visited_density": self.visited_density}
        return figures | {name: sum(part[name] for part in parts) for name in sums}

    def _each(self, change: Callable[[Plan], Plan]) -> HeadPlan:
        plans = tuple(map(change, self.plans))
        return self if plans == self.plans else replace(self, plans=plans)

    def _of_heads(self, heads: Sequence[int]) -> HeadPlan:
        if self.by_sample:
            samples = range(self.num_samples)
            rows = tuple(self.of_row(sample, head) for sample in samples for head in heads)
            table = torch.arange(len(rows), device=self.device).view(len(samples), -1)
            return HeadPlan(rows, table)
        parts, numbers = [], []
        for plan, mine in zip(self.plans, self.heads):
            rank = {head: i for i, head in enumerate(mine.tolist())}
            if chosen := [head for head in heads if head in rank]:
                parts.append(plan.select_heads([rank[head] for head in chosen]))
                numbers.append([heads.index(head) for head in chosen])
        return HeadPlan.join(parts, numbers)

    def _copy_on(self, device: torch.device) -> HeadPlan:
        plans = tuple(plan.to(device) for plan in self.plans)
        return HeadPlan(plans, self.plan_of_head.to(device))
