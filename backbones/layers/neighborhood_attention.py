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
from vidattn import halo_operator  # noqa: F401
from vidattn.backbones.exporting import is_exported


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
        self.num_heads, self.window, self.dilation, self.pads = num_heads, window, dilation, pads
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
        if is_exported():
            # what a cell of padding has
            blank = self.qkv(torch.zeros_like(x[:1, :1, :1]))
            options = (self.num_heads, self.window, self.dilation, self.pads)
            out = attend_one_by_one(self.qkv(x), blank, self.rpb, *options)
            return self.proj_drop(self.proj(out))
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


def attend_one_by_one(
    qkv: Tensor,
    blank: Tensor,
    rpb: Tensor,
    num_heads: int,
    window: int,
    dilation: int,
    pads: bool,
) -> Tensor:
    """The same by operators of PyTorch alone, of a map of any size that is not padded yet.

    Every query gets a copy of the keys and values that it reads.

    Args:
        qkv: (B, H, W, 3 * C).
        blank: (1, 1, 1, 3 * C), those of a cell of padding.
        rpb: (n, 2 * window - 1, 2 * window - 1).
        num_heads: n.
        window, dilation, pads: as NeighborhoodAttention2d takes them.

    Returns:
        (B, H, W, C).
    """
    height, width = qkv.shape[1], qkv.shape[2]
    # (H, window) and (W, window)
    rows, below = read_places(height, window, dilation, pads, qkv.device)
    columns, right = read_places(width, window, dilation, pads, qkv.device)
    is_outside = (rows >= height)[:, None, :, None] | (columns >= width)[:, None]
    cell = rows[:, None, :, None] * width + columns[:, None]
    # one cell more stands for all those outside, [H * W, window ** 2]
    cell = cell.masked_fill(is_outside, height * width).flatten(2).flatten(0, 1)
    tokens = torch.cat([qkv.flatten(1, 2), blank.flatten(1, 2).expand(qkv.shape[0], -1, -1)], 1)
    # (3, B, n, H * W + 1, D)
    tokens = tokens.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = tokens[0][:, :, :-1, None], tokens[1][:, :, cell], tokens[2][:, :, cell]
    bias = rpb[:, below[:, None, :, None], right[:, None]].flatten(3).flatten(1, 2)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT + bias[:, :, None]
    if not pads:
        is_hidden = is_outside.flatten(2).flatten(0, 1)[:, None]
        scores = scores.masked_fill(is_hidden, float("-inf"))
    out = scores.softmax(-1) @ v
    return out.squeeze(3).transpose(1, 2).flatten(2).unflatten(1, (height, width))


def read_places(
    extent: int, window: int, dilation: int, pads: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(extent, window) the cells of an axis that every cell reads, and the places of their biases.

    Cells from ``extent`` on are padding, or hidden if there is none.
    """
    place = torch.arange(extent, device=device)
    group = place % dilation
    index = place.div(dilation, rounding_mode="floor")
    # cells of the group
    number = (extent - group + dilation - 1).div(dilation, rounding_mode="floor")
    if pads:
        number = number.clamp(min=window)
    first = (index - window // 2).clamp(min=0)
    first = torch.minimum(first, (number - window).clamp(min=0))
    read = first[:, None] + torch.arange(window, device=device)
    bias = read - index[:, None] + window - 1
    return read * dilation + group[:, None], bias
