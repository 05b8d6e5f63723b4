// Gradients of a tile of queries, and what it adds to those of its keys and values.
//
// The letters are those of neighborhood_cpu.cpp.

#pragma once

#include "neighborhood_forward.h"

namespace {

// Some tiles of the query heads of a unit, which add up their own gradients of keys and values.
struct Part {
  i64 unit, begin, end;      // tiles
  Range places;              // those of the grid that they read
  i64 at;                    // where its rows begin: its places, then those that all read
};

// Keys that gain from all lanes: out rows += (keys, lanes) (lanes, width).
struct Gain {
  float* out;
  const i64* place;
  const float* left;         // (keys, words)
  i64 words;
  const float* right;        // (words, width)
  i64 width;
};

template <int N>
void add_gain(const Gain& g, i64 i, i64 column) {
  V acc[ROWS][N] = {};
  const float* left = g.left + i * g.words;
#pragma GCC unroll 4
  for (i64 k = 0; k < g.words; k++) {
    V b[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) b[n] = load(g.right + k * g.width + column + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
      V a = splat(left[m * g.words + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[m][n] = fused(acc[m][n], a, b[n]);
    }
  }
  // one after the other: behind the last key it stands again, and gains nothing
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      float* at = g.out + g.place[i + m] * g.width + column + n * W;
      store(at, load(at) + acc[m][n]);
    }
}

void add_gains(const Gain& g, i64 count) {
  static constexpr void (*TILES[])(const Gain&, i64, i64) = {add_gain<1>, add_gain<2>, add_gain<3>,
                                                             add_gain<TILE>};
  for (i64 column = 0; column < g.width;) {
    i64 n = next_vectors((g.width - column) / W);
    for (i64 i = 0; i < count; i += ROWS) TILES[n - 1](g, i, column);
    column += n * W;
  }
}

// (W, words) rows as the right side of a product that sums over lanes.
const float* lane_sums(const Job& j, const float* rows, float* pairs) {
  if (!PAIRS) return rows;
  const u16* from = reinterpret_cast<const u16*>(rows);
  u32* to = reinterpret_cast<u32*>(pairs);
  for (i64 lane = 0; lane < W; lane += 2)
    for (i64 d = 0; d < j.width; d++)
      to[lane / 2 * j.width + d] =
          u32(from[lane * j.width + d]) | u32(from[(lane + 1) * j.width + d]) << 16;
  return pairs;
}

// The weights of a piece, and the gradients of its scores.
void pull_scores(const Job& j, i64 unit, i64 count, V lse2, V delta, Scratch& s) {
  const float scale = float(j.call.scale) * LOG2E;
  const Table keys = j.key_rows(unit), values = j.value_rows(unit);
  auto weigh = [&](i64 i, const V(&products)[KEYS]) {
#pragma GCC unroll 8
    for (int r = 0; r < KEYS; r++) {
      V score = hide(PAIRS ? products[r] * splat(scale) : products[r], s.bits[i + r]);
      V weight = exp2<true>(score - lse2);
      store(s.weights + (i + r) * W, weight);
      if (PAIRS) store_packed(s.lane_weights + (i + r) * W / PAIR, weight);
    }
  };
  auto pull = [&](i64 i, const V(&products)[KEYS]) {
#pragma GCC unroll 8
    for (int r = 0; r < KEYS; r++) {
      V d_score = load(s.weights + (i + r) * W) * (products[r] - delta);
      store(s.d_scores + (i + r) * W, d_score);
      if (PAIRS) store_packed(s.lane_d_scores + (i + r) * W / PAIR, d_score);
    }
  };
  for (i64 i = 0; i < count; i += KEYS) {
    multiply_keys(keys, s.place, i, s.across, j.depth, weigh);
    multiply_keys(values, s.place, i, s.pulls_across, j.depth, pull);
  }
}

// The gradients of a tile: its queries get theirs, keys and values have them added to their rows.
void pull_tile(const Job& j, const Part& part, i64 index, i64 tile, float* d_k, float* d_v,
               Scratch& s) {
  const Call& c = j.call;
  Head h = j.head(index);
  Tile& t = s.tile;
  cut_tile(j, tile, t);
  load_tile(j, h, c.q, PAIRS ? 1 : float(c.scale) * LOG2E, t, s.rows, s.across);
  load_tile(j, h, c.d_out, 1, t, s.pulls, s.pulls_across);
  const float* queries = lane_sums(j, s.rows, s.row_pairs);
  const float* pulls = lane_sums(j, s.pulls, s.pull_pairs);
  std::memset(s.out, 0, W * j.width * 4);
  V lse2 = splat(NEVER), delta = {};
  for (int lane = 0; lane < W; lane++) {
    if (t.place[lane] < 0) continue;
    i64 at = j.token_row(h) + c.token[t.place[lane]];
    if (c.lse[at] != -INFINITY) lse2[lane] = c.lse[at] * LOG2E;
    delta[lane] = c.delta[at];
  }
  for_pieces(j, t, [&](const Piece& p) {
    list_keys(j, h, t, p, s);
    i64 count = round_up(p.count(), KEYS);
    pull_scores(j, part.unit, count, lse2, delta, s);
    i64 moved = p.frame.length() ? part.places.begin : j.P - part.places.length();
    float *to_k = d_k - moved * j.width, *to_v = d_v - moved * j.width;
    const float* weights = PAIRS ? s.lane_weights : s.weights;
    const float* d_scores = PAIRS ? s.lane_d_scores : s.d_scores;
    add_gains({to_v, s.place, weights, W / PAIR, pulls, j.width}, count);
    add_gains({to_k, s.place, d_scores, W / PAIR, queries, j.width}, count);
    pair_keys(p, s.d_scores);
    add_sums(j, t, p, s.d_scores, j.key_sums(part.unit), s.out);
  });
  for (int lane = 0; lane < W; lane++)
    if (t.place[lane] >= 0)
      store_row(s.out + lane * j.width, float(c.scale), c.kind, c.D,
                c.d_q.at(h.sample, h.query, c.token[t.place[lane]], c.kind));
}

// The gradients of some keys and values of a unit: the sums over its parts.
void put_gains(const Job& j, const std::vector<Part>& parts, i64 task, const float* d_k,
               const float* d_v) {
  const Call& c = j.call;
  i64 unit = task / j.packs(), begin = task % j.packs() * PACKED;
  i64 at = j.first_unit + unit, end = std::min(begin + PACKED, j.rows);
  std::vector<float> line(2 * j.width);
  for (i64 place = begin; place < end; place++) {
    std::fill(line.begin(), line.end(), 0.0f);
    for (const Part& part : parts) {
      Range own = part.places;
      if (part.unit != unit || (place < j.P && (place < own.begin || place >= own.end))) continue;
      i64 row = part.at + (place < j.P ? place - own.begin : own.length() + place - j.P);
      for (i64 d = 0; d < j.width; d++) {
        line[d] += d_k[row * j.width + d];
        line[j.width + d] += d_v[row * j.width + d];
      }
    }
    i64 sample = at / c.K, head = at % c.K, token = c.token[place];
    // packed queries carry the scale, and the base of the softmax
    store_row(line.data(), PAIRS ? float(c.scale) : LN2, c.kind, c.D,
              c.d_k.at(sample, head, token, c.kind));
    store_row(line.data() + j.width, 1, c.kind, c.D, c.d_v.at(sample, head, token, c.kind));
  }
}

}  // namespace
