"""One generation with one method: the frames, and where the time went.

Letters: F frames, C channels, H height, W width.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.commands.choice import Choice
from vidattn.commands.request import Request
from vidattn.measure import synchronize
from vidattn.pipelines.patch import patch
from vidattn.pipelines.report import Report


@dataclass(frozen=True)
class Guards:
    """Layers and steps that stay dense."""

    dense_layers: int | float = 1
    dense_steps: int | float = 0.1


@dataclass(frozen=True, eq=False)
class Clip:
    """What one generation gave: (F, 3, H, W) frames in [0, 1], its times, and its report."""

    frames: Tensor
    steps_ms: list[float]
    total_ms: float
    report: Report

    @property
    def step_ms(self) -> float:
        """Median time of a denoising step."""
        return statistics.median(self.steps_ms)

    def timing(self) -> dict[str, object]:
        """The times as plain types."""
        return {
            "step_ms_median": round(self.step_ms, 3),
            "steps_ms": [round(x, 3) for x in self.steps_ms],
            "total_ms": round(self.total_ms, 3),
        }


def make_clip(pipe: object, request: Request, choice: Choice, guards: Guards) -> Clip:
    """Run a pipeline with a method, on latents that depend on the seed only.

    Raises:
        FloatingPointError: the latents turned NaN; the step is named.
        ValueError: the pipeline, or the method, cannot do what is asked.
    """
    pipe.set_progress_bar_config(desc=choice.label)
    arguments = request.arguments()
    if request.image is not None:
        from diffusers.utils import load_image

        arguments["image"] = load_image(str(request.image))
    arguments["generator"] = torch.Generator("cpu").manual_seed(request.seed)
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        arguments["output_type"] = "pt"
    with (
        patch(
            pipe,
            choice.name,
            dense_layers=guards.dense_layers,
            dense_steps=guards.dense_steps,
            **choice.options,
        ) as handle,
        step_times(pipe) as marks,
    ):
        synchronize()
        begin = time.perf_counter()
        frames = pipe(**arguments).frames[0]
        synchronize()
        total_ms = 1e3 * (time.perf_counter() - begin)
        report = handle.report()
    steps_ms = [1e3 * (stop - start) for start, stop in zip(marks, marks[1:])] or [total_ms]
    frames = frames.detach().float().cpu()
    if not bool(torch.isfinite(frames).all()):
        raise FloatingPointError(
            f"the decoded frames of {choice.label} hold NaN or infinity although the latents did "
            "not: the VAE overflows in this dtype; try --dtype float32"
        )
    return Clip(frames.clamp(0, 1), steps_ms, total_ms, report)


@contextmanager
def step_times(pipe: object) -> Iterator[list[float]]:
    """The moments at which the scheduler was set and at which each of its steps ended."""
    marks: list[float] = []
    scheduler = pipe.scheduler
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    def marked_set(*args, **kwargs):
        out = set_timesteps(*args, **kwargs)
        synchronize()
        marks[:] = [time.perf_counter()]
        return out

    def marked_step(*args, **kwargs):
        out = step(*args, **kwargs)
        synchronize()
        marks.append(time.perf_counter())
        return out

    # pipelines ask for the signatures of both
    marked_set.__signature__ = inspect.signature(set_timesteps)
    marked_step.__signature__ = inspect.signature(step)
    scheduler.set_timesteps, scheduler.step = marked_set, marked_step
    try:
        yield marks
    finally:
        del scheduler.set_timesteps, scheduler.step
