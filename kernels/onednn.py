"""Which library multiplies float32 matrices on a CPU: oneDNN instead of MKL where it is exact."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import lru_cache

import torch

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
