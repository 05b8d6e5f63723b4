// Packed rows of tokens, and products of them on tiles of registers.
//
// The letters are those of block_sparse_cpu.cpp.

#pragma once

#include <algorithm>
#include <cstring>

#include "block_sparse_call.h"

namespace {

inline float as_float(u32 x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

inline u32 as_bits(float x) {
  u32 y;
  std::memcpy(&y, &x, 4);
  return y;
}

inline i64 piece_at(const Job& j, i64 owner, i64 block, i64 piece) {
  return (owner * j.nb + block) * j.pieces + piece;
}

INLINE U load(const i32* from) {
  U x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

#if VIDATTN_WIDTH == 16
INLINE u32 bits_of_equal(U a, U b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
INLINE bool any_above(V a, V b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
}
// Minus infinity where `bits` lacks a lane.
INLINE V hide(V x, u32 bits) {
  return (V)_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)bits, (__m512)x);
}
#else
#if VIDATTN_WIDTH == 8
INLINE u32 bits_of(I mask) { return u32(_mm256_movemask_ps((__m256)mask)); }
#else
INLINE u32 bits_of(I mask) {
  mask &= I{1, 2, 4, 8};
  return u32(mask[0] | mask[1] | mask[2] | mask[3]);
}
#endif
INLINE u32 bits_of_equal(U a, U b) { return bits_of((I)(a == b)); }
INLINE bool any_above(V a, V b) { return bits_of((I)(a > b)) != 0; }
// Minus infinity where `bits` lacks a lane.
INLINE V hide(V x, u32 bits) {
  I lane;
  for (int i = 0; i < W; i++) lane[i] = 1 << i;
  return (lane & i32(bits)) == lane ? x : splat(-INFINITY);
}
#endif

// acc + a * b, over both numbers of a word.
INLINE V fused(V acc, V a, V b) {
#if VIDATTN_PAIRS
  return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#else
  return acc + a * b;
#endif
}

// A vector as words of packed numbers.
INLINE void store_packed(float* to, V x) {
#if VIDATTN_PAIRS
  __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &half, sizeof half);
#else
  store(to, x);
#endif
}

// 2 ** x, and 2 ** LEAST for all that is below; with MASKED 0 where `hide` was. The polynomials are
// minimax.
template <bool MASKED = false>
INLINE V exp2(V given) {
  V x = larger(splat(LEAST), given);
#if VIDATTN_WIDTH == 16
  V f = (V)_mm512_reduce_ps((__m512)x, 1), p;  // x minus its floor
  if (PAIRS) {
    // 7.5e-5, far below the rounding of a bfloat16 weight
    p = 7.80245215e-2f * f + 2.26067171e-1f;
    p = p * f + 6.95833504e-1f;
    p = p * f + 9.99925196e-1f;
  } else {
    p = 1.87757669e-3f * f + 8.98934063e-3f;
    p = p * f + 5.58263175e-2f;
    p = p * f + 2.40153611e-1f;
    p = p * f + 6.93153083e-1f;
    p = p * f + 9.99999940e-1f;
  }
  if (MASKED) {
    __mmask16 seen = _mm512_cmp_ps_mask((__m512)given, _mm512_set1_ps(2 * LEAST), _CMP_NLT_UQ);
    return (V)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)x);
  }
  return (V)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  // the sum rounds x to a whole number, which its last bits then hold
  const V magic = splat(12582912.0f);
  V whole = x + magic, f = x - (whole - magic);
  V p = 1.32764725e-3f * f + 9.67554189e-3f;
  p = p * f + 5.55071309e-2f;
  p = p * f + 2.40221202e-1f;
  p = p * f + 6.93146944e-1f;
  p = p * f + 1.00000012f;
  V power = (V)((U)p + ((U)whole << 23));
  return MASKED ? (V)((I)power & ~(I)(given < splat(2 * LEAST))) : power;
#endif
}

