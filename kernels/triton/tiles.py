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

# A loop reads the list, the tokens of a block and their rows one behind the other. Triton shares
# the stages of its pipeline out among what it reads ahead: as many each, and so many it needs to
# read rows one turn ahead. Where a block number is used in two places it is read in its own turn.
READS = tl.constexpr(3)
READS_BESIDE_LIST = tl.constexpr(2)


@triton.jit
def load_rows(
    x, b_token, stride, D: tl.constexpr, BD: tl.constexpr, CHECKED: tl.constexpr, always=None
):
    """[R, BD] the rows of the tokens; 0 beyond D, and for token -1 where ``CHECKED``.

    ``always`` is true, which the compiler does not know: it gives the rows a mask of their own,
    where one for keys and values would be kept in registers from the ones to the others.
    """
    o_d = tl.arange(0, BD)
    p_x = x + b_token.to(tl.int64)[:, None] * stride + o_d[None, :]
    if CHECKED:
        m_x = (b_token >= 0)[:, None]
        if D != BD:
            m_x = m_x & (o_d < D)[None, :]
        if always is not None:
            m_x = m_x & always
        b_x = tl.load(p_x, mask=m_x, other=0.0)
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
def listed_slot(listed, i_tile, BLOCK: tl.constexpr, R: tl.constexpr):
    """First slot of a tile of the listed blocks."""
    PER_BLOCK: tl.constexpr = BLOCK // R
    i_block = tl.load(listed + i_tile // PER_BLOCK)
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
