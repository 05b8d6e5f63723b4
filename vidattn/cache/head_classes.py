"""Head classes: heads that look only near keep little, the others keep a window.

Many heads of a causal video model attend to the last frames and to nothing else. Forcing-KV finds
them in a run beforehand, which scripts/profile_heads.py does: for every head, the share of its
attention that lies on the last frames is measured on some of the queries, and written into a file.
Without one the first chunks of the video are that run, and until then all heads keep the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vidattn.planning.method import check_share
from vidattn.streaming.cache import Cache, Part, Site
from vidattn.streaming.frames import FrameCache
from vidattn.streaming.policy import WindowPolicy
from vidattn.support.config import build, read_yaml

# queries of a chunk that are looked at
QUERIES = 64


@dataclass(frozen=True)
class HeadClasses(WindowPolicy):
    """Heads that look only near keep the last frames, the others a sink and a window.

    Args:
        near: frames of the past that a near head keeps beside the sink.
        share: of its attention that a head must have on the chunk itself, those frames and the
            sink to be a near one.
        profile: chunks that are looked at before heads are told apart, without a file.
        file: what scripts/profile_heads.py wrote for the model, with the same near and sink.
    """

    near: int = 1
    share: float = 0.9
    profile: int = 3
    file: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.at_least("near", 1)
        self.at_least("profile", 1)
        check_share("share", self.share)

    def make(self, site: Site) -> SplitCache:
        """An empty cache for one layer."""
        shares = None if self.file is None else self._shares(site)
        return SplitCache(site, self, self.room(site) // site.frame_tokens, shares)

    def _shares(self, site: Site) -> tuple[float, ...]:
        """What the file says of the heads of a layer.

        Raises:
            ValueError: it was made for another model, or with other options.
        """
        assert self.file is not None
        found = load_profile(Path(self.file))
        if site.model not in ("", found.model):
            raise ValueError(
                f"'{self.file}' is a profile of the heads of another model, {found.model}, and "
                f"this is {site.model}: make one with scripts/profile_heads.py"
            )
        if (found.near, found.sink) != (self.near, self.sink):
            raise ValueError(
                f"'{self.file}' was made with near={found.near},sink={found.sink}, and this policy "
                f"has near={self.near},sink={self.sink}: give those of the file, or make another"
            )
        if site.layer >= len(found.shares) or len(found.shares[site.layer]) != site.heads:
            raise ValueError(
                f"'{self.file}' has {len(found.shares)} layers, and layer {site.layer} of "
                f"{site.heads} heads is not among them: make one with scripts/profile_heads.py"
            )
        return found.shares[site.layer]


@dataclass(frozen=True)
class HeadProfile:
    """Which heads of a model look only near.

    Args:
        model: what tells its weights from those of others.
        near, sink: options of the policy that it was made with.
        shares: of the attention of each head of each layer that lies near.
    """

    model: str
    near: int
    sink: int
    shares: tuple[tuple[float, ...], ...]


def load_profile(path: Path) -> HeadProfile:
    """Read what scripts/profile_heads.py wrote.

    Raises:
        ValueError: no such file, or another kind of file.
    """
    given = read_yaml(path)
    return build(HeadProfile, given, f"the profile of heads '{path}'")


class SplitCache(Cache):
    """One cache for all heads at first, then one for each class of them.

    Args:
        room: frames of the past that a head keeps that looks far.
        shares: of the attention of each head that lies near, where that is known.
    """

    def __init__(
        self, site: Site, policy: HeadClasses, room: int, shares: Sequence[float] | None = None
    ):
        super().__init__(site, (room + site.chunk) * site.frame_tokens)
        self._policy, self._room, self._known = policy, room, shares
        self._forget()

    @property
    def shares(self) -> list[float] | None:
        """Of the attention of each head that lies near, as far as was looked; None before."""
        if not self._num_profiled:
            return None
        return (self._total / self._num_profiled).tolist()

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
        if self._known is not None:
            self._split(self._known)

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
                # the one wait for the device
                self._split(self.shares or ())

    def _look(self, q: Tensor, part: Part, frames: range) -> None:
        """Measure the share of the attention of each head that lies near."""
        policy = self._policy
        assert part.frames is not None
        far = (part.frames < frames.start - policy.near) & (part.frames >= policy.sink)
        is_known = self._known is not None or self._num_profiled >= policy.profile
        if is_known or not frames or not bool(far.any()):
            return
        some = q[:, :, :: max(1, q.shape[2] // QUERIES)].float()
        some = some.unflatten(1, (self.site.heads, -1)).flatten(2, 3)
        weights = (some @ part.k.float().mT * q.shape[-1] ** -0.5).softmax(-1)
        self._mass = 1 - (weights * far.to(weights.device)).sum(-1).mean((0, 2))

    def _split(self, shares: Sequence[float]) -> None:
        """Give each class of heads a cache of its own."""
        policy = self._policy
        is_near = [share >= policy.share for share in shares]
        ((heads, whole),) = self._classes
        near, far = ([head for head in heads if is_near[head] is x] for x in (True, False))
        rooms = (min(self._room, policy.sink + policy.near), self._room)
        self._classes = [
            (own, whole.of_heads(own, room)) for own, room in zip((near, far), rooms) if own
        ]
        if len(self._classes) == 1 and far:
            self._classes = [(far, whole)]
