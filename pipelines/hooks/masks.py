"""Attention masks that only say which keys are padding, brought to the form that attend takes."""

from __future__ import annotations

import torch
from torch import Tensor

# models write "never" as a score of -10000 or lower
_NEVER = -1e4


def key_mask(mask: Tensor | None, shape: tuple[int, int], paired: bool) -> Tensor | None:
    """(B, S) bool, False for keys that nobody may read; None when there are none.

    Args:
        mask: what scaled_dot_product_attention is given, bool or additive, broadcast over heads and
            queries.
        shape: (B, S).
        paired: the mask is one of keys paired with itself, so that its diagonal is that mask.

    Raises:
        ValueError: the mask says something else.
    """
    if mask is None:
        return None
    batch, length = shape
    mask = full(mask)
    if paired and mask.shape[-2] == length:
        mask = mask.diagonal(dim1=-2, dim2=-1)[:, :, None]
    elif mask.stride(-2) == 0 or mask.stride(1) == 0:
        # expanded, not materialized
        mask = mask[:, :1] if mask.stride(1) == 0 else mask
        mask = mask[:, :, :1] if mask.stride(-2) == 0 else mask
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        raise ValueError("its mask differs between queries or heads")
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask <= _NEVER)).all()):
            raise ValueError("its mask weighs scores instead of leaving keys out")
        mask = mask == 0
    return mask[:, 0, 0].expand(batch, length)


def full(mask: Tensor) -> Tensor:
    """A mask with all four axes."""
    return mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))


def shared_mask(mask: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """(B, S) bool, the keys that all queries of a mask read, and (B, 1, S) how much each weighs.

    Args:
        mask: (B|1, H|1, Q, S) of these queries, bool or additive.
        shape: (B, S).

    Returns:
        The keys, and their weights or None where all weigh the same.

    Raises:
        ValueError: it is another for some queries or heads.
    """
    first = mask[:, :1, :1]
    if not bool((mask == first).all()):
        raise ValueError("its mask differs between queries or heads")
    first = first[:, 0, 0].expand(shape)
    if first.dtype == torch.bool:
        return first, None
    keys = first > _NEVER
    bias = first.float().masked_fill(~keys, -torch.inf)
    weight = (bias - bias.amax(-1, keepdim=True)).exp()
    return keys, None if bool((weight == keys).all()) else weight[:, None]


def unpaired(func: object, args: tuple) -> Tensor | None:
    """A mask of keys in place of that mask paired with itself, which would take S * S bytes.

    Args:
        func, args: a call of torch on the way to pairing a (B, 1, 1, S) bool mask.

    Returns:
        (B, 1, S, S) bool without memory of its own, or None for any other call.
    """
    if func is Tensor.repeat and _is_mask(args[0]) and args[0].shape[1:3] == (1, 1):
        return args[0].expand(*args[0].shape[:2], args[-2], -1)
    if func is Tensor.__and__ and all(map(_is_mask, args)) and args[0].stride(2) == 0:
        return args[0]
    return None


def paired(mask: Tensor | None) -> Tensor | None:
    """The mask that ``unpaired`` stood in for."""
    return None if mask is None else mask & mask.transpose(-2, -1)


def _is_mask(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.bool and x.dim() == 4
