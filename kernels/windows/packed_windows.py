"""Attention inside the shifted windows of a picture, of queries, keys and values in one tensor.

On a CPU in float32 it is an operator of ``torch.library``, which compiled graphs hold, over
``window_attention_cpu``; its gradient is written in one piece too.

Letters: B batch, S tokens, H heads, D head dim, n queries and m keys of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidattn.kernels.windows import window_attention_cpu, window_attention_torch
from vidattn.kernels.windows.windows import Windows, shifted_windows

_ARGUMENTS = (
    "Tensor qkv, Tensor scale, Tensor? bias, int[] size, int[] window, int[] shift, bool is_cosine"
)


def packed_windows(
    qkv: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    is_cosine: bool = False,
) -> Tensor:
    """Softmax attention of every token to its window; gradients reach qkv, bias and scale.

    Args:
        qkv: (B, S, 3, H, D), of a picture padded to whole windows.
        scale: (H,) factor of the scores.
        bias: (H, n, m), added to the scaled scores.
        size: of the picture before it was padded; see ``shifted_windows``.
        window, shift: likewise.
        is_cosine: whether queries and keys are divided by their lengths, and scale has a gradient.

    Returns:
        (B, S, H, D).
    """
    given = [x for x in (qkv, scale, bias) if x is not None]
    if all(x.device.type == "cpu" and x.dtype == torch.float32 for x in given):
        return _op(qkv, scale, bias, size, window, shift, is_cosine)
    windows, scale = _windows(size, window, shift), scale.to(qkv)
    options = {"scale": scale, "bias": bias, "is_cosine": is_cosine}
    return window_attention_torch.window_attention(*qkv.unbind(2), windows, **options)


@torch.library.custom_op(
    "vidattn::packed_windows", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
def _op(qkv, scale, bias, size, window, shift, is_cosine):
    options = {"scale": scale, "bias": bias, "is_cosine": is_cosine}
    parts = qkv.contiguous().unbind(2)
    return window_attention_cpu.forward(*parts, _windows(size, window, shift), **options)


@torch.library.custom_op(
    "vidattn::packed_windows_backward",
    mutates_args=(),
    schema=f"(Tensor d_out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(d_out, qkv, scale, bias, size, window, shift, is_cosine):
    qkv, d_qkv = qkv.contiguous(), qkv.new_empty(qkv.shape)
    options = {"scale": scale, "bias": bias, "is_cosine": is_cosine, "into": d_qkv.unbind(2)}
    windows = _windows(size, window, shift)
    *_, d_scale, d_bias = window_attention_cpu.backward(d_out, *qkv.unbind(2), windows, **options)
    # an operator gives tensors
    d_scale, d_bias = (qkv.new_empty(0) if x is None else x for x in (d_scale, d_bias))
    return d_qkv, d_scale, d_bias


@_op.register_fake
def _(qkv, scale, bias, *places):
    return qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:])


@_backward_op.register_fake
def _(d_out, qkv, scale, bias, size, window, shift, is_cosine):
    d_scale = scale.new_empty(scale.shape if is_cosine else 0)
    d_bias = qkv.new_empty(0 if bias is None else bias.shape)
    return qkv.new_empty(qkv.shape), d_scale, d_bias


def _keep(ctx, inputs, output):
    qkv, scale, bias, *ctx.places = inputs
    ctx.save_for_backward(qkv, scale, bias)


def _pull(ctx, d_out):
    qkv, scale, bias = ctx.saved_tensors
    is_cosine, none = ctx.places[-1], (None,) * len(ctx.places)
    if torch.is_grad_enabled():
        # of a gradient that has one itself, only the twin knows how it came about
        windows = _windows(*ctx.places[:-1])
        options = {"scale": scale, "bias": bias, "is_cosine": is_cosine}
        pulled = window_attention_torch.backward(d_out, qkv, windows, **options)
        return *pulled, *none
    d_qkv, d_scale, d_bias = _backward_op(d_out, qkv, scale, bias, *ctx.places)
    return d_qkv, d_scale if is_cosine else None, None if bias is None else d_bias, *none


_op.register_autograd(_pull, setup_context=_keep)


def _windows(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Windows:
    return shifted_windows(tuple(size), tuple(window), tuple(shift))[0]
