"""When a GPU attends faster to everything than sparsely."""

from __future__ import annotations

from functools import lru_cache

import torch

from vidattn.simulation import gpus


@lru_cache
def break_even(device: torch.device) -> float:
    """The visited density above which dense attention is faster; infinite where nobody knows.

    The figure is the one that ``vidattn simulate`` models for the GPU.
    """
    if device.type != "cuda":
        return float("inf")
    try:
        return gpus.break_even(gpus.find_gpu(torch.cuda.get_device_name(device)))
    except ValueError:
        return float("inf")
