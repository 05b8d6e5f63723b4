"""What a sparse-attention method is: options, and a plan for a grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import ClassVar, get_type_hints

from torch import Tensor

from vidattn.config import convert
from vidattn.grid import Grid, Size
from vidattn.head_plan import HeadPlan
from vidattn.plan import Plan
from vidattn.steady import steadily


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A frozen dataclass of options, given by keyword, whose defaults are valid on any grid.

    The name of the file it stands in is the name it is registered under.

    Raises:
        ValueError: an option of another type than its hint.
    """

    # whether plan() needs q and k; see vidattn/content.py and vidattn/pattern.py
    reads_content: ClassVar[bool] = False
    # whether what a head reads hangs on its number, so that plan() must see all heads of a layer
    numbers_heads: ClassVar[bool] = False

    def __init_subclass__(cls, **options: object):
        super().__init_subclass__(**options)
        if "plan" in cls.__dict__:
            # what is read must not depend on autocast, inference mode or the default dtype
            cls.plan = steadily(cls.plan)

    def __post_init__(self):
        hints = _hints(type(self))
        for field in fields(self):
            convert(getattr(self, field.name), hints[field.name], field.name)

    @abstractmethod
    def plan(self, grid: Grid, q: Tensor | None = None, k: Tensor | None = None) -> Plan | HeadPlan:
        """Who reads whom on ``grid``.

        A method that reads content is given ``q`` (B, H, S, D) and ``k`` (B, K, S, D), H a multiple
        of K, plans every sample and head of ``q`` on its own, and may be told more (see
        ``ContentMethod.plan``).
        """

    def check(self, grid: Grid) -> None:  # noqa: B027
        """Raise ValueError where ``plan`` would, whatever it is given, because of the grid.

        It takes no tensors and little time, so a run can be refused before anything is loaded.
        """

    def at(self, layer: int) -> Method:
        """The method as a layer, counted from 0, uses it: the same one unless it says otherwise."""
        return self

    def in_step(self, step: int) -> Method:
        """The method as a denoising step, counted from 0, uses it: the same one by default."""
        return self

    def with_density(self, density: float, grid: Grid) -> Method | None:
        """The method set to keep about a share of the video pairs of a grid, None if it cannot be.

        Raises:
            ValueError: a share out of range.
        """
        if any(field.name == "density" for field in fields(self)):
            return replace(self, density=density)
        return None

    def by_head(self) -> Method:
        """The method with nothing shared among the heads of a layer: the same one by default."""
        return self

    def misfit(self, transformer: str, layers: int, heads: int | None) -> str | None:
        """Why a method that was prepared for one model cannot serve another, None where it can.

        Args:
            transformer: name of the model's class.
            layers: how many self-attentions over the video it has.
            heads: of each of them; None where nobody knows.
        """
        return None

    def keeps(self, made: int, now: int, num_steps: int | None) -> bool:
        """Whether a plan read from content at denoising step ``made`` still serves at step ``now``.

        Steps count from 0; ``num_steps`` is None where nobody knows how many there will be.
        """
        return False


@lru_cache(maxsize=64)
def _hints(cls: type) -> dict[str, object]:
    return get_type_hints(cls)


def as_size(name: str, value: int | Size, least: int = 1) -> Size:
    """A (t, h, w) tuple from a tuple, or from one value meant for every axis.

    Raises:
        ValueError: not one or three integers, or one of them below ``least``.
    """
    size = tuple(value) if isinstance(value, tuple | list) else (value,) * 3
    if len(size) != 3 or not all(type(x) is int and x >= least for x in size):
        raise ValueError(
            f"{name} must be one integer or a (t, h, w) tuple of integers of at least {least}, "
            f"got {value!r}"
        )
    return size


def check_share(name: str, value: float | None) -> None:
    """Raise ValueError unless an option is a share above 0 and at most 1, or None."""
    if value is not None and not 0 < value <= 1:
        raise ValueError(
            f"{name} must be above 0 and at most 1, got {value!r}: it is a share, 0.25 is a quarter"
        )
