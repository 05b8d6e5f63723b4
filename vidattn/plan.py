"""A plan: which key blocks every query block reads, resolved for one grid.

Letters: B batch, H heads, S queries, Sk keys, N slots, n slots to a block, nv video blocks, nb all
blocks, nvk video blocks of keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout, Size, raster_layout, tile_layout
from vidattn.kernels.quantise import PRECISIONS
from vidattn.listing import Rule, Window, list_blocks, list_rule, list_windows
from vidattn.pairs import Pairs
from vidattn.support.registry import unknown

# what picks some samples, or heads, out of (B, H, ...)
Index = slice | Tensor
Kind = TypeVar("Kind", bound="AnyPlan")


class AnyPlan(ABC):
    """Who reads whom: a ``Plan``, or a ``HeadPlan`` where the heads have several.

    ``mask()`` defines what ``attend`` computes. What works on one plan after the other loops over
    ``parts()``, and puts what it found in order with ``put_back``.
    """

    grid: Grid
    # whether this is attention of every token to every key, and nothing else
    is_dense: bool
    # whether every sample has plans of its own
    by_sample: bool = False

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the tensors are."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """B, or 1 where all samples share what is read."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """H, or 1 where all heads share what is read."""

    @property
    @abstractmethod
    def key_grid(self) -> Grid:
        """Where the keys sit: ``grid`` where they are the queries' own tokens."""

    @property
    @abstractmethod
    def density(self) -> float:
        """Kept pairs over all pairs of video tokens, mean over the heads, counted exactly."""

    @abstractmethod
    def density_of(self, queries: Tensor) -> float:
        """``density`` of the pairs of (S,) bool queries, over the pairs of all."""

    @property
    @abstractmethod
    def visited_density(self) -> float:
        """Pairs in visited blocks over all pairs of video tokens: what an engine has to compute."""

    @abstractmethod
    def parts(self) -> list[tuple[Plan, Index, Index]]:
        """Every plan with the samples and the heads that follow it.

        ``x[samples, heads]`` are theirs of (B, H, ...), in the shape that the plan is for: where
        samples have plans of their own, (n, 1, ...), each head as a sample of one head.
        """

    @abstractmethod
    def put_back(self, found: Sequence[Tensor]) -> Tensor:
        """(B, H, ...) from what belongs to each of ``parts()``, each of the shape of its part."""

    @abstractmethod
    def check_counts(self, num_samples: int, num_heads: int) -> None:
        """Raise ValueError unless it is for so many samples and heads."""

    def check_square(self, what: str) -> None:
        """Raise ValueError unless the keys are the queries' own tokens, as ``what`` needs."""
        if self.key_grid is not self.grid:
            keys = f"keys are other tokens than the queries, those of {self.key_grid}"
            raise ValueError(f"{what} is of a plan for one grid: here {keys}")

    @abstractmethod
    def mask(self) -> Tensor:
        """(B|1, H|1, S, Sk) bool in sequence order, query by key; for tests and pictures."""

    @abstractmethod
    def summary(self) -> dict[str, float | int | str]:
        """Figures worth printing: densities, blocks and memory."""

    def of_queries(self: Kind, wanted: Callable[[Layout], Tensor]) -> Kind:
        """The plan of query blocks with any of (S,) bool tokens, by layout; others read nothing."""
        return self._each(lambda x: replace(x, lists=x.lists.of_queries(wanted(x.layout))))

    def with_precision(self: Kind, precision: str | None) -> Kind:
        """The same plan with its products in another precision, which has no gradient but for None.

        "int8_qk" multiplies queries and keys as 8-bit integers, "int8" weights and values too,
        "int8_qk_int4_pv" those as 4-bit integers, simulated by the "torch" engine.
        """
        return self._each(lambda plan: replace(plan, precision=precision))

    def unsharpened(self: Kind) -> Kind:
        """The plan with the scale of dense attention; itself where it has that."""
        return self._each(lambda x: x if x.sharpness == 1 else replace(x, sharpness=1.0))

    @abstractmethod
    def of_row(self, sample: int, head: int) -> Plan:
        """The plan that one head of one sample follows, with one list (see ``select_heads``)."""

    def select_heads(self: Kind, heads: Sequence[int]) -> Kind:
        """The plan of some heads, in ascending order, numbered anew.

        Raises:
            ValueError: a head that the plan does not have.
        """
        if wrong := [x for x in heads if x < 0 or x >= self.num_heads > 1]:
            raise ValueError(f"the plan is for {self.num_heads} heads, got head {wrong[0]}")
        return self._of_heads(heads)

    def to(self: Kind, device: torch.device | str) -> Kind:
        """The same plan with its tensors on ``device``: itself, or a copy that is made once."""
        # "cuda" is the GPU at hand, with its number
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        if device not in self._copies:
            self._copies[device] = self._copy_on(device)
        return self._copies[device]

    @cached_property
    def _copies(self: Kind) -> dict[torch.device, Kind]:
        """What ``to`` made: what engines learn of a plan once is kept with its tensors."""
        return {}

    @abstractmethod
    def _each(self: Kind, change: Callable[[Plan], Plan]) -> Kind: ...

    @abstractmethod
    def _of_heads(self: Kind, heads: Sequence[int]) -> Kind: ...

    @abstractmethod
    def _copy_on(self: Kind, device: torch.device) -> Kind: ...


