// Products of packed pairs of bfloat16 on the matrix registers of AMX, 16 rows of 64 bytes each.
//
// With VIDATTN_AMX a register multiplies 16 rows by 16 columns over 32 numbers at once. The packed
// forms are those of pairs: rows as they are on the left, two rows to a word on the right.

#pragma once

#include "numbers.h"

namespace {

#if VIDATTN_AMX
constexpr bool AMX = true;
#else
constexpr bool AMX = false;
#endif
constexpr int SIDE = 16;  // rows of a matrix register, and words of a row

// While it lives, the matrix registers of this thread are whole; they are given back after it.
struct MatrixRegisters {
#if VIDATTN_AMX
  MatrixRegisters() {
    struct alignas(64) {
      u8 palette = 1, start_row = 0, reserved[14] = {};
      u16 bytes[16] = {};
      u8 rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 4 * SIDE, config.rows[i] = SIDE;
    _tile_loadconfig(&config);
  }
  ~MatrixRegisters() { _tile_release(); }
#else
  MatrixRegisters() {}
#endif
  MatrixRegisters(const MatrixRegisters&) = delete;
  MatrixRegisters& operator=(const MatrixRegisters&) = delete;
};

// The left side of a product: SIDE rows, and a right side with a row for every word of them.
struct Sides {
  const float* left;
  i64 left_ld;
  const float* right;
  i64 right_ld;
};

#if VIDATTN_AMX
#define VIDATTN_ADD_COLUMN(n, b)                                             \
  if (count > n) {                                                           \
    _tile_loadd(b, right + columns[n] * SIDE, x.right_ld * 4);               \
    _tile_dpbf16ps(n, 4, b);                                                 \
  }

// Adds the product over the steps of 32 numbers in `steps` to registers 0 to count - 1.
INLINE void add_columns(const Sides& x, u64 steps, const u8* columns, int count) {
  // the compiler does not know that registers are loaded from memory
  asm volatile("" ::: "memory");
  for (; steps; steps &= steps - 1) {
    i64 step = __builtin_ctzll(steps) * SIDE;
    const float* right = x.right + step * x.right_ld;
    _tile_loadd(4, x.left + step, x.left_ld * 4);
    VIDATTN_ADD_COLUMN(0, 5)
    VIDATTN_ADD_COLUMN(1, 6)
    VIDATTN_ADD_COLUMN(2, 7)
    VIDATTN_ADD_COLUMN(3, 5)
  }
}

// to = the product, where up to four vectors of columns are listed.
INLINE void multiply_sides(const Sides& x, u64 steps, const u8* columns, int count, float* to,
                           i64 to_ld) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  add_columns(x, steps, columns, count);
  _tile_stored(0, to + columns[0] * SIDE, to_ld * 4);
  if (count > 1) _tile_stored(1, to + columns[1] * SIDE, to_ld * 4);
  if (count > 2) _tile_stored(2, to + columns[2] * SIDE, to_ld * 4);
  if (count > 3) _tile_stored(3, to + columns[3] * SIDE, to_ld * 4);
}

// to += the product, for `width` columns, a multiple of 2 SIDE.
INLINE void add_sides(Sides x, u64 steps, i64 width, float* to) {
  static constexpr u8 COLUMNS[] = {0, 1, 2, 3};
  asm volatile("" ::: "memory");
  for (i64 column = 0; column < width; column += 4 * SIDE) {
    int count = width - column < 4 * SIDE ? 2 : 4;
    float* at = to + column;
    _tile_loadd(0, at, width * 4);
    _tile_loadd(1, at + SIDE, width * 4);
    if (count > 2) _tile_loadd(2, at + 2 * SIDE, width * 4);
    if (count > 2) _tile_loadd(3, at + 3 * SIDE, width * 4);
    add_columns(x, steps, COLUMNS, count);
    _tile_stored(0, at, width * 4);
    _tile_stored(1, at + SIDE, width * 4);
    if (count > 2) _tile_stored(2, at + 2 * SIDE, width * 4);
    if (count > 2) _tile_stored(3, at + 3 * SIDE, width * 4);
    x.right += 4 * SIDE;
  }
}
#undef VIDATTN_ADD_COLUMN
#else
INLINE void multiply_sides(const Sides&, u64, const u8*, int, float*, i64) {}
INLINE void add_sides(Sides, u64, i64, float*) {}
#endif

// Vectors of 16 slots are multiplied two at a time: sets of vectors, in whole pairs, and in steps.
INLINE u32 in_pairs(u32 vectors) { return ((vectors | vectors >> 1) & 5) * 3; }
INLINE u64 in_steps(u32 vectors) {
  u32 pairs = (vectors | vectors >> 1) & 5;
  return (pairs | pairs >> 1) & 3;
}

}  // namespace
