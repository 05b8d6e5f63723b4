"""What the block-sparse Triton kernels share: reading rows by token, and rules of partial tiles.

Letters: R rows of a tile, M queries and L keys of a tile, D head dim, BD the power of two that
holds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# the running maximum of a row that has seen nothing: finite, so that it can be subtracted
NOTHING = tl.constexpr(-1.0e30)

# how a tile behind the clear ones decides its pairs; a row of clear tiles alone has no rule
NO_RULE = tl.constexpr(0)
LIVE = tl.constexpr(1)
BOX = tl.constexpr(2)
TABLE = tl.constexpr(3)


@triton.jit
def load_rows(x, b_token, stride, D: tl.constexpr, BD: tl.constexpr, CHECKED: tl.constexpr):
    """[R, BD] the rows of the tokens; 0 beyond D, and for token -1 where ``CHECKED``."""
    o_d = tl.arange(0, BD)
    p_x = x + b_token.to(tl.int64)[:, None] * stride + o_d[None, :]
    if CHECKED and D != BD:
        b_x = tl.load(p_x, mask=(b_token >= 0)[:, None] & (o_d < D)[None, :], other=0.0)
    elif CHECKED:
        b_x = tl.load(p_x, mask=(b_token >= 0)[:, None], other=0.0)
    elif D != BD:
        b_x = tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_x = tl.load(p_x)
    return b_x


@triton.jit
def store_rows(x, b_x, b_token, stride, D: tl.constexpr, BD: tl.constexpr):
    """Writes [R, BD] to the rows of the tokens, not for token -1."""
    o_d = tl.arange(0, BD)
    p_x = x + b_token.to(tl.int64)[:, None] * stride + o_d[None, :]
    m_x = (b_token >= 0)[:, None] & (o_d < D)[None, :]
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_x)


@triton.jit
def first_slot(listed, i_tile, end, BLOCK: tl.constexpr, R: tl.constexpr):
    """First slot of a tile of the listed blocks; of slot 0 where the list has ended."""
    PER_BLOCK: tl.constexpr = BLOCK // R
    i_block = tl.load(listed + i_tile // PER_BLOCK, mask=i_tile < end, other=0)
    return tl.multiple_of(i_block * BLOCK + i_tile % PER_BLOCK * R, R)


@triton.jit
def in_box(b_key, b_low, b_high, guard):
    """Whether packed positions lie in packed boxes, the operands broadcast together.

    A guard bit above each axis is lost where the subtraction of that axis borrowed.
    """
    return ((b_key - b_low) & (b_high - b_key) & guard) == guard


@triton.jit
def widen(b_low, b_high, guard, is_whole):
    """The boxes, or boxes that hold every live key where the whole tile is visible."""
    b_low = tl.where(is_whole, -guard, b_low)
    b_high = tl.where(is_whole, 0x7FFFFFFF, b_high)
    return b_low, b_high


@triton.jit
def in_table(masks, mask_id, i_entry, is_whole, o_query, o_key, BLOCK: tl.constexpr):
    """Whether pairs are visible in the mask of a listed block, or the block is whole.

    ``o_query`` and ``o_key`` are offsets in the block, broadcast together.
    """
    i_mask = tl.maximum(tl.load(mask_id + i_entry), 0).to(tl.int64)
    b_seen = tl.load(masks + i_mask * (BLOCK * BLOCK) + o_query * BLOCK + o_key)
    return (b_seen != 0) | is_whole
