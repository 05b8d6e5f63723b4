"""Attention of every query to every key, by the fastest kernel that PyTorch has for it.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

# By default PyTorch takes FlashAttention-2, which reaches half of what cuDNN does on Hopper: 329
# and 631 TFLOP/s on an H100 at head dim 128, forward (pytorch/pytorch#142132)
HOPPER = (9, 0)
ON_HOPPER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """``scaled_dot_product_attention``, on Hopper by cuDNN unless the user chose a kernel.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, Sk, D), H a multiple of K.
        mask: bool or additive, broadcast to (B, H, S, Sk).
        scale: factor of the scores; D ** -0.5 by default.

    Returns:
        (B, H, S, D) in the dtype of ``q``.
    """
    with _cudnn_first() if _wants_cudnn(q, mask) else nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def _wants_cudnn(q: Tensor, mask: Tensor | None) -> bool:
    """Whether cuDNN has the faster kernel, and nobody told PyTorch which to take."""
    if torch.compiler.is_compiling() or mask is not None or not _is_on_hopper(q):
        return False
    return is_usual()


def _is_on_hopper(q: Tensor) -> bool:
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    return is_half and q.is_cuda and torch.cuda.get_device_capability(q.device) == HOPPER


def is_usual() -> bool:
    """Whether PyTorch's kernels, and their order, are those of a process in which nobody chose."""
    allowed = (
        cuda.cudnn_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )
    return all(allowed) and torch._C._get_sdp_priority_order() == _USUAL_ORDER


def _cudnn_first() -> AbstractContextManager:
    # the others stay: cuDNN is passed over where it cannot do a call
    return sdpa_kernel(ON_HOPPER, set_priority=True)


_USUAL_ORDER = torch._C._get_sdp_priority_order()
