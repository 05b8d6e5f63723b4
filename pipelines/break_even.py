"""When attention to everything is faster than sparse attention."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vidattn.kernels.engines.exact import speed
from vidattn.simulation import gpus


def break_even(q: Tensor, k: Tensor, v: Tensor) -> float:
    """The visited density above which dense attention is faster; infinite where nobody knows.

    On a GPU it is the figure that ``vidattn simulate`` models. On a CPU it is how fast our engine
    attends to everything against PyTorch, where it loses: sparse attention runs on ours, and takes
    time in proportion to what it reads.
    """
    if q.device.type == "cpu":
        return on_cpu(speed(q, k, v))
    return on_gpu(q.device)


def on_cpu(speed: float) -> float:
    """The figure where our engine is so many times as fast as PyTorch's, 0 where nobody knows."""
    return speed if 0 < speed < 1 else float("inf")


@lru_cache
def on_gpu(device: torch.device) -> float:
    """The figure of a GPU, by its name."""
    if device.type != "cuda":
        return float("inf")
    try:
        return gpus.break_even(gpus.find_gpu(torch.cuda.get_device_name(device)))
    except ValueError:
        return float("inf")
