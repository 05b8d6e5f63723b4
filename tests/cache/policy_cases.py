"""Layers and chunks for the tests of cache policies."""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.streaming.attention import read
from vidattn.streaming.cache import Cache, Site
from vidattn.streaming.rotation import Rotation

B, H, D, TOKENS, CHUNK = 2, 3, 20, 5, 2


def site(**changes: object) -> Site:
    """A layer with an awkward size."""
    given = {
        "batch": B, "heads": H, "head_dim": D, "frame_tokens": TOKENS, "chunk": CHUNK,
        "dtype": torch.float32, "device": torch.device("cpu"), "rotation": Rotation(8),
    }  # fmt: skip
    return Site(**{**given, **changes})


class Film:
    """A cache that is fed with chunks, beside everything that it was ever given."""

    def __init__(self, cache: Cache, group: int = 1):
        self.cache, self.site, self.group = cache, cache.site, group
        self.k, self.v, self.frames = [], [], []

    def step(self, noisy: int = 1) -> Tensor:
        """Append a chunk, noisy first and then clean, commit it; the outputs of the clean pass."""
        site, first = self.site, len(self.frames)
        frames = range(first, first + site.chunk)
        shape = (site.batch, site.heads, site.chunk_tokens, site.head_dim)
        for _ in range(noisy):
            self.cache.append(*(torch.randn(shape) * 3 for _ in range(3)), frames)
        # the same of every film, whatever ran before
        torch.manual_seed(first)
        q = torch.randn(site.batch, site.heads * self.group, *shape[2:])
        k, v = torch.randn(shape), torch.randn(shape)
        self.parts = self.cache.append(q, k, v, frames)
        out = read(q, self.parts, site.heads, None)
        self.q = q
        self.k.append(k)
        self.v.append(v)
        self.frames += frames
        self.cache.commit()
        return out

    def seen(self, visible: list[int], place=lambda frame: frame) -> Tensor:
        """What the queries of the last chunk read of some frames, each moved to its place."""
        tokens = self.site.frame_tokens
        k, v = torch.cat(self.k, 2), torch.cat(self.v, 2)
        pick = [slice(frame * tokens, (frame + 1) * tokens) for frame in visible]
        keys = [self.site.rotation(k[:, :, x], place(f) - f) for f, x in zip(visible, pick)]
        k = torch.cat(keys, 2).double().repeat_interleave(self.group, 1)
        v = torch.cat([v[:, :, x] for x in pick], 2).double().repeat_interleave(self.group, 1)
        scores = self.q.double() @ k.mT / self.site.head_dim**0.5
        return (scores.softmax(-1) @ v).float()
