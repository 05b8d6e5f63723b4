"""Queries and keys for tests of methods that read them, and the loops they are checked with."""

import torch
from torch import Tensor

from vidattn.grid import Grid, Layout


def coherent(grid: Grid, *, batch: int = 2, heads: int = 3, dim: int = 16, noise: float = 0.3):
    """q, k and v (B, H, S, D) that vary smoothly over the video, so that near tokens are alike."""
    places = grid.coords().float() / torch.tensor(grid.size)
    tensors = []
    for gain in (3.0, 3.0, 1.0):
        waves = torch.randn(batch, heads, 3, dim) * 2
        phase = torch.rand(batch, heads, 1, dim) * 6.3
        smooth = torch.cos(places @ waves + phase)
        tensors.append(gain * smooth + noise * torch.randn_like(smooth))
    # queries look for keys like them
    q, k, v = tensors
    return 0.7 * k + 0.3 * q, k, v


def tokens_of(layout: Layout, block: int) -> list[int]:
    """The tokens in a block."""
    slots = layout.order.view(-1, layout.block)[block].tolist()
    return [token for token in slots if token >= 0]


def dense_weights(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    """(B, H, S, S) float64 softmax attention."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = scale * q.double() @ k.mT
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    return scores.softmax(-1)
