"""The operator behind neighborhood attention: windows on tiles and the halos around them.

Letters: B batch, H heads, t, h and w the axes, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.grid import Size, dilation_order
from vidattn.kernels.windows import neighborhood_torch
from vidattn.kernels.windows.halo import EDGES, Axis, Halo, choose_edges, every_pair, window_axis
from vidattn.methods.neighborhood import axis_window

Flags = tuple[bool, bool, bool]


@lru_cache(maxsize=64)
def _halo(size: Size, window: Size, stride: Size, dilation: Size, causal: Flags) -> Halo:
    axes = []
    for axis in zip(size, window, stride, dilation, causal):
        first, last = (x.tolist() for x in axis_window(*axis))
        extent, reach, step = axis[0], axis[1] - 1, axis[3]
        lengths = [len(range(group, extent, step)) for group in range(min(step, extent))]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        groups = [(end - length, end) for end, length in zip(ends, lengths)]
        edges = sorted({min(edge, max(lengths)) for edge in EDGES})
        runs = {edge: window_axis(first, last, groups, edge, reach) for edge in edges}
        axes.append((runs, reach, None if step == 1 else dilation_order(extent, step)))
    edges = choose_edges([runs for runs, _, _ in axes])
    t, h, w = (Axis(runs[edge], *rest) for (runs, *rest), edge in zip(axes, edges))
    return Halo((t, h, w))


def _halo_of(q: Tensor, k: Tensor, rule: tuple[Sequence, ...]) -> Halo:
    """The halo of the arguments of an operator; without a window, every pair."""
    if not rule[0]:
        return every_pair(q.shape[4], k.shape[4])
    return _halo(tuple(q.shape[2:5]), *(tuple(x) for x in rule))


_RULE = "int[] window, int[] stride, int[] dilation, bool[] causal, float scale"


@torch.library.custom_op(
    "vidattn::neighborhood",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? bias, {_RULE}) -> (Tensor, Tensor)",
)
def halo_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rule: object
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the window around it, by tiles of queries and the keys near them.

    Args:
        q, k, v: (B, H, t, h, w, D); k and v of another size where there is no window.
        bias: (H, 2 wt - 1, 2 wh - 1, 2 ww - 1) table of relative positions.
        rule: window, stride, dilation and causal, three numbers each, or none for every pair; then
            the scale.

    Returns:
        (B, H, t, h, w, D) output and (B, H, t, h, w) log-sum-exp.
    """
    flat = None if bias is None else bias.flatten(1)
    return neighborhood_torch.forward(q, k, v, _halo_of(q, k, rule[:4]), rule[4], flat)


@torch.library.custom_op(
    "vidattn::neighborhood_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor delta, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? bias, "
    f"{_RULE}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(d_out, delta, q, k, v, lse, bias, *rule):
    flat = None if bias is None else bias.flatten(1)
    halo = _halo_of(q, k, rule[:4])
    *grads, d_bias = neighborhood_torch.backward(d_out, delta, q, k, v, lse, halo, rule[4], flat)
    return *grads, d_bias if bias is None else d_bias.view(bias.shape)


@halo_attention.register_fake
def _(q, k, v, bias, *rule):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=lse_dtype)


@_backward.register_fake
def _(d_out, delta, q, k, v, lse, bias, *rule):
    d_bias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_bias


def _keep(ctx, inputs, output):
    q, k, v, bias, *ctx.rule = inputs
    ctx.save_for_backward(q, k, v, *output, bias)


def _pull(ctx, d_out, d_lse):
    q, k, v, out, lse, bias = ctx.saved_tensors
    # what the softmax of a row loses when its output, or its log-sum-exp, is pulled
    delta = (out.to(lse.dtype) * d_out).sum(-1) - d_lse
    *grads, d_bias = _backward(d_out, delta, q, k, v, lse, bias, *ctx.rule)
    return *grads, None if bias is None else d_bias, *(None,) * len(ctx.rule)


halo_attention.register_autograd(_pull, setup_context=_keep)
