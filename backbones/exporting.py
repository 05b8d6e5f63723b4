"""What models do other than usual while torch.export, ONNX or torch.jit.trace makes graphs of them.

A graph that leaves the process holds operators of PyTorch alone, not those of this package, and
what it was made of says nothing of the sizes it will see.

Letters: B batch, H, W size of a feature map, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def is_exported() -> bool:
    """Whether a graph is being made that has to stand without this package."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_exporting() or torch.jit.is_tracing()


def resize_map(x: Tensor, height: int, width: int) -> Tensor:
    """A map (B, H, W, C) with so many rows and columns: cut or padded with zeros at its ends.

    Sizes are not compared, so a graph that is made of this takes maps of every size.
    """
    x = pad(x, [0, 0, 0, 1, 0, 1])
    rows = torch.arange(height, device=x.device).clamp(max=x.shape[1] - 1)
    columns = torch.arange(width, device=x.device).clamp(max=x.shape[2] - 1)
    return x[:, rows][:, :, columns]


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention of PyTorch, whose output lies in memory row by row where it is exported.

    Else its layout would be that of the kernel which made the graph, and another one might refuse
    to reshape it.

    Args:
        q: (..., queries, D).
        k, v: (..., keys, D).
        bias: added to the scaled scores.
        scale: of the scores; D ** -0.5 for None.
    """
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.clone(memory_format=torch.contiguous_format) if is_exported() else out
