"""Attention of timm's vision transformers, and of whatever attends as they do, where it is faster.

A module keeps its class and its code; ``scaled_dot_product_attention`` alone, where the module
calls it, goes to the engine that has measured faster for the type and the size at hand.

Letters: B batch, H heads, S tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from vidattn.backbones.exporting import is_exported
from vidattn.backbones.faster.layers import Faster
from vidattn.kernels.engines.exact import exact_attention, exact_engine


class FasterAttention(Faster):
    """The forward of a module that may call PyTorch's fused attention."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the module gives."""
        own = getattr(type(self.module), self.method)
        is_traced = torch.compiler.is_compiling() or any(isinstance(x, fx.Proxy) for x in args)
        if not self.is_on or is_traced or is_exported():
            return own(self.module, *args, **options)
        with _OnTheFaster():
            return own(self.module, *args, **options)


class _OnTheFaster(TorchFunctionMode):
    """Sends PyTorch's fused attention to the faster engine in a with block."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        attention = _attend if func is F.scaled_dot_product_attention else func
        return attention(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention``, on the faster engine where that takes the call."""
    q, k, v = query, key, value
    is_plain = not dropout_p and not is_causal and q.dim() == 4 and k.dim() == 4
    if is_plain and _is_of_keys(attn_mask, q, k) and (enable_gqa or q.shape[1] == k.shape[1]):
        if exact_engine(q, k, v) != "pytorch":
            keys = None if attn_mask is None else attn_mask[:, 0, 0].expand(q.shape[0], -1)
            return exact_attention(q, k, v, key_mask=keys, scale=scale)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _is_of_keys(mask: Tensor | None, q: Tensor, k: Tensor) -> bool:
    """Whether a mask is none, or leaves out the same keys for all heads and queries."""
    if mask is None:
        return True
    shapes = ((q.shape[0], 1, 1, k.shape[2]), (1, 1, 1, k.shape[2]))
    return mask.dtype == torch.bool and mask.shape in shapes


def may_attend(module: nn.Module) -> bool:
    """Whether a module calls PyTorch's fused attention, as timm's say of themselves."""
    return getattr(module, "fused_attn", False) is True and "forward" not in vars(module)
