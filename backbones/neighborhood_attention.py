"""The attention of NAT and DiNAT.

Hassani et al., "Neighborhood Attention Transformer", arXiv:2204.07143; Hassani and Shi, "Dilated
Neighborhood Attention Transformer", arXiv:2209.15001.

Letters: B batch, H, W size of a feature map, C channels, n heads, D head dim.
"""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_function
from torch import Tensor, nn

# registers torch.ops.vidattn.neighborhood, which, unlike the function, TorchScript can call
from vidattn import neighborhood  # noqa: F401


class NeighborhoodAttention2d(nn.Module):
    """Every cell of a feature map attends to the window around it.

    Args:
        dim: channels.
        num_heads: a divisor of ``dim``.
        window: cells along each axis that a cell reads.
        dilation: distance between the cells of a window.
        pads: whether a map smaller than a window is padded at its right and bottom, as NAT does,
            with cells that are read like any other; else the window shrinks.
        proj_drop: dropout rate of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        dilation: int = 1,
        pads: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.window, self.dilation = num_heads, window, dilation
        self.least = window * dilation if pads else 1
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        # added to the score of a key at (key - query) / dilation + window - 1
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * window - 1, 2 * window - 1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the position biases from which training starts."""
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        height, width = x.shape[1], x.shape[2]
        x = grow(x, self.least)
        # (3, B, n, 1, H, W, D)
        qkv = self.qkv(x).unflatten(-1, (3, 1, self.num_heads, -1)).permute(3, 0, 5, 4, 1, 2, 6)
        x = attend(qkv, self.rpb, self.window, self.dilation)
        x = x[:, :height, :width]
        return self.proj_drop(self.proj(x))


@register_notrace_function
def grow(x: Tensor, least: int) -> Tensor:
    """Pad a feature map (B, H, W, C) with zeros to ``least`` cells on both axes."""
    height, width = x.shape[1], x.shape[2]
    if height >= least and width >= least:
        return x
    pad = [0, 0, 0, max(0, least - width), 0, max(0, least - height)]
    return nn.functional.pad(x, pad)


@register_notrace_function
def attend(qkv: Tensor, rpb: Tensor, window: int, dilation: int) -> Tensor:
    """(B, H, W, C) from (3, B, n, 1, H, W, D) queries, keys and values."""
    out = torch.ops.vidattn.neighborhood(
        qkv[0],
        qkv[1],
        qkv[2],
        rpb[:, None],
        [1, window, window],
        [1, 1, 1],
        [1, dilation, dilation],
        [False, False, False],
        qkv.shape[-1] ** -0.5,
    )[0]
    return out.squeeze(2).permute(0, 2, 3, 1, 4).flatten(3)
