"""Attention inside the windows of a map with any number of axes, shifted or not.

Liu et al., "Swin Transformer", arXiv:2103.14030; with three axes, "Video Swin Transformer",
arXiv:2106.13230. A cyclic shift with a mask keeps cells apart that only the shift made neighbors;
here they never share a window: the first and the last window of an axis are merely shorter.

Letters: B batch, n heads, C channels, D head dim, P cells of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_function
from torch import Tensor, nn

from vidattn.backbones.exporting import attention


class WindowAttention(nn.Module):
    """Every cell of a map attends to the window that it lies in.

    The map is padded with zeros to whole windows, and padding is read like any other cell. On an
    axis that is shorter than a window there is one window, as long as the axis if windows shrink.

    Args:
        dim: channels.
        num_heads: a divisor of ``dim``.
        window: cells of a window, for each axis.
        shift: where the second window begins, for each axis; 0 for windows side by side.
        has_bias: whether every distance on the axes has a bias of the scores, for each head.
        shrinks: whether a window is as short as the map; else the map is padded to it.
        by_place: whether a window that has shrunk takes the biases between as many first cells of
            a whole one, row by row, as in the released code of Video Swin; else those of its own
            distances.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Sequence[int],
        shift: Sequence[int],
        *,
        has_bias: bool = True,
        shrinks: bool = True,
        by_place: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if len(window) != len(shift) or any(not 0 <= s < w for s, w in zip(shift, window)):
            raise ValueError(
                f"shift must be from 0 to below window on each axis, got {shift} and {window}"
            )
        self.num_heads, self.window, self.shift = num_heads, list(window), list(shift)
        self.shrinks, self.by_place = shrinks, by_place
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        # at query - key + window - 1 on each axis, the last axis fastest
        num_distances = math.prod(2 * side - 1 for side in window)
        rpb = nn.Parameter(torch.empty(num_distances, num_heads, **dd)) if has_bias else None
        self.register_parameter("rpb", rpb)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the position biases from which training starts."""
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C), like ``x``."""
        qkv = self.qkv(pad_to_windows(x, self.window, self.shrinks))
        out = attend_in_windows(
            qkv, self.rpb, self.num_heads, self.window, self.shift, None, self.by_place
        )
        return self.proj(crop(out, x))


