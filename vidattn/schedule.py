"""Which layers and denoising steps stay dense."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class DenseGuard:
    """The first layers and the first denoising steps, which keep full attention.

    Early layers and early steps decide the layout of a video and suffer most from missing pairs.

    Args:
        layers: how many of the first layers of a transformer: a count, or a fraction of them.
        steps: how many of the first denoising steps: a count, or a fraction of them.

    Raises:
        ValueError: a negative count, a fraction outside 0 to 1, or something that is no number.

    >>> DenseGuard(layers=0.1, steps=3).num_layers(25)
    3
    """

    layers: int | float = 1
    steps: int | float = 0

    def __post_init__(self):
        for name in ("layers", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(
                    f"dense_{name} must be a count such as 2 or a fraction such as 0.1, "
                    f"got {value!r}"
                )
            if not 0 <= value < math.inf or isinstance(value, float) and value > 1:
                raise ValueError(
                    f"dense_{name} must be a count of at least 0, or a fraction between 0.0 and "
                    f"1.0, got {value!r}"
                )

    @property
    def needs_num_steps(self) -> bool:
        """Whether the steps are a fraction, which only the number of steps turns into a count."""
        return isinstance(self.steps, float) and 0 < self.steps < 1

    def num_layers(self, total: int) -> int:
        """Guarded layers among ``total``; a fraction is rounded up."""
        return _count(self.layers, total)

    def num_steps(self, total: int | None) -> int:
        """Guarded steps among ``total``, which a count does without; a fraction is rounded up."""
        return _count(self.steps, total or 0)


def _count(value: int | float, total: int) -> int:
    # 0.1 * 30 and its like must not be rounded up to one more
    return value if isinstance(value, int) else math.ceil(value * total - 1e-9)
