"""Every token reads every token: the yardstick.

A model patched with it attends by PyTorch's own kernels, to the bit. Dense layers, steps and heads
beside other methods run on the faster engine instead, as all of ``exact`` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from vidattn.grid import Grid
from vidattn.plan import Plan
from vidattn.planning.method import Method
from vidattn.planning.reading import Reading


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Full attention over the whole sequence."""

    def plan(self, grid: Grid, reading: Reading | None = None) -> Plan:
        """All pairs, in blocks of 128 tokens."""
        return Plan.dense(grid)
