"""What a sparse-attention method is: options, and a plan for a grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import Field, dataclass, field, fields, replace
from functools import lru_cache
from typing import ClassVar, get_type_hints

from vidattn.grid import Grid, Size
from vidattn.plan import AnyPlan
from vidattn.planning.reading import Memory, Reading
from vidattn.support.config import convert
from vidattn.support.steady import steadily


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A frozen dataclass of options, given by keyword, whose defaults are valid on any grid.

    The name of the file it stands in is the name it is registered under.

    Raises:
        ValueError: an option of another type than its hint.
    """

    # whether what a head reads hangs on its number, so that plan() must see all heads of a layer
    numbers_heads: ClassVar[bool] = False

    def __init_subclass__(cls, **options: object):
        super().__init_subclass__(**options)
        # what is read must not depend on autocast, inference mode or the default dtype
        for name in {"plan", "plan_with_memory"} & cls.__dict__.keys():
            setattr(cls, name, steadily(getattr(cls, name)))

    def __post_init__(self):
        hints = _hints(type(self))
        for each in fields(self):
            convert(getattr(self, each.name), hints[each.name], each.name)

    @classmethod
    def options(cls) -> dict[str, Field]:
        """The fields that a caller may set, by name: all but those made by ``run_state``."""
        return {x.name: x for x in fields(cls) if x.metadata.get("is_option", True)}

    @property
    def reads_content(self) -> bool:
        """Whether ``plan`` needs a reading."""
        return False

    @abstractmethod
    def plan(self, grid: Grid, reading: Reading | None = None) -> AnyPlan:
        """Who reads whom on ``grid``, for every sample and head of a reading on its own.

        Raises:
            ValueError: a reading that is missing or does not fit the grid, or a grid that the
                method cannot serve.
        """

    def plan_with_memory(
        self, grid: Grid, reading: Reading | None = None
    ) -> tuple[AnyPlan, Memory]:
        """The plan, with what the next plan for the same place starts from (``Reading.last``)."""
        return self.plan(grid, reading), ()

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
        return replace(self, density=density) if "density" in self.options() else None

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


def run_state(default: int) -> int:
    """A field that ``Method.at`` or ``Method.in_step`` sets as a model runs, so no option."""
    return field(default=default, metadata={"is_option": False})


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
