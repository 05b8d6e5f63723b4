"""Attention mass of every pair of blocks in Triton, without a matrix of weights.

Letters: B batch, H query heads, K key heads, S tokens, D head dim, BD the power of two that holds
it, N slots, nb blocks, M queries and L keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vidattn.kernels.triton.tiles import READS_BESIDE_LIST, load_rows


@triton.jit
def block_mass_kernel(
    q,  # (B, H, S, D)
    k,  # (B, K, S, D)
    slot_lse,  # (B, H, N) base 2, by slot; 1e30 hides a query
    mass,  # (B, H, N / BM, nb), by tile of queries and block of keys
    order,  # (N,) token of each slot, -1 for none
    readable,  # (B|1, N) whether a slot holds a key that may be read
    scale,  # of the scores, times log2(e)
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_readable_b,
    num_heads,
    group,  # query heads to a key head
    num_blocks,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of queries of one head against all keys."""
    PER_BLOCK: tl.constexpr = BLOCK // BN
    num_tiles = num_blocks * (BLOCK // BM)
    i_tile = tl.program_id(0) % num_tiles
    i_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    o_slot = i_tile * BM + tl.arange(0, BM)
    b_token = tl.load(order + o_slot)
    # [M, BD]
    b_q = load_rows(q + i_b * stride_qb + i_h * stride_qh, b_token, stride_qs, D, BD, True)
    # [M]
    b_lse = tl.load(slot_lse + i_bh * num_blocks * BLOCK + o_slot)
    k += i_b * stride_kb + (i_h // group) * stride_kh
    readable += i_b * stride_readable_b
    mass += (i_bh * num_tiles + i_tile) * num_blocks
    o_n = tl.arange(0, BN)
    total = 0.0
    for i_key in tl.range(num_blocks * PER_BLOCK, num_stages=(STAGES - 1) * READS_BESIDE_LIST + 1):
        b_key = tl.load(order + i_key * BN + o_n)
        m_key = tl.load(readable + i_key * BN + o_n) != 0
        # [L, BD]
        b_k = load_rows(k, b_key, stride_ks, D, BD, True)
        # [L, M], so that most of a sum stays within a thread
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = tl.exp2(b_s * scale - b_lse[None, :])
        # [L], so that hidden keys are left out once and not for every query
        b_sum = tl.where(m_key, tl.sum(b_p, 1), 0.0)
        first = i_key % PER_BLOCK == 0
        total = tl.where(first, 0.0, total) + tl.sum(b_sum, 0)
        # the last tile of a block writes over what the ones before it wrote
        tl.store(mass + i_key // PER_BLOCK, total)