@dataclass(frozen=True, eq=False)
class Plan(Pairs, AnyPlan):
    """Pairs of tokens that read each other, and how (see ``Pairs``)."""

    # compensation of what is not read: out = gain * out + rest @ (means of v over key blocks)
    gain: Tensor | None = None  # (B|1, H|1, nb), per query block
    rest: Tensor | None = None  # (B|1, H|1, nb, nb), query block by key block
    sharpness: float = 1.0  # factor of the scale of the scores
    precision: str | None = None  # of the products (see ``with_precision``)
    is_dense: bool = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        if self.precision is not None and self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.keys is not None and (self.rest is not None or self.precision is not None):
            raise ValueError(
                "a plan in which the keys are other tokens than the queries has neither an "
                "estimate of what is not read (rest) nor a precision of its own: leave them out"
            )
        lists = self.lists
        # found out now: a compiler that traces attention could not
        is_plain = all(x is None for x in (self.gain, self.rest, self.precision))
        is_whole = lists.key_block.numel() == lists.num_rows * lists.num_key_blocks
        is_dense = is_plain and is_whole and (lists.order.is_meta or lists.num_partial == 0)
        object.__setattr__(self, "is_dense", is_dense)

    @property
    def device(self) -> torch.device:
        return self.layout.order.device

    def parts(self) -> list[tuple[Plan, Index, Index]]:
        return [(self, slice(None), slice(None))]

    def put_back(self, found: Sequence[Tensor]) -> Tensor:
        return found[0]

    def check_counts(self, num_samples: int, num_heads: int) -> None:
        if self.num_samples not in (1, num_samples) or self.num_heads not in (1, num_heads):
            raise ValueError(
                f"the plan is for {self.num_samples} samples and {self.num_heads} heads, q has "
                f"{num_samples} and {num_heads}: each must be equal, or 1 in the plan"
            )

    def summary(self) -> dict[str, float | int | str]:
        beside = [x for x in (self.gain, self.rest) if x is not None]
        return {
            "num_tokens": self.grid.num_tokens,
            **({} if self.keys is None else {"num_keys": self.key_grid.num_tokens}),
            "density": self.density,
            "visited_density": self.visited_density,
            "block": self.layout.block,
            "num_blocks": self.lists.key_block.numel(),
            "num_partial_blocks": self.lists.num_partial,
            "precision": self.precision or "of the inputs",
            "memory_mib": sum(x.nbytes for x in (self.lists, *beside)) / 2**20,
        }

    def of_row(self, sample: int, head: int) -> Plan:
        plan = self.select_heads([head])
        lists = plan.lists
        if lists.batch > 1:
            lists = lists.of_heads(torch.zeros(1, dtype=torch.long, device=plan.device), sample)
        return plan._with_estimates(lambda x: x if len(x) == 1 else x[sample, None], lists=lists)

    def _each(self, change: Callable[[Plan], Plan]) -> Plan:
        return change(self)

    def _of_heads(self, heads: Sequence[int]) -> Plan:
        is_shared = self.num_heads == 1
        if is_shared and self.gain is None and self.rest is None:
            return self
        index = torch.tensor(heads, device=self.device)
        lists = self.lists if is_shared else self.lists.of_heads(index)
        return self._with_estimates(lambda x: x if x.shape[1] == 1 else x[:, index], lists=lists)

    def _copy_on(self, device: torch.device) -> Plan:
        lists, keys = self.lists.to(device), self.keys
        if keys is not None:
            keys = keys[0], replace(keys[1], order=lists.key_order)
        layout = replace(self.layout, order=lists.order)
        return self._with_estimates(lambda x: x.to(device), lists=lists, layout=layout, keys=keys)

    def _with_estimates(self, change: Callable[[Tensor], Tensor], **fields: object) -> Plan:
        gain, rest = (None if x is None else change(x) for x in (self.gain, self.rest))
        return replace(self, gain=gain, rest=rest, **fields)

    @classmethod
    def dense(cls, grid: Grid, keys: Grid | int | None = None, *, block: int = 128) -> Plan:
        """A plan in which every query reads every key.

        Args:
            keys: where keys sit, or how many there are, that are other tokens than the queries.
            block: tokens to a block.
        """
        layout, other = raster_layout(grid, block), None
        if keys is not None:
            keys = keys if isinstance(keys, Grid) else Grid(1, 1, keys)
            other = keys, raster_layout(keys, block)
        columns = layout if other is None else other[1]
        shape = (1, 1, layout.num_video_blocks, columns.num_video_blocks)
        return cls.from_blocks(grid, layout, torch.ones(shape, dtype=torch.bool), keys=other)

    @classmethod
    def from_blocks(
        cls,
        grid: Grid,
        layout: Layout,
        blocks: Tensor,
        *,
        gain: Tensor | None = None,
        rest: Tensor | None = None,
        keys: tuple[Grid, Layout] | None = None,
    ) -> Plan:
        """A plan of whole blocks; text reads, and is read by, everything.

        Args:
            blocks: (B|1, H|1, nv, nvk) bool, whether a query block reads a key block of the video.
            gain, rest, keys: see the fields.

        Raises:
            ValueError: ``blocks`` does not fit the layout.
        """
        lists = list_blocks(layout, blocks, None if keys is None else keys[1])
        return cls(grid, layout, lists, gain, rest, keys=keys)

    @classmethod
    def from_windows(
        cls, grid: Grid, windows: tuple[Window, Window, Window], *, tile: Size, dilation: Size
    ) -> Plan:
        """An exact plan of windows along the axes (see ``list_windows``) in blocks of a tile."""
        layout = tile_layout(grid, tile, dilation)
        return cls(grid, layout, list_windows(grid, layout, windows, tile, dilation))

    @classmethod
    def from_rule(
        cls, grid: Grid, layout: Layout, rule: Rule, *, keys: tuple[Grid, Layout] | None = None
    ) -> Plan:
        """An exact plan of what a rule says about two positions (see ``list_rule``)."""
        return cls(grid, layout, list_rule(grid, layout, rule, keys), keys=keys)
