"""Attention inside windows in PyTorch: the twin of ``window_attention_cpu``.

Letters: B batch, S tokens, H heads, D head dim, R windows, n queries and m keys of a window.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vidattn.kernels.windows import Windows


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
