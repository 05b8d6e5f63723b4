"""Block-sparse flash attention with products of 8-bit integers in Triton, forward.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, BD the power of two that holds
it, N slots, nb blocks, R plan rows, E listed blocks, M queries and L keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vidattn.kernels.triton.tiles import (
    BOX,
    LIVE,
    LN2,
    NO_RULE,
    NOTHING,
    READS_BESIDE_LIST,
    TABLE,
    in_box,
    in_table,
    listed_slot,
    load_rows,
    store_rows,
    widen,
)

LEVELS = tl.constexpr(127.0)


@triton.jit
def _read_keys(
    b_acc,
    b_sum,
    b_top,
    b_q,
    k,
    v,
    key_scales,
    key_bias,
    order,
    listed,
    begin,
    end,
    num_whole,
    key_code,
    b_low,
    b_high,
    guard,
    masks,
    mask_id,
    o_query,
    scale,
    stride_vs,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    RULE: tl.constexpr,
    STAGES: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """One pass over listed blocks ``begin`` to ``end``; the running softmax goes in and out."""
    PER_BLOCK: tl.constexpr = BLOCK // BN
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    end = end * PER_BLOCK
    for i_tile in tl.range(begin * PER_BLOCK, end, num_stages=(STAGES - 1) * READS_BESIDE_LIST + 1):
        i_slot = listed_slot(listed, i_tile, BLOCK, BN)
        b_token = tl.load(order + i_slot + o_n)
        # [L, BD]
        b_k = load_rows(k, i_slot + o_n, BD, BD, BD, False)
        tile_scale = scale * tl.load(key_scales + i_slot // BLOCK)
        # [M, L]
        b_s = tl.dot(b_q, tl.trans(b_k), out_dtype=tl.int32).to(tl.float32)
        if RULE == LIVE:
            b_s = tl.where((b_token >= 0)[None, :], b_s, float("-inf"))
        if RULE == BOX:
            b_key = tl.load(key_code + i_slot + o_n)
            b_lo, b_hi = widen(b_low, b_high, guard, i_tile < num_whole * PER_BLOCK)
            m_seen = in_box(b_key[None, :], b_lo[:, None], b_hi[:, None], guard)
            b_s = tl.where(m_seen, b_s, float("-inf"))
        if RULE == TABLE:
            o_key = (i_tile % PER_BLOCK * BN + o_n)[None, :]
            is_whole = i_tile < num_whole * PER_BLOCK
            i_entry = i_tile // PER_BLOCK
            m_seen = in_table(masks, mask_id, i_entry, is_whole, o_query[:, None], o_key, BLOCK)
            b_s = tl.where(m_seen & (b_token >= 0)[None, :], b_s, float("-inf"))
        if key_bias is not None:
            b_bias = tl.load(key_bias + b_token, mask=b_token >= 0, other=0.0)
            b_s = b_s * tile_scale + b_bias[None, :]
            tile_scale = 1.0
        # finite, so that it can be subtracted where the tile is hidden from a query
        b_here = tl.maximum(tl.max(b_s, 1) * tile_scale, NOTHING)
        b_new = tl.maximum(b_top, b_here)
        b_fade = tl.exp2(b_top - b_new)
        if ROUNDED:
            # of the largest weight of the tile, which all integers are used for
            b_p = tl.exp2(b_s * tile_scale - b_here[:, None])
            b_weight = tl.exp2(b_here - b_new)
            b_sum = b_sum * b_fade + tl.sum(b_p, 1) * b_weight
            b_code = (b_p * LEVELS + 0.5).to(tl.int8)
            # [BD, L]
            b_v = load_rows(v + i_slot, o_d, stride_vs, BN, BN, False)
            b_o = tl.dot(b_code, tl.trans(b_v), out_dtype=tl.int32).to(tl.float32)
            b_acc = b_acc * b_fade[:, None] + b_o * b_weight[:, None]
        else:
            b_p = tl.exp2(b_s * tile_scale - b_new[:, None])
            b_sum = b_sum * b_fade + tl.sum(b_p, 1)
            b_acc = b_acc * b_fade[:, None]
            # [L, BD]
            b_v = load_rows(v, b_token, stride_vs, D, BD, RULE != NO_RULE)
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_top = b_new
    return b_acc, b_sum, b_top


@triton.jit(do_not_specialize=["guard"])
def quantised_kernel(
    q,  # (B, H, N, BD) int8
    k,  # (B, K, N, BD) int8
    v,  # (B, K, BD, N) int8 where ROUNDED, else (B, K, S, D)
    query_scales,  # (B, H, nb)
    key_scales,  # (B, K, nb)
    value_scales,  # (B, K, D) where ROUNDED, else None
    out,  # (B, H, S, D)
    lse,  # (B, H, S) natural log, without the mean of the keys
    key_bias,  # (B|1, H|1, S) base 2, or None
    order,  # (N,) token of each slot, -1 for none
    row_start,  # (R + 1,)
    num_clear,  # (R,)
    num_whole,  # (R,)
    listed,  # (E,) key blocks
    mask_id,  # (E,), for a table
    masks,  # (distinct masks, BLOCK, BLOCK), for a table
    key_code,  # (N,) packed positions, guard for an empty slot, for a box
    low,  # (N,), for a box
    high,  # (N,), for a box
    guard,
    scale,  # of the scores, times log2(e)
    stride_vb,
    stride_vh,
    stride_vs,  # of a token, or of a channel where ROUNDED
    stride_ob,
    stride_oh,
    stride_os,
    stride_bias_b,
    stride_bias_h,
    stride_row_b,
    stride_row_h,
    num_heads,
    group,  # query heads to a key head
    num_tokens,
    num_blocks,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RULE: tl.constexpr,
    STAGES: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """One tile of queries of one head; weights and values are integers too where ROUNDED."""
    PER_BLOCK: tl.constexpr = BLOCK // BM
    num_tiles = num_blocks * PER_BLOCK
    num_slots = num_blocks * BLOCK
    i_tile = tl.program_id(0) % num_tiles
    i_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    i_k = i_h // group
    # of the key head, counted through the batch
    i_bk = i_bh // group
    i_block = i_tile // PER_BLOCK
    o_d = tl.arange(0, BD)
    o_slot = i_tile * BM + tl.arange(0, BM)
    b_token = tl.load(order + o_slot)
    # [M, BD]
    b_q = load_rows(q + i_bh * num_slots * BD, o_slot, BD, BD, BD, False)
    scale *= tl.load(query_scales + i_bh * num_blocks + i_block)
    k += i_bk * num_slots * BD
    key_scales += i_bk * num_blocks
    v += i_b * stride_vb + i_k * stride_vh
    if key_bias is not None:
        key_bias += i_b * stride_bias_b + i_h * stride_bias_h
    i_row = i_b * stride_row_b + i_h * stride_row_h + i_block
    start = tl.load(row_start + i_row)
    count = (tl.load(row_start + i_row + 1) - start).to(tl.int32)
    clear = tl.load(num_clear + i_row)
    listed += start

    b_acc = tl.zeros([BM, BD], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_top = tl.full([BM], NOTHING, tl.float32)
    # fmt: off
    b_acc, b_sum, b_top = _read_keys(
        b_acc, b_sum, b_top, b_q, k, v, key_scales, key_bias, order, listed, 0, clear, clear,
        None, None, None, guard, None, None, None, scale, stride_vs,
        D, BD, BLOCK, BN, NO_RULE, STAGES, ROUNDED,
    )
    if RULE != NO_RULE:
        whole = tl.load(num_whole + i_row)
        b_low = None
        b_high = None
        o_query = None
        if RULE == BOX:
            b_low = tl.load(low + o_slot)
            b_high = tl.load(high + o_slot)
        if RULE == TABLE:
            mask_id += start
            o_query = i_tile % PER_BLOCK * BM + tl.arange(0, BM)
        b_acc, b_sum, b_top = _read_keys(
            b_acc, b_sum, b_top, b_q, k, v, key_scales, key_bias, order, listed, clear, count,
            whole, key_code, b_low, b_high, guard, masks, mask_id, o_query, scale, stride_vs,
            D, BD, BLOCK, BN, RULE, STAGES, ROUNDED,
        )
    # fmt: on

    m_empty = b_sum == 0.0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_acc = b_acc / b_sum[:, None]
    if ROUNDED:
        b_scale = tl.load(value_scales + i_bk * D + o_d, mask=o_d < D, other=0.0)
        b_acc *= b_scale[None, :] / LEVELS
    store_rows(out + i_b * stride_ob + i_h * stride_oh, b_acc, b_token, stride_os, D, BD)
    b_lse = tl.where(m_empty, float("-inf"), (b_top + tl.log2(b_sum)) * LN2)
    tl.store(lse + i_bh * num_tokens + b_token, b_lse, mask=b_token >= 0)
