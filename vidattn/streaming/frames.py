"""A cache of whole frames: all of them, or the first ones and a window of the last ones.

Letters: B batch, H key heads, S tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vidattn.streaming.bank import Bank
from vidattn.streaming.cache import Cache, Part, Site
from vidattn.streaming.codec import Quantise
from vidattn.streaming.sink import Sink

# frames that a cache without a limit has room for at first
FIRST_ROOM = 12


class FrameCache(Cache):
    """Keeps frames; where there is no more room, the oldest beside the sink leaves.

    Args:
        room: frames of the past that are kept; None for all.
        cap: tokens that are never exceeded; where there is no ``room``, a ValueError says so before
            they are.
    """

    def __init__(
        self, site: Site, sink: Sink, quantise: Quantise, *, room: int | None, cap: int | None
    ):
        super().__init__(site, cap)
        self._sink, self._quantise, self._room = sink, quantise, room
        # the frame in each slot of a frame: attention does not mind their order
        self._held: list[int] = []
        self._next = 0
        self._frames = torch.empty(0, dtype=torch.int32)
        self._bank: Bank | None = None

    @property
    def num_past_tokens(self) -> int:
        return len(self._held) * self.site.frame_tokens

    @property
    def num_bytes(self) -> int:
        return 0 if self._bank is None else self._bank.num_bytes + self._sink.num_bytes

    @property
    def held(self) -> tuple[int, ...]:
        """Frames of the past that are kept, in the order in which they lie."""
        return tuple(self._held)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, frames: range) -> tuple[Part, ...]:
        self._check_room(len(frames))
        past = torch.cat([self._frames, torch.tensor(frames, dtype=torch.int32)])
        places = past.repeat_interleave(self.site.frame_tokens)[None, None]
        k, v = self._open().read(self.num_past_tokens, (k, v))
        return (Part(k, v, places),)

    def of_heads(self, heads: list[int], room: int) -> FrameCache:
        """The part of this cache that belongs to some heads, with room for so many frames."""
        site, tokens = replace(self.site, heads=len(heads)), self.site.frame_tokens
        sink = self._sink.of_heads(heads, site)
        found = FrameCache(site, sink, self._quantise, room=room, cap=self.cap)
        kept = sorted(self._held)
        kept = kept[: sink.frames] + kept[sink.frames :][-max(0, room - sink.frames) :]
        for frame in kept:
            start = self._held.index(frame) * tokens
            k, v = self._open().take(start, start + tokens)
            found._put(frame, k[:, heads], v[:, heads])
        found._place_sink(self._next)
        return found

    def _keep(self, k: Tensor, v: Tensor, frames: range) -> None:
        tokens = self.site.frame_tokens
        for frame, key, value in zip(frames, k.split(tokens, 2), v.split(tokens, 2)):
            self._sink.take(frame, key, value)
            self._put(frame, key, value)
        self._place_sink(frames.stop)

    def _put(self, frame: int, k: Tensor, v: Tensor) -> None:
        """Write one frame into a slot."""
        slot, bank = self._slot(), self._open()
        self._held[slot : slot + 1] = [frame]
        start = slot * self.site.frame_tokens
        if start >= bank.capacity:
            bank.grow(2 * bank.capacity)
        bank.write(start, k, v)

    def _place_sink(self, following: int) -> None:
        """Let the sink stand where the chunk that begins at a frame is to see it."""
        self._next = following
        self._frames = torch.tensor(self._held, dtype=torch.int32)
        window = [frame for frame in self._held if frame >= self._sink.frames]
        placed = self._sink.place(min(window, default=0), following)
        if placed is not None:
            # the first frames of a video are those in the first slots
            self._open().write(0, *placed)

    def leaving(self, frames: list[int]) -> int:
        """The frame that leaves where there is no more room: the oldest.

        Args:
            frames: that may leave, oldest first; the sink is not among them.
        """
        return frames[0]

    def _slot(self) -> int:
        """Where the next frame goes."""
        if self._room is None or len(self._held) < self._room:
            return len(self._held)
        old = self.leaving([frame for frame in sorted(self._held) if frame >= self._sink.frames])
        slot = self._held.index(old)
        start = slot * self.site.frame_tokens
        self._sink.fold(old, *self._open().take(start, start + self.site.frame_tokens))
        return slot

    def _check_room(self, num_frames: int) -> None:
        """Raise ValueError where a cache that keeps everything has reached its limit."""
        tokens = (len(self._held) + num_frames) * self.site.frame_tokens
        if self._room is None and self.cap is not None and tokens > self.cap:
            raise ValueError(
                f"this cache keeps every frame, and frame {len(self._held)} is the last that its "
                f"limit of {self.cap} tokens has room for: raise the limit, or take a policy that "
                "leaves frames out, such as rolling or tempcache"
            )

    def _open(self) -> Bank:
        if self._bank is None:
            site = self.site
            room = FIRST_ROOM if self._room is None else self._room
            tokens = room * site.frame_tokens
            self._bank = Bank(site, self._quantise, tokens, site.chunk_tokens)
        return self._bank

    def _forget(self) -> None:
        self._sink.reset()
        self._held, self._frames, self._next = [], self._frames[:0], 0
