"""What a method is told of one call, and what it leaves for the next plan of the same place.

Letters: B batch, H query heads, K key heads, S tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# what a method remembers of each sample that it planned for, nothing where it remembers nothing
Memory = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """The queries and keys that a method may read.

    Args:
        q: (B, H, S, D).
        k: (B, K, S, D), H a multiple of K.
        scale: factor of the scores; D ** -0.5 by default.
        key_mask: (B, S) bool, False for keys that nobody may read, such as padded text.
        last: what the same method left when it planned for the same place (layer and pass) at an
            earlier step.
    """

    q: Tensor
    k: Tensor
    scale: float | None = None
    key_mask: Tensor | None = None
    last: Memory = ()

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.q.device
