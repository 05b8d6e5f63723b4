"""One generation with one method: the frames, and where the time went.

Letters: F frames, C channels, H height, W width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidattn.guidance import Guide
from vidattn.kernels.timing import synchronize
from vidattn.pipelines.guiding import Guidance
from vidattn.pipelines.patch import patch
from vidattn.pipelines.report import Report
from vidattn.runs.choices import Served
from vidattn.runs.request import Request


@dataclass(frozen=True)
class Guards:
    """What ``patch`` is told beside the method; None for what the method or the schedule says."""

    dense_layers: int | float | None = None
    dense_steps: int | float | None = None
    dense_backend: str = "auto"
    repeats_after: float | None = None


@dataclass(frozen=True, eq=False)
class Clip:
    """What one generation gave.

    Args:
        frames: (F, 3, H, W) in [0, 1].
        steps_ms: time of each denoising step.
        peak_gib: the most GPU memory it held, None on a CPU.
    """

    frames: Tensor
    steps_ms: list[float]
    total_ms: float
    peak_gib: float | None
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
            "peak_gpu_gib": self.peak_gib and round(self.peak_gib, 3),
        }


def make_clip(
    pipe: object,
    request: Request,
    choice: Served,
    guards: Guards,
    *,
    parameters: Path | None = None,
    guide: Guide | None = None,
) -> Clip:
    """Run a pipeline with a method, on latents that depend on the seed only.

    Args:
        parameters: of learned methods (see ``Handle.load_parameters``).
        guide: that acts beside the method.

    Raises:
        FloatingPointError: the latents turned NaN; the step is named.
        ValueError: the pipeline, or the method, cannot do what is asked.
    """
    pipe.set_progress_bar_config(desc=choice.label)
    arguments = pipeline_arguments(request, "pt")

    def make() -> tuple[Tensor, Report]:
        with patch(pipe, **choice.arguments, **vars(guards)) as handle:
            if parameters is not None:
                handle.load_parameters(parameters)
            with nullcontext() if guide is None else Guidance(pipe, guide):
                return first_frames(pipe(**arguments)), handle.report()

    return timed_clip(pipe, choice.label, make)


def first_frames(output: Any) -> Tensor:
    """(F, 3, H, W) of the first video that a pipeline made, or of its first picture."""
    return output.frames[0] if hasattr(output, "frames") else output.images[:1]


def timed_clip(pipe: object, label: str, make: Callable[[], tuple[Tensor, Report]]) -> Clip:
    """The frames (F, 3, H, W) that ``make`` gives with their report, and the time they took.

    Raises:
        FloatingPointError: the frames hold NaN or infinity.
    """
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with step_times(pipe) as bars:
        begin = _now()
        frames, report = make()
        total_ms = 1e3 * (_now() - begin)
    steps_ms = [1e3 * (stop - start) for marks in bars for start, stop in zip(marks, marks[1:])]
    if not steps_ms:
        raise RuntimeError(f"{type(pipe).__name__} shows no progress, so its steps cannot be timed")
    frames = frames.detach().float().cpu()
    if not bool(torch.isfinite(frames).all()):
        raise FloatingPointError(
            f"the decoded frames of {label} hold NaN or infinity although the latents did "
            "not: the VAE overflows in this dtype; try --dtype float32"
        )
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return Clip(frames.clamp(0, 1), steps_ms, total_ms, peak_gib, report)


def warm_up(pipe: object, request: Request, choice: Served) -> Report:
    """Run one sparse step without decoding it, so that no clip pays for what happens once."""
    pipe.set_progress_bar_config(desc=f"warm-up of {choice.label}")
    arguments = pipeline_arguments(replace(request, num_inference_steps=1), "latent")
    with patch(pipe, **choice.arguments, dense_steps=0) as handle:
        pipe(**arguments)
        return handle.report()


def pipeline_arguments(request: Request, output_type: str) -> dict[str, object]:
    """What a pipeline is called with, latents that depend on the seed only among it."""
    arguments = request.arguments()
    if request.image is not None:
        from diffusers.utils import load_image

        arguments["image"] = load_image(str(request.image))
    arguments["generator"] = torch.Generator("cpu").manual_seed(request.seed)
    return arguments | {"output_type": output_type}


@contextmanager
def step_times(pipe: object) -> Iterator[list[list[float]]]:
    """The moments at which each progress bar of a pipeline began and moved: its denoising steps.

    Every pipeline has one such bar, whatever it does with its scheduler.
    """
    bars: list[list[float]] = []
    progress_bar = pipe.progress_bar

    def marked_bar(*args, **kwargs):
        bar = progress_bar(*args, **kwargs)
        marks, update = [_now()], bar.update
        bars.append(marks)

        def marked_update(n: int = 1):
            marks.append(_now())
            return update(n)

        bar.update = marked_update
        return bar

    pipe.progress_bar = marked_bar
    try:
        yield bars
    finally:
        del pipe.progress_bar


def _now() -> float:
    synchronize()
    return time.perf_counter()
