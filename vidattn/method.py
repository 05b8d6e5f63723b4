"""What a sparse-attention method is: options, and a plan for a grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vidattn.grid import Grid, Size
from vidattn.plan import Plan


@dataclass(frozen=True)
class Method(ABC):
    """A frozen dataclass of options whose defaults are valid on any grid.

    The name of the file it stands in is the name it is registered under.
    """

    # whether plan() needs q and k; such plans are never shared between calls
    reads_content: ClassVar[bool] = False

    @abstractmethod
    def plan(self, grid: Grid, q: Tensor | None = None, k: Tensor | None = None) -> Plan:
        """Who reads whom on ``grid``; ``q`` and ``k`` are (B, H, S, D) if the method reads them."""


def as_size(name: str, value: int | Size, least: int = 1) -> Size:
    """A (t, h, w) tuple from a tuple, or from one value meant for every axis.

    Raises:
        ValueError: not one or three integers, or one of them below ``least``.
    """
    size = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(size) != 3 or not all(isinstance(x, int) and x >= least for x in size):
        raise ValueError(
            f"{name} must be one integer or a (t, h, w) tuple of integers of at least {least}, "
            f"got {value!r}"
        )
    return size
