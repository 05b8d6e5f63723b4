"""What a patch was asked for, and what its transformers share."""

from __future__ import annotations

from functools import lru_cache

import torch

from vidattn.grid import Grid
from vidattn.pipelines.generation import Generations
from vidattn.pipelines.steps import Steps
from vidattn.plan import AnyPlan
from vidattn.schedule import Part, Schedule
from vidattn.support.registry import unknown

# "auto": the faster of PyTorch's and ours
DENSE_BACKENDS = ("auto", "pytorch")


class Settings:
    """Schedule, strictness, steps and generations of one patch, shared by its transformers.

    Raises:
        ValueError: an unknown backend of the dense calls, or a period of no frames.
    """

    def __init__(
        self,
        schedule: Schedule,
        strict: bool,
        dense_backend: str = "auto",
        repeats_after: float | None = None,
    ):
        if dense_backend not in DENSE_BACKENDS:
            raise unknown("dense_backend", dense_backend, DENSE_BACKENDS)
        self.schedule, self.strict = schedule, strict
        if repeats_after is not None and not repeats_after >= 2:
            raise ValueError(
                f"repeats_after must be at least 2 latent frames, got {repeats_after!r}"
            )
        self.repeats_after = repeats_after
        self.only_pytorch = dense_backend == "pytorch" or schedule.is_yardstick
        self.steps, self.generations = Steps(), Generations()
        # a generation has one grid, or one per length of text; training may have more
        self.fixed_plans = lru_cache(maxsize=64)(_no_plans)


def _no_plans(grid: Grid, device: torch.device) -> dict[tuple[Part, ...], AnyPlan]:
    """Where the plans go that do not depend on content."""
    return {}
