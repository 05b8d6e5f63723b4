"""Block-sparse attention on NVIDIA GPUs, by Triton kernels.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim, N slots of queries, nb
their blocks.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.compensation import compensate
from vidattn.kernels.constant import constant_result
from vidattn.kernels.engines.block_segments import Segments, segments
from vidattn.kernels.library import LISTS, REST, Operator, flatten, gather, new_like
from vidattn.kernels.triton.configs import Tile, architecture, padded_head_dim, tile

LOG2E = math.log2(math.e)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
TAKES = ("scale", "key_mask", "key_bias", "gain", "shift")
# the tiles an interpreted kernel runs
INTERPRETED_AS = 90
# the log-sum-exp of a query that gets no gradient: every weight is then 0
NO_QUERY = 1e30


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result of ``block_sparse_torch.attention``, by Triton kernels.

    Gradients reach all of q, k, v, ``key_bias``, ``gain`` and ``shift``, also through the
    log-sum-exp, and are the same bits every time. Where none is wanted, gain and shift cost no pass
    over the output.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, Sk, D), H a multiple of K.
        lists: which key blocks each query block reads.
        scale: factor of the scores, above 0.
        key_mask: (B, Sk) bool, False for keys that nobody may read.
        key_bias: (B|1, H|1, Sk) added to the scaled scores of a key, -inf for keys that nobody may
            read.
        gain: (B|1, H|1, nb) factor of the output of a query block.
        shift: (B|1, H|1, nb, D) added to the output of a query block after that.

    Returns:
        (B, H, S, D) in the dtype of ``q``; (B, H, S) float32 log-sum-exp, -inf for no keys.
    """
    inputs = (q, k, v, key_bias, gain, shift)
    pulled = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if not pulled and (gain is not None or shift is not None):
        rest = (float(scale), key_mask, key_bias)
        return _compensated(q, k, v, gain, shift, *flatten(lists), *rest)
    out, lse = _attention(q, k, v, lists, scale=scale, key_mask=key_mask, key_bias=key_bias)
    return compensate(out, lists, gain, shift), lse


def obstacle(q: Tensor, *others: object, scale: float, **options: object) -> str | None:
    """What keeps these kernels from a call of ``attention``, and what to do; None if nothing."""
    return unfit(q, scale)


def unfit(q: Tensor, scale: float) -> str | None:
    """What keeps any of these kernels from such queries, and what to do; None if nothing does."""
    wrong = None
    if q.dtype not in DTYPES:
        wrong = f"take float16, bfloat16 and float32, got {q.dtype}"
    elif q.shape[-1] > MAX_HEAD_DIM:
        wrong = f"take head dims up to {MAX_HEAD_DIM}, got {q.shape[-1]}"
    elif not scale > 0:
        wrong = f"need a scale above 0, got {scale}"
    elif q.device.type != "meta":
        wrong = missing(q.device)
    return None if wrong is None else f'the Triton kernels {wrong}: use backend="torch"'


@constant_result
def missing(device: torch.device) -> str | None:
    """What these kernels lack on a device; None where nothing is."""
    if importlib.util.find_spec("triton") is None:
        return "need Triton, which is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        is_fit = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        is_fit = device.type == "cpu" and _is_interpreted()
    if is_fit:
        return None
    return f"need an NVIDIA GPU from compute capability 8.0 on, the tensors are on {device}"


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _forward(q, k, v, lists, scale, key_mask, key_bias, gain=None, shift=None):
    from vidattn.kernels.triton import forward as triton_forward

    rows = segments(lists)
    out, lse = new_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    q, k, v = map(rows_of, (q, k, v))
    bias = bias_arguments(q, key_mask, key_bias)
    shipped = _tile("forward", q, rows, bias)
    launch(
        triton_forward.forward_kernel,
        rows.order.numel() // shipped.rows * q.shape[0] * q.shape[1],
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse,
        gain=_per_head(gain, q),
        shift=_per_head(shift, q),
        scale=scale * LOG2E,
        num_tokens=q.shape[2],
        key_order=rows.key_order,
        **bias,
        **stride_arguments(q=q, k=k, v=v, o=out),
        **list_arguments(rows, lists, q, k),
        **constant_arguments(rows, q, k, shipped),
    )
    return out, lse


def launch(kernel: Any, num_programs: int, **arguments: Any) -> None:
    """Run a kernel on the device of its arguments."""
    with torch.cuda.device_of(arguments["order"]):
        # the default of fusion changes with Triton 3.10, and the bits of results with it
        kernel[(num_programs,)](**arguments, enable_fp_fusion=True)


def _per_head(x: Tensor | None, q: Tensor) -> Tensor | None:
    """(B|1, H|1, ...) as (B, H, ...), contiguous and float32."""
    return None if x is None else x.float().expand(*q.shape[:2], *x.shape[2:]).contiguous()


