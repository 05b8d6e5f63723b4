"""Attention inside windows in PyTorch: the twin of ``window_attention_cpu``.

Letters: B batch, S tokens, H heads, D head dim, R windows, n queries and m keys of a window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.kernels.windows.windows import Windows


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    *,
    scale: Tensor,
    bias: Tensor | None = None,
    is_cosine: bool = False,
) -> Tensor:
    """Softmax attention of every query over the keys of its window; see the C++ engine."""
    D = k.shape[-1]
    # (B, R, H, n, D) and (B, R, H, m, D)
    queries = q[:, windows.queries.long()].transpose(2, 3)
    keys, values = (F.pad(x, (0, 0, 0, 0, 0, 1))[:, windows.keys.long()] for x in (k, v))
    keys, values = keys.transpose(2, 3), values.transpose(2, 3)
    own, of_slots = queries[..., :D], queries[..., D:]
    if is_cosine:
        own, keys = F.normalize(own, dim=-1), F.normalize(keys, dim=-1)
    scores = own @ keys.mT * scale[:, None, None]
    if windows.slots is not None:
        scores = scores + of_slots @ windows.slots.to(q.dtype).mT
    if bias is not None:
        scores = scores + bias
    if windows.hidden is not None:
        scores = scores + windows.hidden[windows.kind.long(), None].to(q.dtype)
    # (B, R * n, H, D) in the order of the windows, then of the tokens
    out = (scores.softmax(-1) @ values).transpose(2, 3).flatten(1, 2)
    return out[:, windows.queries.flatten().argsort()]


def backward(
    d_out: Tensor,
    parts: Tensor | tuple[Tensor, Tensor, Tensor],
    windows: Windows,
    *,
    scale: Tensor,
    bias: Tensor | None,
    is_cosine: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of the parts, scale and bias, None where there is none; they have some themselves.

    Args:
        parts: q, k and v, or (B, S, 3, H, D) of them packed.
    """
    leaves = [parts] if isinstance(parts, Tensor) else list(parts)
    leaves += [scale if is_cosine else None, bias]
    with torch.enable_grad():
        q, k, v = parts.unbind(2) if isinstance(parts, Tensor) else parts
        out = window_attention(q, k, v, windows, scale=scale, bias=bias, is_cosine=is_cosine)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, d_out, create_graph=True))
    return tuple(next(grads) if x is not None and x.requires_grad else None for x in leaves)
