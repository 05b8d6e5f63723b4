"""Which keys some queries read under a plan.

Letters: B batch, H query heads, Sk keys, R queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.plan import Plan


def visible_keys(plan: Plan, queries: Tensor) -> Tensor:
    """Rows of the mask of a plan, without the rest of it.

    Args:
        queries: (R,) int64 tokens.

    Returns:
        (B|1, H|1, R, Sk) bool, whether a query reads a key, in sequence order.
    """
    lists, n, nb = plan.lists, plan.layout.block, plan.layout.num_blocks
    slot = plan.layout.slot_of_token[queries]
    first = torch.arange(0, lists.num_rows, nb, device=slot.device)
    row = (first[:, None] + slot // n).flatten()  # one for each sample, head and query
    start, count = lists.row_start[row], lists.row_start[row + 1] - lists.row_start[row]
    of = torch.arange(len(row), device=slot.device).repeat_interleave(count)
    nth = torch.arange(len(of), device=slot.device) - (count.cumsum(0) - count)[of]
    entry = start[of] + nth
    visible = torch.zeros(len(row), lists.num_key_blocks, n, dtype=torch.bool, device=slot.device)
    visible[of, lists.key_block[entry].long()] = True
    partial = nth >= lists.num_full[row][of]
    if partial.any():
        of, entry = of[partial], entry[partial]
        query, key = slot.repeat(len(first))[of], lists.key_block[entry].long()
        if lists.box is None:
            seen = lists.masks[lists.mask_id[entry].long(), query % n]
        else:
            inside = torch.arange(n, device=slot.device)
            seen = lists.box.visible(query[:, None], key[:, None] * n + inside)
        visible[of, key] = seen
    rows = visible.flatten(1)[:, plan.key_layout.slot_of_token]
    return rows.view(lists.batch, lists.heads, len(queries), -1)
