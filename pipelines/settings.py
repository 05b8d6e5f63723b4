"""What a patch was asked for, and the plans it has made."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vidattn.grid import Grid
from vidattn.head_plan import HeadPlan
from vidattn.method import Method
from vidattn.methods.dense import Dense
from vidattn.pipelines.steps import StepCounter
from vidattn.pipelines.stopwatch import Stopwatch
from vidattn.plan import Plan
from vidattn.schedule import DenseGuard


class Settings:
    """Method, guards and steps of one patch, shared by its transformers."""

    def __init__(self, method: Method, guard: DenseGuard, strict: bool, steps: StepCounter):
        self.method, self.guard, self.strict, self.steps = method, guard, strict, steps
        self.is_dense = isinstance(method, Dense)
        self.watch = Stopwatch()
        # a generation has one grid, or one per length of text; training may have more
        self._fixed_plan = lru_cache(maxsize=16)(self._make_plan)

    def plan(
        self, method: Method, grid: Grid, q: Tensor, k: Tensor, **content: object
    ) -> Plan | HeadPlan:
        """The plan of a layer's method, made once per grid and device unless it reads content.

        Args:
            content: what else a method that reads content is told (see ``ContentMethod.plan``).
        """
        if not method.reads_content:
            return self._fixed_plan(method, grid, q.device)
        return self._make_plan(method, grid, q.device, q, k, **content)

    def _make_plan(
        self, method: Method, grid: Grid, device: torch.device, *qk: Tensor, **content: object
    ) -> Plan | HeadPlan:
        with self.watch.span(device), torch.no_grad():
            return method.plan(grid, *qk, **content).to(device)
