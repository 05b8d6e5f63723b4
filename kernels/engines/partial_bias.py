"""Partial blocks as numbers to add to scores, so that hidden pairs drop out.

Letters: G query blocks, P listed blocks of each, n slots to a block, M distinct masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists

# what hides a pair when added to its score: below every real score, and finite, so that the largest
# score of a row that sees nothing can be subtracted
HIDDEN = -1e28


def partial_bias(lists: BlockLists, rows: Tensor, entries: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, n, P * n) what to add to scores so that hidden pairs drop out: 0, or HIDDEN and less.

    ``rows`` (G,) are plan rows, ``entries`` (G, P) positions in ``key_block``; whole blocks among
    them get 0.
    """
    whole = entries < (lists.row_start[rows] + lists.num_full[rows])[:, None]
    if lists.box is None:
        tables = _mask_biases(lists, dtype)[lists.mask_id[entries].long()]
        return tables.transpose(1, 2).flatten(2)
    box, block = lists.box, lists.block
    inside = torch.arange(block, device=rows.device)
    query_slots = (rows % lists.num_blocks)[:, None] * block + inside  # (G, n)
    key_slots = lists.key_block[entries].long()[..., None] * block + inside  # (G, P, n)
    key = box.key[key_slots].flatten(1)[:, None]
    # a lost guard bit leaves a negative number
    lost = (key - box.low[query_slots][..., None]).bitwise_and_(
        box.high[query_slots][..., None] - key
    )
    bias = lost.bitwise_and_(box.guard).sub_(box.guard).to(dtype).mul_(-HIDDEN)
    if bool(whole.any()):
        bias.unflatten(-1, (-1, block)).mul_((~whole)[:, None, :, None].to(dtype))
    return bias


def _mask_biases(lists: BlockLists, dtype: torch.dtype) -> Tensor:
    """(M + 1, n, n) the masks as biases; the last one, for whole blocks, is 0."""
    key = ("mask biases", dtype)
    if key not in lists.cache:
        bias = torch.zeros(lists.masks.shape, dtype=dtype, device=lists.masks.device)
        bias.masked_fill_(~lists.masks, HIDDEN)
        lists.cache[key] = torch.cat([bias, torch.zeros_like(bias[:1])])
    return lists.cache[key]
