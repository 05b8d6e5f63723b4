// Packed rows of tokens, and products of them on tiles of registers.
//
// The letters are those of block_sparse_cpu.cpp.

#pragma once

#include <algorithm>
#include <cstring>

#include "block_sparse_call.h"

namespace {

// A piece among those of the query heads, and among those of the units, which have keys.
inline i64 query_piece_at(const Job& j, i64 head, i64 block, i64 piece) {
  return (head * j.nb + block) * j.pieces + piece;
}

inline i64 key_piece_at(const Job& j, i64 unit, i64 block, i64 piece) {
  return (unit * j.nb_k + block) * j.pieces + piece;
}

// One token as packed numbers, 0 for no token; floats are multiplied by `factor`, pairs are not.
void load_row(const Job& j, const Rows& x, i64 sample, i64 head, i64 token, float factor,
              float* to) {
  const char* from = token < 0 ? nullptr : x.at(sample, head, token, j.call.kind);
  load_row(from, j.call.kind, j.call.D, j.words, factor, to);
}

void store_row(const Job& j, const Rows& x, i64 sample, i64 head, i64 token, const float* from,
               float factor) {
  store_row(from, factor, j.call.kind, j.call.D, x.at(sample, head, token, j.call.kind));
}

// The rows of one piece, (ld, words), of the tokens that begin in `order`; zeros in slots that
// `readable` lacks.
void load_piece(const Job& j, const Rows& x, i64 sample, i64 head, const i32* order, u64 readable,
                float factor, float* to) {
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
  i64 unit = task / j.nb_k, block = task % j.nb_k;
  Head h = j.head(unit * j.group);
  for (i64 piece = 0; piece < j.pieces; piece++) {
    i64 at = key_piece_at(j, unit, block, piece) * j.ld * j.words;
    u64 readable = j.readable_keys(h.sample, block, piece);
    const i32* order = j.call.key_order + block * j.call.n + piece * PIECE;
    float* values = j.values.data + at;
    load_piece(j, j.call.k, h.sample, h.key, order, readable, 1, s.keys);
    transpose(s.keys, j.ld, j.words, j.keys.data + at);
    load_piece(j, j.call.v, h.sample, h.key, order, readable, 1, PAIRS ? s.keys : values);
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
