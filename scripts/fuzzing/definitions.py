"""Which video tokens read which, by the definitions of the methods that read no content.

Pair by pair or axis by axis, with no part of the planners.

Letters: N video tokens, L places on an axis, nv tiles.
"""

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from fuzzing.cases import Wrong
from torch import Tensor

Size = tuple[int, int, int]
# a block center may lie on the edge of a window, to within rounding: either is right there
EDGE = 1e-4


def triple(value: int | bool | tuple) -> tuple:
    """One value for each axis."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * 3


def product(t: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """(N, N) bool, pairs that are visible on every axis, from one (L, L) table to an axis."""
    pairs = t[:, None, None, :, None, None] & h[None, :, None, None, :, None]
    pairs = pairs & w[None, None, :, None, None, :]
    return pairs.reshape(len(t) * len(h) * len(w), -1)


@lru_cache
def parted(*numbers: Tensor) -> Tensor:
    """(N, N) bool, pairs that lie in the same part of every axis, by the part of each place."""
    return product(*(axis[:, None] == axis for axis in numbers))


def window_axis(length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """(L, L) bool: the rule of generalized neighborhood attention, pair by pair.

    Source: Hassani et al., arXiv:2504.16922, and NATTEN's documentation.
    """
    seen = torch.zeros(length, length, dtype=torch.bool)
    for x, y in itertools.product(range(length), repeat=2):
        group, place = x % dilation, x // dilation
        if y % dilation != group:
            continue
        count = math.ceil((length - group) / dilation)
        width = min(window, count)
        if causal:
            leader = min(place // stride * stride + stride - 1, count - 1)
            start, end = max(leader - width + 1, 0), place + 1
        else:
            leader = min(place // stride * stride + stride // 2, count - 1)
            start = min(max(leader - width // 2, 0), count - width)
            end = start + width
        seen[x, y] = start <= y // dilation < end
    return seen


def neighborhood(size: Size, window, stride=1, dilation=1, causal=False) -> Tensor:
    """(N, N) bool of a window on every axis."""
    options = zip(*map(triple, (window, stride, dilation, causal)))
    return product(*(window_axis(length, *x) for length, x in zip(size, options)))


def tiles_of(size: Size, tile: Size) -> tuple[Size, Tensor]:
    """How many tiles there are on each axis, and the (N, 3) tile of every token."""
    places = torch.tensor(list(itertools.product(*map(range, size)))).view(-1, 3)
    counts = tuple(math.ceil(length / edge) for length, edge in zip(size, tile))
    return counts, places // torch.tensor(tile)


def by_tiles(size: Size, tile: Size, pairs: Tensor) -> Tensor:
    """(N, N) from (nv, nv), tiles in raster order."""
    counts, place = tiles_of(size, tile)
    number = (place[:, 0] * counts[1] + place[:, 1]) * counts[2] + place[:, 2]
    return pairs[number][:, number]


def tile_gaps(size: Size, tile: Size) -> Tensor:
    """(nv, nv, 3) int64, the distance of two tiles along each axis."""
    counts, _ = tiles_of(size, tile)
    places = torch.tensor(list(itertools.product(*map(range, counts)))).view(-1, 3)
    return (places[:, None] - places).abs()


@lru_cache
def sliding_axis(length: int, window: int, edge: int) -> Tensor:
    """(L, L) bool: a tile reads a window of whole tiles, moved inward at the ends."""
    count = math.ceil(length / edge)
    window = min(window, count)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for x, y in itertools.product(range(length), repeat=2):
        start = min(max(x // edge - window // 2, 0), count - window)
        seen[x, y] = start <= y // edge < start + window
    return seen


def sliding_tile(size: Size, tile: Size, window: Size) -> Tensor:
    """(N, N) bool of sliding tile attention (Zhang et al., arXiv:2502.04507)."""
    return product(*map(sliding_axis, size, window, tile))


def power(size: Size, tile: Size, near: Size, axes: int) -> Tensor:
    """(N, N) bool: a window of tiles, and powers of two along at most ``axes`` axes."""
    gaps = tile_gaps(size, tile)
    window = (gaps <= torch.tensor(near)).all(-1)
    powers = torch.tensor([1 << i for i in range(20)])
    lines = ((gaps == 0) | torch.isin(gaps, powers)).all(-1) & ((gaps > 0).sum(-1) <= axes)
    return by_tiles(size, tile, window | lines)


def anchored_frames(size: Size, near: int, interval: int, step: int) -> Tensor:
    """(N, N) bool: frames up to a distance, and one of every so many (arXiv:2605.31057)."""
    frame = torch.arange(size[0]).repeat_interleave(size[1] * size[2])
    first = step if interval <= 8 else step * interval // 8
    anchor = (frame - first) % interval == 0
    return ((frame[:, None] - frame).abs() <= near) | anchor


def boxes(size: Size, tile: Size, first: int = 0) -> Iterator[Size]:
    """Every window of tiles there is, ``first`` being the smallest edge."""
    counts, _ = tiles_of(size, tile)
    return itertools.product(*(range(first, first + count) for count in counts))


def nearest_box(seen: Tensor, wanted: float, made: dict[Size, Tensor]) -> None:
    """Check a pattern whose window was fitted to a density.

    Args:
        seen: (N, N) bool, what was made.
        wanted: the density that was asked for.
        made: the patterns of every window.

    Raises:
        Wrong: it is the pattern of no window, or a window one tile larger or smaller is nearer.
    """
    matching = [box for box, pattern in made.items() if torch.equal(pattern, seen)]
    if not matching:
        raise Wrong("a pattern fitted to a density is that of no window", f"density {wanted}")
    miss = {box: abs(pattern.double().mean().item() - wanted) for box, pattern in made.items()}
    found = min(miss[box] for box in matching)
    for box in matching:
        for axis, step in itertools.product(range(3), (-1, 1)):
            beside = tuple(far + step * (i == axis) for i, far in enumerate(box))
            if miss.get(beside, 1.0) < found - 1e-9:
                detail = f"{box} is off by {found:.4f}, {beside} by {miss[beside]:.4f}"
                raise Wrong("a window beside the fitted one is nearer to the density", detail)


def strided_shares(
    size: Size, tile: Size, stride: int, shares: list[set[int] | None], hidden: set[int]
) -> bool:
    """Whether sets of tiles are what (a i + b j + c l) mod stride deals out, for some a, b, c.

    Args:
        shares: for every number of a share, the tiles (in raster order) that belong to it; None
            where no head reads it.
        hidden: tiles of which nobody can tell.
    """
    counts, _ = tiles_of(size, tile)
    places = torch.tensor(list(itertools.product(*map(range, counts)))).view(-1, 3)
    told = torch.tensor([number not in hidden for number in range(len(places))])
    for steps in itertools.product(range(stride), repeat=3):
        dealt = (places * torch.tensor(steps)).sum(-1) % stride
        if all(
            mine is None or mine == set(((dealt == number) & told).nonzero().flatten().tolist())
            for number, mine in enumerate(shares)
        ):
            return True
    return False
