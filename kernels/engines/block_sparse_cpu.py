"""Block-sparse attention in C++: the fast engine of every CPU with a compiler beside it.

``block_sparse_cpu.cpp`` is compiled at the first call for the best instruction set of the
processor: AVX-512 with the matrix registers of AMX, with bfloat16 products, or alone, AVX2, or what
every processor has. Its twin is
``block_sparse_torch``.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim, N slots, n slots to a
block, nb blocks, R plan rows, E listed blocks, M masks.
"""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.constant import constant_result
from vidattn.kernels.cpp.compiler import CompileError, load
from vidattn.kernels.cpp.processor import SETS, SOURCE, instruction_set
from vidattn.kernels.cpp.rows import Rows, rows_of
from vidattn.kernels.library import Operator
from vidattn.kernels.windows import neighborhood_cpu

# in the order of the numbers that the library knows them by
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BAD_LISTS, NO_MEMORY = 1, 2
TAKES = ("scale", "key_mask", "key_bias")
LISTED = ("order", "key_order", "row_start", "num_full", "key_block", "mask_id", "masks")
BOX = ("key", "low", "high")
log = logging.getLogger("vidattn")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over listed blocks.

    Computes in float32, or in bfloat16 with float32 sums where the processor multiplies bfloat16.
    Gradients reach q, k, v and key_bias, also through the log-sum-exp. A query that sees no key
    gives 0. The same call gives the same bits on the same number of threads.

    Args:
        q: (B, H, S, D) float32, bfloat16 or float16 on the CPU.
        k, v: (B, K, Sk, D), H a multiple of K.
        lists: which key blocks each query block reads.
        scale: factor of the scores.
        key_mask: (B, Sk) bool, False for keys that nobody may read.
        key_bias: (B|1, H|1, Sk) added to the scaled scores, -inf for keys that nobody may read.

    Returns:
        (B, H, S, D) in the dtype of ``q``; (B, H, S) float32 log-sum-exp, -inf for no keys.

    Raises:
        ValueError: lists or a bias that do not fit the tensors.
        CompileError: there is no compiler, or it failed.
    """
    _check_sizes(q, k, lists, key_bias)
    if key_bias is not None:
        key_bias = key_bias.float()
    return _operator(q, k, v, lists, scale=scale, key_mask=key_mask, key_bias=key_bias)


def obstacle(q: Tensor, *others: object, **options: object) -> str | None:
    """What keeps this engine from a call of ``attention``, and what to do; None if nothing does."""
    if q.device.type not in ("cpu", "meta") or q.dtype not in DTYPES:
        return (
            f"the C++ engine takes float32, bfloat16 and float16 on the CPU, got {q.dtype} on "
            f'{q.device}: use backend="torch"'
        )
    return missing(q.dtype)


@lru_cache
@constant_result
def missing(dtype: torch.dtype) -> str | None:
    """What keeps this engine from a dtype on this machine, found and logged once."""
    try:
        _library(dtype)
    except CompileError as error:
        log.warning("the C++ engine is not available: %s", error)
        return f'the C++ engine is not available: {error}; or use backend="torch"'
    return None


def version(dtype: torch.dtype) -> str:
    """The name of the library that runs a dtype: another one for every source and compiler."""
    return Path(_library(dtype)._name).stem


def peak_flops(dtype: torch.dtype) -> float:
    """Products and sums a second, measured, of one thread that works in registers alone.

    Raises:
        CompileError: there is no compiler, or it failed.
    """
    return _measure("peak", dtype)


def exp_rate(dtype: torch.dtype) -> float:
    """Exponentials a second, measured, of one thread that finds its numbers in the first cache.

    Raises:
        CompileError: there is no compiler, or it failed.
    """
    return _measure("exp_rate", dtype)


def _measure(what: str, dtype: torch.dtype) -> float:
    measure = getattr(_library(dtype), f"vidattn_{what}")
    measure.restype = ctypes.c_double
    return max(measure() for _ in range(3))


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    return load(SOURCE, SETS[instruction_set(dtype)])


def _check_sizes(q: Tensor, k: Tensor, lists: BlockLists, key_bias: Tensor | None) -> None:
    B, H, Sk = *q.shape[:2], k.shape[2]
    if "sizes are checked" not in lists.cache:
        _check_lists(lists)
        lists.cache["sizes are checked"] = True
    for name, given, needed in (("batch", lists.batch, B), ("heads", lists.heads, H)):
        if given not in (1, needed):
            raise ValueError(f"the plan's {name} does not fit: got {given}, needed {needed} or 1")
    if key_bias is not None and (
        key_bias.dim() != 3
        or key_bias.shape[0] not in (1, B)
        or key_bias.shape[1] not in (1, H)
        or key_bias.shape[2] != Sk
    ):
        raise ValueError(
            f"key_bias must be of shape (1 or {B}, 1 or {H}, {Sk}), got {tuple(key_bias.shape)}"
        )


def _check_lists(lists: BlockLists) -> None:
    order, block = lists.order, lists.block
    rows, entries = lists.batch * lists.heads * lists.num_blocks, lists.key_block.numel()
    sizes: dict[str, tuple[object, object]] = {
        "order": (order.numel() % block, 0),
        "key order": (lists.key_order.numel() % block, 0),
        "row_start": (lists.row_start.numel(), rows + 1),
        "num_full": (lists.num_full.numel(), rows),
    }
    if lists.box is not None:
        slots = (lists.key_order, order, order)
        sizes |= {
            name: (getattr(lists.box, name).numel(), x.numel()) for name, x in zip(BOX, slots)
        }
    elif lists.mask_id is not None:
        sizes["mask_id"] = (lists.mask_id.numel(), entries)
        sizes["masks"] = (tuple(lists.masks.shape[1:]), (block, block))
    for name, (given, needed) in sizes.items():
        if given != needed:
            raise ValueError(f"the plan's {name} does not fit: got {given}, needed {needed}")


ROWS = ("q", "k", "v", "out", "d_out", "d_q", "d_k", "d_v")
ARRAYS = {
    **dict.fromkeys(("lse", "delta", "d_bias", "key_bias"), torch.float32),
    "key_mask": torch.bool,
    **dict.fromkeys(("order", "key_order"), torch.int32),
    "row_start": torch.int64,
    **dict.fromkeys(("num_full", "key_block"), torch.int32),
    **dict.fromkeys((f"box_{name}" for name in BOX), torch.int32),
    "mask_id": torch.int32,
    "masks": torch.bool,
}
NUMBERS = (
    *("guard", "bias_sample", "bias_head", "B", "H", "K", "S", "S_k", "D", "N", "N_k", "n"),
    *("plan_batch", "plan_heads", "num_entries", "num_masks", "kind", "threads"),
)


class Call(ctypes.Structure):
    """One call; the struct of this name in the C++ source has the same fields."""

    _fields_ = [
        *((name, Rows) for name in ROWS),
        *((name, ctypes.c_void_p) for name in ARRAYS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("scale", ctypes.c_double),
    ]


def _run(
    direction: str,
    rows: dict[str, Tensor],
    arrays: dict[str, Tensor | None],
    lists: BlockLists,
    scale: float,
) -> None:
    """Call the library; ``rows`` and ``arrays`` are fields of ``Call`` by name."""
    q, bias = rows["q"], arrays["key_bias"]
    name = instruction_set(q.dtype)
    # matrix registers take the blocks of the forward pass in less time
    has_matrices = name == "amx_bf16" and direction == "forward"
    if bias is None and not has_matrices and neighborhood_cpu.is_faster(lists):
        # where they are, vectors of bfloat16 are multiplied at half the speed of those of float32
        flags = SETS["avx512" if name == "amx_bf16" else name]
        neighborhood_cpu.run(
            direction, rows, arrays, lists, scale=scale, kind=DTYPES.index(q.dtype), flags=flags
        )
        return
    (B, H, S, D), (K, S_k) = q.shape, rows["k"].shape[1:3]
    listed, numbers = _fields_of(lists)
    held = _held(arrays) | listed  # until the call returns
    call = Call(
        **rows_of(rows),
        # asked anew: sharing and copying move the memory of a tensor
        **{name: x.data_ptr() for name, x in held.items()},
        **numbers,
        bias_sample=0 if bias is None or bias.shape[0] == 1 else bias.shape[1] * S_k,
        bias_head=0 if bias is None or bias.shape[1] == 1 else S_k,
        **dict(B=B, H=H, K=K, S=S, S_k=S_k, D=D),
        kind=DTYPES.index(q.dtype),
        threads=torch.get_num_threads(),
        scale=scale,
    )
    status = getattr(_library(q.dtype), f"vidattn_{direction}")(ctypes.byref(call))
    if status == BAD_LISTS:
        raise ValueError(
            "the plan points outside its grid: order must hold tokens or -1, key_block blocks of "
            "the layout, mask_id masks, and a partial block needs a box or a mask"
        )
    if status == NO_MEMORY:
        raise MemoryError("no memory for the packed blocks of attention")


def _held(arrays: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The arrays that are there, as the library reads them."""
    return {name: x.to(ARRAYS[name]).contiguous() for name, x in arrays.items() if x is not None}


