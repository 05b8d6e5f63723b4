// Attention of the query blocks of one head: which pairs are seen, weights, sums.
//
// The letters are those of block_sparse_cpu.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "block_sparse_products.h"

namespace {

// The bits of a mask table: queries by keys.
void table_bits(const Call& c, i64 mask, i64 query, int queries, i64 key, int keys, u64* bits) {
  for (int r = 0; r < queries; r++) {
    const u8* seen = c.masks + (mask * c.n + query + r) * c.n + key;
    bits[r] = 0;
    for (int i = 0; i < keys; i++) bits[r] |= u64(seen[i] != 0) << i;
  }
}

void transpose_bits(u64* bits) {
  u64 low = 0xffffffffull;
  for (int half = 32; half; half /= 2, low ^= low << half)
    for (int i = 0; i < PIECE; i++) {
      if (i & half) continue;
      u64 swapped = (bits[i] >> half ^ bits[i + half]) & low;
      bits[i + half] ^= swapped;
      bits[i] ^= swapped << half;
    }
}

// The bits of the box: queries by keys, or keys by queries with BY_KEY; up to a piece of each.
template <bool BY_KEY>
void box_bits(const Call& c, i64 query_slot, int queries, i64 key_slot, int keys, u64* bits) {
  alignas(64) i32 low[PIECE] = {}, high[PIECE] = {}, key[PIECE] = {};
  std::memcpy(low, c.box_low + query_slot, queries * 4);
  std::memcpy(high, c.box_high + query_slot, queries * 4);
  std::memcpy(key, c.box_key + key_slot, keys * 4);
  const U guard = U{} + u32(c.guard);
  int rows = BY_KEY ? keys : queries, columns = BY_KEY ? queries : keys;
  for (int r = 0; r < rows; r++) {
    u64 seen = 0;
    for (int i = 0; i < columns; i += W) {
      U place = BY_KEY ? U{} + u32(key[r]) : load(key + i);
      U first = BY_KEY ? load(low + i) : U{} + u32(low[r]);
      U last = BY_KEY ? load(high + i) : U{} + u32(high[r]);
      seen |= u64(bits_of_equal((place - first) & (last - place) & guard, guard)) << i;
    }
    bits[r] = seen;
  }
}

// The bits of every partial block of a row: (partial blocks, pieces, rows).
void fill_bits(const Job& j, i64 row, Scratch& s) {
  const Call& c = j.call;
  i64 rows = round_up(c.n, ROWS), block = row % j.nb;
  u64* bits = s.bits.data();
  for (i64 e = c.row_start[row] + c.num_full[row]; e < c.row_start[row + 1]; e++)
    for (i64 piece = 0; piece < j.pieces; piece++, bits += rows) {
      i64 key = piece * PIECE;
      for (i64 query = 0; query < c.n; query += PIECE) {
        int queries = j.piece_slots(query / PIECE), keys = j.piece_slots(piece);
        if (c.box_key)
          box_bits<false>(c, block * c.n + query, queries, c.key_block[e] * c.n + key, keys,
                          bits + query);
        else
          table_bits(c, c.mask_id[e], query, queries, key, keys, bits + query);
      }
      std::fill(bits + c.n, bits + rows, 0);
    }
}

// ROWS queries against part of a piece of keys.
struct Strip {
  const float* queries;
  const float* keys;
  i64 words, ld, depth;
  const float* bias;
  float scale;
  u64 bits[ROWS];
  float *scores, *weights, *tops, *sums, *out;
  i64 width;
};

// Moves the maximum of row m up to the largest score, and what was made so far with it: the sums,
// and the weights before vector `first`, which are not summed yet.
__attribute__((noinline)) void raise_top(const Strip& s, int m, V scores, int first) {
  float top = s.tops[m];
  for (int i = 0; i < W; i++) top = scores[i] > top ? scores[i] : top;
  V fade = exp2(splat(s.tops[m] - top));
  s.tops[m] = top;
  store(s.sums + m * GRANULE, load(s.sums + m * GRANULE) * fade);
  float* weights = s.weights + m * PIECE_WORDS;
  // one tile is all of a row otherwise
  for (int i = 0; TILE < VECTORS && i < first; i++)
    store(weights + i * W, load(weights + i * W) * fade);
  for (i64 d = 0; d < s.width; d += W)
    store(s.out + m * s.width + d, load(s.out + m * s.width + d) * fade);
}

// Weights of N vectors of keys, and their sums.
template <int N, bool MASKED>
void weigh(const Strip& s, const u8* vectors) {
  V acc[ROWS][N];
  int at[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) at[n] = vectors[n];
  if (AMX) {
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[m][n] = load(s.scores + m * PIECE + at[n] * W);
  } else {
    scores<N>(acc, s.queries, s.words, s.keys, s.ld, s.depth, vectors);
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    V highest = splat(-INFINITY);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      V& score = acc[m][n];
      if (PAIRS) score *= s.scale;
      if (s.bias) score += load(s.bias + at[n] * W);
      if (MASKED) score = hide(score, u32(s.bits[m] >> at[n] * W));
      highest = larger(highest, score);
    }
    if (__builtin_expect(any_above(highest, splat(s.tops[m] + SLACK)), 0))
      raise_top(s, m, highest, at[0]);
    V top = splat(s.tops[m]), sum = load(s.sums + m * GRANULE);
    float* weights = s.weights + m * PIECE_WORDS;
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      V weight = exp2<MASKED>(acc[m][n] - top);
      sum += weight;
      store_packed(weights + at[n] * VECTOR_WORDS, weight);
    }
    store(s.sums + m * GRANULE, sum);
  }
}

