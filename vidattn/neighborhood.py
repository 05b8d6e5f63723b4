"""Neighborhood attention on a line, a picture or a video, with the argument names users know.

It follows NATTEN's generalized neighborhood attention: its ``kernel_size`` is ``window`` here, its
``is_causal`` is ``causal``, its ``additional_keys`` and ``additional_values`` are ``extra_k`` and
``extra_v``; its tensors are those of ``layout="heads_last"``. Beyond it, a window may be longer
than its axis, and relative position biases (Hassani et al., "Neighborhood Attention Transformer",
arXiv:2204.07143) are there, with their gradient.

Letters: B batch, H heads, Hk key heads, S tokens, D head dim, E extra tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.attention import attend
from vidattn.engines import BACKENDS
from vidattn.grid import Grid, Size
from vidattn.halo_operator import halo_attention
from vidattn.kernels.derivatives import refuse_transforms
from vidattn.methods.neighborhood import Neighborhood
from vidattn.mixture import merge
from vidattn.plan import Plan
from vidattn.support.registry import unknown
from vidattn.support.steady import cast_by_autocast

LAYOUTS = ("heads_first", "heads_last")
Flags = tuple[bool, bool, bool]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    rel_bias: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    layout: str = "heads_first",
    backend: str = "auto",
) -> Tensor:
    """Every token attends to the window around it, which slides inward at the borders.

    Gradients reach every tensor. Under ``torch.autocast`` all but a bias and float64 is cast to its
    dtype first, as in ``attend``.

    Args:
        q: (B, H, *size, D) with one to three axes in ``size``: (S,), (h, w) or (t, h, w);
            (B, *size, H, D) for ``layout="heads_last"``.
        k, v: likewise, with Hk heads; H must be a multiple of Hk (grouped-query attention).
        window: keys that a query reads along each axis; NATTEN's ``kernel_size``.
        stride: queries that share one window, at most ``window``.
        dilation: distance between the keys of a window.
        causal: whether a query reads only keys at or before its own position on an axis; NATTEN's
            ``is_causal``. These four are one value, or one for each axis.
        scale: factor of the scores; D ** -0.5 by default.
        rel_bias: (H, *(2 * window - 1)), added to the scaled scores at (key - query) / dilation
            + window - 1 on each axis, as in NAT and DiNAT.
        extra_k, extra_v: (B, Hk, E, D), or (B, E, Hk, D) for heads last: tokens without a place
            that every query reads, such as registers or text.
        layout: "heads_first" or "heads_last".
        backend: "halo" (tiles of queries times all keys around them, in PyTorch), a backend of
            ``attend``, or "auto": "halo" with a bias, which no other one takes, on meta tensors and
            while torch.compile traces for a CPU, where it is one operator; else that of ``attend``.

    Returns:
        The output, of the shape and dtype of ``q``, or of the dtype of autocast.

    Raises:
        ValueError: shapes or options that do not fit together, an unknown layout or backend, or a
            bias on a backend without one.

    >>> q = k = v = torch.randn(1, 4, 16, 24, 32)  # 16 x 24 tokens
    >>> neighborhood_attention(q, k, v, window=(7, 9), dilation=2).shape
    torch.Size([1, 4, 16, 24, 32])
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    _check_tensors(q, k, v, extra_k, extra_v)
    q, k, v, extra_k, extra_v = cast_by_autocast(q, k, v, extra_k, extra_v)
    if layout == "heads_last":
        q, k, v = (x.movedim(-2, 1) for x in (q, k, v))
        extra_k, extra_v = (None if x is None else x.transpose(1, 2) for x in (extra_k, extra_v))
    _check(q, k, v, extra_k, extra_v)
    num_axes = q.dim() - 3
    options = _options(num_axes, window, stride, dilation, causal)
    bias = _table(rel_bias, q, options[0], num_axes)
    backend = _backend(backend, bias, q.device)
    size = (1,) * (3 - num_axes) + tuple(q.shape[2:-1])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if backend == "halo":
        out = _on_halo(q, k, v, size, options, scale, bias, extra_k, extra_v)
    else:
        out = _on_plan(q, k, v, size, options, scale, extra_k, extra_v, backend)
    out = out.view(q.shape) if out.is_contiguous() else out.reshape(q.shape)
    return out.movedim(1, -2) if layout == "heads_last" else out


def _on_halo(q, k, v, size, options, scale, bias, extra_k, extra_v) -> Tensor:
    """(B, H, S, D) by tiles and halos; extra tokens are attended to apart, then merged."""

    def split(x: Tensor, size: Size) -> Tensor:
        copies = q.shape[1] // x.shape[1]
        x = x if copies == 1 else x.repeat_interleave(copies, dim=1)
        return x.reshape(*x.shape[:2], *size, x.shape[-1])

    refuse_transforms()
    tokens = split(q, size)
    out, lse = halo_attention(tokens, split(k, size), split(v, size), bias, *options, scale)
    out, lse = out.flatten(2, 4), lse.flatten(2)
    if extra_k is None:
        return out
    line = (1, 1, lse.shape[2])
    extra = (1, 1, extra_k.shape[2])
    nothing = ([], [], [], [])
    extra_out, extra_lse = halo_attention(
        split(q, line), split(extra_k, extra), split(extra_v, extra), None, *nothing, scale
    )
    return merge(out, lse, extra_out.flatten(2, 4), extra_lse.flatten(2))[0]


