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
    mask = mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))
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
