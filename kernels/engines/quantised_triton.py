"""Block-sparse attention in low precision on NVIDIA GPUs, by Triton kernels.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, BD the power of two that holds
it, N slots, nb blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidattn.kernels.block_lists import BlockLists
from vidattn.kernels.engines import block_sparse_triton as plain
from vidattn.kernels.engines.block_segments import Segments, segments
from vidattn.kernels.engines.quantised import SCHEMA, fake
from vidattn.kernels.library import flatten, gather
from vidattn.kernels.quantise import LEVELS, PRECISIONS, SMALLEST_TILE, channel_peaks
from vidattn.kernels.triton.configs import quantising_tile, tile

DTYPES = (torch.float16, torch.bfloat16)
# integers that weights become, and whether the kernel then rounds them
WEIGHTS = {None: False, LEVELS: True}
TAKES = ("scale", "key_mask", "precision")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists,
    *,
    scale: float,
    precision: str,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result of ``quantised.attention``, by Triton kernels.

    Args:
        q: (B, H, S, D).
        k, v: (B, K, S, D), H a multiple of K.
        lists: which key blocks each query block reads.
        scale: factor of the scores, above 0.
        precision: "int8_qk" or "int8".
        key_mask: (B, S) bool, False for keys that nobody may read.

    Returns:
        (B, H, S, D) in the dtype of ``q``; (B, H, S) float32 log-sum-exp, -inf for no keys.
    """
    return _attention(q, k, v, *flatten(lists), float(scale), key_mask, precision)


def obstacle(
    q: Tensor, *others: object, scale: float, precision: str, **options: object
) -> str | None:
    """What keeps these kernels from a call of ``attention``, and what to do; None if nothing."""
    if (wrong := plain.unfit(q, scale)) is not None:
        return wrong
    if q.dtype not in DTYPES:
        wrong = f"take float16 and bfloat16, got {q.dtype}"
    elif PRECISIONS[precision].weights not in WEIGHTS:
        wrong = f"have no precision {precision!r}"
    return (
        None if wrong is None else f'the Triton kernels for integers {wrong}: use backend="torch"'
    )


def _forward(q, k, v, lists, scale, key_mask, precision):
    from vidattn.kernels.triton.quantised import quantised_kernel

    rounded = WEIGHTS[PRECISIONS[precision].weights]
    rows = segments(lists, smallest_tile=SMALLEST_TILE)
    out, lse = fake(q)
    q, k, v = map(plain.rows_of, (q, k, v))
    mean = k.mean(2, dtype=torch.float32)
    along = torch.empty_like(lse)
    q_codes, query_scales = _in_blocks(q, rows, mean, along)
    k_codes, key_scales = _in_blocks(k, rows, mean, None)
    value_scales = None
    if rounded:
        v, value_scales = _in_channels(v, rows)
    bias = plain.bias_arguments(q, key_mask, None)
    size = (q.itemsize, q.shape[-1], rows.block)
    extras = {"has_masks": rows.masks is not None, "has_bias": key_mask is not None}
    shipped = tile(precision, plain.architecture_of(q), *size, **extras)
    constants = plain.constant_arguments(rows, q, k, shipped)
    plain.launch(
        quantised_kernel,
        rows.order.numel() // shipped.rows * q.shape[0] * q.shape[1],
        q=q_codes,
        k=k_codes,
        v=v,
        query_scales=query_scales,
        key_scales=key_scales,
        value_scales=value_scales,
        out=out,
        lse=lse,
        scale=scale * plain.LOG2E,
        num_tokens=q.shape[2],
        **bias,
        **plain.stride_arguments(v=v, o=out),
        **plain.list_arguments(rows, lists, q, k),
        **constants | {"BD": q_codes.shape[-1]},
        ROUNDED=rounded,
    )
    # the kernel saw keys without their mean
    return out, lse.add_(along, alpha=scale)


def _in_blocks(
    x: Tensor, rows: Segments, mean: Tensor, along: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, H, N, BD) int8 and (B, H, nb) scales; writes ``along`` or subtracts the mean."""
    from vidattn.kernels.triton.quantise import quantise_blocks_kernel

    *heads, num_tokens, head_dim = x.shape
    num_slots, num_blocks = rows.order.numel(), rows.order.numel() // rows.block
    shipped = quantising_tile(head_dim)
    codes = torch.empty(*heads, num_slots, shipped.columns, dtype=torch.int8, device=x.device)
    scales = torch.empty(*heads, num_blocks, dtype=torch.float32, device=x.device)
    plain.launch(
        quantise_blocks_kernel,
        scales.numel(),
        x=x,
        mean=mean,
        along=along,
        codes=codes,
        scales=scales,
        order=rows.order,
        **plain.stride_arguments(x=x),
        num_heads=heads[1],
        group=heads[1] // mean.shape[1],
        num_tokens=num_tokens,
        num_blocks=num_blocks,
        D=head_dim,
        BD=shipped.columns,
        BLOCK=rows.block,
        R=shipped.rows,
        num_warps=shipped.warps,
        num_stages=shipped.stages,
    )
    return codes, scales


def _in_channels(x: Tensor, rows: Segments) -> tuple[Tensor, Tensor]:
    """(B, K, BD, N) int8 and (B, K, D) scales."""
    from vidattn.kernels.triton.quantise import quantise_channels_kernel

    *heads, _, head_dim = x.shape
    num_slots, shipped = rows.order.numel(), quantising_tile(head_dim)
    codes = torch.empty(*heads, shipped.columns, num_slots, dtype=torch.int8, device=x.device)
    peaks = channel_peaks(x)
    plain.launch(
        quantise_channels_kernel,
        num_slots // shipped.rows * heads[0] * heads[1],
        x=x,
        factors=LEVELS / peaks,
        codes=codes,
        order=rows.order,
        **plain.stride_arguments(x=x),
        num_heads=heads[1],
        num_slots=num_slots,
        D=head_dim,
        BD=shipped.columns,
        R=shipped.rows,
        num_warps=shipped.warps,
        num_stages=shipped.stages,
    )
    return codes, peaks / LEVELS


_attention = torch.library.custom_op(
    "vidattn::quantised_triton",
    lambda *inputs: _forward(*gather(inputs)),
    mutates_args=(),
    schema=SCHEMA,
)
_attention.register_fake(fake)
