"""Attention of every query to every key on the faster of two engines: PyTorch's, or ours in C++.

Which is faster depends on the processor, the dtype, the head dim, the length, and whether there is
a gradient. It is measured once for each of these on random numbers, which takes some tens of
milliseconds, and kept; calls too short to matter stay PyTorch's, unmeasured.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.engines import block_sparse_cpu
from vidattn.kernels.engines.dense import dense_attention, is_usual
from vidattn.kernels.figures import kept
from vidattn.support.steady import cast_by_autocast, steadily

# ours has to win by so much: where both are as fast, results stay PyTorch's
MARGIN = 1.05
# products and sums of a call, forward, below which it is PyTorch's: about a millisecond
LEAST_FLOPS = 2.5e8
# of a call that is measured, at least
MEASURED_FLOPS = 5e8
ROUNDS = 7
# rounds that name different engines, the best and the worst aside, and differ by more than this
# say nothing: the machine is busy
AGREEMENT = 1.3
# a length stands for those up to it, in steps, from the least on; longer ones are one class
LEAST_TOKENS, STEP, MOST_TOKENS = 128, 64, 4096
MOST_HEAD_DIM = 256
# more slots to a block make the packed queries of a thread leave its cache
MOST_SLOTS = 320
VECTOR = 16
# of a thread, or of a task
_may_choose: ContextVar[bool] = ContextVar("_may_choose", default=True)
log = logging.getLogger("vidattn")


@contextmanager
def only_pytorch() -> Iterator[None]:
    """Leave attention to everything to PyTorch's own in a with block, to the bit."""
    token = _may_choose.set(False)
    try:
        yield
    finally:
        _may_choose.reset(token)


class Kind(NamedTuple):
    """Calls among which the same engine is the faster one."""

    dtype: torch.dtype
    head_dim: int
    num_tokens: int
    has_gradient: bool
    num_threads: int

    def __str__(self) -> str:
        direction = "forward and backward" if self.has_gradient else "forward"
        return (
            f"{str(self.dtype).removeprefix('torch.')}, head dim {self.head_dim}, "
            f"{self.num_tokens} tokens, {direction}, {self.num_threads} threads"
        )


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of every query to every key, on the engine that ``exact_engine`` names.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, Sk, D), H a multiple of K.
        key_mask: (B, Sk) bool, False for keys that nobody may read.
        key_bias: (B|1, H|1, Sk) added to the scaled scores, -inf for keys that nobody may read.
        scale: factor of the scores; D ** -0.5 by default.

    Returns:
        (B, H, S, D) in the dtype of ``q``, or of autocast.
    """
    if exact_engine(q, k, v) == "pytorch":
        mask = None if key_mask is None else key_mask[:, None, None]
        if key_bias is not None:
            bias = key_bias[:, :, None]
            mask = bias if mask is None else torch.where(mask, bias, -math.inf)
        return dense_attention(q, k, v, mask=mask, scale=scale)
    q, k, v = cast_by_autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _ours(q, k, v, scale, key_mask=key_mask, key_bias=key_bias)


def exact_engine(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which engine attends faster to everything: "cpp" where that is measured, else "pytorch".

    It is PyTorch's also where a compiler or a transform traces the call, or somebody has told
    PyTorch which kernel to take.
    """
    return "cpp" if speed(q, k, v) >= MARGIN else "pytorch"


