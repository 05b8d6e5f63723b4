"""Bi-level routing attention: every region of a feature map attends to a few whole regions.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv:2303.08810. The
chosen regions are a block list, so no key or value is copied, but in graphs.

Letters: B batch, n heads, H, W size of a feature map, C channels, D head dim, R regions.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from timm.models import register_notrace_function
from torch import Tensor, nn

from vidattn.attention import attend
from vidattn.backbones.exporting import attention, is_exported, resize_map
from vidattn.grid import Grid, Layout
from vidattn.kernels.block_lists import BlockLists
from vidattn.plan import Plan


class BiLevelRoutingAttention(nn.Module):
    """Attention to the regions whose mean key fits the mean query of a region best.

    A depth-wise convolution of the values is added to the output. Routing has no gradient.

    Args:
        dim: channels.
        num_heads: a divisor of ``dim``; all heads take the same regions.
        topk: regions that a region reads, itself or not.
        side: regions to a side of the map, which is padded to a multiple of it at its right and
            bottom, with cells that are read like any other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        topk: int,
        *,
        side: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if not 1 <= topk <= side**2:
            raise ValueError(f"topk must be 1 to the {side**2} regions, got {topk}")
        self.num_heads, self.topk, self.side = num_heads, topk, side
        # as released: not that of the head dim
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        height, width = x.shape[1], x.shape[2]
        x = pad_to_multiple(x, self.side)
        qkv = self.qkv(x)
        out = attend_regions(qkv, self.num_heads, self.side, self.topk, self.scale)
        values = qkv.chunk(3, -1)[2].permute(0, 3, 1, 2)
        x = out + self.lepe(values).permute(0, 2, 3, 1)
        return self.proj(cut(x, height, width))


@register_notrace_function
def pad_to_multiple(x: Tensor, side: int) -> Tensor:
    """Pad a feature map (B, H, W, C) with zeros to multiples of ``side``."""
    height, width = x.shape[1], x.shape[2]
    if is_exported():
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        return resize_map(x, rows * side, columns * side)
    if height % side == 0 and width % side == 0:
        return x
    return nn.functional.pad(x, [0, 0, 0, -width % side, 0, -height % side])


@register_notrace_function
def cut(x: Tensor, height: int, width: int) -> Tensor:
    """The first cells of a feature map (B, H, W, C)."""
    return resize_map(x, height, width) if is_exported() else x[:, :height, :width]


@register_notrace_function
def attend_regions(qkv: Tensor, num_heads: int, side: int, topk: int, scale: float) -> Tensor:
    """Bi-level routing attention of a map whose size is a multiple of ``side``.

    Args:
        qkv: (B, H, W, 3 * C).
        num_heads: n.
        side: regions to a side.
        topk: regions that a region reads.
        scale: factor of the scores.

    Returns:
        (B, H, W, C).
    """
    # a graph has no place for a plan, and a tensor without data no routes
    if torch.jit.is_scripting() or torch.compiler.is_compiling() or is_exported() or qkv.is_meta:
        return attend_to_copies(qkv, num_heads, side, topk, scale)
    return attend_by_plan(qkv, num_heads, side, topk, scale)


def attend_to_copies(qkv: Tensor, num_heads: int, side: int, topk: int, scale: float) -> Tensor:
    """``attend_regions`` where every region gets a copy of the keys and values that it reads."""
    batch, height, width = qkv.shape[0], qkv.shape[1], qkv.shape[2]
    cells = cells_of_regions(height // side, width // side, side, qkv.device)
    x = qkv.flatten(1, 2)[:, cells]
    routes = route(x.mean(2), topk, scale)
    # (3, B, R, n, cells, D)
    x = x.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    sample = torch.arange(batch, device=qkv.device)[:, None, None]
    # (2, B, R, n, topk * cells, D)
    kv = x[1:, sample, routes].transpose(3, 4).flatten(4, 5)
    out = attention(x[0].flatten(0, 1), kv[0].flatten(0, 1), kv[1].flatten(0, 1), None, scale)
    # (B, R * cells, C), then as the map was
    out = out.transpose(1, 2).flatten(2).unflatten(0, (batch, -1)).flatten(1, 2)
    return out[:, cells.flatten().argsort()].unflatten(1, (height, width))


@torch.jit.unused
def attend_by_plan(qkv: Tensor, num_heads: int, side: int, topk: int, scale: float) -> Tensor:
    """``attend_regions`` by a block list, so that no key or value is copied."""
    B, H, W, _ = qkv.shape
    means = reduce(qkv.detach(), "b (r y) (s x) c -> b (r s) c", "mean", r=side, s=side)
    routes = route(means, topk, scale).flatten().int()
    row_start = torch.arange(0, routes.numel() + 1, topk, device=qkv.device)
    num_full = torch.full([B * side * side], topk, dtype=torch.int32, device=qkv.device)
    order = cells_of_regions(H // side, W // side, side, qkv.device).flatten().int()
    block = order.numel() // side**2
    lists = BlockLists(order, block, B, 1, row_start, num_full, routes)
    plan = Plan(Grid(1, H, W), Layout(order, block, side**2), lists)
    q, k, v = rearrange(qkv, "b h w (qkv n d) -> qkv b n (h w) d", qkv=3, n=num_heads)
    return rearrange(attend(q, k, v, plan, scale=scale), "b n (h w) d -> b h w (n d)", h=H)


def cells_of_regions(rows: int, columns: int, side: int, device: torch.device) -> Tensor:
    """(R, rows * columns), the cells of each region of a map of so many cells a region."""
    first = torch.arange(side, device=device)[:, None]
    y = first * rows + torch.arange(rows, device=device)
    x = first * columns + torch.arange(columns, device=device)
    return (y[:, None, :, None] * (columns * side) + x[:, None]).flatten(2).flatten(0, 1)


def route(means: Tensor, topk: int, scale: float) -> Tensor:
    """(B, R, topk), the regions that each region reads, in ascending order.

    Args:
        means: (B, R, 3 * C), of the queries, keys and values of each region.
    """
    q, k, _ = means.detach().chunk(3, -1)
    chosen = ((q * scale) @ k.mT).topk(topk, -1)[1]
    return chosen.sort(-1)[0]
