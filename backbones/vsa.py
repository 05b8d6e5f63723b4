"""Swin with varied-size windows: every head picks place and size of the window that it reads.

Zhang et al., "VSA: Learning Varied-Size Window Attention in Vision Transformers",
arXiv:2204.08446, ECCV 2022. Windows are placed as in the code released for ViTAEv2; the rest is
the paper's Swin, of which no code is released.

Letters: B batch, n heads, H, W size of a feature map, C channels, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, grid_sample, leaky_relu
from typing_extensions import Unpack

from vidattn.backbones.layers.attention_block import AttentionBlock
from vidattn.backbones.layers.patchify import patchify
from vidattn.backbones.layers.window_attention import PatchMerging, attend_in_blocks, crop, pad_axes
from vidattn.backbones.pyramids.doubling_pyramid import DoublingPyramid, build, check_stages
from vidattn.backbones.pyramids.pyramid import Options, pretrained_cfg


class ZeroConv2d(nn.Conv2d):
    """A convolution that gives zeros until it is trained."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class VariedWindowAttention(nn.Module):
    """Every window of queries attends to as many cells, spread evenly over a window of its own.

    A linear layer of the mean cell of a window scales and moves the window of keys for each head;
    at the outset it is the window of queries. The map is padded at its right and bottom with
    queries, keys and values of zero, which also lie around it.

    Args:
        dim: channels.
        num_heads: a divisor of ``dim``.
        window: cells along each axis of a window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.window = num_heads, window
        # horizontal and vertical, for each head
        self.offsets = ZeroConv2d(dim, 2 * num_heads, 1, **dd)
        self.scales = ZeroConv2d(dim, 2 * num_heads, 1, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        sides = [self.window, self.window]
        cells = pad_axes(x, 1, sides).permute(0, 3, 1, 2)
        means = leaky_relu(avg_pool2d(cells, self.window))
        qkv = pad_axes(self.qkv(x), 1, sides)
        places = place_windows(self.scales(means), self.offsets(means), x, self.window)
        return self.proj(crop(attend_at(qkv, places, self.num_heads, self.window), x))


@register_notrace_function
def place_windows(scales: Tensor, offsets: Tensor, x: Tensor, window: int) -> Tensor:
    """Where the cells of the windows of keys lie.

    Args:
        scales: (B, 2 * n, rows, columns), by how much a window of keys is wider and higher than
            one of queries, over its size.
        offsets: (B, 2 * n, rows, columns), by how much it is farther right and down, where 2 is
            the extent of the map over the whole windows along it.
        x: (B, H, W, C), the map, before it is padded to rows and columns of windows.
        window: cells along each axis of a window.

    Returns:
        (B * n, padded H, padded W, 2), horizontal and vertical, from -1 to 1.
    """
    # coordinates need more than 8 bits
    is_half = scales.dtype == torch.float16 or scales.dtype == torch.bfloat16
    dtype = torch.float32 if is_half else scales.dtype
    axes: list[Tensor] = []
    for i in range(2):
        scale = of_cells(scales.to(dtype), i, window)
        offset = of_cells(offsets.to(dtype), i, window) / max(x.shape[2 - i] // window, 1)
        extent = scale.shape[2 - i]
        cells = torch.arange(extent, dtype=dtype, device=scales.device)
        if i == 1:
            cells = cells[:, None]
        middle = cells.div(window, rounding_mode="floor") * window + (window - 1) / 2
        place = middle + (cells - middle) * (1 + scale)
        axes += [place * 2 / max(extent - 1, 1) - 1 + offset]
    return torch.stack(axes, -1)


def of_cells(x: Tensor, i: int, window: int) -> Tensor:
    """(B * n, H, W), for every cell the ``i``-th of what (B, 2 * n, ...) says of its window."""
    x = x.unflatten(1, [-1, 2])[:, :, i].flatten(0, 1)
    return x.repeat_interleave(window, 1).repeat_interleave(window, 2)


@register_notrace_function
def attend_at(qkv: Tensor, places: Tensor, num_heads: int, window: int) -> Tensor:
    """Attention of windows of queries to keys and values read between the cells of a map.

    Args:
        qkv: (B, H, W, 3 * C), padded to whole windows.
        places: (B * n, H, W, 2), as grid_sample takes them.
        num_heads: n.
        window: cells along each axis of a window.

    Returns:
        (B, H, W, C).
    """
    # (B, H, W, 3, n, D)
    x = qkv.unflatten(-1, [3, num_heads, -1])
    # (B, n, 2, D, H, W)
    kv = x[:, :, :, 1:].permute(0, 4, 3, 5, 1, 2)
    flat = kv.flatten(2, 3).flatten(0, 1).to(places.dtype)
    read = grid_sample(flat, places, "bilinear", "zeros", True).to(qkv.dtype)
    kv = read.reshape(kv.shape).permute(0, 4, 5, 2, 1, 3)
    x = torch.cat([x[:, :, :, :1], kv], 3).flatten(3)
    return attend_in_blocks(x, None, num_heads, [window, window])


class ConditionalPositions(nn.Module):
    """Adds a depth-wise convolution, which tells apart where cells are."""

    def __init__(self, dim: int, kernel: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class VaryingSwin(DoublingPyramid):
    """Swin with varied-size windows; takes images of any size.

    Windows are not shifted, as those of keys overlap, and convolutions as large as a window stand
    for position biases, both as in the paper. The code released for ViTAEv2 has position biases
    too.

    Args:
        depths: blocks of each stage.
        num_heads: of each stage.
        window: cells along each axis of a window, an odd number.
        mlp_ratio: hidden channels of the perceptrons over their width.
        options: as every pyramid takes them.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        **options: Unpack[Options],
    ):
        check_stages(depths=depths, num_heads=num_heads)
        if window % 2 == 0:
            raise ValueError(f"window must be odd, as that of its convolutions, got {window}")

        def block(dim: int, rate: float, stage: int, index: int, **dd) -> nn.Sequential:
            attn = VariedWindowAttention(dim, num_heads[stage], window=window, **dd)
            return nn.Sequential(
                ConditionalPositions(dim, window, **dd),
                AttentionBlock(attn, mlp_ratio=mlp_ratio, drop_path=rate, **dd),
            )

        super().__init__(
            partial(patchify, 4),
            block,
            partial(PatchMerging, axes=(1, 2)),
            depths=depths,
            **options,
        )


default_cfgs = generate_default_cfgs({"vsa_swin_tiny": pretrained_cfg("stem.proj")})


@register_model
def vsa_swin_tiny(pretrained: bool = False, **options) -> VaryingSwin:
    """29 M parameters, in the layout of Swin-T."""
    defaults = {"depths": (2, 2, 6, 2), "drop_path_rate": 0.2}
    return build(VaryingSwin, "vsa_swin_tiny", pretrained, **defaults | options)
