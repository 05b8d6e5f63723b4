"""The block of a transformer: attention, then a multilayer perceptron.

Letters: B batch, C channels.
"""

from __future__ import annotations

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn


class AttentionBlock(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut.

    Args:
        attn: keeps the shape of a map; its last layer ``proj`` says how many channels there are.
        mlp_ratio: hidden channels of the perceptron over its width.
        drop: dropout rate of the perceptron.
        drop_path: rate at which a branch is left out.
        layer_scale: factor of each branch to begin with; none for None.
    """

    def __init__(
        self,
        attn: nn.Module,
        *,
        mlp_ratio: float,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dim = attn.proj.out_features
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        scales = layer_scale is not None
        self.ls1 = LayerScale(dim, layer_scale, **dd) if scales else nn.Identity()
        self.ls2 = LayerScale(dim, layer_scale, **dd) if scales else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C), like ``x``."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
