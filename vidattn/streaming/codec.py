"""How keys and values are kept: as they are, or as small integers with a scale.

Integers follow KIVI (2402.02750) in keeping a scale, and for 4 bits a least value too, for each
group of channels of a token; groups are channels here, for keys too, so that a token can be
written, moved and dropped alone.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Quantise = Literal["none", "int8", "int4"]
Planes = tuple[Tensor, ...]
# channels that share a scale in 4 bits
GROUP = 32


class Codec(ABC):
    """Turns (B, H, S, D) into planes (B, H, S, ...) and back."""

    is_exact = False

    @abstractmethod
    def encode(self, x: Tensor) -> Planes:
        """The planes of a tensor."""

    @abstractmethod
    def decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Tensor:
        """The tensor of planes, of ``head_dim`` channels, up to rounding."""

    def num_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """What one token of one head takes, keys or values."""
        planes = self.encode(torch.zeros(1, 1, 1, head_dim, dtype=dtype))
        return sum(plane.numel() * plane.element_size() for plane in planes)


class _Exact(Codec):
    is_exact = True

    def encode(self, x: Tensor) -> Planes:
        return (x,)

    def decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Tensor:
        return planes[0].to(dtype)


class _Int8(Codec):
    def encode(self, x: Tensor) -> Planes:
        x = x.float()
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-7).half()
        return (x / scale.float()).round().clamp(-127, 127).to(torch.int8), scale

    def decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Tensor:
        whole, scale = planes
        return (whole.float() * scale.float()).to(dtype)


class _Int4(Codec):
    def encode(self, x: Tensor) -> Planes:
        x = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
        low = x.amin(-1, keepdim=True).half()
        scale = ((x.amax(-1, keepdim=True) - low.float()) / 15).clamp_min(1e-7).half()
        whole = ((x - low.float()) / scale.float()).round().clamp(0, 15).to(torch.uint8)
        even, odd = whole.unflatten(-1, (-1, 2)).unbind(-1)
        return (even | odd << 4).flatten(-2), torch.cat([low, scale], -1).flatten(-2)

    def decode(self, planes: Planes, head_dim: int, dtype: torch.dtype) -> Tensor:
        packed, scales = planes
        whole = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
        low, scale = scales.float().unflatten(-1, (-1, 2)).split(1, -1)
        x = whole.float().unflatten(-1, (-1, GROUP)) * scale + low
        return x.flatten(-2)[..., :head_dim].to(dtype)


CODECS: dict[str, Codec] = {"none": _Exact(), "int8": _Int8(), "int4": _Int4()}
