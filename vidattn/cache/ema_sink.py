"""EMA sink: frames that leave the window live on in the sink, which follows the video.

Each key and value of a frame that leaves is folded into the sink by an exponential moving average,
at the same place of the frame, as in Reward Forcing (2512.04678). The keys are brought to the time
of the sink first, so that the average is that of keys without their temporal rotation.
"""

from __future__ import annotations

from dataclasses import dataclass

from vidattn.streaming.cache import Site
from vidattn.streaming.frames import FrameCache
from vidattn.streaming.policy import WindowPolicy
from vidattn.streaming.sink import Sink


@dataclass(frozen=True)
class EmaSink(WindowPolicy):
    """A window of frames is kept, and a sink that is a moving average of those that left it.

    Args:
        alpha: share of itself that the sink keeps at each frame that is folded into it.
    """

    window: int = 9
    alpha: float = 0.999

    def __post_init__(self):
        super().__post_init__()
        self.at_least("sink", 1)
        if not 0 <= self.alpha < 1:
            raise ValueError(
                f"alpha must be at least 0 and below 1, got {self.alpha!r}: with 1 the sink never "
                "changes, which the policy rolling does"
            )

    def make(self, site: Site) -> FrameCache:
        """An empty cache for one layer."""
        room = self.room(site) // site.frame_tokens
        cap = (room + site.chunk) * site.frame_tokens
        return FrameCache(site, self.make_sink(site), self.quantise, room=room, cap=cap)

    def make_sink(self, site: Site) -> Sink:
        """The sink of one layer, which changes."""
        return Sink(site, self.sink, self.sink_at, self.alpha)
