"""Numbers as small integers with a scale: what attention in low precision multiplies.

Letters: B batch, H heads, S tokens, D head dim, N slots, n slots to a block, nb blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.kernels.engines.block_segments import even_block
from vidattn.kernels.slots import Slots

LEVELS = 127
# the smallest number that stands for the largest of a block: a block of zeros has a scale too
TINY = 1e-30
# the integer units multiply 32 numbers of a row at a time
SMALLEST_TILE = 32
MAX_KEYS_TOGETHER = 64


@dataclass(frozen=True)
class Precision:
    """The largest integers that weights and values become; None where they stay as they are."""

    weights: int | None = None
    values: int | None = None


# queries and keys are 8-bit integers in all of them; no weight is negative, so that 4 bits hold 15
PRECISIONS = {
    "int8_qk": Precision(),
    "int8": Precision(weights=LEVELS, values=LEVELS),
    "int8_qk_int4_pv": Precision(weights=15, values=7),
}


def keys_together(block: int) -> int:
    """How many keys of a block share the scale of their weights, in every row."""
    even = even_block(block, SMALLEST_TILE)
    return min(MAX_KEYS_TOGETHER, even & -even)


def quantise_blocks(
    x: Tensor, order: Tensor, block: int, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every block of tokens as integers with one scale.

    Args:
        x: (B, H, S, D).
        order: (N,) int32, token in each slot, -1 for an empty slot.
        block: slots to a block.
        mean: (B, H, D), subtracted first.

    Returns:
        (B, H, N, D) int8, 0 in empty slots; (B, H, nb) float32 scales.
    """
    x = x.float() if mean is None else x.float() - mean[:, :, None]
    blocks = Slots(order, block, None).fill(x).view(*x.shape[:2], -1, block, x.shape[-1])
    peak = blocks.abs().amax((-2, -1)).clamp_min(TINY)
    return _rounded(blocks * (LEVELS / peak)[..., None, None]).flatten(2, 3), peak / LEVELS


def quantise_channels(x: Tensor, order: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """Every channel of a head as integers with one scale.

    Args:
        x: (B, H, S, D).
        order: (N,) int32, token in each slot, -1 for an empty slot.
        levels: the largest integer.

    Returns:
        (B, H, N, D) int8, 0 in empty slots; (B, H, D) float32 scales.
    """
    peak = channel_peaks(x)
    filled = Slots(order, 1, None).fill(x.float()).view(*x.shape[:2], -1, x.shape[-1])
    return _rounded(filled * (levels / peak)[:, :, None]), peak / levels


def channel_peaks(x: Tensor) -> Tensor:
    """(B, H, D) float32, the largest absolute number of every channel, above 0."""
    # a norm reads x once; its absolute values would be another tensor of this size
    return torch.linalg.vector_norm(x, float("inf"), dim=2).float().clamp_min_(TINY)


def round_weights(weights: Tensor, block: int, levels: int) -> None:
    """Round softmax weights in place, each to one of ``levels`` parts of the largest beside it.

    The scale is that of a row and of some keys, not the 1 / 127 of SageAttention (2410.02367), of
    which a key far below the row's largest has little left: on normal numbers the error is half.

    Args:
        weights: (..., P * n) of whole blocks of n slots.
        block: n.
    """
    together = keys_together(block)
    blocks = F.pad(weights.unflatten(-1, (-1, block)), (0, -block % together))
    groups = blocks.unflatten(-1, (-1, together))
    peak = groups.amax(-1, keepdim=True).clamp_min_(TINY)
    rounded = (groups * (levels / peak) + 0.5).floor_().mul_(peak / levels)
    weights.copy_(rounded.flatten(-2)[..., :block].flatten(-2))


def _rounded(x: Tensor) -> Tensor:
    return (x + 0.5).floor_().to(torch.int8)
