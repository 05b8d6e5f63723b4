"""What a transformer did in one generation, layer by layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidattn.grid import Grid
from vidattn.pipelines.stopwatch import Stopwatch
from vidattn.schedule import Part


@dataclass
class Tally:
    """What one layer has done in one generation."""

    num_sparse: int = 0
    density_sum: float = 0.0
    num_dense: Counter[str] = field(default_factory=Counter)
    # what the heads followed in the sparse calls
    parts: Counter[tuple[Part, ...]] = field(default_factory=Counter)
    # and what they ran on, and the dense ones
    engines: Counter[str] = field(default_factory=Counter)
    dense_engines: Counter[str] = field(default_factory=Counter)
    time: Stopwatch = field(default_factory=Stopwatch)

    @property
    def num_calls(self) -> int:
        """Calls, sparse and dense."""
        return self.num_sparse + self.num_dense.total()

    def add(
        self,
        start: object,
        device: torch.device,
        density: float | None,
        why: str | None,
        parts: tuple[Part, ...],
        engines: tuple[str, ...],
    ) -> None:
        """Count a call that began at ``start``: sparse with a density, or dense with a reason."""
        self.time.add(start, device)
        if density is None:
            self.num_dense[why] += 1
            self.dense_engines["+".join(engines)] += 1
        else:
            self.num_sparse += 1
            self.density_sum += density
            self.parts[parts] += 1
            self.engines["+".join(engines)] += 1


@dataclass
class Searches:
    """How often one layer's plans were read from content in one generation."""

    num: int = 0
    # the latest step with a search, and (B, H) of each of its searches: the share of attention kept
    step: int = -1
    recalls: list[Tensor] = field(default_factory=list)

    @property
    def recall(self) -> float | None:
        """Share of dense attention that the plans of the latest searches keep, None without."""
        if not self.recalls:
            return None
        return torch.cat([x.flatten() for x in self.recalls]).mean().item()

    def add(self, step: int, recall: Tensor) -> None:
        """Count a search."""
        if step != self.step:
            self.step, self.recalls = step, []
        self.num += 1
        self.recalls.append(recall)


@dataclass
class Diary:
    """What one transformer has done in one generation."""

    num_passes: int = 0
    time: Stopwatch = field(default_factory=Stopwatch)
    grids: set[Grid] = field(default_factory=set)
    # by layer
    tallies: dict[int, Tally] = field(default_factory=lambda: defaultdict(Tally))
    searches: dict[int, Searches] = field(default_factory=lambda: defaultdict(Searches))
