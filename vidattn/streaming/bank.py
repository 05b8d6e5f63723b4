"""Memory for keys and values, allocated once and filled from the front.

Letters: B batch, H key heads, S tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.streaming.cache import Site
from vidattn.streaming.codec import CODECS, Planes, Quantise


class Bank:
    """Slots of keys and values, and room behind them for what is read but not kept.

    Args:
        capacity: slots.
        tail: tokens of the room, which is used where values are kept as they are: the past and the
            chunk are then read as one view, without a copy of the past.
    """

    def __init__(self, site: Site, quantise: Quantise, capacity: int, tail: int):
        self._site, self._codec = site, CODECS[quantise]
        self._tail = tail if self._codec.is_exact else 0
        self.capacity = 0
        self._planes: tuple[Planes, Planes] = ((), ())
        self.grow(capacity)

    def grow(self, capacity: int) -> None:
        """Make room for more slots; what is in them stays."""
        site = self._site
        one = torch.zeros(site.batch, site.heads, 1, site.head_dim, dtype=site.dtype)
        # zeros: a slot of weight 0 is multiplied, so it must not hold NaN
        keys, values = (
            [self._empty(plane, capacity) for plane in self._codec.encode(one)] for _ in range(2)
        )
        for new, old in zip((keys, values), self._planes):
            for plane, before in zip(new, old):
                plane[:, :, : self.capacity] = before[:, :, : self.capacity]
        self._planes, self.capacity = (tuple(keys), tuple(values)), capacity

    def _empty(self, like: Tensor, capacity: int) -> Tensor:
        """A plane for so many slots and the room behind them."""
        shape = (*like.shape[:2], capacity + self._tail, *like.shape[3:])
        return torch.zeros(shape, dtype=like.dtype, device=self._site.device)

    def write(self, start: int, k: Tensor | None, v: Tensor | None) -> None:
        """Put (B, H, S, D) keys or values, or both, into S slots."""
        for planes, x in zip(self._planes, (k, v)):
            if x is not None:
                for plane, new in zip(planes, self._codec.encode(x)):
                    plane[:, :, start : start + x.shape[2]] = new

    def take(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(B, H, stop - start, D) keys and values of some slots; where exact, a view."""
        k, v = (self._decode(planes, start, stop) for planes in self._planes)
        return k, v

    def read(self, stop: int, *tail: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``stop`` slots, with others behind them."""
        if self._codec.is_exact:
            end = stop
            for k, v in tail:
                self.write(end, k, v)
                end += k.shape[2]
            return self.take(0, end)
        k, v = self.take(0, stop)
        return torch.cat([k, *(x for x, _ in tail)], 2), torch.cat([v, *(x for _, x in tail)], 2)

    @property
    def num_bytes(self) -> int:
        """Memory of all slots, and of the room behind them."""
        return sum(x.numel() * x.element_size() for planes in self._planes for x in planes)

    def _decode(self, planes: Planes, start: int, stop: int) -> Tensor:
        some = tuple(plane[:, :, start:stop] for plane in planes)
        return self._codec.decode(some, self._site.head_dim, self._site.dtype)


def token_bytes(site: Site, quantise: Quantise) -> int:
    """Memory of one token in one cache: keys and values of all heads and samples."""
    each = CODECS[quantise].num_bytes(site.head_dim, site.dtype)
    return 2 * each * site.heads * site.batch
