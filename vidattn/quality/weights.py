"""Where the weights of the measuring networks are kept, and how they are read."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# what scripts/fetch_metric_weights.py makes, by the name of the network
FILES = {
    "lpips": "lpips_alex_v0.1.safetensors",
    "i3d": "i3d_kinetics400.safetensors",
    "raft": "raft_things.safetensors",
}


def weights_folder() -> Path:
    """The folder of fetched weights, in the cache of the user."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "vidattn" / "weights"


def has_weights(network: str) -> bool:
    """Whether the weights of a network have been fetched."""
    return (weights_folder() / FILES[network]).is_file()


def load_weights(network: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The weights of a network, by name.

    Raises:
        ValueError: they have not been fetched.
    """
    path = weights_folder() / FILES[network]
    if not path.is_file():
        raise ValueError(
            f"the weights of {network} are not there ({path}): fetch them with "
            f"`python scripts/fetch_metric_weights.py {network}` of the vidattn repository"
        )
    return load_file(path, device=str(device))
