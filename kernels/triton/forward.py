"""Block-sparse flash attention in Triton, forward.

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
    LN2,
    NO_RULE,
    NOTHING,
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
def _read_keys(
    b_acc,
    b_sum,
    b_top,
    b_q,
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
    """One pass over listed blocks ``begin`` to ``end``; the running softmax goes in and out."""
    PER_BLOCK: tl.constexpr = BLOCK // BN
    o_n = tl.arange(0, BN)
    end = end * PER_BLOCK
    AHEAD: tl.constexpr = (STAGES - 1) * (READS if RULE == NO_RULE else READS_BESIDE_LIST)
    for i_tile in tl.range(begin * PER_BLOCK, end, num_stages=AHEAD + 1):
        i_slot = listed_slot(listed, i_tile, BLOCK, BN)
        b_token = tl.load(order + i_slot + o_n)
        # either takes fewer registers; the one with which nothing spills is found by compiling
        listed_k = i_slot >= 0 if BN > 64 else None
        listed_v = None if BN > 64 else i_slot >= 0
        # [L, BD]
        b_k = load_rows(k, b_token, stride_ks, D, BD, RULE != NO_RULE, listed_k)
        # [M, L]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if RULE == LIVE:
            b_s = tl.where((b_token >= 0)[None, :], b_s, float("-inf"))
        if RULE == BOX:
            b_key = tl.load(key_code + i_slot + o_n)
            b_lo, b_hi = widen(b_low, b_high, guard, i_tile < num_whole * PER_BLOCK)
            m_seen = in_box(b_key[None, :], b_lo[:, None], b_hi[:, None], guard)
            b_s = tl.where(m_seen, b_s, float("-inf"))
        if RULE == TABLE:
            o_key = i_tile % PER_BLOCK * BN + o_n
            is_whole = i_tile < num_whole * PER_BLOCK
            m_seen = in_table(
                masks,
                mask_id,
                i_tile // PER_BLOCK,
                is_whole,
                o_query[:, None],
                o_key[None, :],
                BLOCK,
            )
            b_s = tl.where(m_seen & (b_token >= 0)[None, :], b_s, float("-inf"))
        if key_bias is not None:
            b_bias = tl.load(key_bias + b_token, mask=b_token >= 0, other=0.0)
            b_s = b_s * scale + b_bias[None, :]
            b_new = tl.maximum(b_top, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_new[:, None])
        else:
            b_new = tl.maximum(b_top, tl.max(b_s, 1) * scale)
            b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_fade = tl.exp2(b_top - b_new)
        b_sum = b_sum * b_fade + tl.sum(b_p, 1)
        b_acc = b_acc * b_fade[:, None]
        # [L, BD]
        b_v = load_rows(v, b_token, stride_vs, D, BD, RULE != NO_RULE, listed_v)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_top = b_new
    return b_acc, b_sum, b_top


@triton.jit(do_not_specialize=["guard"])
def forward_kernel(
    q,  # (B, H, S, D)
    k,  # (B, K, Sk, D)
    v,  # (B, K, Sk, D)
    out,  # (B, H, S, D)
    lse,  # (B, H, S) natural log
    key_bias,  # (B|1, H|1, Sk) base 2, -inf for a key that nobody may read, or None
    gain,  # (B, H, N / BLOCK) factor of the output, or None
    shift,  # (B, H, N / BLOCK, D) added to it, or None
    order,  # (N,) token of each slot of queries, -1 for none
    key_order,  # (Nk,) likewise of keys
    row_start,  # (R + 1,)
    num_clear,  # (R,)
    num_whole,  # (R,)
    listed,  # (E,) key blocks
    mask_id,  # (E,), for a table
    masks,  # (distinct masks, BLOCK, BLOCK), for a table
    key_code,  # (Nk,) packed positions, guard for an empty slot, for a box
    low,  # (N,), for a box
    high,  # (N,), for a box
    guard,
    scale,  # of the scores, times log2(e)
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
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
):
    """One tile of queries of one head; the head is the slow axis, so that its keys stay in L2."""
    PER_BLOCK: tl.constexpr = BLOCK // BM
    num_tiles = num_blocks * PER_BLOCK
    i_tile = tl.program_id(0) % num_tiles
    i_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    i_k = i_h // group
    i_block = i_tile // PER_BLOCK
    o_slot = i_tile * BM + tl.arange(0, BM)
    b_token = tl.load(order + o_slot)
    # [M, BD]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, b_token, stride_qs, D, BD, True)
    k += i_b * stride_kb + i_k * stride_kh
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
        b_acc, b_sum, b_top, b_q, k, v, key_bias, key_order, listed, 0, clear, clear,
        None, None, None, guard, None, None, None, scale, stride_ks, stride_vs,
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
        b_acc, b_sum, b_top = _read_keys(
            b_acc, b_sum, b_top, b_q, k, v, key_bias, key_order, listed, clear, count, whole,
            key_code, b_low, b_high, guard, masks, mask_id, o_query, scale, stride_ks, stride_vs,
            D, BD, BLOCK, BN, RULE, STAGES,
        )
    # fmt: on

    m_empty = b_sum == 0.0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_acc = b_acc / b_sum[:, None]
    if gain is not None:
        b_acc *= tl.load(gain + i_bh * num_blocks + i_block)
    if shift is not None:
        o_d = tl.arange(0, BD)
        p_shift = shift + (i_bh * num_blocks + i_block) * D + o_d
        b_acc += tl.load(p_shift, mask=o_d < D, other=0.0)[None, :]
    store_rows(out + i_b * stride_ob + i_h * stride_oh, b_acc, b_token, stride_os, D, BD)
    b_lse = tl.where(m_empty, float("-inf"), (b_top + tl.log2(b_sum)) * LN2)
    tl.store(lse + i_bh * num_tokens + b_token, b_lse, mask=b_token >= 0)