template <bool MASKED>
INLINE void weigh_tile(const Strip& s, const u8* vectors, int count) {
  static constexpr void (*TILES[])(const Strip&, const u8*) = {
      weigh<1, MASKED>, weigh<2, MASKED>, weigh<3, MASKED>, weigh<TILE, MASKED>};
  TILES[count - 1](s, vectors);
}

// Weights of 0 for vectors of keys that none of its rows sees.
INLINE void clear_weights(const Strip& s, Set unseen) {
  const List list(unseen);
  for (int i = 0; i < list.count; i++)
    for (int m = 0; m < ROWS; m++)
      store_packed(s.weights + m * PIECE_WORDS + list.vector[i] * VECTOR_WORDS, V{});
}

// The bias of the keys of a piece, base 2; keys whose bias is minus infinity leave `readable`.
const float* load_bias(const Job& j, const Head& h, i64 block, i64 piece, float* to,
                       u64& readable) {
  const float* bias = j.bias(h);
  if (!bias) return nullptr;
  const i32* order = j.call.key_order + block * j.call.n + piece * PIECE;
  for (int i = 0; i < j.ld; i++) {
    to[i] = readable >> i & 1 ? bias[order[i]] * LOG2E : 0;
    if (to[i] == -INFINITY) readable &= ~(1ull << i), to[i] = 0;
  }
  return to;
}

INLINE u64 low_bits(int count) { return count == 64 ? ~0ull : (1ull << count) - 1; }

// Asks for a share of packed memory that is needed soon.
INLINE void fetch(const float* from, i64 words, i64 share, i64 shares) {
  i64 lines = words / GRANULE;
  for (i64 i = lines * share / shares; i < lines * (share + 1) / shares; i++)
    __builtin_prefetch(from + i * GRANULE, 0, 2);
}

// The steps of 32 numbers in a row.
INLINE u64 whole_steps(const Job& j) { return low_bits(int(j.words / SIDE)); }

