"""The machine that figures are measured on."""

from __future__ import annotations

import os
import platform

import torch

from vidattn.kernels.figures import cpu_name


def hardware() -> dict[str, str | int | None]:
    """The machine a figure was measured on."""
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return {
        "cpu": cpu_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.platform(terse=True),
    }
