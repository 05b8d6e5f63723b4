"""Boxes: a rule on pairs of slots that one subtraction decides on all axes at once.

Letters: N slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Box:
    """A predicate: the key's position lies in a box that depends on the query.

    Every position is three small integers packed in one int32 with a guard bit above each, so one
    subtraction compares three axes: ``guard`` survives where no axis borrowed.
    """

    key: Tensor  # (N,) int32, position of each slot
    low: Tensor  # (N,) int32, first visible position of each query slot, guard bits cleared below
    high: Tensor  # (N,) int32, last visible position of each query slot, guard bits set
    guard: int

    @classmethod
    def pack(cls, axes: Sequence[tuple[int, Tensor, Tensor, Tensor]]) -> Box:
        """One box to a slot.

        Args:
            axes: the extent of each, and three (N,) int64 tensors: the place of each slot, and the
                first and the last place that a query in it reads.

        Raises:
            ValueError: too many places for 31 bits.
        """
        check_packable([extent for extent, *_ in axes])
        key, low, high, guard, shift = 0, 0, 0, 0, 0
        for extent, here, first, last in axes:
            key = key + (here << shift)
            low = low + (first << shift)
            high = high + (last << shift)
            shift += (extent - 1).bit_length() + 1
            guard += 1 << (shift - 1)
        return cls(key.int(), (low - guard).int(), (high | guard).int(), guard)

    def visible(self, query_slots: Tensor, key_slots: Tensor) -> Tensor:
        """Bool of the two slot tensors broadcast together."""
        key = self.key[key_slots]
        above = (key - self.low[query_slots]).bitwise_and_(self.high[query_slots] - key)
        return above.bitwise_and_(self.guard) == self.guard

    def num_visible(self, query_slots: Tensor) -> Tensor:
        """(Q,) int64, the positions in the box of each of Q query slots."""
        low, high = self.low[query_slots].long() + self.guard, self.high[query_slots].long()
        count, shift = torch.ones_like(low), 0
        for bit in range(self.guard.bit_length()):
            if self.guard >> bit & 1:
                field = (1 << bit) - (1 << shift)
                count *= ((high & field) >> shift) - ((low & field) >> shift) + 1
                shift = bit + 1
        return count

    def to(self, device: torch.device | str) -> Box:
        """The same box with its tensors on ``device``."""
        return Box(self.key.to(device), self.low.to(device), self.high.to(device), self.guard)


def check_packable(size: Sequence[int]) -> None:
    """Raise ValueError unless a position on the grid fits in 31 bits, guards included."""
    bits = sum((extent - 1).bit_length() + 1 for extent in size)
    if bits > 31:
        raise ValueError(
            f"a grid of {tuple(size)} needs {bits} bits to pack a position, 31 are there: "
            "attend to the video in pieces"
        )
