"""Block-sparse flash attention in Triton, backward: gradients of k, v and biases of keys.

The transposed lists name the query blocks of a key block, so that one program sums all of a tile:
no atomics, and equal inputs give equal bits.

Letters: B batch, H query heads, K key heads, S queries, Sk keys, D head dim, BD the power of two
that holds it, N slots of queries, Nk of keys, R plan rows, E listed blocks, M queries and L keys of
a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vidattn.kernels.triton.tiles import (
    BOX,
    LOG2E,
    NO_RULE,
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
def _pull_keys(
    b_dk,
    b_dv,
    b_dbias,
    b_k,
    b_v,
    b_bias,
    q,
    d_out,
    slot_lse,
    delta,
    order,
    listed,
    begin,
    end,
    num_whole,
    b_key,
    low,
    high,
    guard,
    masks,
    mask_id,
    o_key,
    scale,
    stride_qs,
    stride_ds,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    RULE: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_DBIAS: tl.constexpr,
):
    """Adds what listed query blocks ``begin`` to ``end`` give to the gradients of one tile."""
    PER_BLOCK: tl.constexpr = BLOCK // BM
    o_m = tl.arange(0, BM)
    end = end * PER_BLOCK
    for i_tile in tl.range(begin * PER_BLOCK, end, num_stages=(STAGES - 1) * READS_BESIDE_LIST + 1):
        i_slot = listed_slot(listed, i_tile, BLOCK, BM)
        b_token = tl.load(order + i_slot + o_m)
        # [M, BD]
        b_q = load_rows(q, b_token, stride_qs, D, BD, RULE != NO_RULE)
        b_d_out = load_rows(d_out, b_token, stride_ds, D, BD, RULE != NO_RULE)
        # [M]
        b_lse = tl.load(slot_lse + i_slot + o_m)
        b_delta = tl.load(delta + i_slot + o_m)
        # [L, M]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        if b_bias is not None:
            b_p = tl.exp2(b_s * scale + b_bias[:, None] - b_lse[None, :])
        else:
            b_p = tl.exp2(b_s * scale - b_lse[None, :])
        # the log-sum-exp of an empty slot hides its query
        if RULE == BOX:
            is_whole = i_tile < num_whole * PER_BLOCK
            b_low = tl.load(low + i_slot + o_m)
            b_high = tl.load(high + i_slot + o_m)
            b_low, b_high = widen(b_low, b_high, guard, is_whole)
            m_seen = in_box(b_key[:, None], b_low[None, :], b_high[None, :], guard)
            b_p = tl.where(m_seen, b_p, 0.0)
        if RULE == TABLE:
            o_query = (i_tile % PER_BLOCK * BM + o_m)[None, :]
            is_whole = i_tile < num_whole * PER_BLOCK
            i_entry = i_tile // PER_BLOCK
            m_seen = in_table(masks, mask_id, i_entry, is_whole, o_query, o_key[:, None], BLOCK)
            b_p = tl.where(m_seen, b_p, 0.0)
        b_dv = tl.dot(b_p.to(b_d_out.dtype), b_d_out, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_d_out), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :])
        if HAS_DBIAS:
            b_dbias += tl.sum(b_ds, 1)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv, b_dbias


@triton.jit(do_not_specialize=["guard"])
def key_gradient_kernel(
    q,  # (B, H, S, D)
    k,  # (B, K, Sk, D)
    v,  # (B, K, Sk, D)
    d_out,  # (B, H, S, D)
    slot_lse,  # (B, H, N) base 2, by slot; 1e30 hides a query
    delta,  # (B, H, N) what the softmax of a query loses, by slot
    d_k,  # (B, K, Sk, D)
    d_v,  # (B, K, Sk, D)
    d_bias,  # (B, H, Sk), or None
    key_bias,  # (B|1, H|1, Sk) base 2, or None
    order,  # (N,) of queries
    key_order,  # (Nk,) of keys
    row_start,  # (R + 1,) of the transposed lists
    num_clear,  # (R,)
    num_whole,  # (R,)
    listed,  # (E,) query blocks
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
    stride_gkb,
    stride_gkh,
    stride_gks,
    stride_gvb,
    stride_gvh,
    stride_gvs,
    stride_bias_b,
    stride_bias_h,
    stride_row_b,
    stride_row_h,
    num_heads,
    group,
    num_keys,
    num_query_blocks,
    num_blocks,  # of keys
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RULE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of one tile of keys of one key head, summed over its query heads in order."""
    PER_BLOCK: tl.constexpr = BLOCK // BN
    num_tiles = num_blocks * PER_BLOCK
    i_tile = tl.program_id(0) % num_tiles
    i_bk = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_b = i_bk // (num_heads // group)
    i_k = i_bk % (num_heads // group)
    o_slot = i_tile * BN + tl.arange(0, BN)
    b_token = tl.load(key_order + o_slot)
    # [L, BD]
    b_k = load_rows(k + i_b * stride_kb + i_k * stride_kh, b_token, stride_ks, D, BD, True)
    b_v = load_rows(v + i_b * stride_vb + i_k * stride_vh, b_token, stride_vs, D, BD, True)
    b_key = None
    o_key = None
    if RULE == BOX:
        b_key = tl.load(key_code + o_slot)
    if RULE == TABLE:
        o_key = i_tile % PER_BLOCK * BN + tl.arange(0, BN)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    log2_scale = scale * LOG2E
    for i_member in range(group):
        i_h = i_k * group + i_member
        i_bh = i_b * num_heads + i_h
        p_q = q + i_b * stride_qb + i_h * stride_qh
        p_d_out = d_out + i_b * stride_db + i_h * stride_dh
        p_lse = slot_lse + i_bh * num_query_blocks * BLOCK
        p_delta = delta + i_bh * num_query_blocks * BLOCK
        i_row = i_b * stride_row_b + i_h * stride_row_h + i_tile // PER_BLOCK
        start = tl.load(row_start + i_row)
        count = (tl.load(row_start + i_row + 1) - start).to(tl.int32)
        clear = tl.load(num_clear + i_row)
        b_bias = None
        # a tensor also where nobody asks for it: functions return no None before Triton 3.7
        b_dbias = tl.zeros([BN], tl.float32)
        if key_bias is not None:
            p_bias = key_bias + i_b * stride_bias_b + i_h * stride_bias_h
            b_bias = tl.load(p_bias + b_token, mask=b_token >= 0, other=0.0)
        # fmt: off
        b_dk, b_dv, b_dbias = _pull_keys(
            b_dk, b_dv, b_dbias, b_k, b_v, b_bias, p_q, p_d_out, p_lse, p_delta, order,
            listed + start, 0, clear, clear, None, None, None, guard, None, None, None,
            log2_scale, stride_qs, stride_ds, D, BD, BLOCK, BM, NO_RULE, STAGES, d_bias is not None,
        )
        if RULE != NO_RULE:
            whole = tl.load(num_whole + i_row)
            p_mask_id = None
            if RULE == TABLE:
                p_mask_id = mask_id + start
            b_dk, b_dv, b_dbias = _pull_keys(
                b_dk, b_dv, b_dbias, b_k, b_v, b_bias, p_q, p_d_out, p_lse, p_delta, order,
                listed + start, clear, count, whole, b_key, low, high, guard,
                masks, p_mask_id, o_key, log2_scale, stride_qs, stride_ds,
                D, BD, BLOCK, BM, RULE, STAGES, d_bias is not None,
            )
        # fmt: on
        if d_bias is not None:
            tl.store(d_bias + i_bh * num_keys + b_token, b_dbias, mask=b_token >= 0)
    d_k += i_b * stride_gkb + i_k * stride_gkh
    d_v += i_b * stride_gvb + i_k * stride_gvh
    store_rows(d_k, b_dk * scale, b_token, stride_gks, D, BD)
    store_rows(d_v, b_dv, b_token, stride_gvs, D, BD)
