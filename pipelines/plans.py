"""Makes the plans of a transformer's layers, and keeps them for as long as they serve.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

import threading
from collections import defaultdict

import torch
from torch import Tensor

from vidattn.fidelity import recall
from vidattn.grid import Grid, sample
from vidattn.head_plan import HeadPlan, join, select_heads
from vidattn.pipelines.record import Pass, Searches
from vidattn.pipelines.sequence import Call
from vidattn.pipelines.settings import Settings
from vidattn.plan import Plan
from vidattn.schedule import Part

Parts = tuple[Part, ...]

# queries that tell how much attention a plan keeps: 0.2 % of dense attention at 32,768 tokens
NUM_SAMPLES = 8


class Plans:
    """The plans of one transformer."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self.reset()

    def reset(self) -> None:
        """Forget the plans that were read from content."""
        # plans that serve or start off later ones, with the step they were made at, by thread,
        # layer, turn, grid, heads and part
        self._kept: dict[tuple, tuple[int, Plan | HeadPlan]] = {}
        # by layer
        self.searches: dict[int, Searches] = defaultdict(Searches)

    def plan(
        self, parts: Parts, layer: int, current: Pass, call: Call, q: Tensor, k: Tensor
    ) -> Plan | HeadPlan:
        """The plan of a layer whose heads follow ``parts``.

        Args:
            q: (B, H, S, D) queries.
            k: (B, K, S, D) keys.
        """
        fixed = self._settings.fixed_plans(call.grid, q.device)
        if parts not in fixed:
            plans = [self._part(part, layer, current, call, q, k) for part in parts]
            plan = plans[0] if len(parts) == 1 else join(plans, [part.heads for part in parts])
            if any(part.method.reads_content for part in parts):
                return plan
            fixed[parts] = plan
        return fixed[parts]

    def _part(
        self, part: Part, layer: int, current: Pass, call: Call, q: Tensor, k: Tensor
    ) -> Plan | HeadPlan:
        method, grid = part.method, call.grid
        if not method.reads_content:
            return self._fixed_part(part, grid, q.device)
        step, num_steps = current.step, self._settings.steps.num_steps
        key = (threading.get_ident(), layer, current.turn, grid, q.shape[:2], part)
        made, last = self._kept.get(key, (step, None))
        last = last if made < step else None
        if last is not None and method.keeps(made, step, num_steps):
            return last
        keys = call.keys
        if part.heads is not None:
            heads, group = torch.tensor(part.heads, device=q.device), q.shape[1] // k.shape[1]
            q, k = q[:, heads], k[:, heads // group]
        if call.turn:
            q, k = (x.roll(-call.turn, 2) for x in (q, k))
            keys = None if keys is None else keys.roll(-call.turn, 1)
        with self._settings.watch.span(q.device), torch.no_grad():
            plan = method.plan(grid, q, k, scale=call.scale, key_mask=keys, last=last)
            plan = plan.to(q.device)
            some = grid.video_start + sample(grid.num_video_tokens, NUM_SAMPLES).to(q.device)
            kept = recall(q, k, plan, some, scale=call.scale, key_mask=keys)
            self.searches[layer].add(step, kept)
        if plan.memory or method.keeps(step, step + 1, num_steps):
            self._kept[key] = step, plan
        return plan

    def _fixed_part(self, part: Part, grid: Grid, device: torch.device) -> Plan | HeadPlan:
        """The plan of a method that does not read content, made once per grid and device."""
        fixed, whole = self._settings.fixed_plans(grid, device), (Part(part.method),)
        if whole not in fixed:
            with self._settings.watch.span(device), torch.no_grad():
                fixed[whole] = part.method.plan(grid).to(device)
        plan = fixed[whole]
        return plan if part.heads is None else select_heads(plan, part.heads)
