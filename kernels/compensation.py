"""Gain and shift of query blocks: how an estimate of what was not read enters the output.

Letters: B batch, H heads, S tokens, D head dim, nb blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists


def compensate(out: Tensor, lists: BlockLists, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """``gain * out + shift``, each token by its query block, in float32 or more.

    Args:
        out: (B, H, S, D).
        lists: those that were read, of which the layout is taken.
        gain: (B|1, H|1, nb).
        shift: (B|1, H|1, nb, D).
    """
    if gain is None and shift is None:
        return out
    order = lists.order
    # empty slots write behind the last token
    token = torch.where(order < 0, out.shape[2], order).long()
    block_of_slot = torch.arange(order.numel(), device=order.device) // lists.block
    block_of_token = token.new_zeros(out.shape[2] + 1).scatter(0, token, block_of_slot)[:-1]
    result = out.to(torch.promote_types(out.dtype, torch.float32))
    if gain is not None:
        result = result * gain[..., block_of_token, None]
    if shift is not None:
        result = result + shift[..., block_of_token, :]
    return result.to(out.dtype)
