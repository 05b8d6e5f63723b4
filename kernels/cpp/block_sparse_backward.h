// Gradients of queries, keys and values, block of keys by block of keys.
//
// The letters are those of block_sparse_cpu.cpp.

#pragma once

#include <algorithm>
#include <cstring>

#include "block_sparse_forward.h"

namespace {

// One head of queries as both sides of the products of the gradient: rows, and rows transposed.
void pack_both(const Job& j, const Rows& x, const Head& h, i64 block, i64 piece, float factor,
               float* rows, float* across, float* space) {
  float* loaded = PAIRS ? space : rows;
  u64 all = low_bits(j.piece_slots(piece));
  const i32* order = j.call.order + block * j.call.n + piece * PIECE;
  load_piece(j, x, h.sample, h.query, order, all, factor, loaded);
  transpose(loaded, j.ld, j.words, across);
  if (PAIRS) pack_pairs(j, loaded, rows);
}

void pack_queries(const Job& j, i64 task, Scratch& s) {
  const Call& c = j.call;
  i64 index = task / j.nb, block = task % j.nb;
  Head h = j.head(index);
  for (i64 piece = 0; piece < j.pieces; piece++) {
    i64 place = query_piece_at(j, index, block, piece) * j.ld, at = place * j.words;
    pack_both(j, c.q, h, block, piece, packed_factor(j), j.queries.data + at,
              j.queries_t.data + at, s.rows);
    pack_both(j, c.d_out, h, block, piece, 1, j.pulls.data + at, j.pulls_t.data + at, s.rows);
    const i32* order = c.order + block * c.n + piece * PIECE;
    for (i64 i = 0; i < j.ld; i++) {
      i64 token = i < j.piece_slots(piece) ? order[i] : -1;
      float lse = token < 0 ? -INFINITY : c.lse[j.token_row(h) + token];
      j.lse2.data[place + i] = lse == -INFINITY ? NEVER : lse * LOG2E;
      j.delta.data[place + i] = token < 0 ? 0 : c.delta[j.token_row(h) + token];
    }
  }
  i64 floats = j.slots * j.width, heads = j.num_units * j.group;
  for (i64 part = 0; part < j.parts; part++)
    std::memset(j.d_q.data + ((part * heads + index) * j.nb + block) * floats, 0, floats * 4);
}

// A piece of keys against a piece of queries.
struct Pull {
  const float *keys, *values, *key_pairs, *queries, *queries_t, *pulls, *pulls_t, *lse2, *delta;
  const float* bias;
  float *d_keys, *d_values, *d_q, *d_bias;
  const u64* bits;  // for each key its queries, or null where all see each other
  int num_keys, num_queries;  // padded
  Set queries_seen;           // where no bits hide any
  i64 words, width, ld, depth;
  float scale;
};

// Products of ROWS rows from row r on with N vectors of columns; AMX has made them before.
template <int N>
INLINE void scores_of(V (&acc)[ROWS][N], const Pull& p, const Scratch& s, const float* rows,
                      const float* columns, int r, const u8* vectors) {
  if (!AMX) return scores<N>(acc, rows + r * p.words, p.words, columns, p.ld, p.depth, vectors);
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[m][n] = load(s.scores + (r + m) * PIECE + vectors[n] * W);
}

// Weights of ROWS keys from row r on, for N vectors of queries.
template <int N, bool MASKED>
void weigh_keys(const Pull& p, const Scratch& s, int r, const u8* vectors) {
  V acc[ROWS][N];
  scores_of<N>(acc, p, s, p.keys, p.queries_t, r, vectors);
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    V bias = splat(p.bias ? p.bias[r + m] : 0);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      V score = acc[m][n];
      if (PAIRS) score *= p.scale;
      if (MASKED) score = hide(score, u32(p.bits[r + m] >> vectors[n] * W));
      V weight = exp2<MASKED>(score + bias - load(p.lse2 + vectors[n] * W));
      store(s.exact + (r + m) * PIECE + vectors[n] * W, weight);
      if (PAIRS)
        store_packed(s.weights + (r + m) * PIECE_WORDS + vectors[n] * VECTOR_WORDS, weight);
    }
  }
}

