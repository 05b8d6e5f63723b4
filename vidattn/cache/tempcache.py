"""TempCache: keys of successive frames that are nearly equal become one key that counts for many.

After Fast Autoregressive Video Diffusion (2602.01801), of which there is no public code. What does
not change from frame to frame has the same keys in each: softmax attention to n equal keys is that
to one of them whose logit is raised by log(n), with the mean of their values. Each key of a new
frame is compared, head by head, with those of the frame before, all in the time of the newer; where
the nearest is near enough, the two become one, which has the newer key, the mean value and the sum
of the counts. What was not seen for longest leaves when there is no more room. The sink and the
last chunk stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.streaming.bank import Bank, token_bytes
from vidattn.streaming.cache import Cache, Part, Site
from vidattn.streaming.policy import WindowPolicy


@dataclass(frozen=True)
class TempCache(WindowPolicy):
    """Nearly equal keys of successive frames are merged, head by head, and counted.

    Args:
        similarity: cosine from which on two keys become one; 1 merges equal keys only.
        aligned: compare keys as if they stood in one frame, without the turn of the rotary
            embedding from one to the next.
        bits: look for the nearest key by so many signs of random projections of each, and compare
            with that one alone: a few are missed, and none is merged that should not be. Without,
            all are compared, which takes a CPU no longer.
    """

    similarity: float = 0.9
    aligned: bool = True
    bits: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"similarity must be a cosine from -1 to 1, got {self.similarity!r}")
        self.at_least("bits", 1)

    def token_bytes(self, site: Site) -> int:
        """Memory of one token in one cache, with its weight and the frame it was seen in."""
        return super().token_bytes(site) + 8 * site.heads * site.batch

    def fixed_bytes(self, site: Site) -> int:
        """Memory beside that of tokens: the sink, and the last chunk as it was."""
        return super().fixed_bytes(site) + token_bytes(site, "none") * site.chunk_tokens

    def make(self, site: Site) -> MergingCache:
        """An empty cache for one layer.

        Raises:
            ValueError: no room for the sink, a frame that is merged into, and two chunks.
        """
        limit = self.limit(site)
        least = self.sink + 1 + 2 * site.chunk
        what = f"a sink of {self.sink} frames, one more, the last chunk and the one being made"
        self.check_limit(site, limit, least, f"{what}, of {site.chunk} frames each,")
        if self.window < least:
            raise ValueError(
                f"window={self.window} frames have no room for {what}, of {site.chunk} each: give "
                f"window={least} or more"
            )
        room = self.room(site) - site.chunk_tokens
        return MergingCache(site, self, room)


class MergingCache(Cache):
    """Merged keys of the past, the last chunk as it was, and the chunk that is being made.

    Args:
        room: merged keys of a head.
    """

    def __init__(self, site: Site, policy: TempCache, room: int):
        super().__init__(site, room + 2 * site.chunk_tokens)
        self._policy, self._room = policy, room
        self._sink = policy.make_sink(site)
        self._bank = Bank(site, policy.quantise, room, 2 * site.chunk_tokens)
        self._last: tuple[Tensor, Tensor, range] | None = None
        self._used = 0
        # of each key, the tokens that it stands for, and the frame in which it was seen last
        rows = (site.batch, site.heads, room)
        self._weight = torch.zeros(rows, device=site.device)
        self._seen = torch.zeros(rows, dtype=torch.int32, device=site.device)
        # the newest frame that was merged, and the keys that stand for its tokens
        self._where: Tensor | None = None
        self._merged = -1

    @property
    def num_past_tokens(self) -> int:
        return self._used + (0 if self._last is None else self._last[0].shape[2])

    @property
    def num_bytes(self) -> int:
        own = [self._weight, self._seen, *(() if self._last is None else self._last[:2])]
        own_bytes = sum(x.numel() * x.element_size() for x in own)
        return self._bank.num_bytes + self._sink.num_bytes + own_bytes

    def _read(self, q: Tensor, k: Tensor, v: Tensor, frames: range) -> tuple[Part, ...]:
        last = [] if self._last is None else [self._last]
        tail = [*last, (k, v, frames)]
        keys, values = self._bank.read(self._used, *((x[0], x[1]) for x in tail))
        seen = [self._seen[..., : self._used], *(self._frames_of(x[2]) for x in tail)]
        counts = F.pad(self._weight[..., : self._used], (0, keys.shape[2] - self._used), value=1.0)
        return (Part(keys, values, torch.cat(seen, 2), counts),)

    def _frames_of(self, frames: range) -> Tensor:
        """(B, H, S) frame of each token of a chunk."""
        own = torch.tensor(frames, dtype=torch.int32).repeat_interleave(self.site.frame_tokens)
        return own.to(self.site.device).expand(self.site.batch, self.site.heads, -1)

    def _keep(self, k: Tensor, v: Tensor, frames: range) -> None:
        if self._last is not None:
            self._merge(*self._last)
            site, sink = self.site, self._policy.sink
            # where the window of a rolling cache of this size would begin
            length = (self._room - site.chunk_tokens) // site.frame_tokens + site.chunk
            placed = self._sink.place(max(sink, frames.stop + sink - length), frames.stop)
            if placed is not None:
                self._bank.write(0, *placed)
        self._last = (k, v, frames)

    def _forget(self) -> None:
        self._sink.reset()
        self._last, self._where, self._used, self._merged = None, None, 0, -1

    def _merge(self, k: Tensor, v: Tensor, frames: range) -> None:
        """Let a chunk become part of the merged keys."""
        tokens, used, sink = self.site.frame_tokens, self._used, self._policy.sink
        keys, values = (torch.cat([x, y], 2) for x, y in zip(self._bank.take(0, used), (k, v)))
        weight = F.pad(self._weight[..., :used], (0, k.shape[2]), value=1.0)
        seen = torch.cat([self._seen[..., :used], self._frames_of(frames)], 2)
        bits = self._policy.bits
        planes = None if bits is None else _planes(self.site.head_dim, bits, self.site.device)
        pool = _Pool(keys, values, weight, seen, planes)
        for i, frame in enumerate(frames):
            new = slice(used + i * tokens, used + (i + 1) * tokens)
            self._sink.take(frame, keys[:, :, new], values[:, :, new])
            if self._where is None or not sink <= self._merged == frame - 1:
                self._where = pool.places(new)
            else:
                before = _pick(keys, self._where)
                if self._policy.aligned:
                    before = self.site.rotation(before, 1)
                self._where = pool.join(new, self._where, before, self._policy.similarity)
            self._merged = frame
        kept = pool.newest(min(self._room, keys.shape[2]), sink)
        self._used = kept.shape[2]
        self._bank.write(0, _pick(keys, kept), _pick(values, kept))
        self._weight[..., : self._used] = weight.gather(2, kept)
        self._seen[..., : self._used] = seen.gather(2, kept)
        places = torch.arange(self._used, device=kept.device).expand_as(kept)
        self._where = (
            torch.zeros_like(seen, dtype=torch.long).scatter(2, kept, places).gather(2, self._where)
        )


@dataclass(eq=False)
class _Pool:
    """Keys with what they stand for; joining changes the tensors in place.

    Args:
        keys: (B, H, N, D).
        values: (B, H, N, D).
        weight: (B, H, N) tokens that a key stands for, 0 for those that have joined another.
        seen: (B, H, N) frame in which a key was seen last.
        planes: (D, bits) normals of the planes that keys are hashed by; None compares all.
    """

    keys: Tensor
    values: Tensor
    weight: Tensor
    seen: Tensor
    planes: Tensor | None

    def places(self, new: slice) -> Tensor:
        """(B, H, T) places of the T tokens of a frame."""
        own = torch.arange(new.start, new.stop, device=self.keys.device)
        return own.expand(*self.weight.shape[:2], -1)

    def join(self, new: slice, where: Tensor, before: Tensor, similarity: float) -> Tensor:
        """Let the tokens of a frame join those of the frame before that are near enough.

        Args:
            new: the tokens.
            where: (B, H, T) keys that stand for the tokens of the frame before.
            before: (B, H, T, D) these keys, as they are compared.
            similarity: cosine from which on they join; the rounding of a cosine is forgiven.

        Returns:
            (B, H, T) keys that stand for the tokens of the frame now.
        """
        tokens = torch.arange(where.shape[2], device=where.device).expand_as(where)
        # tokens that share a key speak for it through the first of them
        speaker = torch.full_like(self.seen, where.shape[2], dtype=torch.long)
        speaker = speaker.scatter_reduce(2, where, tokens, "amin").gather(2, where)
        k, v = self.keys[:, :, new], self.values[:, :, new]
        best, nearest = self._nearest(k, before, speaker == tokens)
        joins = best >= similarity - 1e-6
        count = torch.zeros_like(best).scatter_add(2, nearest, joins.float())
        newest = torch.full_like(where, -1)
        newest = newest.scatter_reduce(2, nearest, tokens.where(joins, -1), "amax")
        weight = self.weight.gather(2, where)
        mean = _pick(self.values, where).float() * weight[..., None] + _sums(v, nearest, joins)
        mean = (mean / (weight + count)[..., None]).to(v.dtype)
        merged = newest >= 0
        key = _pick(k, newest.clamp_min(0)).where(merged[..., None], _pick(self.keys, where))
        frame = self.seen[..., new].where(merged, self.seen.gather(2, where))
        # tokens that share a key write the same into it
        _put(self.keys, where, _pick(key, speaker))
        _put(self.values, where, _pick(mean, speaker))
        self.weight.scatter_(2, where, (weight + count).gather(2, speaker))
        self.seen.scatter_(2, where, frame.gather(2, speaker))
        self.weight[..., new] *= ~joins
        return where.gather(2, nearest).where(joins, self.places(new))

    def _nearest(self, k: Tensor, before: Tensor, may: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, T) cosine to the nearest of the keys before, and which that is.

        Args:
            may: (B, H, T) bool, which of those before it may be.
        """
        k, before = (F.normalize(x.float(), dim=-1) for x in (k, before))
        if self.planes is None:
            return (k @ before.mT).masked_fill_(~may[:, :, None], -2).max(-1)
        # what all keys of a head have in common would give them the same signs
        center = before.mean(2, keepdim=True)
        signs, others = (((x - center) @ self.planes).sign() for x in (k, before))
        alike = (signs @ others.mT).masked_fill_(~may[:, :, None], -torch.inf)
        nearest = alike.argmax(-1)
        return (k * _pick(before, nearest)).sum(-1), nearest

    def newest(self, room: int, sink: int) -> Tensor:
        """(B, H, room) keys that stay: the sink in its order, then those that were seen last."""
        last = torch.iinfo(torch.int32).max
        rank = self.seen.masked_fill(self.seen < sink, last).masked_fill(self.weight == 0, -1)
        return rank.sort(dim=2, descending=True, stable=True).indices[..., :room]


@lru_cache(maxsize=8)
def _planes(head_dim: int, bits: int, device: torch.device) -> Tensor:
    """(D, bits) normals of random planes, the same for all layers."""
    generator = torch.Generator().manual_seed(bits)
    return torch.randn(head_dim, bits, generator=generator, dtype=torch.float32).to(device)


def _sums(x: Tensor, index: Tensor, which: Tensor) -> Tensor:
    """(B, H, T, D) float32 sums of (B, H, T, D) rows by an index, of those of (B, H, T) bool.

    Added up in one order on every device.
    """
    x = x.float() * which[..., None]
    if x.device.type == "cpu":
        return torch.zeros_like(x).scatter_add(2, index[..., None].expand_as(x), x)
    rows = torch.arange(x.shape[2], device=x.device)
    return (index[..., None] == rows).mT.float() @ x


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, T, D) rows of (B, H, N, D)."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))


def _put(x: Tensor, index: Tensor, rows: Tensor) -> None:
    """Write rows into (B, H, N, D)."""
    x.scatter_(2, index[..., None].expand(-1, -1, -1, x.shape[-1]), rows)
