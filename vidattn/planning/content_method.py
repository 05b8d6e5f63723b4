"""Methods that read queries and keys."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout, Size, tile_layout_on
from vidattn.plan import AnyPlan
from vidattn.planning.content import Content
from vidattn.planning.method import Method, as_size
from vidattn.planning.reading import Memory, Reading
from vidattn.planning.tile_size import usual_tile


@dataclass(frozen=True, kw_only=True)
class ContentMethod(Method):
    """A method that reads queries and keys; a subclass says in ``search`` who reads whom.

    Every sample is planned on its own, every block of queries reads at least itself, and ties are
    broken by the number of a block or head.

    Args:
        tile: tokens of one block along (t, h, w); chosen for the grid when not given.
        every: denoising steps that one plan serves, as a count or a fraction of them all; a
            fraction is 1 step where nobody knows how many there are.
        rectify: add an estimate of what is not read to the output.

    Raises:
        ValueError: a value out of range.
    """

    tile: Size | None = None
    every: int | float = 1
    rectify: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.tile is not None:
            as_size("tile", self.tile)
        share = isinstance(self.every, float) and 0 < self.every <= 1
        if not (share or type(self.every) is int and self.every >= 1):
            raise ValueError(
                "every must be a number of steps of at least 1, or a fraction of them above 0.0 "
                f"and at most 1.0, got {self.every!r}: 1 plans anew at every step"
            )

    @property
    def reads_content(self) -> bool:
        """Always."""
        return True

    @abstractmethod
    def search(self, content: Content) -> tuple[AnyPlan, Tensor | None]:
        """The plan of one sample, with what the next search in its place is to remember, if any.

        ``content.plan`` makes a plan from the blocks to read; ``content.memory`` is what the search
        before this one left.
        """

    def tile_of(self, grid: Grid) -> Size:
        """Tokens of one block along (t, h, w)."""
        return usual_tile(grid.size) if self.tile is None else as_size("tile", self.tile)

    def layout(self, grid: Grid, device: torch.device) -> Layout:
        """The blocks that ``search`` is given."""
        return tile_layout_on(grid, self.tile_of(grid), device)

    def plan(self, grid: Grid, reading: Reading | None = None) -> AnyPlan:
        """Who reads whom, for every sample and head of a reading on its own."""
        return self.plan_with_memory(grid, reading)[0]

    def plan_with_memory(
        self, grid: Grid, reading: Reading | None = None
    ) -> tuple[AnyPlan, Memory]:
        """The plan, with what the searches remember."""
        self.check(grid)
        content = Content.of(grid, partial(self.layout, grid), reading, rectify=self.rectify)
        return content.by_sample(self.search)

    def keeps(self, made: int, now: int, num_steps: int | None) -> bool:
        """Whether fewer than ``every`` steps have gone by."""
        steps = self.every
        if isinstance(steps, float):
            # 0.4 * 50 and its like must not be rounded up to one more
            steps = math.ceil(steps * (num_steps or 0) - 1e-9) or 1
        return now < made + steps
