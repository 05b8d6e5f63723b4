"""What a cache policy is: options, and a cache for each attention layer.

A policy is one file in vidattn/cache with a frozen dataclass; nothing else has to know about it.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vidattn.streaming.bank import token_bytes
from vidattn.streaming.cache import Cache, Part, Site
from vidattn.streaming.codec import CODECS, Quantise
from vidattn.streaming.sink import Sink, SinkAt

# what a policy decides: which keys are kept, which of them a query reads, which words are read
Kind = Literal["cache", "queries", "text"]


@dataclass(frozen=True)
class Policy:
    """Options of something that makes streaming cheaper; every default is valid."""

    kind: ClassVar[Kind] = "cache"

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field]:
        """What a caller may set, by name."""
        return {field.name: field for field in dataclasses.fields(cls)}

    def at_least(self, name: str, least: float) -> None:
        """Raise ValueError where an option that is set is below what it must be."""
        value = getattr(self, name)
        if value is not None and not (type(value) in (int, float) and value >= least):
            raise ValueError(f"{name} must be at least {least}, got {value!r}")


@dataclass(frozen=True)
class TextPolicy(Policy, ABC):
    """Which words of the prompt a chunk reads."""

    kind: ClassVar[Kind] = "text"

    @abstractmethod
    def choose(self, q: Tensor, part: Part, scale: float) -> Part:
        """The words that the queries of a chunk read.

        Args:
            q: (B, Hq, S, D) queries of the cross-attention.
            part: all words, with the weight of each.
            scale: factor of the scores.
        """


@dataclass(frozen=True)
class QueryPolicy(Policy, ABC):
    """Which of the keys that a cache keeps a query reads."""

    kind: ClassVar[Kind] = "queries"

    @abstractmethod
    def attend(self, q: Tensor, part: Part, scale: float) -> Tensor:
        """(B, H, S, D): what the queries of a chunk read.

        Args:
            q: (B, H, S, D) queries.
            part: the keys of their heads; those of the chunk itself stand last.
            scale: factor of the scores.
        """


@dataclass(frozen=True)
class CachePolicy(Policy, ABC):
    """Which keys and values of the past are kept.

    Args:
        cap: the most tokens of a head of a layer, the chunk that is being made included.
        cap_mib: the most memory for the past and the chunk of all layers, in MiB.
        quantise: how the past is kept: as it is, or in 8 or 4 bits.
    """

    cap: int | None = None
    cap_mib: float | None = None
    quantise: Quantise = "none"

    def __post_init__(self):
        self.at_least("cap", 1)
        self.at_least("cap_mib", 0)
        if self.quantise not in CODECS:
            raise ValueError(f"quantise must be {' or '.join(CODECS)}, got {self.quantise!r}")

    @abstractmethod
    def make(self, site: Site) -> Cache:
        """An empty cache for one layer, which ``build`` gives its limit in bytes.

        Raises:
            ValueError: the options leave no room for what has to be kept.
        """

    def build(self, site: Site) -> Cache:
        """An empty cache for one layer.

        Raises:
            ValueError: the options leave no room for what has to be kept.
        """
        cache = self.make(site)
        if self.cap_mib is not None:
            cache.cap_bytes = int(self.cap_mib * 2**20 / site.num_caches)
        return cache

    def token_bytes(self, site: Site) -> int:
        """Memory of one token in one cache."""
        return token_bytes(site, self.quantise)

    def fixed_bytes(self, site: Site) -> int:
        """Memory of one cache beside that of its tokens."""
        return 0

    def limit(self, site: Site) -> int | None:
        """Tokens that a head may have in all, None without a limit."""
        limits = [self.cap] if self.cap is not None else []
        if self.cap_mib is not None:
            left = self.cap_mib * 2**20 / site.num_caches - self.fixed_bytes(site)
            limits.append(max(0, int(left // self.token_bytes(site))))
        return min(limits, default=None)

    def check_limit(self, site: Site, limit: int | None, frames: int, what: str) -> None:
        """Raise ValueError unless a limit has room for so many frames."""
        tokens = frames * site.frame_tokens
        if limit is not None and limit < tokens:
            each = tokens * self.token_bytes(site) + self.fixed_bytes(site)
            mib = math.ceil(10 * each * site.num_caches / 2**20) / 10
            raise ValueError(
                f"the cache may hold {limit} tokens (cap={self.cap}, cap_mib={self.cap_mib}), and "
                f"needs {tokens}: {what} of {site.frame_tokens} tokens each. Give cap={tokens} or "
                f"cap_mib={mib:.1f} or more"
            )


@dataclass(frozen=True)
class WindowPolicy(CachePolicy, ABC):
    """A cache whose size does not depend on the length of the video.

    Args:
        window: latent frames that there is room for, the sink and the chunk that is being made
            included; ``cap`` and ``cap_mib`` may lower it.
        sink: first latent frames of the video, which are always kept.
        sink_at: where in time the sink stands: in its true place (absolute), right before the
            window (relative), or at most so many frames back.
    """

    window: int = 12
    sink: int = 3
    sink_at: SinkAt = "relative"

    def __post_init__(self):
        super().__post_init__()
        self.at_least("window", 2)
        self.at_least("sink", 0)
        if self.sink_at not in ("absolute", "relative"):
            self.at_least("sink_at", 1)

    def room(self, site: Site) -> int:
        """Tokens of the past that a head keeps.

        Raises:
            ValueError: there is none for the sink, one frame more, and a chunk.
        """
        limit = self.limit(site)
        least = self.sink + 1 + site.chunk
        what = f"a sink of {self.sink} frames, one frame more, and a chunk of {site.chunk}, "
        self.check_limit(site, limit, least, what.rstrip(", "))
        if self.window < least:
            raise ValueError(
                f"window={self.window} frames have no room for {what}give window={least} or more"
            )
        tokens = self.window * site.frame_tokens
        return (tokens if limit is None else min(tokens, limit)) - site.chunk_tokens

    def fixed_bytes(self, site: Site) -> int:
        """Memory of one cache beside that of its tokens: the sink as it was."""
        return self.make_sink(site).num_bytes

    def make_sink(self, site: Site) -> Sink:
        """The sink of one layer."""
        return Sink(site, self.sink, self.sink_at)