def _on_plan(q, k, v, size, options, scale, extra_k, extra_v, backend) -> Tensor:
    """(B, H, S, D) by ``attend``; extra tokens stand in the sequence like text."""
    q, k, v = (x.flatten(2, -2) for x in (q, k, v))
    num_tokens, num_extra = q.shape[2], 0
    if extra_k is not None:
        num_extra = extra_k.shape[2]
        # what these queries would read is nobody's business
        q = torch.cat([q, q.new_zeros(*q.shape[:2], num_extra, q.shape[-1])], 2)
        k, v = torch.cat([k, extra_k], 2), torch.cat([v, extra_v], 2)
    plan = _plan(Grid(*size, text=num_extra), *options, q.device)
    return attend(q, k, v, plan, scale=scale, backend=backend)[:, :, :num_tokens]


@lru_cache(maxsize=64)
def _plan(
    grid: Grid, window: Size, stride: Size, dilation: Size, causal: Flags, device: torch.device
) -> Plan:
    method = Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal)
    return method.plan(grid).to(device)


def _check_tensors(q, k, v, extra_k, extra_v) -> None:
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        kinds = ", ".join(type(x).__name__ for x in (q, k, v))
        raise ValueError(f"q, k and v must be tensors, got {kinds}")
    for name, x in (("extra_k", extra_k), ("extra_v", extra_v)):
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")


def _check(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None) -> None:
    if wrong := _wrong_shapes(q.shape, k.shape, v.shape):
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} (heads first)"
        raise ValueError(f"q, k and v must {wrong}, got {shapes}")
    if (extra_k is None) != (extra_v is None):
        raise ValueError("extra_k and extra_v go together, got only one of them")
    wanted = (*k.shape[:2], k.shape[-1])
    for name, x in (("extra_k", extra_k), ("extra_v", extra_v)):
        if x is not None and (x.dim() != 4 or (*x.shape[:2], x.shape[3]) != wanted):
            raise ValueError(
                f"{name} must have the batch, heads and head dim of k, {wanted}, beside its "
                f"tokens, got {tuple(x.shape)} (heads first)"
            )
    if extra_k is not None and extra_k.shape != extra_v.shape:
        raise ValueError(
            f"extra_k {tuple(extra_k.shape)} and extra_v {tuple(extra_v.shape)} must agree"
        )
    given = [x for x in (q, k, v, extra_k, extra_v) if x is not None]
    if len({(x.dtype, x.device) for x in given}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in given)
        raise ValueError(f"q, k, v and extra tokens must share dtype and device, got {kinds}")


def _wrong_shapes(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> str | None:
    """What shapes must do that these do not."""
    if 0 in q or 0 in k:
        return "hold at least one sample, head and token"
    if len(q) not in (4, 5, 6) or k != v:
        return "be (B, H, *size, D) with 1 to 3 axes"
    if q[0] != k[0] or q[2:] != k[2:] or q[1] % k[1]:
        return (
            "agree in batch, size and head dim, and the heads of q must be a multiple of the heads "
            "of k"
        )
    return None


def _options(num_axes: int, *values) -> tuple[Size, Size, Size, Flags]:
    """Window, stride, dilation and causal of three axes; those that are not there come first."""
    names, kinds = ("window", "stride", "dilation", "causal"), (int, int, int, bool)
    found = []
    for name, kind, value in zip(names, kinds, values):
        each = (value,) * num_axes if isinstance(value, kind) else tuple(value)
        if len(each) != num_axes or not all(isinstance(x, kind) and x >= 0 for x in each):
            raise ValueError(
                f"{name} must be one {kind.__name__}, or one for each of {num_axes} axes, "
                f"got {value!r}"
            )
        found.append((kind(kind is int),) * (3 - num_axes) + each)
    window, stride, dilation, causal = found
    if torch.compiler.is_compiling():
        return _checked.__wrapped__(window, stride, dilation, causal)
    return _checked(window, stride, dilation, causal)


@lru_cache(maxsize=64)
def _checked(window: Size, stride: Size, dilation: Size, causal: Flags) -> tuple:
    # the method checks the values
    Neighborhood(window=window, stride=stride, dilation=dilation, causal=causal)
    return window, stride, dilation, causal


def _table(rel_bias: Tensor | None, q: Tensor, window: Size, num_axes: int) -> Tensor | None:
    """(H, 2 wt - 1, 2 wh - 1, 2 ww - 1) from a table with the axes that are there."""
    if rel_bias is None:
        return None
    size = tuple(2 * x - 1 for x in window)
    wanted = (q.shape[1], *size[3 - num_axes :])
    if tuple(rel_bias.shape) != wanted:
        raise ValueError(
            f"rel_bias must be (heads, 2 * window - 1 on each axis) = {wanted}, got "
            f"{tuple(rel_bias.shape)}"
        )
    if rel_bias.device != q.device:
        raise ValueError(f"rel_bias is on {rel_bias.device}, q on {q.device}")
    return rel_bias.view(q.shape[1], *size)


def _backend(backend: str, bias: Tensor | None, device: torch.device) -> str:
    if backend not in ("halo", *BACKENDS):
        raise unknown("backend", backend, ("halo", *BACKENDS))
    if bias is not None and backend not in ("auto", "halo"):
        raise ValueError(f"backend {backend!r} takes no rel_bias; 'halo' does")
    # a graph would hold the making of the plan, which tensors without data cannot do at all
    traced = device.type == "meta" or device.type == "cpu" and torch.compiler.is_compiling()
    return "halo" if bias is not None or backend == "auto" and traced else backend