// Gradients of the scores whose weights are known.
template <int N>
void pull_scores(const Pull& p, const Scratch& s, int r, const u8* vectors) {
  V acc[ROWS][N];
  scores_of<N>(acc, p, s, p.values, p.pulls_t, r, vectors);
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++) {
    V total = {};
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      V weight = load(s.exact + (r + m) * PIECE + vectors[n] * W);
      acc[m][n] = weight * (acc[m][n] - load(p.delta + vectors[n] * W));
      total += acc[m][n];
      store_packed(s.d_scores + (r + m) * PIECE_WORDS + vectors[n] * VECTOR_WORDS, acc[m][n]);
    }
    if (p.d_bias) p.d_bias[r + m] += sum_of(total);
  }
#if VIDATTN_PAIRS
  for (int m = 0; m < ROWS; m += 2)
    for (int n = 0; n < N; n++) {
      __m256bh even = _mm512_cvtneps_pbh((__m512)acc[m][n]);
      __m256bh odd = _mm512_cvtneps_pbh((__m512)acc[m + 1][n]);
      __m512i low = _mm512_cvtepu16_epi32((__m256i)even);
      __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)odd), 16);
      store(s.d_pairs + (r + m) / 2 * PIECE + vectors[n] * W, (V)_mm512_or_si512(low, high));
    }
#endif
}

typedef void (*Tile)(const Pull&, const Scratch&, int, const u8*);

// Calls tiles of 1 to 4 vectors on what each strip of keys sees.
void run_tiles(const Pull& p, const Scratch& s, const Tile (&tiles)[4]) {
  for (int r = 0; r < p.num_keys && p.bits; r += ROWS) {
    const List list(s.seen[r / ROWS]);
    for (int i = 0, n; i < list.count; i += n) {
      n = next_tile(list.count - i);
      tiles[n - 1](p, s, r, list.vector + i);
    }
  }
  // a tile's queries stay close while all keys pass
  const List whole(p.bits ? 0 : p.queries_seen);
  for (int i = 0, n; i < whole.count; i += n) {
    n = next_tile(whole.count - i);
    for (int r = 0; r < p.num_keys; r += ROWS) tiles[n - 1](p, s, r, whole.vector + i);
  }
}

// Zeros where hidden score gradients would be read across rows, or by AMX, which skips no vector.
void clear_unseen(const Scratch& s, int r, Set unseen) {
  const List list(unseen);
  for (int m = 0; AMX && m < ROWS; m++)
    for (int i = 0; i < list.count; i++)
      for (float* pairs : {s.weights, s.d_scores})
        store_packed(pairs + (r + m) * PIECE_WORDS + list.vector[i] * VECTOR_WORDS, V{});
  for (int m = 0; m < ROWS; m += PAIR)
    for (int i = 0; i < list.count; i++)
      store((PAIRS ? s.d_pairs : s.d_scores) + (r + m) / PAIR * PIECE + list.vector[i] * W, V{});
}

// On matrix registers: the products of all rows with the queries, (keys, PIECE).
void multiply_rows(const Pull& p, const Scratch& s, const float* rows, const float* columns) {
  const List list(p.queries_seen);
  for (int r = 0; r < p.num_keys; r += SIDE) {
    Sides sides{rows + r * p.words, p.words, columns, p.ld};
    multiply_sides(sides, low_bits(int(p.words / SIDE)), list.vector, list.count,
                   s.scores + r * PIECE, PIECE);
  }
}

// On matrix registers: rows += (rows, PIECE) pairs times what the queries, or keys, have.
void add_rows(const float* pairs, const float* right, i64 width, int num_rows, u64 steps,
              float* to) {
  for (int r = 0; r < num_rows; r += SIDE)
    add_sides({pairs + r * PIECE_WORDS, PIECE_WORDS, right, width}, steps, width, to + r * width);
}

// On matrix registers: the gradients, once weights and score gradients are known.
void pull_rows(const Pull& p, const Scratch& s) {
  u64 steps = in_steps(p.queries_seen);
  add_rows(s.weights, p.pulls, p.width, p.num_keys, steps, p.d_values);
  add_rows(s.d_scores, p.queries, p.width, p.num_keys, steps, p.d_keys);
  // keys are multiplied 32 at a time
  int rows = int(round_up(p.num_keys, 2 * SIDE));
  for (int r = p.num_keys; r < rows; r += ROWS) clear_unseen(s, r, low_bits(VECTORS));
  transpose(s.d_pairs, PIECE / 2, PIECE, s.across);
  add_rows(s.across, p.key_pairs, p.width, p.num_queries, low_bits(rows / (2 * SIDE)), p.d_q);
}