class PatchMerging(nn.Module):
    """A cell for every two cells along each of some axes: a norm and a linear layer of both.

    Args:
        dim: channels before.
        out_dim: channels behind.
        axes: that become half as long, in a map (B, ..., C); the channels of neighbors on the
            first of them come next to each other.
    """

    def __init__(self, dim: int, out_dim: int, axes: Sequence[int], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.axes = list(axes)
        self.norm = nn.LayerNorm(dim * 2 ** len(axes), **dd)
        self.reduction = nn.Linear(dim * 2 ** len(axes), out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., out_dim) from (B, ..., dim)."""
        return self.reduction(self.norm(merge_pairs(x, self.axes)))


@register_notrace_function
def pad_axes(x: Tensor, first: int, sides: list[int]) -> Tensor:
    """Pad the axes from ``first`` on, at their ends, with zeros to multiples of ``sides``."""
    pads: list[int] = []
    for axis in range(x.dim() - 1, -1, -1):
        is_padded = first <= axis < first + len(sides)
        pads += [0, -x.shape[axis] % sides[axis - first] if is_padded else 0]
    return nn.functional.pad(x, pads) if max(pads) > 0 else x


@register_notrace_function
def pad_to_windows(x: Tensor, window: list[int], shrinks: bool = True) -> Tensor:
    """Pad a map (B, ..., C) to whole windows, which are no longer than an axis if they shrink."""
    sides = window
    if shrinks:
        sides = [min(side, x.shape[1 + i]) for i, side in enumerate(window)]
    return pad_axes(x, 1, sides)


@register_notrace_function
def crop(x: Tensor, whole: Tensor) -> Tensor:
    """The first cells of a map, as many as ``whole`` has."""
    for axis in range(1, x.dim() - 1):
        x = x.narrow(axis, 0, whole.shape[axis])
    return x


@register_notrace_function
def merge_pairs(x: Tensor, axes: list[int]) -> Tensor:
    """Join the channels of two neighbors along each axis in turn."""
    for axis in axes:
        x = pad_axes(x, axis, [2])
        x = torch.cat(x.unflatten(axis, [-1, 2]).unbind(axis + 1), -1)
    return x


@register_notrace_function
def attend_in_windows(
    qkv: Tensor,
    rpb: Tensor | None,
    num_heads: int,
    window: list[int],
    shift: list[int],
    factor: Tensor | None = None,
    by_place: bool = False,
) -> Tensor:
    """Attention inside windows.

    Args:
        qkv: (B, ..., 3 * C), padded to whole windows.
        rpb: (distances, n) biases of the scores; none for None.
        num_heads: n.
        window: cells of a window, for each axis.
        shift: cells of the first window, for each axis; 0 for as many as the others.
        factor: (distances, n), what the sigmoid of a score is multiplied by to be a weight;
            weights are a softmax for None.
        by_place: as WindowAttention takes it.

    Returns:
        (B, ..., C).
    """
    boxes, begins, counts = cut_at_borders(qkv, window, shift)
    whole = [min(side, extent) for side, extent in zip(window, qkv.shape[1:-1])]
    outs: list[Tensor] = []
    for box, begin in zip(boxes, begins):
        sides = [min(side, extent) for side, extent in zip(window, box.shape[1:-1])]
        bias = None if rpb is None else biases_of_box(rpb, window, whole, begin, sides, by_place)
        scale = None if factor is None else biases_of_box(factor, window, whole, begin, sides)
        outs.append(attend_in_blocks(box, bias, num_heads, window, scale))
    for i in range(len(window) - 1, -1, -1):
        count = counts[i]
        if count > 1:
            outs = [torch.cat(outs[j : j + count], 1 + i) for j in range(0, len(outs), count)]
    return outs[0]


def cut_at_borders(
    x: Tensor, window: list[int], shift: list[int]
) -> tuple[list[Tensor], list[list[int]], list[int]]:
    """Boxes of a map whose windows are all alike: before, between and behind shifted borders.

    Returns:
        The boxes, those of the last axis next to each other; where in its window, were it whole,
        each begins; and how many there are along each axis.
    """
    nowhere: list[int] = []
    boxes, begins = [x], [nowhere]
    counts: list[int] = []
    for i, (side, step) in enumerate(zip(window, shift)):
        extent = x.shape[1 + i]
        # no border of an axis that is one window
        cuts, starts = [extent], [0]
        if step > 0 and extent > side:
            cuts, starts = [step, extent - side, side - step], [side - step, 0, 0]
        parts: list[Tensor] = []
        begins_of_parts: list[list[int]] = []
        for box, begin in zip(boxes, begins):
            parts += torch.split(box, cuts, 1 + i)
            for start in starts:
                begins_of_parts.append(begin + [start])
        boxes, begins = parts, begins_of_parts
        counts += [len(cuts)]
    return boxes, begins, counts


def attend_in_blocks(
    qkv: Tensor,
    bias: Tensor | None,
    num_heads: int,
    window: list[int],
    factor: Tensor | None = None,
) -> Tensor:
    """Attention inside windows that begin where the map does.

    Args:
        qkv: (B, ..., 3 * C), of whole windows, or shorter than one.
        bias: (1, n, P, P) of the scores; none for None.
        num_heads: n.
        window: cells of a window, for each axis.
        factor: (1, n, P, P), what the sigmoid of a score is multiplied by to be a weight; weights
            are a softmax for None.

    Returns:
        (B, ..., C).
    """
    batch, size, num_axes = qkv.shape[0], list(qkv.shape[1:-1]), len(window)
    sides = [min(side, extent) for side, extent in zip(window, size)]
    blocks = [extent // side for side, extent in zip(sides, size)]
    split: list[int] = []
    for block, side in zip(blocks, sides):
        split += [block, side]
    outer = [1 + 2 * i for i in range(num_axes)]
    inner = [2 + 2 * i for i in range(num_axes)]
    last = 1 + 2 * num_axes
    # (3, B, blocks, n, sides, D)
    x = qkv.reshape([batch] + split + [3, num_heads, -1])
    x = x.permute([last, 0] + outer + [last + 1] + inner + [last + 2])
    # (B * blocks, n, P, D) each
    q, k, v = x.flatten(-1 - num_axes, -2).flatten(1, 1 + num_axes).unbind(0)
    bias = None if bias is None else bias.to(q.dtype)
    if factor is None:
        out = attention(q, k, v, bias)
    else:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = (scores if bias is None else scores + bias).sigmoid()
        out = weights * factor.to(q.dtype) @ v
    # (B, blocks, n, sides, D), then as the map was
    out = out.reshape([batch] + blocks + [num_heads] + sides + [-1])
    order = [0]
    for i in range(num_axes):
        order += [1 + i, 2 + num_axes + i]
    out = out.permute(order + [1 + num_axes, 2 + 2 * num_axes])
    return out.reshape([batch] + size + [-1])


def biases_of_box(
    rpb: Tensor,
    window: list[int],
    whole: list[int],
    begin: list[int],
    sides: list[int],
    by_place: bool = False,
) -> Tensor:
    """(1, n, P, P) biases of a query and a key of a box of cells inside a window.

    Args:
        rpb: (distances, n) of a window.
        window: its cells, for each axis.
        whole: likewise, as far as the map reaches.
        begin: where in the window the box begins.
        sides: cells of the box.
        by_place: as WindowAttention takes it.
    """
    number = torch.zeros(1, dtype=torch.long, device=rpb.device)
    for extent, first, side in zip(whole, begin, sides):
        cells = torch.arange(first, first + side, device=rpb.device)
        number = (number[:, None] * extent + cells).flatten()
    index = torch.zeros(1, 1, dtype=torch.long, device=rpb.device)
    step = 1
    for i in range(len(window) - 1, -1, -1):
        extent = window[i] if by_place else whole[i]
        place = number % extent
        number = number.div(extent, rounding_mode="floor")
        index = index + (place[:, None] - place + window[i] - 1) * step
        step *= 2 * window[i] - 1
    return rpb[index].permute(2, 0, 1)[None]
