"""The attention of TransNeXt: a few cells nearby and a pooled map, under one softmax.

Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv:2311.17132. Its
heads are weighed token by token, as in MoH (head_routing.py).

Letters: B batch, n heads, H, W size of a feature map, N its cells, P pooled cells, C channels,
D head dim, L cells nearby.
"""

from __future__ import annotations

import math

import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, normalize, pad, softplus

from vidattn.backbones.exporting import attention
from vidattn.backbones.layers.head_routing import HeadRouter

# softplus of the temperature to begin with
TEMPERATURE = 1 / 0.24
HIDDEN = 512


@register_notrace_module
class PositionBias(nn.Module):
    """Biases that a perceptron draws from the distance of query and key on a log scale.

    Args:
        num_heads: n.
        stride: cells to a side of what a key was pooled from.
        side: cells to a side of the map in training, to which distances are relative.
    """

    def __init__(self, num_heads: int, stride: int, side: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.stride, self.side = stride, side
        self.fc1 = nn.Linear(2, HIDDEN, **dd)
        self.fc2 = nn.Linear(HIDDEN, num_heads, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(n, N, P) for a feature map (B, H, W, C)."""
        weight = self.fc1.weight
        # half precision cannot count far
        like = weight if weight.dtype == torch.float64 else weight.float()
        y, index_y = distances(x.shape[1], self.stride, self.side, like)
        z, index_z = distances(x.shape[2], self.stride, self.side, like)
        apart = torch.stack([y[:, None].expand(-1, len(z)), z.expand(len(y), -1)], -1)
        table = self.fc2(self.fc1(apart.to(weight.dtype)).relu())
        # [y of query, x of query, y of key, x of key, n]
        bias = table[index_y[:, None, :, None], index_z[None, :, None, :]]
        return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


def distances(extent: int, stride: int, side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of queries and keys on one axis, and which of them a pair has: (extent, keys).

    A key lies in the middle of its ``stride`` cells, whether the map has all of them or not.
    """
    keys = (extent + stride - 1) // stride
    shift = (keys - 1) * stride
    query = torch.arange(extent, device=like.device)
    key = torch.arange(keys, device=like.device)
    apart = torch.arange(extent + shift, dtype=like.dtype, device=like.device)
    apart = (apart - shift - (stride - 1) / 2) / max(1, side - 1) * 8
    return apart.sign() * (apart.abs() + 1).log2() / 3, query[:, None] - key * stride + shift


class ScaledQueries(nn.Module):
    """Queries of length 1, moved by an embedding and scaled by what each head has learned.

    Args:
        num_heads: n.
        head_dim: D.
    """

    def __init__(self, num_heads: int, head_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        self.embedding = nn.Parameter(torch.empty(num_heads, 1, head_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters from which training starts."""
        nn.init.constant_(self.temperature, math.log(math.expm1(TEMPERATURE)))
        trunc_normal_(self.embedding, std=0.02)

    def forward(self, q: Tensor) -> Tensor:
        """(B, n, N, D), like ``q``."""
        return (q + self.embedding) * softplus(self.temperature)


class CosineAttention(nn.Module):
    """Cosine attention of every cell to every cell.

    Args:
        dim: channels.
        router: of the heads.
        num_heads: a divisor of ``dim``.
        side: cells to a side of the map in training.
    """

    def __init__(
        self, dim: int, router: HeadRouter, *, num_heads: int, side: int, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.router = num_heads, router
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.queries = ScaledQueries(num_heads, dim // num_heads, **dd)
        self.position_bias = PositionBias(num_heads, 1, side, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        tokens = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).flatten(1, 2)
        tokens = tokens.permute(2, 0, 3, 1, 4)
        q, k, v = normalize(tokens[0], dim=-1), normalize(tokens[1], dim=-1), tokens[2]
        q = self.queries(q) * log_cells(x)
        bias = self.position_bias(x)[None]
        out = attention(q, k, v, bias, 1.0)
        return self.proj(weigh(out, self.router(x)))


class AggregatedAttention(nn.Module):
    """Cosine attention to the cells nearby and to a pooled map.

    To the weights of the cells nearby come others, of the query and learned tokens alone.

    Args:
        dim: channels.
        router: of the heads.
        num_heads: a divisor of ``dim``.
        stride: cells to a side of what is pooled.
        side: cells to a side of the map in training.
        window: cells to a side of what is nearby; odd.
    """

    def __init__(
        self,
        dim: int,
        router: HeadRouter,
        *,
        num_heads: int,
        stride: int,
        side: int,
        window: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads, self.router = num_heads, router
        self.stride, self.window = stride, window
        near, head_dim = window**2, dim // num_heads
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.queries = ScaledQueries(num_heads, head_dim, **dd)
        self.position_bias = PositionBias(num_heads, stride, side, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, near, **dd))
        self.tokens = nn.Parameter(torch.empty(num_heads, head_dim, near, **dd))
        self.token_bias = nn.Parameter(torch.empty(num_heads, 1, near, **dd))
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters from which training starts."""
        trunc_normal_(self.rpb, std=0.0004)
        trunc_normal_(self.tokens, std=0.02)
        nn.init.zeros_(self.token_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), like ``x``."""
        q = normalize(self.q(x).unflatten(-1, (self.num_heads, -1)), dim=-1)
        q = q.flatten(1, 2).transpose(1, 2)
        # (2, B, n, H, W, D)
        near = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        pooled = self.act(self.sr(x.permute(0, 3, 1, 2)))
        # a window at the border may have fewer cells
        pooled = avg_pool2d(pooled, self.stride, ceil_mode=True, count_include_pad=False)
        pooled = self.norm(pooled.flatten(2).transpose(1, 2))
        # (2, B, n, P, D)
        pooled = self.kv(pooled).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

        ones = torch.ones_like(x[:1, :, :, :1]).unsqueeze(1)
        is_inside = torch.stack(neighbors(ones, self.window), -1).flatten(2, 4)
        # [1, 1, N, 1]
        num_keys = is_inside.sum(-1, keepdim=True) + pooled.shape[3]
        scaled = self.queries(q) * num_keys.log()
        near_k = neighbors(normalize(near[0], dim=-1), self.window)
        scores = torch.stack([(scaled * k.flatten(2, 3)).sum(-1) for k in near_k], -1)
        scores = scores + self.rpb[:, None]
        scores = scores.masked_fill(is_inside == 0, float("-inf"))
        far = scaled @ normalize(pooled[0], dim=-1).transpose(2, 3) + self.position_bias(x)
        weights = torch.cat([scores, far], -1).softmax(-1)
        num_near = scores.shape[-1]
        out = weights[..., num_near:] @ pooled[1]
        weights = weights[..., :num_near] + q @ self.tokens + self.token_bias
        for i, v in enumerate(neighbors(near[1], self.window)):
            out = out + weights[..., i : i + 1] * v.flatten(2, 3)
        return self.proj(weigh(out, self.router(x)))


def neighbors(x: Tensor, window: int) -> list[Tensor]:
    """The cells around every cell, row by row: of shape (B, n, H, W, D) each, like ``x``.

    Those beyond the border are 0.
    """
    height, width, reach = x.shape[2], x.shape[3], window // 2
    x = pad(x, [0, 0, reach, reach, reach, reach])
    found: list[Tensor] = []
    for i in range(window):
        for j in range(window):
            found.append(x[:, :, i : i + height, j : j + width])
    return found


def weigh(out: Tensor, weights: Tensor) -> Tensor:
    """(B, H, W, C) from the outputs of heads (B, n, N, D) and their weights (B, H, W, n)."""
    out = out.transpose(1, 2).reshape(weights.shape[:3] + out.shape[1:2] + out.shape[3:])
    return (out * weights[..., None]).flatten(3)


@register_notrace_function
def log_cells(x: Tensor) -> float:
    """Logarithm of the number of cells of a feature map (B, H, W, C)."""
    return math.log(x.shape[1] * x.shape[2])