// What the queries of a piece gain: each strip sums over the vectors of keys that any of it sees.
void pull_queries(const Pull& p, const Scratch& s) {
  u64 columns[VECTORS] = {};
  Set seen[PIECE / ROWS] = {};
  for (int r = 0; r < p.num_keys; r++) columns[r / W] |= p.bits ? p.bits[r] : ~0ull;
  for (int q = 0; q < p.num_queries; q += ROWS)
    for (int n = 0; n < VECTORS; n++)
      seen[q / ROWS] |= Set((columns[n] >> q & low_bits(ROWS)) != 0) << n;
  Product d_q{p.d_q, p.width, PAIRS ? s.d_pairs : s.d_scores, PIECE, p.key_pairs, p.width, 0};
  add_products<true>(d_q, p.width, p.num_queries / ROWS, seen);
}

void pull_pair(const Pull& p, Scratch& s) {
  static constexpr Tile PULL[] = {pull_scores<1>, pull_scores<2>, pull_scores<3>,
                                  pull_scores<TILE>};
  static constexpr Tile WEIGH[] = {weigh_keys<1, false>, weigh_keys<2, false>,
                                   weigh_keys<3, false>, weigh_keys<TILE, false>};
  static constexpr Tile WEIGH_SEEN[] = {weigh_keys<1, true>, weigh_keys<2, true>,
                                        weigh_keys<3, true>, weigh_keys<TILE, true>};
  for (int r = 0; r < p.num_keys; r += ROWS) {
    Set& seen = s.seen[r / ROWS];
    seen = p.queries_seen;
    if (p.bits) seen &= vectors_of(p.bits[r] | p.bits[r + 1] | p.bits[r + 2] | p.bits[r + 3]);
    if (AMX || p.bits) clear_unseen(s, r, (AMX ? in_pairs(p.queries_seen) : p.queries_seen) & ~seen);
  }
  if (AMX) multiply_rows(p, s, p.keys, p.queries_t);
  run_tiles(p, s, p.bits ? WEIGH_SEEN : WEIGH);
  if (AMX) multiply_rows(p, s, p.values, p.pulls_t);
  run_tiles(p, s, PULL);
  if (AMX) return pull_rows(p, s);
  i64 strips = p.num_keys / ROWS;
  Product d_v{p.d_values, p.width, s.weights, PIECE_WORDS, p.pulls, p.width, 0};
  add_products<false>(d_v, p.width, strips, s.seen.data());
  Product d_k{p.d_keys, p.width, s.d_scores, PIECE_WORDS, p.queries, p.width, 0};
  add_products<false>(d_k, p.width, strips, s.seen.data());
  pull_queries(p, s);
}

// For each key of a piece the queries that read it; null where all do.
const u64* pair_bits(const Job& j, i64 mask, i64 block, i64 piece, i64 query, i64 query_piece,
                     u64 readable, u64* bits) {
  const Call& c = j.call;
  int keys = j.piece_slots(piece), queries = j.piece_slots(query_piece);
  i64 key_slot = piece * PIECE, query_slot = query_piece * PIECE;
  if (mask < 0) {
    int padded = int(round_up(keys, GRANULE));
    if (readable == low_bits(padded)) return nullptr;
    std::fill(bits, bits + PIECE, ~0ull);
  } else if (c.box_key) {
    box_bits<true>(c, query * c.n + query_slot, queries, block * c.n + key_slot, keys, bits);
  } else {
    std::fill(bits, bits + PIECE, 0);
    table_bits(c, mask, query_slot, queries, key_slot, keys, bits);
    transpose_bits(bits);
  }
  for (int i = 0; i < PIECE; i++)
    if (!(readable >> i & 1)) bits[i] = 0;
  return bits;
}

