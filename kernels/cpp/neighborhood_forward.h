// Attention of one tile of queries: scores of a piece of keys, weights, sums of values.
//
// The letters are those of neighborhood_cpu.cpp.

#pragma once

#include "neighborhood_call.h"

namespace {

// What one thread works in; the arrays lie in one buffer.
struct Scratch {
  Buffer memory;
  Tile tile;
  i64 place[MOST + KEYS];            // of each key of a piece
  u32 bits[MOST + KEYS];             // the lanes that read it
  float *rows, *across, *out;        // (W, words) queries, (words, W), (W, width)
  float *weights;                    // (keys, W)
  // of the backward pass alone
  float *pulls, *pulls_across, *row_pairs, *pull_pairs;
  float *d_scores, *lane_weights, *lane_d_scores;
};

// The keys of a piece, one behind the other, up to whole KEYS of them.
void list_keys(const Job& j, const Head& h, const Tile& t, const Piece& p, Scratch& s) {
  bool is_text = !p.frame.length();
  u32 lanes = is_text ? t.live : t.seen[0][p.frame.begin - t.keys[0].begin];
  i64 i = 0;
  for (i64 line = p.lines.begin; line < p.lines.end; line++) {
    i64 place = p.begin + (line - p.lines.begin) * p.pitch;
    const u32* seen = is_text ? nullptr : &t.seen[2][p.columns.begin - t.keys[2].begin];
    u32 of_line = is_text ? lanes : lanes & t.seen[1][line - t.keys[1].begin];
    for (i64 n = 0; n < p.columns.length(); n++, i++) {
      s.place[i] = place + n;
      s.bits[i] = is_text ? of_line : of_line & seen[n];
      if (j.call.key_mask && !j.is_readable(h.sample, j.call.token[place + n])) s.bits[i] = 0;
    }
  }
  for (; i % KEYS; i++) s.place[i] = s.place[i - 1], s.bits[i] = 0;
}

// Calls put(i, products) with those of KEYS keys from `i` on and the queries of all lanes.
// Not inlined: what is around would take the registers of the loop.
template <typename Put>
__attribute__((noinline)) void multiply_keys(const Table& rows, const i64* place, i64 i,
                                             const float* across, i64 depth, const Put& put) {
  const float* key[KEYS];
  V acc[KEYS] = {};
#pragma GCC unroll 8
  for (int r = 0; r < KEYS; r++) key[r] = rows.data + place[i + r] * rows.ld;
  for (i64 d = 0; d < depth; d += STEP, across += STEP * W) {
    // one index for all keys: a pointer moved on for each would take the registers of others
    asm("" : "+r"(d));
#pragma GCC unroll 4
    for (int n = 0; n < STEP; n++) {
      V query = load(across + n * W);
#pragma GCC unroll 8
      for (int r = 0; r < KEYS; r++) acc[r] = fused(acc[r], query, splat(key[r][d + n]));
    }
  }
  put(i, acc);
}

// A group of lanes, and the part of a piece that it reads.
struct Sum {
  float* out;                // (GROUP, width)
  const float* weights;      // (lines, .., W)
  i64 line_weights, lines, columns;
  const float* right;
  i64 line_right, ld, width;
};

template <int N>
void add_sum(const Sum& x, i64 column) {
  V acc[GROUP][N];
#pragma GCC unroll 8
  for (int m = 0; m < GROUP; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[m][n] = load(x.out + m * x.width + column + n * W);
  for (i64 line = 0; line < x.lines; line++) {
    const float* weights = x.weights + line * x.line_weights;
    const float* right = x.right + line * x.line_right + column;
    for (i64 i = 0; i < x.columns; i += PAIR) {
      V b[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) b[n] = load(right + i * x.ld + n * W);
#pragma GCC unroll 8
      for (int m = 0; m < GROUP; m++) {
        V a = splat(weights[i * W + m]);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) acc[m][n] = fused(acc[m][n], a, b[n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < GROUP; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(x.out + m * x.width + column + n * W, acc[m][n]);
}

// Vectors in the next tile of registers, of those that remain.
INLINE i64 next_vectors(i64 rest) { return rest == TILE + 1 ? TILE - 1 : std::min<i64>(rest, TILE); }

// out += weights (of every lane and key of a piece) table, for the keys that each group reads.
void add_sums(const Job& j, const Tile& t, const Piece& p, const float* weights, const Table& table,
              float* out) {
  static constexpr void (*TILES[])(const Sum&, i64) = {add_sum<1>, add_sum<2>, add_sum<3>,
                                                       add_sum<TILE>};
  for (i64 column = 0; column < j.width;) {
    i64 n = next_vectors((j.width - column) / W);
    for (int g = 0; g < GROUPS; g++) {
      Range lines = p.lines, columns = p.columns;
      if (p.frame.length()) {
        if (!p.frame.within(t.of_group[g][0]).length()) continue;
        lines = lines.within(t.of_group[g][1]), columns = columns.within(t.of_group[g][2]);
      } else if (!(t.live >> g * GROUP & ((1u << GROUP) - 1))) {
        continue;
      }
      i64 line = lines.begin - p.lines.begin, first = columns.begin - p.columns.begin;
      i64 line_weights = p.columns.length() * W;
      Sum sum{out + g * GROUP * j.width, weights + line * line_weights + first * W + g * GROUP,
              line_weights, lines.length(), columns.length(),
              table.data + (p.begin + line * p.pitch + first) * table.ld, p.pitch * table.ld,
              table.ld, j.width};
      if (lines.length() && columns.length()) TILES[n - 1](sum, column);
    }
    column += n * W;
  }
}

#if VIDATTN_PAIRS
// A vector of numbers, and those of the key behind it, as pairs.
INLINE V paired(V x, V next) {
  __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
  __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)next));
  return (V)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

// In place: the numbers of keys as pairs with those of the next key of the same line, or zero.
void pair_keys(const Piece& p, float* numbers) {
#if VIDATTN_PAIRS
  i64 columns = p.columns.length();
  for (i64 i = 0; i < p.count(); i++) {
    V next = (i + 1) % columns ? load(numbers + (i + 1) * W) : V{};
    store(numbers + i * W, paired(load(numbers + i * W), next));
  }
#endif
}

// The rows of a tile, (W, words), and across, (words, W).
void load_tile(const Job& j, const Head& h, const Rows& x, float factor, const Tile& t, float* rows,
               float* across) {
  const Call& c = j.call;
  for (int lane = 0; lane < W; lane++) {
    i64 token = t.place[lane] < 0 ? -1 : c.token[t.place[lane]];
    load_row(token < 0 ? nullptr : x.at(h.sample, h.query, token, c.kind), c.kind, c.D, j.words,
             factor, rows + lane * j.words);
  }
  transpose(rows, W, j.words, across);
}

// Moves the maxima of all lanes up, and what was made with them: the sums, and the outputs.
__attribute__((noinline)) void raise_tops(const Job& j, V highest, V& tops, V& sums, float* out) {
  V higher = larger(tops, highest), fade = exp2(tops - higher);
  tops = higher;
  sums *= fade;
  for (int lane = 0; lane < W; lane++)
    for (i64 d = 0; d < j.width; d += W)
      store(out + lane * j.width + d, load(out + lane * j.width + d) * splat(fade[lane]));
}

void attend(const Job& j, i64 index, i64 tile, Scratch& s) {
  const Call& c = j.call;
  Head h = j.head(index);
  const Table keys = j.key_rows(index / j.group), values = j.value_sums(index / j.group);
  const float scale = float(c.scale) * LOG2E;
  Tile& t = s.tile;
  cut_tile(j, tile, t);
  load_tile(j, h, c.q, PAIRS ? 1 : scale, t, s.rows, s.across);
  std::memset(s.out, 0, W * j.width * 4);
  V tops = splat(LOWEST), sums = {};
  for_pieces(j, t, [&](const Piece& p) {
    list_keys(j, h, t, p, s);
    i64 count = p.count();
    V highest = splat(-INFINITY);
    auto put = [&](i64 i, const V(&products)[KEYS]) {
      V top = highest;
#pragma GCC unroll 8
      for (int r = 0; r < KEYS; r++) {
        V score = hide(PAIRS ? products[r] * splat(scale) : products[r], s.bits[i + r]);
        top = larger(top, score);
        store(s.weights + (i + r) * W, score);
      }
      highest = top;
    };
    for (i64 i = 0; i < count; i += KEYS)
      multiply_keys(keys, s.place, i, s.across, j.depth, put);
    if (__builtin_expect(any_above(highest, tops + splat(SLACK)), 0))
      raise_tops(j, highest, tops, sums, s.out);
    for (i64 i = 0; i < count; i++) {
      V weight = exp2<true>(load(s.weights + i * W) - tops);
      sums += weight;
      store(s.weights + i * W, weight);
    }
    pair_keys(p, s.weights);
    add_sums(j, t, p, s.weights, values, s.out);
  });
  for (int lane = 0; lane < W; lane++) {
    if (t.place[lane] < 0) continue;
    i64 token = c.token[t.place[lane]];
    bool blind = sums[lane] == 0;
    store_row(s.out + lane * j.width, blind ? 0 : 1 / sums[lane], c.kind, c.D,
              c.out.at(h.sample, h.query, token, c.kind));
    float lse = (tops[lane] + std::log2(sums[lane])) * LN2;
    c.lse[j.token_row(h) + token] = blind ? -INFINITY : lse;
  }
}

}  // namespace
