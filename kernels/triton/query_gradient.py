"""Block-sparse flash attention in Triton, backward: the gradient of q, from the row lists.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim, BD the power of two
that holds it, N slots of queries, Nk of keys, R plan rows, E listed blocks, M queries and L keys of
a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vidattn.kernels.triton.tiles import (
    BOX,
    LIVE,
    LOG2E,
    NO_RULE,
    READS,
    READS_BESIDE_LIST,
    TABLE,
    in_box,
    in_table,
    listed_slot,
    load_rows,
    store_rows,
    widen,
)


@triton.jit
def _pull_queries(
    b_dq,
    b_q,
    b_d_out,
    b_lse,
    b_delta,
    k,
    v,
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
    stride_ks,
    stride_vs,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    RULE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds what listed blocks ``begin`` to ``end`` give to the gradient of one tile of queries."""
    PER_BLOCK: tl.constexpr = BLOCK // BN
    o_n = tl.arange(0, BN)
    end = end * PER_BLOCK
    AHEAD: tl.constexpr = (STAGES - 1) * (READS if RULE == NO_RULE else READS_BESIDE_LIST)
    for i_tile in tl.range(begin * PER_BLOCK, end, num_stages=AHEAD + 1):
        i_slot = listed_slot(listed, i_tile, BLOCK, BN)
        b_token = tl.load(order + i_slot + o_n)
        # [L, BD]
        b_k = load_rows(k, b_token, stride_ks, D, BD, RULE != NO_RULE)
        b_v = load_rows(v, b_token, stride_vs, D, BD, RULE != NO_RULE)
        # [M, L]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if key_bias is not None:
            b_bias = tl.load(key_bias + b_token, mask=b_token >= 0, other=0.0)
            b_p = tl.exp2(b_s * scale + b_bias[None, :] - b_lse[:, None])
        else:
            b_p = tl.exp2(b_s * scale - b_lse[:, None])
        if RULE == LIVE:
            b_p = tl.where((b_token >= 0)[None, :], b_p, 0.0)
        if RULE == BOX:
            b_key = tl.load(key_code + i_slot + o_n)
            b_lo, b_hi = widen(b_low, b_high, guard, i_tile < num_whole * PER_BLOCK)
            m_seen = in_box(b_key[None, :], b_lo[:, None], b_hi[:, None], guard)
            b_p = tl.where(m_seen, b_p, 0.0)
        if RULE == TABLE:
            o_key = (i_tile % PER_BLOCK * BN + o_n)[None, :]
            is_whole = i_tile < num_whole * PER_BLOCK
            i_entry = i_tile // PER_BLOCK
            m_seen = in_table(masks, mask_id, i_entry, is_whole, o_query[:, None], o_key, BLOCK)
            b_p = tl.where(m_seen & (b_token >= 0)[None, :], b_p, 0.0)
        b_dp = tl.dot(b_d_out, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit(do_not_specialize=["guard"])
def query_gradient_kernel(
    q,  # (B, H, S, D)
    k,  # (B, K, Sk, D)
    v,  # (B, K, Sk, D)
    d_out,  # (B, H, S, D)
    slot_lse,  # (B, H, N) base 2, by slot; 1e30 hides a query
    delta,  # (B, H, N) what the softmax of a query loses, by slot
    d_q,  # (B, H, S, D)
    key_bias,  # (B|1, H|1, Sk) base 2, or None
    order,  # (N,) of queries
    key_order,  # (Nk,) of keys
    row_start,  # (R + 1,)
    num_clear,  # (R,)
    num_whole,  # (R,)
    listed,  # (E,) key blocks
    mask_id,
    masks,
    key_code,
    low,
    high,
    guard,
    scale,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_db,
    stride_dh,
    stride_ds,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_bias_b,
    stride_bias_h,
    stride_row_b,
    stride_row_h,
    num_heads,
    group,
    num_blocks,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RULE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of one tile of queries, from the row lists."""
    PER_BLOCK: tl.constexpr = BLOCK // BM
    num_tiles = num_blocks * PER_BLOCK
    i_tile = tl.program_id(0) % num_tiles
    i_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    i_k = i_h // group
    o_slot = i_tile * BM + tl.arange(0, BM)
    b_token = tl.load(order + o_slot)
    # [M, BD]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, b_token, stride_qs, D, BD, True)
    b_d_out = load_rows(d_out + i_b * stride_db + i_h * stride_dh, b_token, stride_ds, D, BD, True)
    # [M]
    b_lse = tl.load(slot_lse + i_bh * num_blocks * BLOCK + o_slot)
    b_delta = tl.load(delta + i_bh * num_blocks * BLOCK + o_slot)
    k += i_b * stride_kb + i_k * stride_kh
    v += i_b * stride_vb + i_k * stride_vh
    if key_bias is not None:
        key_bias += i_b * stride_bias_b + i_h * stride_bias_h
    i_row = i_b * stride_row_b + i_h * stride_row_h + i_tile // PER_BLOCK
    start = tl.load(row_start + i_row)
    count = (tl.load(row_start + i_row + 1) - start).to(tl.int32)
    clear = tl.load(num_clear + i_row)
    listed += start

    b_dq = tl.zeros([BM, BD], tl.float32)
    log2_scale = scale * LOG2E
    # fmt: off
    b_dq = _pull_queries(
        b_dq, b_q, b_d_out, b_lse, b_delta, k, v, key_bias, key_order, listed, 0, clear, clear,
        None, None, None, guard, None, None, None, log2_scale, stride_ks, stride_vs,
        D, BD, BLOCK, BN, NO_RULE, STAGES,
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
        b_dq = _pull_queries(
            b_dq, b_q, b_d_out, b_lse, b_delta, k, v, key_bias, key_order, listed, clear, count,
            whole, key_code, b_low, b_high, guard, masks, mask_id, o_query, log2_scale,
            stride_ks, stride_vs, D, BD, BLOCK, BN, RULE, STAGES,
        )
    # fmt: on
    store_rows(d_q + i_b * stride_gb + i_h * stride_gh, b_dq * scale, b_token, stride_gs, D, BD)
