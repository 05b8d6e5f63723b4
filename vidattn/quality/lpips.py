"""LPIPS: the distance of two pictures in the features of a trained AlexNet.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
arXiv:1801.03924, version 0.1 of the linear layers.

Letters: F frames, C channels, H height, W width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidattn.quality.likeness import pictures
from vidattn.quality.weights import load_weights

# mean and spread of ImageNet in [-1, 1]
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
WIDTHS = (64, 192, 384, 256, 256)
LEAST_PX = 32


class AlexLpips(nn.Module):
    """The five convolutions of AlexNet, and the weight of every feature they give."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.ModuleList(
            [
                nn.Conv2d(3, 64, 11, stride=4, padding=2),
                nn.Conv2d(64, 192, 5, padding=2),
                nn.Conv2d(192, 384, 3, padding=1),
                nn.Conv2d(384, 256, 3, padding=1),
                nn.Conv2d(256, 256, 3, padding=1),
            ]
        )
        self.weight = nn.ParameterList(torch.empty(width) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Features of unit length at every place, from (F, 3, H, W) in [0, 1]."""
        x, found = (2 * x - 1 - self.shift) / self.scale, []
        for i, convolution in enumerate(self.trunk):
            if i in (1, 2):
                x = F.max_pool2d(x, 3, stride=2)
            x = convolution(x).relu()
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(F,) distances of (F, 3, H, W) pictures in [0, 1]."""
        pairs = zip(self.features(a), self.features(b), self.weight)
        return sum(
            torch.einsum("fchw,c->fhw", (x - y).square(), weight).mean((1, 2))
            for x, y, weight in pairs
        )


@lru_cache(maxsize=1)
def _network(device: torch.device) -> AlexLpips:
    network = AlexLpips()
    network.load_state_dict(load_weights("lpips"))
    return network.eval().requires_grad_(False).to(device)


def lpips(video: Tensor, reference: Tensor) -> float:
    """Perceptual distance: the mean over frames, 0 for equal videos, about 0.6 for unlike ones.

    Args:
        video: (F, 3, H, W) floats in [0, 1], or uint8; frames of at least 32 x 32 pixels.
        reference: likewise, of the same shape.

    Raises:
        ValueError: shapes that differ or do not fit, values that are no pictures, or weights that
            have not been fetched.
    """
    video, reference = (x.float() for x in pictures(video, reference))
    if video.shape[1] != 3 or min(video.shape[2:]) < LEAST_PX:
        raise ValueError(
            f"LPIPS needs frames of 3 channels and at least {LEAST_PX} x {LEAST_PX} pixels, got "
            f"{tuple(video.shape[1:])}"
        )
    network = _network(video.device)
    # some frames at a time: the features are larger than the pictures
    pairs = zip(video.split(16), reference.split(16))
    return torch.cat([network(a, b) for a, b in pairs]).mean().item()
