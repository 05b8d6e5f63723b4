"""I3D: the video classifier in whose logits FVD compares videos.

Source: Carreira and Zisserman, "Quo Vadis, Action Recognition?", arXiv:1705.07750: Inception-v1
inflated to three dimensions, with the padding of TensorFlow. Batch norms are folded into the
convolutions.

Letters: N videos, C channels, F frames, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE_PX = 224
NUM_CLASSES = 400
LEAST_FRAMES = 9
# channels of an inception block: the branch of one convolution, the two of two, the pooled one
BLOCKS = {
    "3b": (64, (96, 128), (16, 32), 32),
    "3c": (128, (128, 192), (32, 96), 64),
    "4b": (192, (96, 208), (16, 48), 64),
    "4c": (160, (112, 224), (24, 64), 64),
    "4d": (128, (128, 256), (24, 64), 64),
    "4e": (112, (144, 288), (32, 64), 64),
    "4f": (256, (160, 320), (32, 128), 128),
    "5b": (256, (160, 320), (32, 128), 128),
    "5c": (384, (192, 384), (48, 128), 128),
}


class Convolution(nn.Conv3d):
    """A convolution with the padding of TensorFlow, and a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, F, H, W) to (N, C', F', H', W')."""
        return super().forward(_pad(x, self.kernel_size, self.stride, 0.0)).relu()


class Inception(nn.Module):
    """Four branches beside each other."""

    def __init__(self, width: int, single: int, second: tuple, third: tuple, pooled: int):
        super().__init__()
        self.single = Convolution(width, single, 1)
        self.second = nn.Sequential(
            Convolution(width, second[0], 1), Convolution(second[0], second[1], 3)
        )
        self.third = nn.Sequential(
            Convolution(width, third[0], 1), Convolution(third[0], third[1], 3)
        )
        self.pooled = Convolution(width, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, F, H, W) to (N, C', F, H, W)."""
        pooled = self.pooled(_max_pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.single(x), self.second(x), self.third(x), pooled], dim=1)


class I3D(nn.Module):
    """Logits of the 400 classes of Kinetics."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            Convolution(3, 64, 7, stride=2), Convolution(64, 64, 1), Convolution(64, 192, 3)
        )
        blocks, width = {}, 192
        for name, (single, second, third, pooled) in BLOCKS.items():
            blocks[name] = Inception(width, single, second, third, pooled)
            width = single + second[1] + third[1] + pooled
        self.blocks = nn.ModuleDict(blocks)
        self.logits = nn.Conv3d(width, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 400) logits of (N, 3, F, 224, 224) videos in [-1, 1] of at least 9 frames."""
        x = _max_pool(self.stem[0](x), (1, 3, 3), (1, 2, 2))
        x = self.stem[2](self.stem[1](x))
        for name, block in self.blocks.items():
            if name == "3b":
                x = _max_pool(x, (1, 3, 3), (1, 2, 2))
            elif name == "4b":
                x = _max_pool(x, (3, 3, 3), (2, 2, 2))
            elif name == "5b":
                x = _max_pool(x, (2, 2, 2), (2, 2, 2))
            x = block(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits(x).mean((2, 3, 4))


def _max_pool(x: Tensor, kernel: tuple, stride: tuple) -> Tensor:
    return F.max_pool3d(_pad(x, kernel, stride, -torch.inf), kernel, stride)


def _pad(x: Tensor, kernel: tuple, stride: tuple, value: float) -> Tensor:
    """As many output places as ceil(input / stride), the odd place of padding behind."""
    sides = []
    for extent, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride)):
        total = max((-(-extent // s) - 1) * s + k - extent, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides, value=value) if any(sides) else x
