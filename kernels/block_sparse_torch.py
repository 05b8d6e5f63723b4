"""Block-sparse attention in PyTorch: the engine of every CPU, and the twin of the Triton kernels.

Letters: B batch, H heads, S tokens, D head dim, N slots, n slots to a block, nb blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists, partial_mask


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    block: int,
    lists: BlockLists,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over listed blocks.

    Args:
        q, k, v: (B, H, S, D).
        order: (N,) int32, token in each slot, -1 for an empty slot.
        block: slots to a block.
        lists: which key blocks each query block reads.
        scale: factor of the scores.
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        (B, H, S, D) in the dtype of ``q``; (B, H, S) float32 log-sum-exp, -inf for no keys.
    """
    B, H, S, D = q.shape
    nb = order.numel() // block
    tokens = order.long().clamp_min(0)
    live = (order >= 0).expand(B, -1)
    if key_mask is not None:
        live = live & key_mask[:, tokens]
    qs, ks, vs = (x[:, :, tokens].unflatten(2, (nb, block)).float() for x in (q, k, v))
    out = q.new_zeros(B, H, nb, block, D, dtype=torch.float32)
    lse = q.new_full((B, H, nb, block), float("-inf"), dtype=torch.float32)
    for row in range(lists.num_rows):
        i = row % nb
        h = (
            slice(None)
            if lists.heads == 1
            else slice(row // nb % lists.heads, row // nb % lists.heads + 1)
        )
        b = (
            slice(None)
            if lists.batch == 1
            else slice(row // nb // lists.heads, row // nb // lists.heads + 1)
        )
        begin, end = lists.row_start[row].item(), lists.row_start[row + 1].item()
        if begin == end:
            continue
        cols = lists.key_block[begin:end].long()
        full = lists.num_full[row].item()
        mask = torch.ones(block, len(cols), block, dtype=torch.bool)
        if full < len(cols):
            entries = torch.arange(begin + full, end)[None]
            mask[:, full:] = partial_mask(lists, block, torch.tensor([i]), entries)[0]
        kk, vv = (x[b, h][:, :, cols].flatten(2, 3) for x in (ks, vs))
        keep = mask.flatten(1) & live.view(B, nb, block)[b][:, cols].flatten(1)[:, None, None]
        s = (qs[b, h, i] @ kk.mT * scale).masked_fill(~keep, float("-inf"))
        row_lse = s.logsumexp(-1)
        p = torch.exp(s - torch.where(row_lse.isinf(), 0.0, row_lse)[..., None])
        out[b, h, i] = p @ vv
        lse[b, h, i] = row_lse
    slots = (order >= 0).nonzero().flatten()
    inverse = torch.empty(S, dtype=torch.long).index_copy_(0, order[slots].long(), slots)
    return out.flatten(2, 3)[:, :, inverse].to(q.dtype), lse.flatten(2, 3)[:, :, inverse]
