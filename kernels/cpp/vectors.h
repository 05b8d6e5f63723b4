// Vectors of floats that a register holds: what the engines for a CPU have in common.
//
// Compiled for one instruction set, of vectors of VIDATTN_WIDTH floats: 16 with AVX-512, 8 with
// AVX2, 4 with any.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if VIDATTN_WIDTH > 4
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

typedef int32_t i32;
typedef int64_t i64;
typedef uint32_t u32;

constexpr int W = VIDATTN_WIDTH;         // floats to a vector
constexpr int ROWS = 4;                  // rows of a register tile
constexpr int TILE = W == 16 ? 4 : 3;    // vectors to a row of the widest register tile
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
constexpr float LEAST = -100;            // log2 of the least weight: products stay normal

inline i64 round_up(i64 x, i64 step) { return (x + step - 1) / step * step; }

typedef float V __attribute__((vector_size(4 * W)));
typedef i32 I __attribute__((vector_size(4 * W)));
typedef u32 U __attribute__((vector_size(4 * W)));

INLINE V load(const float* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE void store(float* to, V x) { std::memcpy(to, &x, sizeof x); }

#if defined(__clang__) || __GNUC__ >= 12
#define VIDATTN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VIDATTN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

#if VIDATTN_WIDTH == 16
INLINE V splat(float x) { return (V)_mm512_set1_ps(x); }
INLINE V larger(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE float sum_of(V x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float largest_of(V x) { return _mm512_reduce_max_ps((__m512)x); }
INLINE V zip_low(V a, V b) {
  return VIDATTN_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
INLINE V zip_high(V a, V b) {
  return VIDATTN_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif VIDATTN_WIDTH == 8
INLINE V splat(float x) { return (V)_mm256_set1_ps(x); }
INLINE V larger(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE float sum_of(V x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float largest_of(V x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
INLINE V zip_low(V a, V b) { return VIDATTN_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
INLINE V zip_high(V a, V b) { return VIDATTN_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
INLINE V splat(float x) { return V{x, x, x, x}; }
INLINE V larger(V a, V b) { return a > b ? a : b; }
INLINE float sum_of(V x) { return (x[0] + x[1]) + (x[2] + x[3]); }
INLINE float largest_of(V x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }
INLINE V zip_low(V a, V b) { return VIDATTN_SHUFFLE(a, b, 0, 4, 1, 5); }
INLINE V zip_high(V a, V b) { return VIDATTN_SHUFFLE(a, b, 2, 6, 3, 7); }
#endif

// (rows, columns) to (columns, rows), both multiples of a vector.
void transpose(const float* from, i64 rows, i64 columns, float* to) {
  for (i64 r = 0; r < rows; r += W)
    for (i64 c = 0; c < columns; c += W) {
      V x[W], y[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) x[i] = load(from + (r + i) * columns + c);
      // a shuffle of all rows, done once for every bit of a row's number, swaps rows and columns
      for (int step = 1; step < W; step *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < W / 2; i++) {
          y[2 * i] = zip_low(x[i], x[i + W / 2]);
          y[2 * i + 1] = zip_high(x[i], x[i + W / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = y[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) store(to + (c + i) * rows + r, x[i]);
    }
}

}  // namespace
