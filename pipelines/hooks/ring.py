"""Who attends with which queries, where each process of a ring has those of the whole sequence.

Query blocks are dealt in turn, so that the processes have equally much to do and no block is
computed twice. Outputs then go to the process whose tokens they are of.

Letters: B batch, H heads, S tokens, D head dim; w processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from vidattn.grid import Layout
from vidattn.pipelines.hooks.exchange import exchange
from vidattn.pipelines.sequence import Call
from vidattn.plan import AnyPlan


class Ring:
    """The processes that share the queries of one call.

    Args:
        rank: the number of this one.
        lengths: (w,) tokens of each process.
        order: (S,) int64, where each token of the usual order stands when those of all processes
            are joined; None for in that order.
    """

    def __init__(
        self, rank: int, lengths: Sequence[int], order: Tensor | None, group: ProcessGroup, device
    ):
        self.rank, self.num, self.group = rank, len(lengths), group
        self._joined_home = torch.arange(self.num).repeat_interleave(torch.tensor(lengths))
        self._joined_home = self._joined_home.to(device)
        self._order = order
        # (S,) int64, whose each token is, in the usual order
        self.home = self._joined_home if order is None else self._joined_home[order]
        self._owner = self.home[None, None]

    def deal(self, owner: Tensor) -> bool:
        """Let ``owner``, (B|1, H|1, S) int64, say who attends with what; False if others disagree.

        Plans that are read from content may differ where a device adds up in any order. Then, and
        without a call of this, everybody attends with the queries of its own tokens.
        """
        places = torch.arange(1, owner.numel() + 1, device=owner.device)
        mine = ((owner.flatten() + 1) * places**3).sum().view(1)
        every = [torch.empty_like(mine) for _ in range(self.num)]
        dist.all_gather(every, mine, group=self.group)
        if (torch.cat(every) != mine).any():
            return False
        self._owner = owner
        return True

    def share(self, plan: AnyPlan, call: Call) -> AnyPlan:
        """What this process attends to of the plan of a call."""
        if self.deal(call.from_grid(owners(plan, self.num))):
            return plan.of_queries(lambda layout: turns(layout, self.num) == self.rank)
        mine = call.to_grid((self.home == self.rank)[None, None])[0, 0]
        return plan.of_queries(lambda layout: mine)

    def give_back(self, out: Tensor) -> Tensor:
        """(B, H, s, D) outputs of this process's tokens, for (B, H, S, D) with those it made."""
        owner, home, (batch, heads, _, dim) = self._owner, self._joined_home, out.shape
        if self._order is not None:
            joined = self._order.argsort()
            out, owner = out[:, :, joined], owner[..., joined]
        if owner.shape[:2] == (1, 1):
            out, owner = out.reshape(batch * heads, -1, dim), owner.flatten()
        else:
            owner = owner.expand(batch, heads, -1).flatten()
            out, home = out.reshape(1, -1, dim), home.repeat(batch * heads)
        made = (owner == self.rank).nonzero()[:, 0]
        made = made[home[made].argsort(stable=True)]
        makers = owner[home == self.rank]
        pieces = out[:, made].split(self._counts(home[made]), dim=1)
        shapes = [(out.shape[0], num, dim) for num in self._counts(makers)]
        found = torch.cat(exchange(pieces, shapes, self.group), dim=1)
        return found[:, makers.argsort(stable=True).argsort()].view(batch, heads, -1, dim)

    def _counts(self, processes: Tensor) -> list[int]:
        return torch.bincount(processes, minlength=self.num).tolist()


def turns(layout: Layout, num: int) -> Tensor:
    """(S,) int64, who attends with each query where blocks are dealt in turn."""
    return layout.slot_of_token // layout.block % num


def owners(plan: AnyPlan, num: int) -> Tensor:
    """(B|1, H|1, S) int64, who attends with each query of each head."""
    found = []
    for part, _, heads in plan.parts():
        rows = 1 if isinstance(heads, slice) else len(heads)
        shape = (rows, 1, -1) if plan.by_sample else (1, rows, -1)
        found.append(turns(part.layout, num).expand(shape))
    return plan.put_back(found)
