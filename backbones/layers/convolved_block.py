"""The block of a transformer whose perceptron has a convolution in its middle.

Letters: B batch, C channels, H, W size of a feature map.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class ConvolvedMlp(nn.Module):
    """A perceptron whose hidden channels are convolved 3 x 3.

    Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", arXiv:2106.13797.
    """

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))


class GatedConvolution(nn.Module):
    """A perceptron whose hidden channels, convolved 3 x 3, gate as many others.

    Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv:2311.17132.

    Args:
        dim: channels.
        hidden: channels between the layers; both halves of them.
    """

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        parts = self.fc1(x).chunk(2, -1)
        gate = self.dwconv(parts[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(gate) * parts[1])


class ConvolvedBlock(nn.Module):
    """Attention and a convolved perceptron, each behind a norm and beside a shortcut.

    Args:
        attn, mlp: of the same width.
        dim: channels.
        drop_path: rate at which a branch is left out.
    """

    def __init__(
        self,
        attn: nn.Module,
        mlp: nn.Module,
        dim: int,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
