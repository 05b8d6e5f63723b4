"""Block-sparse attention on PyTorch's FlexAttention: a cross-check, and a fallback on GPUs.

Letters: B batch, H heads, S tokens, D head dim, N slots, n slots to a block, nb blocks.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vidattn.kernels.block_lists import BlockLists


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
    """The same result as ``block_sparse_torch.block_sparse_attention``, by FlexAttention."""
    raise ValueError("not built yet")
