"""Moves keys in time: keys carry a rotary embedding of their frame, and turn on from it.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """The temporal part of a rotary embedding of interleaved pairs, the first ``dims`` of a head.

    Args:
        dims: even number of dimensions that turn with the frame.
        theta: base of the frequencies.
    """

    dims: int
    theta: float = 10000.0

    def __call__(self, k: Tensor, frames: int) -> Tensor:
        """(B, H, S, D) keys as they would be ``frames`` later, in their own dtype.

        Exact up to one rounding of the dtype: angles are float64, the turn is float32 or better.
        """
        if frames == 0 or self.dims == 0:
            return k
        exponents = torch.arange(0, self.dims, 2, dtype=torch.float64) / self.dims
        angle = frames / self.theta**exponents
        wide = torch.promote_types(k.dtype, torch.float32)
        cos, sin = (x.to(k.device, wide) for x in (angle.cos(), angle.sin()))
        even, odd = k[..., : self.dims].to(wide).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return torch.cat([turned.to(k.dtype), k[..., self.dims :]], -1)
