"""The first frames of a video, which every later chunk reads, and where in time they stand.

A model that was trained on short videos has never seen its first frame a thousand frames back, so
that the sink may follow the window, as in Rolling Forcing (2509.25161): its keys are turned on.

Letters: B batch, H key heads, S tokens, D head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vidattn.streaming.cache import Site

# where a sink stands: in its true place, right before the window, or at most so many frames back
SinkAt = Literal["absolute", "relative"] | int


class Sink:
    """Keeps the sink as it was, wherever it is read.

    Args:
        frames: latent frames of it.
        alpha: share of itself that the sink keeps when a frame is folded into it; None where
            nothing is.
    """

    def __init__(self, site: Site, frames: int, at: SinkAt, alpha: float | None = None):
        self.site, self.frames, self.at, self.alpha = site, frames, at, alpha
        self._k: list[Tensor] = []
        self._v: list[Tensor] = []
        self._offset = 0

    @property
    def moves(self) -> bool:
        """Whether what is read of the sink ever changes."""
        return self.frames > 0 and (self.at != "absolute" or self.alpha is not None)

    @property
    def num_bytes(self) -> int:
        """Memory of the sink as it was, once it is whole."""
        site = self.site
        each = torch.promote_types(site.dtype, torch.float32).itemsize * site.head_dim
        tokens = self.frames * site.frame_tokens * site.heads * site.batch
        return 2 * each * tokens if self.moves else 0

    def of_heads(self, heads: list[int], site: Site) -> Sink:
        """The part of the sink that belongs to some heads.

        Args:
            site: what the layer is for them.
        """
        found = Sink(site, self.frames, self.at, self.alpha)
        found._k, found._v = ([x[:, heads] for x in kept] for kept in (self._k, self._v))
        return found

    def take(self, frame: int, k: Tensor, v: Tensor) -> None:
        """Be told (B, H, S, D) keys and values of one frame of a new video."""
        if self.moves and frame < self.frames:
            # steps of a thousandth would be lost in half precision
            wide = torch.promote_types(k.dtype, torch.float32)
            self._k.append(k.to(wide, copy=True))
            self._v.append(v.to(wide, copy=True))

    def fold(self, frame: int, k: Tensor, v: Tensor) -> None:
        """Let a frame that leaves the window change the sink, by an exponential moving average."""
        if self.alpha is None:
            return
        place = frame % self.frames
        k = self.site.rotation(k.to(self._k[place].dtype), place - frame)
        self._k[place].lerp_(k, 1 - self.alpha)
        self._v[place].lerp_(v.to(self._v[place].dtype), 1 - self.alpha)

    def place(self, oldest: int, now: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values as they are read from now on, None where they stay what they are.

        Args:
            oldest: frame of the window.
            now: the frame that comes next.
        """
        if not self.moves or len(self._k) < self.frames:
            return None
        offset = self.offset(oldest, now)
        if offset == self._offset and self.alpha is None:
            return None
        self._offset = offset
        k, v = torch.cat(self._k, 2), torch.cat(self._v, 2)
        return self.site.rotation(k, offset).to(self.site.dtype), v.to(self.site.dtype)

    def offset(self, oldest: int, now: int) -> int:
        """How many frames later than in truth the sink stands."""
        if self.at == "absolute":
            return 0
        adjacent = max(0, oldest - self.frames)
        return adjacent if self.at == "relative" else min(adjacent, max(0, now - self.at))

    def reset(self) -> None:
        """Forget the video."""
        self._k, self._v, self._offset = [], [], 0
