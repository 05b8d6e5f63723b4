"""Rolling: the first frames and a window of the last ones are kept.

That is how LongLive (2509.22622) and others run for minutes: a sink of the first chunk keeps the
scene in place, and what lies between it and the window is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

from vidattn.streaming.cache import Site
from vidattn.streaming.frames import FrameCache
from vidattn.streaming.policy import WindowPolicy


@dataclass(frozen=True)
class Rolling(WindowPolicy):
    """A sink and a window of frames are kept, all others dropped."""

    def make(self, site: Site) -> FrameCache:
        """An empty cache for one layer."""
        room = self.room(site) // site.frame_tokens
        cap = (room + site.chunk) * site.frame_tokens
        return FrameCache(site, self.make_sink(site), self.quantise, room=room, cap=cap)
