"""Generalized neighborhood attention: every token reads a window that slides inward at the edges.

Source: Hassani et al., "Generalized Neighborhood Attention", arXiv:2504.16922; the window rule is
NATTEN's. With ``dilation`` it is DiNA, with ``stride`` equal to ``window`` blocked attention.
A window longer than its axis covers the axis, where NATTEN raises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from vidattn.grid import Grid, Size
from vidattn.kernels.box import check_packable
from vidattn.listing import Window
from vidattn.plan import Plan
from vidattn.planning.method import as_size
from vidattn.planning.pattern import PatternMethod


@dataclass(frozen=True, kw_only=True)
class Neighborhood(PatternMethod):
    """A window on each axis; every option is a (t, h, w) tuple or one value for all three.

    Args:
        window: keys that a query reads along each axis.
        stride: queries that share one window, as in blocked attention; at most ``window``.
        dilation: distance between the keys of a window.
        causal: whether a query reads only keys at or before its own position on the axis.

    Raises:
        ValueError: a value out of range.
    """

    is_exact: ClassVar[bool] = True

    window: int | Size = (13, 15, 23)
    stride: int | Size = 1
    dilation: int | Size = 1
    causal: bool | tuple[bool, bool, bool] = False

    def __post_init__(self):
        super().__post_init__()
        window, stride = as_size("window", self.window), as_size("stride", self.stride)
        as_size("dilation", self.dilation)
        if any(s > w for s, w in zip(stride, window)):
            raise ValueError(
                f"stride must not exceed window on any axis, got stride {stride} and window "
                f"{window}: queries further apart than their window would leave keys unread"
            )
        causal = self.causal
        if not isinstance(causal, bool) and not (
            isinstance(causal, tuple | list) and len(causal) == 3 and set(causal) <= {True, False}
        ):
            raise ValueError(f"causal must be one bool or three, for (t, h, w), got {causal!r}")

    def with_density(self, density: float, grid: Grid) -> Neighborhood:
        """A window of the shape of the grid; its stride and dilation stay."""
        # an axis of one token has nothing to leave out
        share = density ** (1 / max(1, sum(extent > 1 for extent in grid.size)))
        edges = (max(1, round(extent * share)) for extent in grid.size)
        stride = as_size("stride", self.stride)
        return replace(self, window=tuple(map(max, edges, stride)))

    def check(self, grid: Grid) -> None:
        """Refuse a grid too large for a box."""
        check_packable(grid.size)

    def pattern(self, grid: Grid) -> Plan:
        """The exact window of every query."""
        window, stride = as_size("window", self.window), as_size("stride", self.stride)
        dilation = as_size("dilation", self.dilation)
        causal = (self.causal,) * 3 if isinstance(self.causal, bool) else self.causal
        windows = tuple(
            axis_window(*axis) for axis in zip(grid.size, window, stride, dilation, causal)
        )
        return Plan.from_windows(grid, windows, tile=self.tile_of(grid), dilation=dilation)


def axis_window(extent: int, window: int, stride: int, dilation: int, causal: bool) -> Window:
    """First and last place, in dilation order, that the query at each place of an axis reads."""
    first, last, begin = [], [], 0
    for group in range(min(dilation, extent)):
        n = -(-(extent - group) // dilation)
        k = min(window, n)
        p = torch.arange(n)
        if causal:
            leader = (p // stride * stride + stride - 1).clamp(max=n - 1)
            start, end = (leader - k + 1).clamp(min=0), p + 1
        else:
            leader = (p // stride * stride + stride // 2).clamp(max=n - 1)
            start = (leader - k // 2).clamp(min=0, max=n - k)
            end = start + k
        first.append(begin + start)
        last.append(begin + end - 1)
        begin += n
    return torch.cat(first), torch.cat(last)
