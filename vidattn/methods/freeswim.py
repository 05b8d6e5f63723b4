"""FreeSwim's window: at a resolution above training, a token reads the field it was trained on.

Source: Wu et al., "FreeSwim: Revisiting Sliding-Window Attention Mechanisms for Training-Free
Ultra-High-Resolution Video Generation", arXiv:2511.14712. The window has the rows and columns of
the training resolution and all frames, and moves inward at the edges. The scores are sharpened to
sqrt(log_M(2 M) / D), M being the tokens of a frame at training. The authors' code reads one row
and one column more where those are even, to have a middle. This is the window path alone; the
second path, whose full attention steers the cross-attention, is no plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from vidattn.grid import Grid
from vidattn.kernels.box import check_packable
from vidattn.methods.neighborhood import axis_window
from vidattn.plan import Plan
from vidattn.planning.pattern import PatternMethod


@dataclass(frozen=True, kw_only=True)
class FreeSwim(PatternMethod):
    """All frames of a window as large as the frames that the model was trained on.

    Args:
        window: rows and columns of the training resolution in tokens; (30, 52) is 480 x 832 of Wan.
        sharpen: whether to sharpen the scores, which is done only on grids above the window.

    Raises:
        ValueError: a value out of range.
    """

    is_exact: ClassVar[bool] = True

    window: tuple[int, int] = (30, 52)
    sharpen: bool = True

    def __post_init__(self):
        super().__post_init__()
        if min(self.window) < 1:
            raise ValueError(
                f"window must be the (rows, columns) of the training resolution, got {self.window}"
            )

    def check(self, grid: Grid) -> None:
        """Refuse a grid too large for a box."""
        check_packable(grid.size)

    def with_density(self, density: float, grid: Grid) -> FreeSwim:
        """A window of the shape of a frame; unsharpened, as the grid is taken to be trained for."""
        rows, columns = (max(1, round(extent * density**0.5)) for extent in (grid.h, grid.w))
        return replace(self, window=(rows, columns), sharpen=False)

    def pattern(self, grid: Grid) -> Plan:
        """The exact window of every query."""
        window = (grid.t, *self.window)
        windows = tuple(axis_window(*axis, 1, 1, False) for axis in zip(grid.size, window))
        plan = Plan.from_windows(grid, windows, tile=self.tile_of(grid), dilation=(1, 1, 1))
        is_above = grid.h > self.window[0] or grid.w > self.window[1]
        if not (self.sharpen and is_above):
            return plan
        return replace(plan, sharpness=sharpness(math.prod(self.window)))


def sharpness(num_tokens: int) -> float:
    """sqrt(log_M(2 M)) of the M tokens of a frame at training, 1 for a frame of one token.

    >>> round(sharpness(30 * 52), 4)
    1.0461
    """
    if num_tokens == 1:
        return 1.0
    return math.sqrt(math.log(2 * num_tokens) / math.log(num_tokens))
