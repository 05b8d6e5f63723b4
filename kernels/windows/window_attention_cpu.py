"""Attention inside windows in C++: one pass over a picture, without windows or scores in memory.

``window_attention_cpu.cpp`` is compiled at the first call. Its twin is ``window_attention_torch``.

Letters: B batch, S tokens, H heads, D head dim, F numbers of a value, R windows, n queries and
m keys of a window, E numbers of a slot.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vidattn.kernels.cpp.compiler import load
from vidattn.kernels.cpp.processor import SETS, instruction_set
from vidattn.kernels.windows import window_attention_torch
from vidattn.kernels.windows.windows import Windows

SOURCE = Path(__file__).parents[1] / "cpp/window_attention_cpu.cpp"
NO_MEMORY = 2
# parts of the work that every thread gets, so that all end at about the same time
PARTS = 4
# products and sums that pay for starting a thread
PART_FLOPS = 4e6


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
    """Softmax attention of every query over the keys of its window.

    Gradients reach q, k, v and bias, and with cosines scale.

    Args:
        q: (B, S, H, D + E) float32 on the CPU, the last stride 1. The last E numbers are multiplied
            with those of the slots, and not scaled.
        k: (B, T, H, D) likewise.
        v: (B, T, H, F) likewise.
        windows: which tokens stand in each.
        scale: (H,) factor of the scores.
        bias: (H, n, m), added to the scaled scores.
        is_cosine: whether queries and keys are divided by their lengths.

    Returns:
        (B, S, H, F) output.

    Raises:
        ValueError: tensors that do not fit together.
        CompileError: there is no compiler, or it failed.
    """
    return _Attention.apply(windows, is_cosine, scale, bias, q, k, v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, windows, is_cosine, scale, bias, q, k, v):
        ctx.windows, ctx.is_cosine = windows, is_cosine
        ctx.save_for_backward(scale, bias, q, k, v)
        return forward(q, k, v, windows, scale=scale, bias=bias, is_cosine=is_cosine)

    @staticmethod
    def backward(ctx, d_out):
        scale, bias, *parts = ctx.saved_tensors
        options = {"scale": scale, "bias": bias, "is_cosine": ctx.is_cosine}
        if torch.is_grad_enabled():
            # of a gradient that has one itself, only the twin knows how it came about
            pulled = window_attention_torch.backward(d_out, tuple(parts), ctx.windows, **options)
        else:
            pulled = backward(d_out, *parts, ctx.windows, **options)
        *grads, d_scale, d_bias = pulled
        return None, None, d_scale, d_bias, *grads


def forward(q: Tensor, k: Tensor, v: Tensor, windows: Windows, *, scale, bias, is_cosine) -> Tensor:
    """The output of ``window_attention``, without a gradient."""
    _check(q, k, v, windows, scale, bias)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    _run("forward", windows, is_cosine, scale, bias, {"q": q, "k": k, "v": v, "out": out})
    return out


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    *,
    scale: Tensor,
    bias: Tensor | None,
    is_cosine: bool,
    into: Sequence[Tensor] = (),
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, scale and bias; None where there is none.

    Args:
        into: tensors that take those of q, k and v, and hold zeros where windows share keys.
    """
    new = torch.zeros_like if windows.shares_keys else torch.empty_like
    grads = into or [new(x) for x in (q, k, v)]
    tokens = {"q": q, "k": k, "v": v, "out": d_out.contiguous()}
    tokens |= dict(zip(("d_q", "d_k", "d_v"), grads))
    d_scale, d_bias = _run("backward", windows, is_cosine, scale, bias, tokens)
    return *grads, d_scale if is_cosine else None, d_bias


