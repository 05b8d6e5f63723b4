"""Makes the plans of a transformer's layers, and keeps them for as long as they serve.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vidattn.head_plan import HeadPlan
from vidattn.pipelines.passes import Pass, is_backward
from vidattn.pipelines.sequence import Call
from vidattn.pipelines.settings import Settings
from vidattn.plan import AnyPlan
from vidattn.planning.reading import Memory, Reading
from vidattn.planning.sampled import sample
from vidattn.quality.fidelity import recall
from vidattn.schedule import Part

Parts = tuple[Part, ...]

# queries that tell how much attention a plan keeps: 0.2 % of dense attention at 32,768 tokens
NUM_SAMPLES = 8


class Plans:
    """The plans of one transformer."""

    def __init__(self, transformer: str, settings: Settings):
        self._transformer, self._settings = transformer, settings

    def plan(
        self, parts: Parts, layer: int, current: Pass, call: Call, q: Tensor, k: Tensor
    ) -> AnyPlan:
        """The plan of a layer whose heads follow ``parts``.

        Args:
            parts: by the numbers that heads have in the model.
            q: (B, H, S, D) queries.
            k: (B, K, S, D) keys.

        Raises:
            RuntimeError: the call is run again, and what it followed is gone.
        """
        fixed = self._settings.fixed_plans(call.grid, q.device)
        what = parts, call.heads, call.asks_from
        if what in fixed:
            return fixed[what]
        reads_content = any(part.method.reads_content for part in parts)
        place = layer, current.take_call(layer) if reads_content else 0
        if is_backward() and place in current.made:
            return current.made[place]
        plans = [self._part(part, place, current, call, q, k) for part in parts]
        plan = plans[0]
        if len(parts) > 1:
            plan = HeadPlan.join(plans, [call.heads.here(part.heads) for part in parts])
        plan = call.of_turn(plan)
        if not reads_content:
            fixed[what] = plan
        elif current.has_backward:
            current.made[place] = plan
        return plan

    def _part(
        self, part: Part, place: tuple[int, int], current: Pass, call: Call, q: Tensor, k: Tensor
    ) -> AnyPlan:
        """The plan of some heads, kept from an earlier step or new."""
        method, run, step = part.method, current.run, current.step
        if not method.reads_content:
            return self._fixed_part(part, call, q.device)
        key = (self._transformer, place, current.key, call.grid, q.shape[:2], call.heads, part)
        if is_backward() and key in run.kept:
            raise RuntimeError(
                f"layer {place[0]} is run again for a backward pass, and the plan that it followed "
                "is gone: train without torch.compile, or with a method that does not remember "
                "earlier steps"
            )
        made, plan, last = run.kept.get(key, (step, None, ()))
        if made == step:
            last = ()
        elif method.keeps(made, step, run.num_steps):
            return plan
        plan, memory = self._search(part, place[0], current, call, q, k, last)
        serves_later = memory or method.keeps(step, step + 1, run.num_steps)
        if run.keeps(current.has_backward) and serves_later:
            run.kept[key] = step, plan, memory
        return plan

    def _search(
        self,
        part: Part,
        layer: int,
        current: Pass,
        call: Call,
        q: Tensor,
        k: Tensor,
        last: Memory,
    ) -> tuple[AnyPlan, Memory]:
        """A new plan from the content of a call, with what its method remembers."""
        grid = call.grid
        if part.heads is not None:
            mine = torch.tensor(call.heads.here(part.heads), device=q.device)
            q, k = q[:, mine], k[:, mine // (q.shape[1] // k.shape[1])]
        q, k = call.to_grid(q), call.to_grid(k)
        with current.generation.plan_time.span(q.device), planning(q.device):
            reading = Reading(q, k, call.scale, call.keys, last)
            plan, memory = part.method.plan_with_memory(grid, reading)
            plan = plan.to(q.device)
            some = grid.video_start + sample(grid.num_video_tokens, NUM_SAMPLES).to(q.device)
            kept = recall(q, k, plan, some, scale=call.scale, key_mask=call.keys)
        if not is_backward():
            current.diary.searches[layer].add(current.step, kept)
        return plan, memory

    def _fixed_part(self, part: Part, call: Call, device: torch.device) -> AnyPlan:
        """The plan of a method that does not read content, made once per grid and device."""
        fixed, what = self._settings.fixed_plans(call.grid, device), Part(part.method)
        if what not in fixed:
            with self._settings.generations.latest.plan_time.span(device), planning(device):
                fixed[what] = part.method.plan(call.grid).to(device)
        numbers = call.heads.numbers if part.heads is None else part.heads
        if part.heads is None and call.heads.are_all:
            return fixed[what]
        return fixed[what].select_heads(numbers)


@contextmanager
def planning(device: torch.device) -> Iterator[None]:
    """Make plans in their own dtypes and without gradients, in a with block."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