// Everything that one query head gives a block of keys.
void pull_head(const Job& j, const Head& h, i64 block, i64 part, Scratch& s) {
  const Call& c = j.call;
  const i64* start = &j.transposed.start[h.set * j.nb_k + block];
  i64 floats = j.ld * j.words, heads = j.num_units * j.group;
  for (i64 e = start[0]; e < start[1]; e++)
    for (i64 piece = 0; piece < j.pieces; piece++) {
      u64 readable = j.readable_keys(h.sample, block, piece);
      const float* bias = load_bias(j, h, block, piece, s.key_bias, readable);
      if (!readable) continue;
      i64 query = j.transposed.query[e];
      for (i64 other = 0; other < j.pieces; other++) {
        i64 at = query_piece_at(j, h.index, query, other);
        i64 d_q = (part * heads + h.index) * j.nb * j.pieces + query * j.pieces + other;
        const u64* bits = pair_bits(j, j.transposed.mask[e], block, piece, query, other, readable,
                                    s.bits.data());
        const float* key_pairs = PAIRS ? s.key_pairs : s.keys;
        int num_queries = int(round_up(j.piece_slots(other), GRANULE));
        Pull p{s.keys + piece * floats, s.values + piece * floats, key_pairs + piece * floats,
               j.queries.data + at * floats, j.queries_t.data + at * floats,
               j.pulls.data + at * floats, j.pulls_t.data + at * floats,
               j.lse2.data + at * j.ld, j.delta.data + at * j.ld, bias,
               s.d_keys + piece * j.ld * j.width, s.d_values + piece * j.ld * j.width,
               j.d_q.data + d_q * j.ld * j.width,
               c.d_bias ? s.d_bias + piece * j.ld : nullptr, bits,
               int(round_up(j.piece_slots(piece), GRANULE)), num_queries,
               vectors_of(low_bits(num_queries)), j.words, j.width, j.ld, depth_of(j),
               float(c.scale) * LOG2E};
        pull_pair(p, s);
      }
    }
}

void pull_block(const Job& j, i64 unit, i64 part, i64 block, Scratch& s) {
  const Call& c = j.call;
  Head h = j.head(unit * j.group);
  const i32* order = c.key_order + block * c.n;
  for (i64 piece = 0; piece < j.pieces; piece++) {
    u64 readable = j.readable_keys(h.sample, block, piece);
    i64 at = piece * j.ld * j.words;
    load_piece(j, c.k, h.sample, h.key, order + piece * PIECE, readable, 1, s.keys + at);
    load_piece(j, c.v, h.sample, h.key, order + piece * PIECE, readable, 1, s.values + at);
    if (PAIRS) pack_pairs(j, s.keys + at, s.key_pairs + at);
  }
  std::memset(s.d_keys, 0, j.slots * j.width * 4);
  std::memset(s.d_values, 0, j.slots * j.width * 4);
  for (i64 g = 0; g < j.group; g++) {
    Head head = j.head(unit * j.group + g);
    std::fill(s.d_bias, s.d_bias + j.slots, 0.0f);
    pull_head(j, head, block, part, s);
    for (i64 i = 0; i < c.n && c.d_bias; i++)
      if (order[i] >= 0) c.d_bias[j.key_row(head) + order[i]] = s.d_bias[i];
  }
  // packed queries carry the scale, and the base of the softmax
  float factor = PAIRS ? float(c.scale) : LN2;
  for (i64 i = 0; i < c.n; i++) {
    if (order[i] < 0) continue;
    store_row(j, c.d_k, h.sample, h.key, order[i], s.d_keys + i * j.width, factor);
    store_row(j, c.d_v, h.sample, h.key, order[i], s.d_values + i * j.width, 1);
  }
}

void pull(const Job& j, i64 task, Scratch& s) {
  const MatrixRegisters registers;
  i64 unit = task / j.parts, part = task % j.parts;
  const i64* start = &j.part_start[unit * (j.parts + 1) + part];
  for (i64 block = start[0]; block < start[1]; block++) pull_block(j, unit, part, block, s);
}

void put_d_q(const Job& j, i64 task, Scratch& s) {
  const Call& c = j.call;
  i64 index = task / j.nb, block = task % j.nb, heads = j.num_units * j.group;
  Head h = j.head(index);
  for (i64 i = 0; i < c.n; i++) {
    i64 token = c.order[block * c.n + i];
    if (token < 0) continue;
    for (i64 d = 0; d < j.width; d += W) {
      V total = {};
      for (i64 part = 0; part < j.parts; part++) {
        i64 row = ((part * heads + index) * j.nb + block) * j.slots + i;
        total += load(j.d_q.data + row * j.width + d);
      }
      store(s.line + d, total);
    }
    store_row(j, c.d_q, h.sample, h.query, token, s.line, float(c.scale));
  }
}

}  // namespace
