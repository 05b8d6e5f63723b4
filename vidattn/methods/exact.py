"""Every token reads every token, on the fastest engine: as good as dense, and never slower.

On a CPU that is our engine in C++ where it has measured faster than PyTorch's attention for the
dtype, the head dim and the length at hand, and PyTorch's otherwise; results differ from those of
``dense`` by rounding. It is the first thing to try, and what sparse attention has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass

from vidattn.methods.dense import Dense


@dataclass(frozen=True, kw_only=True)
class Exact(Dense):
    """Full attention over the whole sequence, by whichever engine is faster."""