def speed(q: Tensor, k: Tensor, v: Tensor) -> float:
    """How many times as fast as PyTorch the C++ engine attends to everything, 0 for not at all."""
    if not _is_ours_to_take(q, k, v):
        return 0.0
    B, H, S, D = q.shape
    kind = Kind(
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype,
        D,
        min(-(-S // STEP) * STEP, MOST_TOKENS),
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
        torch.get_num_threads(),
    )
    return speed_of(kind) if _flops(B * H, S, D) >= LEAST_FLOPS else 0.0


@lru_cache
def speed_of(kind: Kind) -> float:
    """How many times as fast as PyTorch the C++ engine is in calls of a kind, measured once.

    It is 1 in this process, and not kept, where the rounds of the measurement disagree.
    """
    if block_sparse_cpu.missing(kind.dtype) is not None:
        return 0.0
    name = f"full attention, {block_sparse_cpu.version(kind.dtype)} to pytorch, {kind}"
    found = kept(name, lambda: _measure(kind))
    if found is None:
        log.info("dense attention in %s stays PyTorch's: the machine is too busy to measure", kind)
        return 1.0
    engine = "cpp" if found >= MARGIN else "pytorch"
    log.info("dense attention in %s runs on the %r engine: %.2f", kind, engine, found)
    return found


def speeds(dtype: torch.dtype, has_gradient: bool, lengths: Sequence[int]) -> list[float]:
    """``speed_of`` calls of some lengths in a dtype, with heads of 64 and the threads of now."""
    kinds = (Kind(dtype, 64, x, has_gradient, torch.get_num_threads()) for x in lengths)
    return [speed_of(kind) for kind in kinds]


def _is_ours_to_take(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the C++ engine may take the place of PyTorch's in a call."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not _may_choose.get() or not is_usual():
        return False
    # a subclass of tensors stands for something else than its numbers
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in (q, k, v)):
        return False
    if q.device.type != "cpu" or q.dim() != 4 or q.dtype not in block_sparse_cpu.DTYPES:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    (B, H, S, D), K = q.shape, k.shape[1]
    fits = k.shape == v.shape == (B, K, S, D) and K and H % K == 0
    same = q.dtype == k.dtype == v.dtype and k.device == v.device == q.device
    return bool(fits and same and S >= LEAST_TOKENS and D <= MOST_HEAD_DIM)


def _flops(heads: int, num_tokens: int, head_dim: int) -> float:
    return 4.0 * heads * num_tokens**2 * head_dim


def _ours(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: Tensor | None) -> Tensor:
    lists = whole_lists(q.shape[2])
    return block_sparse_cpu.attention(q, k, v, lists, scale=scale, **options)[0]


@lru_cache(maxsize=64)
@steadily
def whole_lists(num_tokens: int) -> BlockLists:
    """Every block reads every block, in few and even blocks."""
    count = -(-num_tokens // MOST_SLOTS)
    block = -(-num_tokens // (count * VECTOR)) * VECTOR
    order = torch.full((count * block,), -1, dtype=torch.int32)
    order[:num_tokens] = torch.arange(num_tokens, dtype=torch.int32)
    return BlockLists(
        order=order,
        block=block,
        batch=1,
        heads=1,
        row_start=torch.arange(count + 1) * count,
        num_full=torch.full((count,), count, dtype=torch.int32),
        key_block=torch.arange(count, dtype=torch.int32).repeat(count),
    )


@steadily
def _measure(kind: Kind) -> float | None:
    """The time of PyTorch over that of ours, called in turns; None where the turns disagree."""
    S, D = kind.num_tokens, kind.head_dim
    heads = max(kind.num_threads, math.ceil(MEASURED_FLOPS / _flops(1, S, D)))
    generator = torch.Generator().manual_seed(0)
    q, k, v, pull = (
        torch.randn(1, heads, S, D, generator=generator).to(kind.dtype) for _ in range(4)
    )

    def call(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        leaves = [x.detach().requires_grad_(kind.has_gradient) for x in (q, k, v)]
        begin = time.perf_counter()
        with torch.set_grad_enabled(kind.has_gradient):
            out = attention(*leaves)
            if kind.has_gradient:
                torch.autograd.grad(out, leaves, pull)
        return time.perf_counter() - begin

    contestants = (F.scaled_dot_product_attention, lambda *x: _ours(*x, D**-0.5))
    for attention in contestants:
        call(attention)
    times = [[call(attention) for attention in contestants] for _ in range(ROUNDS)]
    return agreed([theirs / ours for theirs, ours in times])


def agreed(ratios: list[float]) -> float | None:
    """The median of rounds, or None where they do not say which engine is faster."""
    ratios = sorted(ratios)
    least, most = ratios[1], ratios[-2]
    is_clear = least >= MARGIN or most < MARGIN or most <= AGREEMENT * least
    return ratios[len(ratios) // 2] if is_clear else None
