"""Bi-level routing attention: every region of a feature map attends to a few whole regions.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv:2303.08810. The
chosen regions are a block list, so no key or value is copied.

Letters: B batch, n heads, H, W size of a feature map, C channels, D head dim, R regions.
"""

from __future__ import annotations

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn

from vidattn.attention import attend
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
        x = self.proj(out + self.lepe(values).permute(0, 2, 3, 1))
        return x[:, :height, :width]


@register_notrace_function
def pad_to_multiple(x: Tensor, side: int) -> Tensor:
    """Pad a feature map (B, H, W, C) with zeros to multiples of ``side``."""
    height, width = x.shape[1], x.shape[2]
    if height % side == 0 and width % side == 0:
        return x
    return nn.functional.pad(x, [0, 0, 0, -width % side, 0, -height % side])


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
    B, H, W, _ = qkv.shape
    # (B, n, S, D) each
    tokens = qkv.unflatten(-1, (3, num_heads, -1)).flatten(1, 2).permute(2, 0, 3, 1, 4)
    q, k, v = tokens[0], tokens[1], tokens[2]
    routes = route(qkv, side, topk, scale)
    row_start = torch.arange(0, routes.numel() + 1, topk, device=qkv.device)
    num_full = torch.full([B * side * side], topk, dtype=torch.int32, device=qkv.device)
    regions = torch.arange(H * W, dtype=torch.int32, device=qkv.device)
    order = regions.view(side, H // side, side, W // side).transpose(1, 2).flatten()
    block = order.numel() // (side * side)
    if torch.jit.is_scripting() or q.is_meta:
        none: Tensor | None = None
        lists = (row_start, num_full, routes)
        out = torch.ops.vidattn.block_sparse_torch(
            q, k, v, lists[0], lists[1], lists[2], none, none, none, none, none, 0, B, 1,
            order, block, scale, none, none,
        )[0]  # fmt: skip
    else:
        lists = BlockLists(B, 1, row_start, num_full, routes)
        plan = Plan(Grid(1, H, W), Layout(order, block, side * side), lists)
        out = attend(q, k, v, plan, scale=scale)
    return out.transpose(1, 2).reshape(B, H, W, -1)


def route(qkv: Tensor, side: int, topk: int, scale: float) -> Tensor:
    """(B * R * topk,) int32, the regions that each region reads, in ascending order."""
    means = qkv.detach().unflatten(2, (side, -1)).unflatten(1, (side, -1)).mean((2, 4))
    q, k, _ = means.flatten(1, 2).chunk(3, -1)
    chosen = ((q * scale) @ k.mT).topk(topk, -1)[1]
    return chosen.sort(-1)[0].flatten().int()