// `next` is where the next piece begins in the packed keys and values.
void attend_piece(const Job& j, const Head& h, i64 block, i64 piece, i64 next, const u64* bits,
                  Scratch& s) {
  const Call& c = j.call;
  u64 readable = j.readable_keys(h.sample, block, piece);
  const float* bias = load_bias(j, h, block, piece, s.key_bias, readable);
  if (!readable) return;
  u64 padded = low_bits(int(round_up(j.piece_slots(piece), GRANULE)));
  bool masked = bits || readable != padded;
  i64 strips = round_up(c.n, ROWS) / ROWS;
  i64 at = key_piece_at(j, h.index / j.group, block, piece) * j.ld * j.words;
  Strip strip{nullptr, j.keys.data + at, j.words, j.ld, depth_of(j), bias, float(c.scale) * LOG2E,
              {}, nullptr, nullptr, nullptr, nullptr, nullptr, j.width};
  auto visit = [&](i64 r) {
    strip.queries = s.rows + r * ROWS * j.words;
    strip.scores = s.scores + r * ROWS % GROUP * PIECE;
    strip.weights = s.weights + r * ROWS * PIECE_WORDS;
    strip.tops = s.tops + r * ROWS;
    strip.sums = s.sums + r * ROWS * GRANULE;
    strip.out = s.out + r * ROWS * j.width;
  };
  auto fetch_next = [&](i64 r) {
    fetch(j.keys.data + next, j.ld * j.words, r, strips);
    fetch(j.values.data + next, j.ld * j.words, r, strips);
  };
  auto look = [&](i64 r) {
    s.seen[r] = vectors_of(padded);
    if (!masked) return;
    u64 any = 0;
    for (int m = 0; m < ROWS; m++)
      any |= strip.bits[m] = bits ? bits[r * ROWS + m] & readable : readable;
    s.seen[r] = vectors_of(any);
  };
  auto weigh_seen = [&](i64 r) {
    visit(r);
    const List list(s.seen[r]);
    for (int i = 0, n; i < list.count; i += n)
      weigh_tile<true>(strip, list.vector + i, n = next_tile(list.count - i));
  };
  for (i64 first = 0; AMX && first < strips; first += GROUP / ROWS) {
    i64 end = std::min<i64>(strips, first + GROUP / ROWS);
    Set any = 0;
    for (i64 r = first; r < end; r++) look(r), fetch_next(r), any |= s.seen[r];
    if (!any) continue;
    float* weights = s.weights + first * ROWS * PIECE_WORDS;
    Sides scores{s.rows + first * ROWS * j.words, j.words, j.keys.data + at, j.ld};
    const List list(any);
    multiply_sides(scores, whole_steps(j), list.vector, list.count, s.scores, PIECE);
    for (i64 r = first; r < end; r++) {
      visit(r);
      clear_weights(strip, in_pairs(any) & ~s.seen[r]);
      if (masked) {
        look(r), weigh_seen(r);
      } else {
        weigh_tile<false>(strip, list.vector, list.count);
      }
    }
    Sides sums{weights, PIECE_WORDS, j.values.data + at, j.width};
    add_sides(sums, in_steps(any), j.width, s.out + first * ROWS * j.width);
  }
  if (AMX) return;
  for (i64 r = 0; r < strips; r++) {
    fetch_next(r);
    look(r);
    if (masked) weigh_seen(r);
  }
  // a tile's keys stay close while all rows pass
  const List whole(masked ? 0 : vectors_of(padded));
  for (int i = 0, n; i < whole.count; i += n) {
    n = next_tile(whole.count - i);
    for (i64 r = 0; r < strips; r++) visit(r), weigh_tile<false>(strip, whole.vector + i, n);
  }
  Product p{s.out, j.width, s.weights, PIECE_WORDS, j.values.data + at, j.width, 0};
  add_products<false>(p, j.width, strips, s.seen.data());
}

void attend_block(const Job& j, const Head& h, i64 block, Scratch& s) {
  const Call& c = j.call;
  i64 rows = round_up(c.n, ROWS), row = h.set * j.nb + block;
  const i32* order = c.order + block * c.n;
  for (i64 r = 0; r < rows; r++)
    load_row(j, c.q, h.sample, h.query, r < c.n ? order[r] : -1, packed_factor(j),
             s.rows + r * j.words);
  std::memset(s.out, 0, rows * j.width * 4);
  std::memset(s.sums, 0, rows * GRANULE * 4);
  std::fill(s.tops, s.tops + rows, LOWEST);
  const u64* bits = s.bits.data();
  i64 unit = h.index / j.group, begin = c.row_start[row], end = c.row_start[row + 1];
  i64 whole = begin + c.num_full[row];
  for (i64 e = begin; e < end; e++)
    for (i64 piece = 0; piece < j.pieces; piece++) {
      bool is_last = piece + 1 == j.pieces;
      i64 after = c.key_block[is_last && e + 1 < end ? e + 1 : e];
      i64 next = key_piece_at(j, unit, after, is_last ? 0 : piece + 1) * j.ld * j.words;
      attend_piece(j, h, c.key_block[e], piece, next, e < whole ? nullptr : bits, s);
      if (e >= whole) bits += rows;
    }
  for (i64 r = 0; r < c.n; r++) {
    if (order[r] < 0) continue;
    float sum = sum_of(load(s.sums + r * GRANULE));
    bool blind = sum == 0;
    float factor = blind ? 0 : 1 / sum;
    store_row(j, c.out, h.sample, h.query, order[r], s.out + r * j.width, factor);
    c.lse[j.token_row(h) + order[r]] = blind ? -INFINITY : (s.tops[r] + std::log2(sum)) * LN2;
  }
}

void attend(const Job& j, i64 task, Scratch& s) {
  const MatrixRegisters registers;
  i64 block = task % j.nb, begin = task / j.nb * j.heads_per_task, known = -1;
  i64 end = std::min(begin + j.heads_per_task, j.num_units * j.group);
  for (i64 index = begin; index < end; index++) {
    Head h = j.head(index);
    if (h.set != known) fill_bits(j, h.set * j.nb + block, s);
    known = h.set;
    attend_block(j, h, block, s);
  }
}

}  // namespace
