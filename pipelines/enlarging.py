"""What turns a clip into the start of a larger one: pixels, noise, and a late first step.

Letters: B batch, F frames, H height and W width in pixels; clips are (B, F, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def enlarge(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """A clip at a size at least as large, cut in the middle where its sides have another ratio."""
    factor = max(new / old for new, old in zip(size, clip.shape[-2:]))
    scaled = [max(new, math.ceil(old * factor)) for new, old in zip(size, clip.shape[-2:])]
    frames = F.interpolate(clip.flatten(0, 1).float(), size=scaled, mode="bicubic")
    top, left = ((have - want) // 2 for have, want in zip(scaled, size))
    cut = frames[..., top : top + size[0], left : left + size[1]]
    return cut.clamp(0, 1).unflatten(0, clip.shape[:2])


def pad(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """A clip with its last row and column repeated below and on the right, up to a size."""
    rows, columns = (want - have for want, have in zip(size, clip.shape[-2:]))
    padded = F.pad(clip.flatten(0, 1), (0, columns, 0, rows), mode="replicate")
    return padded.unflatten(0, clip.shape[:2])


@contextmanager
def late_start(scheduler: Any, strength: float) -> Iterator[None]:
    """Leave out the first steps of a scheduler in a with block, all but a share of them."""
    whole = scheduler.set_timesteps

    @functools.wraps(whole)
    def set_timesteps(*args, **kwargs):
        whole(*args, **kwargs)
        count = scheduler.num_inference_steps
        left = max(1, min(int(count * strength), count))
        begin = (count - left) * scheduler.order
        scheduler.timesteps = scheduler.timesteps[begin:]
        scheduler.sigmas = scheduler.sigmas[begin:]
        scheduler.num_inference_steps = left

    before = scheduler.__dict__.get("set_timesteps")
    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps
        if before is not None:
            scheduler.set_timesteps = before


@contextmanager
def bar_of(pipe: Any, steps: int) -> Iterator[None]:
    """Have the progress bar of a pipeline count to the steps that it takes, in a with block."""
    usual = pipe.progress_bar
    before = pipe.__dict__.get("progress_bar")
    pipe.progress_bar = lambda *args, **kwargs: usual(total=steps)
    try:
        yield
    finally:
        del pipe.progress_bar
        if before is not None:
            pipe.progress_bar = before


@contextmanager
def in_tiles(vae: Any) -> Iterator[None]:
    """Have an autoencoder work in tiles in a with block."""
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before
