"""Float32 products on a CPU in oneDNN instead of MKL, where they are as exact and faster."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from vidattn.kernels.constant import constant_result

# The setting is global to the process, so threads inside the scope are counted: the first one in
# switches, the last one out restores. Nothing else can tell one thread's scope from another's.
_lock = threading.Lock()
_inside = 0
_before = "none"


@contextlib.contextmanager
def fast_float32_products(device: torch.device) -> Iterator[None]:
    """Let float32 products on ``device`` run in oneDNN, where that is faster and as accurate.

    MKL runs AVX2 code on AMD processors, oneDNN AVX-512. What routes products to oneDNN is the
    permission to round to bfloat16, which it uses only where the processor has AMX; so it is given
    on AVX-512 machines without AMX, after a comparison with float64.
    """
    if device.type != "cpu" or not _is_exact():
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


@constant_result
def has_bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _enter() -> None:
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = torch.backends.mkldnn.matmul.fp32_precision
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            torch.backends.mkldnn.matmul.fp32_precision = _before


@lru_cache
def _is_exact() -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_avx512_supported():
        return False
    if torch.cpu._is_amx_tile_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 64, 192, generator=generator)
    b = torch.randn(2, 192, 128, generator=generator)
    _enter()
    try:
        product = torch.bmm(a, b)
    finally:
        _leave()
    exact = a.double() @ b.double()
    return bool((product - exact).norm() < 1e-6 * exact.norm())


@lru_cache
def has_faster_linear() -> bool:
    """Whether ``linear`` runs here and MKL is slower, as measured with AVX-512 on an AMD EPYC."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in oneDNN, forward and backward to ``x``, exact in float32.

    Args:
        x: (..., C) float32 on the CPU.
        weight: (D, C).
        bias: (D,), none for None.

    Returns:
        (..., D).
    """
    rows = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # a function of its own once more, so that it has a gradient too
        d_x = _Linear.apply(d_out, weight.mT, None) if needs_x else None
        # oneDNN is no faster here
        d_weight = d_out.mT @ x if needs_weight else None
        return d_x, d_weight, d_out.sum(0) if needs_bias else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
