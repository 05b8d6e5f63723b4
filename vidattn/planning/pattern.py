"""Methods whose plan is a pattern of the grid, the same for every content."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import ClassVar

import torch

from vidattn.grid import Grid, Size
from vidattn.plan import AnyPlan, Plan
from vidattn.planning.content import Content
from vidattn.planning.method import Method, as_size
from vidattn.planning.reading import Reading
from vidattn.planning.tile_size import usual_tile


@dataclass(frozen=True, kw_only=True)
class PatternMethod(Method):
    """A method that reads no content, unless it is to estimate what it does not read.

    Args:
        tile: tokens of one block along (t, h, w); chosen for the grid when not given.
        rectify: add an estimate of what is not read to the output, from queries and keys.

    Raises:
        ValueError: a value out of range.
    """

    # whether blocks decide nothing but the speed, unless it is rectified: then large ones will do
    is_exact: ClassVar[bool] = False

    tile: Size | None = None
    rectify: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.tile is not None:
            as_size("tile", self.tile)

    @property
    def reads_content(self) -> bool:
        """Whether it is rectified."""
        return self.rectify

    @abstractmethod
    def pattern(self, grid: Grid) -> Plan:
        """Who reads whom; one plan for all samples and heads."""

    def tile_of(self, grid: Grid) -> Size:
        """Tokens of one block along (t, h, w)."""
        if self.tile is not None:
            return as_size("tile", self.tile)
        return usual_tile(grid.size, 64 if self.is_exact and not self.rectify else None)

    def plan(self, grid: Grid, reading: Reading | None = None) -> AnyPlan:
        """The pattern, with an estimate of what it does not read if there is to be one."""
        self.check(grid)
        if not self.rectify:
            return self.pattern(grid)
        made = partial(_pattern, self, grid)
        content = Content.of(grid, lambda device: made(device).layout, reading, rectify=True)
        plan = made(content.q.device)
        content = replace(content, scale=content.scale * plan.sharpness)
        return content.by_sample(lambda sample: (sample.rectified(plan), None))[0]


@lru_cache(maxsize=32)
def _pattern(method: PatternMethod, grid: Grid, device: torch.device) -> Plan:
    """A pattern on a device, made once: it keeps what it found out about its blocks."""
    return method.pattern(grid).to(device)
