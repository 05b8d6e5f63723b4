"""What a patch was asked for, and what its transformers share."""

from __future__ import annotations

from functools import lru_cache

import torch

from vidattn.grid import Grid
from vidattn.pipelines.generation import Generations
from vidattn.pipelines.steps import Steps
from vidattn.plan import AnyPlan
from vidattn.schedule import Part, Schedule


class Settings:
    """Schedule, strictness, steps and generations of one patch, shared by its transformers."""

    def __init__(self, schedule: Schedule, strict: bool):
        self.schedule, self.strict = schedule, strict
        self.steps, self.generations = Steps(), Generations()
        # a generation has one grid, or one per length of text; training may have more
        self.fixed_plans = lru_cache(maxsize=16)(_no_plans)


def _no_plans(grid: Grid, device: torch.device) -> dict[tuple[Part, ...], AnyPlan]:
    """Where the plans go that do not depend on content."""
    return {}
