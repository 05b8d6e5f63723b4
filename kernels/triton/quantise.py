"""Numbers as 8-bit integers in the order of a layout, in Triton.

Letters: B batch, H heads, S tokens, D head dim, BD the power of two that holds it, N slots, nb
blocks, R slots of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vidattn.kernels.triton.tiles import load_rows

LEVELS = tl.constexpr(127.0)
TINY = tl.constexpr(1e-30)


@triton.jit
def _from_mean(x, b_token, b_mean, stride, D: tl.constexpr, BD: tl.constexpr):
    """[R, BD] rows less the mean; 0 for token -1."""
    b_x = load_rows(x, b_token, stride, D, BD, True).to(tl.float32)
    return tl.where((b_token >= 0)[:, None], b_x - b_mean[None, :], 0.0)


@triton.jit
def quantise_blocks_kernel(
    x,  # (B, H, S, D)
    mean,  # (B, H / group, D) float32
    along,  # (B, H, S) product of each token with the mean; None to subtract the mean
    codes,  # (B, H, N, BD) int8
    scales,  # (B, H, nb) float32
    order,  # (N,) token of each slot, -1 for none
    stride_xb,
    stride_xh,
    stride_xs,
    num_heads,
    group,  # heads to a mean
    num_tokens,
    num_blocks,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
):
    """One block of one head, read twice: for its scale, then for its integers."""
    i_block = tl.program_id(0) % num_blocks
    i_bh = (tl.program_id(0) // num_blocks).to(tl.int64)
    x += i_bh // num_heads * stride_xb + i_bh % num_heads * stride_xh
    o_r = tl.arange(0, R)
    o_d = tl.arange(0, BD)
    b_mean = tl.load(mean + i_bh // group * D + o_d, mask=o_d < D, other=0.0)
    b_shift = b_mean if along is None else tl.zeros_like(b_mean)
    peak = TINY
    for begin in range(0, BLOCK, R):
        b_token = tl.load(order + i_block * BLOCK + begin + o_r)
        # [R, BD]
        b_x = _from_mean(x, b_token, b_shift, stride_xs, D, BD)
        peak = tl.maximum(peak, tl.max(tl.abs(b_x)))
        if along is not None:
            b_along = tl.sum(b_x * b_mean[None, :], 1)
            tl.store(along + i_bh * num_tokens + b_token, b_along, mask=b_token >= 0)
    tl.store(scales + i_bh * num_blocks + i_block, peak / LEVELS)
    factor = LEVELS / peak
    for begin in range(0, BLOCK, R):
        o_slot = i_block * BLOCK + begin + o_r
        b_x = _from_mean(x, tl.load(order + o_slot), b_shift, stride_xs, D, BD)
        b_code = tl.floor(b_x * factor + 0.5).to(tl.int8)
        o_row = i_bh * num_blocks * BLOCK + o_slot
        tl.store(codes + o_row[:, None] * BD + o_d[None, :], b_code)


@triton.jit
def quantise_channels_kernel(
    x,  # (B, H, S, D)
    factors,  # (B, H, D) integers to a number of each channel
    codes,  # (B, H, BD, N) int8, so that a product over keys reads along rows
    order,  # (N,) token of each slot, -1 for none
    stride_xb,
    stride_xh,
    stride_xs,
    num_heads,
    num_slots,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
):
    """Some slots of one head."""
    num_tiles = num_slots // R
    o_slot = tl.program_id(0) % num_tiles * R + tl.arange(0, R)
    i_bh = (tl.program_id(0) // num_tiles).to(tl.int64)
    x += i_bh // num_heads * stride_xb + i_bh % num_heads * stride_xh
    o_d = tl.arange(0, BD)
    b_token = tl.load(order + o_slot)
    # [R, BD]
    b_x = load_rows(x, b_token, stride_xs, D, BD, True).to(tl.float32)
    # [BD]
    b_factor = tl.load(factors + i_bh * D + o_d, mask=o_d < D, other=0.0)
    b_code = tl.floor(b_x * b_factor[None, :] + 0.5).to(tl.int8)
    o_row = i_bh * BD + o_d
    tl.store(codes + o_row[:, None] * num_slots + o_slot[None, :], tl.trans(b_code))