def _fields_of(lists: BlockLists) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What the fields of a call point at in block lists, and their numbers, found once."""
    if "call" not in lists.cache:
        arrays = {name: getattr(lists, name) for name in LISTED}
        if lists.box is not None:
            arrays |= {f"box_{name}": getattr(lists.box, name) for name in BOX}
        numbers = {
            "guard": 0 if lists.box is None else lists.box.guard,
            "N": lists.order.numel(),
            "N_k": lists.key_order.numel(),
            "n": lists.block,
            "plan_batch": lists.batch,
            "plan_heads": lists.heads,
            "num_entries": lists.key_block.numel(),
            "num_masks": 0 if lists.masks is None else len(lists.masks),
        }
        lists.cache["call"] = _held(arrays), numbers
    return lists.cache["call"]


def _forward(q, k, v, lists, scale, key_mask, key_bias):
    q, k, v = (_rows(x) for x in (q, k, v))
    out = _rows(torch.empty_like(q))
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    arrays = {"lse": lse, "key_mask": key_mask, "key_bias": key_bias}
    _run("forward", {"q": q, "k": k, "v": v, "out": out}, arrays, lists, scale)
    return out, lse


def _backward(d_out, delta, q, k, v, lse, lists, scale, key_mask, key_bias):
    rows = {"d_out": _rows(d_out), "q": _rows(q), "k": _rows(k), "v": _rows(v)}
    rows |= {f"d_{name}": _rows(torch.empty_like(rows[name])) for name in "qkv"}
    d_bias = None
    if key_bias is not None:
        d_bias = torch.empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)
    arrays = {"lse": lse, "delta": delta, "d_bias": d_bias}
    arrays |= {"key_mask": key_mask, "key_bias": key_bias}
    _run("backward", rows, arrays, lists, scale)
    d_bias = q.new_empty(0) if d_bias is None else d_bias.sum_to_size(key_bias.shape)
    return *(rows[f"d_{name}"] for name in "qkv"), d_bias


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_operator = Operator("block_sparse_cpu", _forward, _backward)
