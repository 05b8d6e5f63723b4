"""Windows of a picture: which tokens stand in each, for queries and for keys.

Letters: R windows, n queries and m keys of a window, M tables of hidden pairs, E numbers of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# what Swin adds to the scores of pairs that only a cyclic shift put into one window
HIDDEN_SCORE = -100.0


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows that hold every query once."""

    queries: Tensor  # (R, n) int32, token of each
    keys: Tensor  # (R, m) int32, token of each; -1 for a key and a value of zeros
    hidden: Tensor | None = None  # (M, n, m) float32, added to the scores
    kind: Tensor | None = None  # (R,) int32, which of the hidden tables
    slots: Tensor | None = None  # (m, E) float32, what the key in each slot has beside its numbers
    shares_keys: bool = False  # whether a key stands in several windows


@lru_cache(maxsize=128)
def shifted_windows(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int] = (0, 0)
) -> tuple[Windows, tuple[int, int]]:
    """The windows of Swin (Liu et al., arXiv:2103.14030) on a picture padded at its ends.

    A picture is rolled by ``shift``, then padded to whole windows, so that its first tokens may
    share a window with the padding. No picture is moved here: tokens are counted in the padded
    picture before it is rolled.

    Args:
        size: of the picture, in tokens.
        window: of each window.
        shift: of the roll, 0 on an axis without one.

    Returns:
        The windows; the size of the padded picture.
    """
    padded = tuple(-(-extent // side) * side for extent, side in zip(size, window))
    rows, columns = (_rolled(*axis) for axis in zip(size, padded, shift))
    # a padded token stays where it is: rolled tokens never get there
    is_real = (torch.arange(padded[0]) < size[0])[:, None] & (torch.arange(padded[1]) < size[1])
    own = torch.arange(padded[0] * padded[1]).view(padded)
    token = torch.where(is_real, rows[:, None] * padded[1] + columns, own)
    tokens = _cut(token, window).int()
    if not any(shift):
        return Windows(tokens, tokens), padded
    hidden = torch.zeros(2, 2, *window, *window, dtype=torch.bool)
    for axis, (side, step) in enumerate(zip(window, shift)):
        # the last window of an axis holds its last tokens, and then its first ones
        if step:
            group = torch.arange(side) >= side - step
            apart = group[:, None] != group
            apart = apart[:, None, :, None] if axis == 0 else apart[None, :, None, :]
            hidden.select(axis, 1).logical_or_(apart)
    last = [
        torch.arange(extent // side) == extent // side - 1 for extent, side in zip(padded, window)
    ]
    kind = (2 * last[0][:, None] + last[1].int()).flatten().int()
    area = window[0] * window[1]
    return Windows(tokens, tokens, hidden.view(4, area, area) * HIDDEN_SCORE, kind), padded


@lru_cache(maxsize=128)
def halo_windows(size: tuple[int, int], block: int, halo: int, stride: int = 1) -> Windows:
    """Blocks of queries that read the keys around them too (Vaswani et al., arXiv:2103.12731).

    Keys beyond the border are zeros that take part. Every slot of a key has its row and its column
    in the window, each as a vector of zeros with a single one: a query that has, beside its own
    numbers, a score for each row and then for each column gets the sum of both.

    Args:
        size: of the picture of keys, multiples of ``block``.
        block: edge of a block, in keys.
        halo: keys on each side of it.
        stride: keys from query to query.
    """
    query_size = tuple(extent // stride for extent in size)
    queries = torch.arange(query_size[0] * query_size[1]).view(query_size)
    keys = F.pad(torch.arange(size[0] * size[1]).view(size), [halo] * 4, value=-1)
    edge = block + 2 * halo
    tiles = keys.unfold(0, edge, block).unfold(1, edge, block).reshape(-1, edge * edge)
    one = torch.eye(edge)
    slots = torch.cat([one.repeat_interleave(edge, 0), one.repeat(edge, 1)], 1)
    cut = _cut(queries, (block // stride, block // stride))
    return Windows(cut.int(), tiles.int(), slots=slots, shares_keys=True)


def _rolled(extent: int, padded: int, shift: int) -> Tensor:
    """(padded,) the token of an axis that stands at each place behind the roll."""
    place = torch.arange(padded)
    return torch.where(place < extent, (place + shift) % extent, place)


def _cut(tokens: Tensor, window: tuple[int, int]) -> Tensor:
    """(R, n) the tokens of each window of (height, width)."""
    return (
        tokens.unfold(0, window[0], window[0])
        .unfold(1, window[1], window[1])
        .flatten(2)
        .flatten(0, 1)
    )
