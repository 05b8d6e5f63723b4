"""Head classes: heads that look only near keep little, the others keep a window.

Many heads of a causal video model attend to the last frames and to nothing else (Forcing-KV finds
them in a run beforehand). Here the first chunks of the video are that run: for every head, the
share of its attention that lies on the last frames is measured on some of the queries. Until then
all heads keep the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidattn.planning.method import check_share
from vidattn.streaming.cache import Cache, Part, Site
from vidattn.streaming.frames import FrameCache
from vidattn.streaming.policy import WindowPolicy

# queries of a chunk that are looked at
QUERIES = 64


@dataclass(frozen=True)
class HeadClasses(WindowPolicy):
    """Heads that look only near keep the last frames, the others a sink and a window.

    Args:
        near: frames of the past that a near head keeps beside the sink.
        share: of its attention that a head must have on the chunk itself, those frames and the
            sink to be a near one.
        profile: chunks that are looked at before heads are told apart.
    """

    near: int = 1
    share: float = 0.9
    profile: int = 3

    def __post_init__(self):
        super().__post_init__()
        self.at_least("near", 1)
        self.at_least("profile", 1)
        check_share("share", self.share)

    def make(self, site: Site) -> SplitCache:
        """An empty cache for one layer."""
        return SplitCache(site, self, self.room(site) // site.frame_tokens)


class SplitCache(Cache):
    """One cache for all heads at first, then one for each class of them.

    Args:
        room: frames of the past that a head keeps that looks far.
    """

    def __init__(self, site: Site, policy: HeadClasses, room: int):
        super().__init__(site, (room + site.chunk) * site.frame_tokens)
        self._policy, self._room = policy, room
        self._forget()

    @property
    def classes(self) -> tuple[tuple[int, ...], ...]:
        """Heads of each class; one class as long as they are not told apart."""
        return tuple(tuple(heads) for heads, _ in self._classes)

    @property
    def num_past_tokens(self) -> int:
        return max(cache.num_past_tokens for _, cache in self._classes)

    @property
    def num_bytes(self) -> int:
        return sum(cache.num_bytes for _, cache in self._classes)

    def _forget(self) -> None:
        site, policy = self.site, self._policy
        sink = policy.make_sink(site)
        whole = FrameCache(site, sink, policy.quantise, room=self._room, cap=self.cap)
        self._classes: list[tuple[list[int], FrameCache]] = [(list(range(site.heads)), whole)]
        self._num_profiled, self._total = 0, torch.zeros(site.heads, device=site.device)
        self._mass: Tensor | None = None

    def _read(self, q: Tensor, k: Tensor, v: Tensor, frames: range) -> tuple[Part, ...]:
        if len(self._classes) == 1:
            ((_, cache),) = self._classes
            parts = cache.append(q, k, v, frames)
            self._look(q, parts[0], frames)
            return parts
        parts = ()
        for heads, cache in self._classes:
            own = torch.tensor(heads, device=k.device)
            (part,) = cache.append(q, k[:, own], v[:, own], frames)
            parts += (replace(part, heads=own),)
        return parts

    def _keep(self, k: Tensor, v: Tensor, frames: range) -> None:
        for _, cache in self._classes:
            cache.commit()
        if self._mass is not None:
            self._total += self._mass
            self._num_profiled, self._mass = self._num_profiled + 1, None
            if self._num_profiled == self._policy.profile:
                self._split()

    def _look(self, q: Tensor, part: Part, frames: range) -> None:
        """Measure the share of the attention of each head that lies near."""
        policy = self._policy
        assert part.frames is not None
        far = (part.frames < frames.start - policy.near) & (part.frames >= policy.sink)
        if self._num_profiled >= policy.profile or not bool(far.any()):
            return
        some = q[:, :, :: max(1, q.shape[2] // QUERIES)].float()
        some = some.unflatten(1, (self.site.heads, -1)).flatten(2, 3)
        weights = (some @ part.k.float().mT * q.shape[-1] ** -0.5).softmax(-1)
        self._mass = 1 - (weights * far.to(weights.device)).sum(-1).mean((0, 2))

    def _split(self) -> None:
        """Give each class of heads a cache of its own: the one wait for the device."""
        policy = self._policy
        is_near = (self._total / policy.profile >= policy.share).tolist()
        ((heads, whole),) = self._classes
        near, far = ([head for head in heads if is_near[head] is x] for x in (True, False))
        rooms = (min(self._room, policy.sink + policy.near), self._room)
        self._classes = [
            (own, whole.of_heads(own, room)) for own, room in zip((near, far), rooms) if own
        ]
        if len(self._classes) == 1 and far:
            self._classes = [(far, whole)]
