"""Linear attention to a whole feature map, and what gathers again what it spreads.

Zheng, "The Linear Attention Resurrection in Vision Transformer", arXiv:2501.16182.

Letters: B batch, n heads, H, W size of a feature map, N its cells, C channels, D head dim.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class LinearAttention(nn.Module):
    """Attention with weights in proportion to the product of rectified queries and keys.

    Their sum is taken as 100 where it is less, which makes training stable; the output of every
    head has a learned factor.

    Args:
        dim: channels.
        num_heads: a divisor of ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.least_total = 100.0
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the factors with which training starts."""
        nn.init.constant_(self.temperature, (self.proj.in_features // self.num_heads) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        tokens = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).flatten(1, 2)
        tokens = tokens.permute(2, 0, 3, 1, 4)
        q, k, v = tokens[0].relu(), tokens[1].relu(), tokens[2]
        total = (q @ k.sum(2).unsqueeze(-1)).clamp(min=self.least_total)
        out = q @ (k.transpose(2, 3) @ v * self.temperature) / total
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class LocalConcentration(nn.Module):
    """Two depth-wise convolutions, beside a shortcut, that gather what linear attention spreads.

    Args:
        dim: channels.
        drop_path: rate at which the convolutions are left out.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.conv1 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.act = nn.GELU()
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.conv2 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        local = self.bn(self.act(self.conv1(self.norm(x).permute(0, 3, 1, 2))))
        return x + self.drop_path(self.conv2(local).permute(0, 2, 3, 1))
