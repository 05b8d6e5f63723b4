// Numbers as tensors and registers hold them: conversions, products, powers of two.
//
// VIDATTN_PAIRS says that a word of 4 bytes holds a pair of bfloat16, which are multiplied two at a
// time; else it holds one float.

#pragma once

#include <cmath>
#include <cstring>

#include "vectors.h"

namespace {

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint64_t u64;

enum Kind { FLOAT32, BFLOAT16, FLOAT16 };

constexpr bool PAIRS = VIDATTN_PAIRS;
constexpr int PAIR = PAIRS ? 2 : 1;      // numbers to a word
constexpr int GRANULE = 16;              // padding rounds up to so many: the widest vector
constexpr float LOWEST = -1e30f;         // maximum of a row that has seen no key
constexpr float NEVER = 1e30f;           // log-sum-exp of a row that gets no weights
constexpr float SLACK = 8;               // weights may reach 2 ** SLACK before the maximum moves

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

}  // namespace