def _backward(d_out, delta, q, k, v, lse, lists, scale, key_mask, key_bias):
    from vidattn.kernels.triton import key_gradient as triton_key_gradient
    from vidattn.kernels.triton import query_gradient as triton_query_gradient

    rows, columns = (segments(lists, transposed=turned) for turned in (False, True))
    d_q, d_k, d_v = map(new_like, (q, k, v))
    d_out, q, k, v = map(rows_of, (d_out, q, k, v))
    lse, delta = by_slot(lse, rows.order), delta.index_select(2, rows.order.long().clamp_min(0))
    # a query without keys has no gradient, whatever comes back through its log-sum-exp
    delta.masked_fill_(lse == NO_QUERY, 0)
    given = {"q": q, "k": k, "v": v, "d_out": d_out, "slot_lse": lse, "delta": delta}
    bias = bias_arguments(q, key_mask, key_bias)
    given |= {"scale": scale, "key_order": rows.key_order, **bias}
    given |= stride_arguments(q=q, k=k, v=v, d=d_out)
    shipped = _tile("query_gradient", q, rows, bias)
    launch(
        triton_query_gradient.query_gradient_kernel,
        rows.order.numel() // shipped.rows * q.shape[0] * q.shape[1],
        d_q=d_q,
        **given,
        **stride_arguments(g=d_q),
        **list_arguments(rows, lists, q, k),
        **constant_arguments(rows, q, k, shipped),
    )
    d_bias = None if key_bias is None else lse.new_empty(*q.shape[:2], k.shape[2])
    shipped = _tile("key_gradient" if d_bias is None else "key_gradient_bias", q, rows, bias)
    launch(
        triton_key_gradient.key_gradient_kernel,
        rows.key_order.numel() // shipped.columns * q.shape[0] * k.shape[1],
        d_k=d_k,
        d_v=d_v,
        d_bias=d_bias,
        num_keys=k.shape[2],
        num_query_blocks=rows.order.numel() // rows.block,
        **given,
        **stride_arguments(gk=d_k, gv=d_v),
        **list_arguments(columns, lists, q, k),
        **constant_arguments(columns, q, k, shipped),
    )
    if d_bias is None:
        return d_q, d_k, d_v, q.new_empty(0)
    return d_q, d_k, d_v, d_bias.sum_to_size(key_bias.shape).to(key_bias.dtype)


_attention = Operator("block_sparse_triton", _forward, _backward)
_compensated = torch.library.custom_op(
    "vidattn::block_sparse_triton_compensated",
    lambda q, k, v, gain, shift, *rest: _forward(*gather((q, k, v, *rest)), gain, shift),
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? gain, Tensor? shift, "
    f"{LISTS}, {REST}) -> (Tensor, Tensor)",
)
_compensated.register_fake(
    lambda q, k, v, *rest: (new_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))
)


def _tile(kernel: str, q: Tensor, rows: Segments, bias: dict[str, Any]) -> Tile:
    """The shipped tile of a kernel on this device."""
    size = (q.itemsize, q.shape[-1], rows.block)
    extras = {"has_masks": rows.masks is not None, "has_bias": bias["key_bias"] is not None}
    return tile(kernel, architecture_of(q), *size, **extras)


def architecture_of(q: Tensor) -> int:
    """The architecture of the table of tiles for the device of ``q``."""
    if q.device.type != "cuda":
        return INTERPRETED_AS
    return architecture(torch.cuda.get_device_capability(q.device))


def by_slot(lse: Tensor, order: Tensor) -> Tensor:
    """(B, H, N) log-sum-exp, base 2, of the query in each slot; none where it has no keys."""
    token = order.long()
    lse = (lse.float() * LOG2E).masked_fill_(lse == -math.inf, NO_QUERY)
    return lse.index_select(2, token.clamp_min(0)).masked_fill_(token < 0, NO_QUERY)


def rows_of(x: Tensor) -> Tensor:
    """``x`` with the numbers of a token side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def stride_arguments(**tensors: Tensor) -> dict[str, int]:
    return {
        f"stride_{name}{axis}": stride
        for name, x in tensors.items()
        for axis, stride in zip("bhs", x.stride())
    }


def bias_arguments(q: Tensor, key_mask: Tensor | None, key_bias: Tensor | None) -> dict[str, Any]:
    """The arguments about (B|1, H|1, Sk) float32 biases, base 2, -inf for keys nobody may read."""
    if key_mask is None and key_bias is None:
        return {"key_bias": None, "stride_bias_b": 0, "stride_bias_h": 0}
    bias = (
        torch.zeros_like(key_mask[:, None], dtype=torch.float32) if key_bias is None else key_bias
    )
    bias = bias.float() * LOG2E
    if key_mask is not None:
        bias = torch.where(key_mask[:, None], bias, -math.inf)
    bias = bias.contiguous().expand(*q.shape[:2], -1)
    return {"key_bias": bias, "stride_bias_b": bias.stride(0), "stride_bias_h": bias.stride(1)}


def list_arguments(rows: Segments, lists: BlockLists, q: Tensor, k: Tensor) -> dict[str, Any]:
    """The arguments about lists and layout, which all kernels name alike."""
    num_blocks = rows.own_order.numel() // rows.block
    key, low, high = (None, None, None) if rows.box is None else rows.box
    return {
        "order": rows.order,
        "row_start": rows.row_start,
        "num_clear": rows.num_clear,
        "num_whole": rows.num_whole,
        "listed": rows.listed,
        "mask_id": rows.mask_id,
        "masks": rows.masks,
        "key_code": key,
        "low": low,
        "high": high,
        "guard": 0 if lists.box is None else lists.box.guard,
        "stride_row_b": lists.heads * num_blocks if lists.batch > 1 else 0,
        "stride_row_h": num_blocks if lists.heads > 1 else 0,
        "num_heads": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "num_blocks": num_blocks,
    }


def constant_arguments(rows: Segments, q: Tensor, k: Tensor, shipped: Tile) -> dict[str, Any]:
    """The compile-time arguments and the options of a launch."""
    from vidattn.kernels.triton.tiles import BOX, LIVE, NO_RULE, TABLE

    listed = q if rows.is_transposed else k
    rule = LIVE if rows.listed_order.numel() != listed.shape[2] else NO_RULE
    if rows.box is not None or rows.masks is not None:
        rule = TABLE if rows.box is None else BOX
    return {
        "D": q.shape[-1],
        "BD": padded_head_dim(q.shape[-1]),
        "BLOCK": rows.block,
        "BM": shipped.rows,
        "BN": shipped.columns,
        "RULE": rule.value,
        "STAGES": shipped.stages,
        "num_warps": shipped.warps,
    }
