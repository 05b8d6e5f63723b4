"""Where the tokens of one video sit: a grid of (t, h, w) positions, and text beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Grid:
    """The token grid of one video: ``t`` latent frames of ``h`` rows and ``w`` columns, row-major.

    ``text`` tokens that share the sequence stand after the video, or before it when
    ``text_first`` is set. Equal grids hash alike, so a grid serves as a cache key.

    Raises:
        ValueError: a size is not a positive integer, ``text`` is negative, or ``text_first`` is no
            bool.

    >>> Grid(21, 30, 52, text=226, text_first=True).num_tokens
    32986
    """

    t: int
    h: int
    w: int
    text: int = 0
    text_first: bool = False

    def __post_init__(self):
        for axis in ("t", "h", "w", "text"):
            least, value = (0 if axis == "text" else 1), getattr(self, axis)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"Grid.{axis} must be an integer of at least {least}, got {value!r}"
                )
        if not isinstance(self.text_first, bool):
            raise ValueError(f"Grid.text_first must be true or false, got {self.text_first!r}")

    @property
    def size(self) -> Size:
        """(t, h, w)."""
        return self.t, self.h, self.w

    @property
    def num_video_tokens(self) -> int:
        """t * h * w."""
        return self.t * self.h * self.w

    @property
    def num_tokens(self) -> int:
        """Video and text tokens together: the length of the sequence."""
        return self.num_video_tokens + self.text

    @property
    def video_start(self) -> int:
        """Position of the first video token in the sequence."""
        return self.text if self.text_first else 0

    @property
    def text_start(self) -> int:
        """Position of the first text token in the sequence."""
        return 0 if self.text_first else self.num_video_tokens

    def coords(self) -> Tensor:
        """(S, 3) int64 (t, h, w) of every token in sequence order; text tokens are (-1, -1, -1)."""
        axes = [torch.arange(extent) for extent in self.size]
        video = torch.cartesian_prod(*axes).view(-1, 3)
        text = torch.full((self.text, 3), -1)
        return torch.cat([text, video] if self.text_first else [video, text])


@dataclass(frozen=True, eq=False)
class Layout:
    """The order in which attention visits the tokens, cut into blocks of equal length.

    ``order`` is (N,) int32, the token in each slot, -1 where a slot is empty. Text tokens fill
    blocks of their own behind the ``num_video_blocks`` blocks of the video.
    """

    order: Tensor
    block: int
    num_video_blocks: int

    @property
    def num_blocks(self) -> int:
        """Blocks of video and text together."""
        return self.order.numel() // self.block

    @cached_property
    def live(self) -> Tensor:
        """(N,) bool, whether a slot holds a token."""
        return self.order >= 0

    @cached_property
    def tokens_per_block(self) -> Tensor:
        """(num_blocks,) int64, the true number of tokens in each block."""
        return self.live.view(-1, self.block).sum(-1)

    @cached_property
    def slot_of_token(self) -> Tensor:
        """(S,) int64, the slot in which each token sits: the inverse of ``order``."""
        slots = self.live.nonzero().flatten()
        inverse = torch.empty_like(slots)
        inverse[self.order[slots].long()] = slots
        return inverse

    def to(self, device: torch.device | str) -> Layout:
        """The same layout with its tensor on ``device``; itself where it is there."""
        order = self.order.to(device)
        return self if order is self.order else replace(self, order=order)


def raster_layout(grid: Grid, block: int, axes: Size = (0, 1, 2)) -> Layout:
    """Video tokens ``block`` at a time, in sequence order or with the axes in another order.

    Args:
        axes: the axes t, h, w by their numbers, from the one that changes least to the one that
            changes most.
    """
    video = (torch.arange(grid.num_video_tokens) + grid.video_start).view(grid.size)
    return with_text(grid, _pad(video.permute(axes).flatten(), block), block)


def frame_layout(grid: Grid, block: int) -> Layout:
    """Video tokens in sequence order, ``block`` at a time, no block crossing into a next frame."""
    frames = (torch.arange(grid.num_video_tokens) + grid.video_start).view(grid.t, -1)
    return with_text(grid, _pad(frames, block).flatten(), block)


def tile_layout(
    grid: Grid, tile: Size, dilation: Size = (1, 1, 1), chunk: Size | None = None
) -> Layout:
    """One 3-D tile of the video to a block; tiles cut by the edge keep empty slots.

    With a dilation, each axis is first sorted by dilation group (position modulo dilation), so a
    tile holds positions that are neighbors in the sense of the dilated window. With a chunk, each
    axis is first cut into chunks of so many positions, and no tile crosses from one into the next.
    """
    chunk = grid.size if chunk is None else chunk
    rooms = [-(-length // edge) * edge for length, edge in zip(chunk, tile)]
    num_chunks = [-(-extent // length) for extent, length in zip(grid.size, chunk)]
    counts = [n * room // edge for n, room, edge in zip(num_chunks, rooms, tile)]
    ids = torch.full([n * room for n, room in zip(num_chunks, rooms)], -1)
    tokens = torch.arange(grid.num_video_tokens).view(grid.size) + grid.video_start
    for axis, (extent, step) in enumerate(zip(grid.size, dilation)):
        tokens = tokens.index_select(axis, dilation_order(extent, step))
    places = [torch.arange(extent) for extent in grid.size]
    t, h, w = (x // length * room + x % length for x, length, room in zip(places, chunk, rooms))
    ids[t[:, None, None], h[:, None], w] = tokens
    split = [length for pair in zip(counts, tile) for length in pair]
    video = ids.view(split).permute(0, 2, 4, 1, 3, 5).flatten()
    return with_text(grid, video, math.prod(tile))


@lru_cache(maxsize=32)
def tile_layout_on(
    grid: Grid, tile: Size, device: torch.device, chunk: Size | None = None
) -> Layout:
    """``tile_layout`` on a device, made once."""
    return tile_layout(grid, tile, chunk=chunk).to(device)


def dilation_order(extent: int, dilation: int) -> Tensor:
    """(extent,) int64, the positions of an axis sorted by dilation group, then by position."""
    positions = torch.arange(extent)
    return torch.cat([positions[group::dilation] for group in range(min(dilation, extent))])


def _pad(ids: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, -ids.shape[-1] % block), value=-1)


def with_text(grid: Grid, video: Tensor, block: int) -> Layout:
    """The layout of (N,) tokens of the video, -1 for an empty slot, with those of the text behind.

    Args:
        block: slots to a block; it divides N.
    """
    text = torch.arange(grid.text, device=video.device) + grid.text_start
    order = torch.cat([video, _pad(text, block)]).int()
    return Layout(order, block, video.numel() // block)
