"""Factorized attention: to patches of a feature map, and to a pool of the windows that tile it.

Qin et al., "Factorization Vision Transformer: Modeling Long Range Dependency with Local Window
Cost", arXiv:2312.08614, as in the released code.

Letters: B batch, n heads, H, W size of a feature map, N its cells, C channels, D head dim.
"""

from __future__ import annotations

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn

from vidattn.backbones.exporting import attention
from vidattn.backbones.layers.neighborhood_attention import grow


class CoarseGroup(nn.Module):
    """Keys and values of patches of the map, with one head.

    Args:
        dim: channels of the group.
        stride: cells to a side of a patch; what is left of the map at its right and bottom is not
            read, but a map without a whole patch is padded to one.
    """

    def __init__(self, dim: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.stride = stride
        self.sr = nn.Conv2d(dim, dim, stride, stride=stride, **dd)
        self.norm = nn.LayerNorm(dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """(B, N, C) from queries (B, N, C) and a feature map (B, H, W, C)."""
        x = grow(x, self.stride)
        x = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        k, v = split(self.kv(x))
        v = v + self.local_conv(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return attend(q, k, v, 1)


class FineGroup(nn.Module):
    """Keys and values of one dilated window, pooled from all those that tile the map.

    As in the released code, the windows and channels of a cell are one axis, pooled to as many
    numbers as a head has channels: with several windows, a number is the mean of some channels of
    one window, and not of one channel of all windows.

    Args:
        dim: channels of the group.
        num_heads: a divisor of ``dim``; heads share their layers.
        window: cells to a side of a window.
        dilation: distance between the cells of a window.
    """

    def __init__(
        self, dim: int, num_heads: int, *, window: int, dilation: int, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        head_dim = dim // num_heads
        self.num_heads, self.window, self.dilation = num_heads, window, dilation
        self.fc = nn.Linear(head_dim, head_dim, **dd)
        self.kv = nn.Linear(head_dim, 2 * head_dim, **dd)
        self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        """(B, N, C) from queries (B, N, C) and a feature map (B, H, W, C)."""
        x = pooled_window(x, self.num_heads, self.window, self.dilation)
        k, v = split(self.kv(self.fc(x)))
        k, v = k.flatten(3), v.flatten(3)
        v = v + self.local_conv(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return attend(q, k, v, self.num_heads)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of the last axis."""
    parts = x.chunk(2, -1)
    return parts[0], parts[1]


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention of (B, N, C) to keys and values (B, h, w, C)."""
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k = k.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    v = v.flatten(1, 2).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return attention(q, k, v).transpose(1, 2).flatten(2)


@register_notrace_function
def pooled_window(x: Tensor, num_heads: int, window: int, dilation: int) -> Tensor:
    """A pool of the dilated windows that tile a map (B, H, W, C): (B, window, window, n, D).

    The map is reflected at its right and bottom, as often as it takes, to whole windows.
    """
    rows = tiles(x.shape[1], window, dilation, x.device)
    columns = tiles(x.shape[2], window, dilation, x.device)
    x = x[:, rows.flatten()][:, :, columns.flatten()]
    x = x.unflatten(2, columns.shape).unflatten(1, rows.shape).unflatten(-1, (num_heads, -1))
    # (B, window, window, n, windows * D)
    x = x.permute(0, 2, 4, 5, 1, 3, 6).flatten(4)
    return x.unflatten(-1, (-1, len(rows) * len(columns))).mean(-1)


def tiles(extent: int, window: int, dilation: int, device: torch.device) -> Tensor:
    """(windows, window) cells of the windows that tile an axis."""
    span = dilation * (window - 1) + 1
    first = torch.arange(0, extent, span, device=device)
    place = first[:, None] + dilation * torch.arange(window, device=device)
    # to and fro between both ends
    period = max(1, 2 * (extent - 1))
    place = place % period
    return torch.minimum(place, period - place)


class FactorizedAttention(nn.Module):
    """Attention whose groups of channels read keys of different grain.

    An eighth of the channels reads patches. The rest reads a window; for a stride above 1, half of
    the rest does, and the other half reads a dilated window.

    Args:
        dim: channels.
        num_heads: of each group but that of patches.
        stride: cells to a side of a patch, and distance between the cells of the dilated windows.
        window: cells to a side of a window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stride: int,
        *,
        window: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dilations = (1,) if stride == 1 else (1, stride)
        fine = 7 * dim // 8 // len(dilations)
        if dim % (8 * len(dilations)) or fine % num_heads:
            raise ValueError(
                f"dim must be a multiple of {8 * len(dilations)}, and the {fine} channels of a "
                f"group one of num_heads, got {dim} and {num_heads}"
            )
        self.num_heads = num_heads
        wide = 7 * dim // 8
        self.widths = [dim // 8, wide]
        self.q = nn.Linear(dim, dim, **dd)
        self.coarse = CoarseGroup(dim // 8, stride, **dd)
        self.mix = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, **dd),
            nn.Conv2d(wide, wide, 1, **dd),
        )
        self.fine = nn.ModuleList(
            FineGroup(fine, num_heads, window=window, dilation=dilation, **dd)
            for dilation in dilations
        )
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        q = self.q(x).flatten(1, 2).split(self.widths, -1)
        parts = x.split(self.widths, -1)
        mixed = self.mix(parts[1].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # a head is cut up between the groups
        queries = q[1].unflatten(-1, (self.num_heads, -1)).chunk(len(self.fine), -1)
        maps = mixed.chunk(len(self.fine), -1)
        out = [self.coarse(q[0], parts[0])]
        for i, group in enumerate(self.fine):
            out.append(group(queries[i].flatten(2), maps[i]))
        return self.proj(torch.cat(out, -1).view(x.shape))
