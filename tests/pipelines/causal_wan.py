"""A causal Wan model, slowly: the whole video in one pass, under a mask, in the names of its code.

Written from the papers (2503.20314, 2506.08009) for tests: nothing of diffusers is in it. A chunk
attends to itself and to the chunks before it. Frames of the past are given without noise, at the
time of the clean pass; those of the chunk that is being made have noise, and a time of their own.

Letters: F latent frames, S tokens, N heads, D head dim, L words, d width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def random_state(
    *, heads: int, head_dim: int, layers: int, channels: int, text: int, ffn: int, patch: tuple
) -> State:
    """Weights of a model in the names of Wan's own code; none of them is zero."""
    width, freq = heads * head_dim, 16
    state: State = {}

    def linear(name: str, outs: int, ins: int):
        state[f"{name}.weight"] = torch.randn(outs, ins) / ins**0.5
        state[f"{name}.bias"] = torch.randn(outs) / 4

    state["patch_embedding.weight"] = torch.randn(width, channels, *patch) / 2
    state["patch_embedding.bias"] = torch.randn(width) / 4
    linear("text_embedding.0", width, text)
    linear("text_embedding.2", width, width)
    linear("time_embedding.0", width, freq)
    linear("time_embedding.2", width, width)
    linear("time_projection.1", 6 * width, width)
    for i in range(layers):
        block = f"blocks.{i}"
        state[f"{block}.modulation"] = torch.randn(1, 6, width) / 2
        state[f"{block}.norm3.weight"] = 1 + torch.randn(width) / 4
        state[f"{block}.norm3.bias"] = torch.randn(width) / 4
        for attn in ("self_attn", "cross_attn"):
            for x in "qkvo":
                linear(f"{block}.{attn}.{x}", width, width)
            for x in "qk":
                state[f"{block}.{attn}.norm_{x}.weight"] = 1 + torch.randn(width) / 4
        linear(f"{block}.ffn.0", ffn, width)
        linear(f"{block}.ffn.2", width, ffn)
    linear("head.head", channels * math.prod(patch), width)
    state["head.modulation"] = torch.randn(1, 2, width) / 2
    return state


def velocity(
    state: State,
    latents: Tensor,
    times: Tensor,
    text: Tensor,
    chunks: list[int],
    heads: int,
    visible: Tensor | None = None,
) -> Tensor:
    """What the model makes of every frame of a video.

    Args:
        latents: (C, F, H, W).
        times: (F,) of 1000.
        text: (L, width of text).
        chunks: frames of each chunk.
        visible: (F, F) bool, whether a frame reads another; by default whether its chunk is no
            later.

    Returns:
        (C, F, H, W) float64.
    """
    state = {name: x.double() for name, x in state.items()}
    latents, times, text = latents.double(), times.double(), text.double()
    patch = state["patch_embedding.weight"].shape[2:]
    x = F.conv3d(
        latents[None], state["patch_embedding.weight"], state["patch_embedding.bias"], patch
    )
    _, width, frames, rows, columns = x.shape
    x = x[0].flatten(1).T
    if visible is None:
        of_frame = torch.tensor(chunks).repeat_interleave(torch.tensor(chunks))
        of_frame = torch.arange(len(chunks)).repeat_interleave(torch.tensor(chunks))
        visible = of_frame[:, None] >= of_frame[None]
    per_frame = rows * columns
    mask = visible.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)
    angles = _angles(frames, rows, columns, width // heads)
    embedded = _times(state, times).repeat_interleave(per_frame, 0)
    shifts = _linear(state, "time_projection.1", F.silu(embedded)).unflatten(1, (6, width))
    words = _linear(state, "text_embedding.0", text)
    words = _linear(state, "text_embedding.2", F.gelu(words, approximate="tanh"))
    i = 0
    while f"blocks.{i}.modulation" in state:
        x = _block(state, f"blocks.{i}", x, words, shifts, mask, angles, heads)
        i += 1
    shift, scale = (state["head.modulation"] + embedded[:, None]).unbind(1)
    x = _linear(state, "head.head", F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift)
    x = x.view(frames, rows, columns, *patch, -1)
    return x.permute(6, 0, 3, 1, 4, 2, 5).reshape(latents.shape)


def _block(state, name, x, words, shifts, mask, angles, heads) -> Tensor:
    width = x.shape[1]
    m = (state[f"{name}.modulation"] + shifts).unbind(1)
    h = F.layer_norm(x, (width,), eps=1e-6) * (1 + m[1]) + m[0]
    x = x + _attention(state, f"{name}.self_attn", h, h, heads, mask, angles) * m[2]
    norm = state[f"{name}.norm3.weight"], state[f"{name}.norm3.bias"]
    h = F.layer_norm(x, (width,), *norm, eps=1e-6)
    x = x + _attention(state, f"{name}.cross_attn", h, words, heads)
    h = F.layer_norm(x, (width,), eps=1e-6) * (1 + m[4]) + m[3]
    h = F.gelu(_linear(state, f"{name}.ffn.0", h), approximate="tanh")
    return x + _linear(state, f"{name}.ffn.2", h) * m[5]


def _attention(state, name, x, seen, heads, mask=None, angles=None) -> Tensor:
    q, k, v = (_linear(state, f"{name}.{part}", y) for part, y in zip("qkv", (x, seen, seen)))
    q, k = (
        y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.norm_{part}.weight"]
        for part, y in zip("qk", (q, k))
    )
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(0, 1) for y in (q, k, v))
    if angles is not None:
        q, k = (_rotated(y, angles) for y in (q, k))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return _linear(state, f"{name}.o", out)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def _angles(frames: int, rows: int, columns: int, dim: int) -> Tensor:
    """(S, D / 2) angles of the places of a video."""
    dims = (dim - 4 * (dim // 6), 2 * (dim // 6), 2 * (dim // 6))
    places = torch.cartesian_prod(*(torch.arange(n) for n in (frames, rows, columns))).double()
    rates = [10000 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d) for d in dims]
    return torch.cat([places[:, axis, None] * rates[axis] for axis in range(3)], 1)


def _times(state: State, times: Tensor) -> Tensor:
    half = state["time_embedding.0.weight"].shape[1] // 2
    rates = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    waves = times[:, None] * rates
    x = torch.cat([waves.cos(), waves.sin()], 1)
    return _linear(state, "time_embedding.2", F.silu(_linear(state, "time_embedding.0", x)))


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
