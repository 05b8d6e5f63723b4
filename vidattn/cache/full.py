"""Full: everything that was generated is kept, which is exact, and grows with the video."""

from __future__ import annotations

from dataclasses import dataclass

from vidattn.streaming.cache import Site
from vidattn.streaming.frames import FrameCache
from vidattn.streaming.policy import CachePolicy
from vidattn.streaming.sink import Sink


@dataclass(frozen=True)
class Full(CachePolicy):
    """Every key and value is kept; a limit ends the video rather than dropping any."""

    def make(self, site: Site) -> FrameCache:
        """An empty cache for one layer."""
        limit = self.limit(site)
        self.check_limit(site, limit, site.chunk, f"a chunk of {site.chunk} frames")
        sink = Sink(site, 0, "absolute")
        return FrameCache(site, sink, self.quantise, room=None, cap=limit)
