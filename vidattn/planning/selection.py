"""Which entries of a row of scores are taken; nothing waits for the device.

Of entries with the same score, those that stand first are the best.

Letters: nb blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

# scores that are nearer than this, relative to the best, may be parted by rounding alone
TIE = 1e-5


def first_best(scores: Tensor) -> Tensor:
    """Where along the first axis the best scores are, by index where rounding alone parts them.

    What is rounded hangs on what else is computed in the same product: heads and samples beside.
    """
    best = scores.amax(0)
    return (scores >= best - TIE * best.abs()).int().argmax(0)


def select_count(scores: Tensor, count: int) -> Tensor:
    """The ``count`` best entries of every row as bool of the shape of ``scores``.

    Raises:
        ValueError: a count that no row has.
    """
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"count is {count}; it must be from 1 to {scores.shape[-1]}")
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def select_mass(scores: Tensor, mass: float) -> Tensor:
    """The best entries of every row that together reach a share of its sum, as bool.

    The entry that crosses the share is among them.

    Args:
        scores: (..., nb), none of them negative.
        mass: share of each row's sum, above 0 and at most 1.

    Raises:
        ValueError: a share outside that range.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass is {mass}; it must be above 0 and at most 1")
    ranked, index = scores.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    # rounding must not drop an entry from a full share
    enough = mass * ranked.sum(-1, keepdim=True) if mass < 1 else torch.inf
    keep = (before < enough) & ((ranked > 0) | (mass == 1))
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def select_share(scores: Tensor, tokens: Tensor, share: float | Tensor) -> Tensor:
    """The best entries of every row whose tokens come nearest to a share of all, as bool.

    Every row has at least one, and a full share takes all.

    Args:
        scores: (..., nb), -inf for an entry that is worth nothing.
        tokens: (..., nb) tokens of each entry, broadcast to ``scores``.
        share: share of the tokens, above 0 and at most 1; a tensor broadcasts to ``scores``.

    Raises:
        ValueError: a share outside that range.
    """
    if not torch.is_tensor(share) and not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1")
    index = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = tokens.expand_as(scores).gather(-1, index)
    middle = ranked.cumsum(-1) - ranked / 2
    keep = middle <= share * tokens.sum(-1, keepdim=True)
    keep[..., 0] = True
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def select_until(scores: Tensor, worth: Tensor, need: Tensor, always: Tensor) -> Tensor:
    """Some entries of every row, and the best others that together reach a need, as bool.

    The entry that reaches the need is among them; without a need only the first are.

    Args:
        scores: (..., nb), -inf for an entry that is never taken.
        worth: (..., nb) what an entry adds, broadcast to ``scores``.
        need: (..., 1) what is to be reached beside the entries of ``always``.
        always: (..., nb) bool, broadcast to ``scores``.
    """
    scores = scores.masked_fill(always, -torch.inf)
    ranked, index = scores.sort(dim=-1, descending=True, stable=True)
    ranked_worth = worth.double().expand_as(scores).gather(-1, index)
    before = ranked_worth.cumsum(-1) - ranked_worth
    keep = (before < need) & (ranked > -torch.inf)
    return torch.zeros_like(keep).scatter_(-1, index, keep) | always