INLINE float from_half(u16 x) {
  u32 size = u32(x & 0x7fff) << 13;
  float scaled = as_float(size) * as_float(0x77800000);  // 2 ** 112
  u32 bits = as_bits(scaled) | ((x & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);
  return as_float(bits | u32(x & 0x8000) << 16);
}

INLINE u16 to_half(float x) {
  u32 sign = as_bits(x) >> 16 & 0x8000, size = as_bits(x) & 0x7fffffff;
  // to nearest, ties to even; the sum with 0.5 rounds what is subnormal as a half
  u32 normal = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
  u32 subnormal = as_bits(as_float(size) + 0.5f) - as_bits(0.5f);
  u32 half = size < 113u << 23 ? subnormal : normal;
  half = size >= 0x477ff000 ? 0x7c00 : half;
  half = size > 0x7f800000 ? 0x7e00 : half;
  return u16(sign | half);
}

INLINE u16 to_bfloat16(float x) {
  u32 bits = as_bits(x);
  u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return u16((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

// One token as packed numbers, 0 for no token; floats are multiplied by `factor`, pairs are not.
void load_row(const Job& j, const Rows& x, i64 sample, i64 head, i64 token, float factor,
              float* to) {
  i64 D = j.call.D, at = sample * x.sample + head * x.head + token * x.token;
  const u16* halves = reinterpret_cast<const u16*>(x.data) + at;
  const float* floats = reinterpret_cast<const float*>(x.data) + at;
  if (token < 0) {
    std::memset(to, 0, j.words * 4);
    return;
  }
  if (PAIRS) {
    std::memset(to + D / PAIR, 0, (j.words - D / PAIR) * 4);
    std::memcpy(to, halves, D * 2);
    return;
  }
  i64 d = 0;
  if (j.call.kind == FLOAT32) {
    for (; d + W <= D; d += W) store(to + d, load(floats + d) * factor);
    for (; d < D; d++) to[d] = floats[d] * factor;
  } else if (j.call.kind == BFLOAT16) {
    for (; d < D; d++) to[d] = as_float(u32(halves[d]) << 16) * factor;
  } else {
    for (; d < D; d++) to[d] = from_half(halves[d]) * factor;
  }
  for (; d < j.width; d++) to[d] = 0;
}

void store_row(const Job& j, const Rows& x, i64 sample, i64 head, i64 token, const float* from,
               float factor) {
  i64 D = j.call.D, at = sample * x.sample + head * x.head + token * x.token;
  u16* halves = reinterpret_cast<u16*>(x.data) + at;
  float* floats = reinterpret_cast<float*>(x.data) + at;
  if (j.call.kind == FLOAT32)
    for (i64 d = 0; d < D; d++) floats[d] = from[d] * factor;
  else if (j.call.kind == BFLOAT16)
    for (i64 d = 0; d < D; d++) halves[d] = to_bfloat16(from[d] * factor);
  else
    for (i64 d = 0; d < D; d++) halves[d] = to_half(from[d] * factor);
}

// The rows of one piece, (ld, words), zeros in slots that `readable` lacks.
void load_piece(const Job& j, const Rows& x, i64 sample, i64 head, i64 block, i64 piece,
                u64 readable, float factor, float* to) {
  const i32* order = j.call.order + block * j.call.n + piece * PIECE;
  for (i64 i = 0; i < j.ld; i++)
    load_row(j, x, sample, head, readable >> i & 1 ? order[i] : -1, factor, to + i * j.words);
}

// (ld, words) rows as the right side of a product that sums over rows: as they are, or with two
// rows to a word.
void pack_pairs(const Job& j, const float* from, float* to) {
  const u16* x = reinterpret_cast<const u16*>(from);
  u32* words = reinterpret_cast<u32*>(to);
  for (i64 i = 0; i < j.ld; i += 2) {
    const u16 *even = x + i * j.width, *odd = even + j.width;
    for (i64 d = 0; d < j.width; d++)
      words[i / 2 * j.width + d] = u32(even[d]) | u32(odd[d]) << 16;
  }
}

// Words of a row that hold its D numbers.
INLINE i64 depth_of(const Job& j) { return (j.call.D + PAIR - 1) / PAIR; }

// What scores are multiplied by before the base-2 softmax; packed floats carry it already.
INLINE float packed_factor(const Job& j) { return PAIRS ? 1 : float(j.call.scale) * LOG2E; }

void pack_keys(const Job& j, i64 task, Scratch& s) {
  i64 unit = task / j.nb, block = task % j.nb;
  Head h = j.head(unit * j.group);
  for (i64 piece = 0; piece < j.pieces; piece++) {
    i64 at = piece_at(j, unit, block, piece) * j.ld * j.words;
    u64 readable = j.readable_keys(h.sample, block, piece);
    float* values = j.values.data + at;
    load_piece(j, j.call.k, h.sample, h.key, block, piece, readable, 1, s.keys);
    transpose(s.keys, j.ld, j.words, j.keys.data + at);
    load_piece(j, j.call.v, h.sample, h.key, block, piece, readable, 1, PAIRS ? s.keys : values);
    if (PAIRS) pack_pairs(j, s.keys, values);
  }
}

// A set of vectors of a row, and its members in turn.
typedef u32 Set;

struct List {
  int count = 0;
  u8 vector[VECTORS];
  explicit List(Set set) {
    for (; set; set &= set - 1) vector[count++] = u8(__builtin_ctz(set));
  }
};

// The vectors of a row where any bit is set.
INLINE Set vectors_of(u64 bits) {
  Set set = 0;
  for (int n = 0; n < VECTORS; n++) set |= Set((bits >> n * W & ((1ull << W) - 1)) != 0) << n;
  return set;
}

// Vectors in the next tile, of those that remain; a narrow tile does not keep the registers busy.
INLINE int next_tile(i64 rest) {
  return rest == TILE + 1 ? TILE - 1 : int(std::min<i64>(rest, TILE));
}

// acc += column k of left times row k of the vectors that `right` points to.
template <int N, bool ACROSS>
INLINE void add_outer(V (&acc)[ROWS][N], const float* left, i64 left_ld,
                      const float* const (&right)[N], i64 right_ld, i64 k) {
  V b[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) b[n] = load(right[n] + k * right_ld);
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    V a = splat(ACROSS ? left[k * left_ld + m] : left[m * left_ld + k]);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[m][n] = fused(acc[m][n], a, b[n]);
  }
}

// acc += left (ROWS, depth) right (depth, N vectors); left is stored the other way with ACROSS.
template <int N, bool ACROSS>
INLINE void multiply(V (&acc)[ROWS][N], const float* left, i64 left_ld,
                     const float* const (&right)[N], i64 right_ld, i64 depth) {
  i64 k = 0;
  if (ROWS * N < 8) {
    // too few sums to hide how long one addition takes: twice as many
    V odd[ROWS][N] = {};
    for (; k + 1 < depth; k += 2) {
      add_outer<N, ACROSS>(acc, left, left_ld, right, right_ld, k);
      add_outer<N, ACROSS>(odd, left, left_ld, right, right_ld, k + 1);
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[m][n] += odd[m][n];
  }
#pragma GCC unroll 2
  for (; k < depth; k++) add_outer<N, ACROSS>(acc, left, left_ld, right, right_ld, k);
}

// to = left (ROWS, depth) right (depth, the vectors of right that are listed).
template <int N>
INLINE void scores(V (&to)[ROWS][N], const float* left, i64 left_ld, const float* right,
                   i64 right_ld, i64 depth, const u8* vectors) {
  const float* from[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) from[n] = right + vectors[n] * W;
  V acc[ROWS][N] = {};
  multiply<N, false>(acc, left, left_ld, from, right_ld, depth);
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) to[m][n] = acc[m][n];
#if VIDATTN_WIDTH < 16
  // with so few registers, what comes next must not take those of the loop
  asm("" : "+m"(to));
#endif
}

struct Product {
  float* out;
  i64 out_ld;
  const float* left;
  i64 left_ld;
  const float* right;
  i64 right_ld;
  Set depth;  // vectors of slots that are summed over
};

template <int N, bool ACROSS>
void add_tile(const Product& p, i64 column) {
  V acc[ROWS][N] = {};
  for (Set rest = p.depth; rest;) {
    // a run of vectors at a time
    int first = __builtin_ctz(rest), run = __builtin_ctz(~(rest >> first));
    rest &= rest + (1u << first);
    i64 begin = first * VECTOR_WORDS;
    const float *left = p.left + begin * (ACROSS ? p.left_ld : 1), *right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) right[n] = p.right + begin * p.right_ld + column + n * W;
    multiply<N, ACROSS>(acc, left, p.left_ld, right, p.right_ld, run * VECTOR_WORDS);
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      float* at = p.out + m * p.out_ld + column + n * W;
      store(at, load(at) + acc[m][n]);
    }
}

// out += left right for `strips` strips of ROWS rows, each summing over the vectors that it sees.
template <bool ACROSS>
void add_products(Product p, i64 width, i64 strips, const Set* seen) {
  static constexpr void (*TILES[])(const Product&, i64) = {
      add_tile<1, ACROSS>, add_tile<2, ACROSS>, add_tile<3, ACROSS>, add_tile<TILE, ACROSS>};
  const float* left = p.left;
  float* out = p.out;
  // a tile's columns stay close while all rows pass
  for (i64 column = 0; column < width;) {
    int n = next_tile((width - column) / W);
    for (i64 r = 0; r < strips; r++) {
      p.out = out + r * ROWS * p.out_ld;
      p.left = left + r * ROWS * (ACROSS ? 1 : p.left_ld);
      p.depth = seen[r];
      if (p.depth) TILES[n - 1](p, column);
    }
    column += n * W;
  }
}

}  // namespace