def _check(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows, scale: Tensor, bias: Tensor | None
) -> None:
    given = [x for x in (q, k, v, scale, bias) if x is not None]
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in given):
        kinds = ", ".join(sorted({f"{x.dtype} on {x.device}" for x in given}))
        raise ValueError(f"attention in windows takes float32 tensors on the CPU, got {kinds}")
    B, S, H, _ = q.shape
    (R, n), m = windows.queries.shape, windows.keys.shape[1]
    E = 0 if windows.slots is None else windows.slots.shape[1]
    wanted = {
        "queries of all windows": (R * n, S),
        "q": (q.shape[3], k.shape[3] + E),
        "k": (tuple(k.shape[::2]), (B, H)),
        "v": (v.shape[:3], k.shape[:3]),
        "scale": (tuple(scale.shape), (H,)),
        "bias": ((H, n, m) if bias is None else tuple(bias.shape), (H, n, m)),
        "last stride": ({x.stride(3) for x in (q, k, v)}, {1}),
    }
    for name, (is_, needed) in wanted.items():
        if is_ != needed:
            raise ValueError(f"{name} does not fit: got {is_}, needed {needed}")


def _num_parts(batch: int, windows: Windows, flops: int) -> int:
    """How many parts threads take in turns, where a window costs ``flops``."""
    num_windows, threads = len(windows.queries), torch.get_num_threads()
    if threads == 1:
        return 1
    most = batch if windows.shares_keys else batch * num_windows
    return max(1, min(most, PARTS * threads, int(batch * num_windows * flops / PART_FLOPS)))


TOKENS = ("q", "k", "v", "out", "d_q", "d_k", "d_v")
ARRAYS = ("scale", "bias", "hidden", "slots", "d_scale", "d_bias", "queries", "keys", "kind")
NUMBERS = (*"BHRnmDEFM", "is_cosine", "is_shared", "parts", "threads")


class Tokens(ctypes.Structure):
    """A (B, tokens, H, numbers) tensor whose last stride is 1; strides count numbers."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sample", "token", "head")),
    ]


class Call(ctypes.Structure):
    """One call; the struct of this name in the C++ source has the same fields."""

    _fields_ = [
        *((name, Tokens) for name in TOKENS),
        *((name, ctypes.c_void_p) for name in ARRAYS),
        *((name, ctypes.c_int64) for name in NUMBERS),
    ]


def _run(
    direction: str,
    windows: Windows,
    is_cosine: bool,
    scale: Tensor,
    bias: Tensor | None,
    tokens: dict[str, Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """Call the library; the gradients of scale and bias."""
    k, (B, _, H, _) = tokens["k"], tokens["q"].shape
    (R, n), m = windows.queries.shape, windows.keys.shape[1]
    parts = _num_parts(B, windows, 2 * n * m * H * (k.shape[3] + tokens["v"].shape[3]))
    d_scale = d_bias = None
    if direction == "backward":
        d_scale = scale.new_empty(parts, H)
        d_bias = None if bias is None else bias.new_empty(parts, H, n, m)
    arrays = {
        name: getattr(windows, name) for name in ("hidden", "slots", "queries", "keys", "kind")
    }
    arrays |= {"scale": scale.contiguous(), "bias": None if bias is None else bias.contiguous()}
    arrays |= {"d_scale": d_scale, "d_bias": d_bias}
    call = Call(
        **{name: Tokens(x.data_ptr(), *x.stride()[:3]) for name, x in tokens.items()},
        **{name: x.data_ptr() for name, x in arrays.items() if x is not None},
        **dict(zip("BHRnmD", (B, H, R, n, m, k.shape[3]))),
        E=tokens["q"].shape[3] - k.shape[3],
        F=tokens["v"].shape[3],
        M=0 if windows.hidden is None else len(windows.hidden),
        is_cosine=is_cosine,
        is_shared=windows.shares_keys,
        parts=parts,
        threads=torch.get_num_threads(),
    )
    library = load(SOURCE, SETS[instruction_set(torch.float32)])
    if getattr(library, f"vidattn_windows_{direction}")(ctypes.byref(call)) == NO_MEMORY:
        raise MemoryError("no memory for attention in windows")
    if direction == "forward":
        return None, None
    return d_scale.sum(0), None if bias is None else d_bias.sum(0)
