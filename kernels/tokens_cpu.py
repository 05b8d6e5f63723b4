"""What surrounds attention in a transformer block, on a CPU: each step one pass over the tokens.

``cpp/tokens_cpu.cpp`` is compiled at the first call. All is computed in float32 and rounded once,
where PyTorch writes a tensor for every sum and product.

Letters: B batch, S tokens, C channels, H heads, D head dim.
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vidattn.kernels.cpp.compiler import CompileError, load
from vidattn.kernels.cpp.processor import SETS, instruction_set

SOURCE = Path(__file__).with_name("cpp") / "tokens_cpu.cpp"
KINDS = {torch.float32: 0, torch.bfloat16: 1}
# C and D are multiples of it
GRANULE = 16
TENSORS = ("x", "y", "out", "scale", "shift", "cosine", "sine")
log = logging.getLogger("vidattn")


class Tokens(ctypes.Structure):
    """A (B, S, C) tensor whose last stride is 1; strides count numbers."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sample", "token")),
    ]


class Call(ctypes.Structure):
    """One call; the struct of this name in the C++ source has the same fields."""

    _fields_ = [
        *((name, Tokens) for name in TENSORS),
        *((name, ctypes.c_int64) for name in (*"BSCD", "kind", "threads")),
        *((name, ctypes.c_double) for name in ("plus", "epsilon")),
    ]


def can_run(x: Tensor) -> bool:
    """Whether (B, S, C) numbers, in forward passes without gradients, are served here."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in KINDS
        and x.ndim == 3
        and x.shape[2] % GRANULE == 0
        and x.stride(2) == 1
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _library(x.dtype) is not None
    )


def layer_norm(
    x: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    plus: float = 0.0,
    eps: float = 1e-6,
) -> Tensor:
    """(B, S, C) with mean 0 and variance 1 over the channels, times (plus + scale), plus shift.

    Args:
        scale, shift: float32, (B or 1, S or 1, C) or (C,); none multiply and add nothing.
    """
    return _call("layer_norm", x, scale=scale, shift=shift, plus=plus, epsilon=eps)


def rms_norm(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    eps: float,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(B, S, C) with root mean square 1 over the channels, times scale, then turned.

    Args:
        scale: float32 (C,).
        rotary: cosines and sines, (1, S, 1, D) float32 each, by which pairs of neighbouring
            channels of every head are turned: the cosine of the first and the sine of the second
            hold for both.
    """
    tables = {}
    if rotary is not None:
        tables = dict(zip(("cosine", "sine"), (table.squeeze(2) for table in rotary), strict=True))
    return _call("rms_norm", x, scale=scale, epsilon=eps, **tables)


def add_scaled(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """x + y * scale: (B, S, C) each of one type, scale float32, (B or 1, S or 1, C)."""
    return _call("add_scaled", x, y=y, scale=scale)


def gelu(x: Tensor) -> Tensor:
    """(B, S, C) through the GELU that is approximated with tanh."""
    return _call("gelu", x)


def _call(name: str, x: Tensor, *, plus: float = 0.0, epsilon: float = 0.0, **others) -> Tensor:
    B, S, C = x.shape
    out = torch.empty(B, S, C, dtype=x.dtype)
    held = {"x": x, "out": out}
    for key, value in others.items():
        if value is not None:
            dtype = x.dtype if key == "y" else torch.float32
            width = C if key in ("y", "scale", "shift") else value.shape[-1]
            value = value if value.dtype == dtype else value.to(dtype)
            value = value if value.stride(-1) == 1 else value.contiguous()
            held[key] = value.expand(B, S, width)
    call = Call(
        **{key: Tokens(t.data_ptr(), *t.stride()[:2]) for key, t in held.items()},
        **dict(zip("BSC", x.shape)),
        D=held["cosine"].shape[2] if "cosine" in held else C,
        kind=KINDS[x.dtype],
        threads=torch.get_num_threads(),
        plus=plus,
        epsilon=epsilon,
    )
    getattr(_library(x.dtype), f"vidattn_{name}")(ctypes.byref(call))
    return out


@lru_cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled source, None where it cannot be compiled."""
    try:
        return load(SOURCE, SETS[instruction_set(dtype)])
    except CompileError as error:
        log.info("norms and rotary embeddings stay PyTorch's: %s", error)
        return None
