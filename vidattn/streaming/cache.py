"""The keys and values that one attention layer has seen, and what the next chunk reads of them.

Letters: B batch, H key heads, S tokens, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vidattn.streaming.rotation import Rotation


@dataclass(frozen=True)
class Site:
    """The attention layer that a cache serves.

    Args:
        heads: key heads, H.
        frame_tokens: tokens of one latent frame.
        chunk: the most latent frames that are appended together.
        rotation: moves keys in time.
        num_caches: caches that share a limit in bytes: one for each layer, twice under guidance.
        layer: its number in the model.
        model: what tells the weights of the model from those of others, "" where nobody knows.
    """

    batch: int
    heads: int
    head_dim: int
    frame_tokens: int
    chunk: int
    dtype: torch.dtype
    device: torch.device
    rotation: Rotation
    num_caches: int = 1
    layer: int = 0
    model: str = ""

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the longest chunk."""
        return self.chunk * self.frame_tokens


@dataclass(frozen=True, eq=False)
class Part:
    """What some heads read.

    Args:
        k: (B, H, S, D) keys.
        v: (B, H, S, D) values.
        frames: (1, 1, S) or (B, H, S) int, the latent frame that each key stands for; None for
            words.
        weight: (B|1, H|1, S) float, how many tokens a key stands for, 0 where there is none; None
            where each stands for one.
        heads: (H,) int64, which key heads of the layer these are; None for all of them.
    """

    k: Tensor
    v: Tensor
    frames: Tensor | None = None
    weight: Tensor | None = None
    heads: Tensor | None = None


class Cache(ABC):
    """Keys and values of one layer, for one of the passes of a guided model.

    A chunk is appended once for each of its noisy passes, where every call replaces the one before,
    and once for its clean pass, which ``commit`` then makes part of the past. All bookkeeping is in
    integers on the host, and the shapes of what is read do not depend on what the tensors hold.

    Args:
        cap: tokens of a head that are never exceeded, the chunk that is being made included; None
            for no limit.
    """

    def __init__(self, site: Site, cap: int | None):
        self.site, self.cap = site, cap
        # memory that is never exceeded either, None for no limit
        self.cap_bytes: int | None = None
        self._staged: tuple[Tensor, Tensor, range] | None = None

    def append(self, q: Tensor, k: Tensor, v: Tensor, frames: range) -> tuple[Part, ...]:
        """What the queries of a chunk read: the past, and the chunk itself.

        Args:
            q: (B, Hq, S, D) queries, for policies that look at them; Hq is a multiple of H.
            k: (B, H, S, D) keys, rotated to their frames.
            v: (B, H, S, D) values.
            frames: of the video, which the S tokens are made of.

        Returns:
            Parts that cover each head once; they hold until the next call.
        """
        # under autocast they may be narrower than what is kept
        k, v = k.to(self.site.dtype), v.to(self.site.dtype)
        self._staged = (k, v, frames)
        with self._plainly():
            parts = self._read(q, k, v, frames)
        self._check()
        return parts

    def commit(self) -> None:
        """Make the chunk that was appended last part of the past."""
        assert self._staged is not None, "nothing was appended"
        (k, v, frames), self._staged = self._staged, None
        with self._plainly():
            self._keep(k, v, frames)
        self._check()

    def _plainly(self) -> torch.autocast:
        """In the dtypes that are asked for."""
        return torch.autocast(self.site.device.type, enabled=False)

    def _check(self) -> None:
        tokens, size = self.num_tokens, self.num_bytes
        assert self.cap is None or tokens <= self.cap, (tokens, self.cap)
        assert self.cap_bytes is None or size <= self.cap_bytes, (size, self.cap_bytes)

    def reset(self) -> None:
        """Forget everything, as for a new video."""
        self._staged = None
        self._forget()

    @property
    def num_tokens(self) -> int:
        """Keys that the next chunk reads of the past, and those of a chunk that was appended."""
        staged = 0 if self._staged is None else len(self._staged[2]) * self.site.frame_tokens
        return self.num_past_tokens + staged

    @property
    @abstractmethod
    def num_past_tokens(self) -> int:
        """Slots of keys that the next chunk reads of the past, the most over the heads."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that is held for the past."""

    @abstractmethod
    def _read(self, q: Tensor, k: Tensor, v: Tensor, frames: range) -> tuple[Part, ...]:
        """See ``append``."""

    @abstractmethod
    def _keep(self, k: Tensor, v: Tensor, frames: range) -> None:
        """See ``commit``."""

    @abstractmethod
    def _forget(self) -> None:
        """See ``reset``."""
