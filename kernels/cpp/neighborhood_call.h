// What one call of neighborhood attention is told; its keys and values packed; a tile of queries
// with the keys around it.
//
// The letters are those of neighborhood_cpu.cpp.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "rows.h"

namespace {

enum Status { OK, NO_MEMORY = 2 };

constexpr int KEYS = 8;                  // keys whose scores are in registers at a time
constexpr int STEP = 4;                  // words that are multiplied in a row
constexpr int GROUP = ROWS;              // queries whose outputs are
constexpr int GROUPS = W / GROUP;
constexpr i64 MOST = 160;                // keys of a piece: their values stay in the first cache
constexpr i64 PACKED = 256;              // rows that are packed in one go
constexpr i64 WORKSPACE = 128ll << 20;   // bytes of packed rows held at a time, about

// One call; the class of this name in neighborhood_cpu.py has the same fields.
struct Call {
  Rows q, k, v, out, d_out, d_q, d_k, d_v;
  float* lse;                // (B, H, S)
  const float* delta;        // (B, H, S) what the softmax of each row loses
  const u8* key_mask;        // (B, S) or null
  const i32* token;          // (P + X,) at each place, those that all read behind the others
  const i32 *first, *last;   // (sum of size,) the places that each place of an axis reads
  const i32* cuts;           // (sum of tiles + 3,) where tiles of an axis begin, and its extent
  i64 size[3], tiles[3], edge[3], group[3];
  i64 B, H, K, S, D, X, is_in_order, kind, threads;
  double scale;
};

struct Range {
  i64 begin = 0, end = 0;
  i64 length() const { return end - begin; }
  void take(i64 low, i64 high) {
    bool is_empty = begin == end;
    begin = is_empty ? low : std::min(begin, low), end = is_empty ? high : std::max(end, high);
  }
  Range within(Range other) const {
    Range both;
    both.begin = std::max(begin, other.begin);
    both.end = std::max(both.begin, std::min(end, other.end));
    return both;
  }
};

// A vector of queries, each in a lane, and the box of keys that any of them reads.
struct Tile {
  i64 place[W];                   // of each query, -1 for none
  u32 live;                       // lanes with a query
  Range keys[3];
  Range of_group[GROUPS][3];      // the keys of each group of lanes
  std::vector<u32> seen[3];       // for each key of the box on an axis, the lanes that read it
};

struct Head {
  i64 sample, query, key;
};

struct Table {
  const float* data;
  i64 ld;
};

struct Job {
  const Call& call;
  i64 P, rows;                // places of the grid, and with those that all read
  i64 width, words, depth;    // of a row: D padded, in words, and the words that are multiplied
  i64 group, text_tiles, num_tiles;
  i64 lane_place[W][3];       // where a lane stands in its tile
  const i32 *first[3], *last[3], *cuts[3];
  i64 first_unit = 0, num_units = 0;
  // (units in flight, rows, words), and (.., width) with a key and the next one to a word of pairs
  Buffer keys, values, key_pairs, value_pairs;

  explicit Job(const Call& c) : call(c) {
    P = c.size[0] * c.size[1] * c.size[2];
    rows = P + c.X;
    width = round_up(c.D, GRANULE * PAIR);
    words = width / PAIR;
    depth = round_up(c.D, PAIR * STEP) / PAIR;
    group = c.H / c.K;
    text_tiles = (c.X + W - 1) / W;
    num_tiles = text_tiles + c.tiles[0] * c.tiles[1] * c.tiles[2];
    const i32 *low = c.first, *high = c.last, *cut = c.cuts;
    for (int a = 0; a < 3; a++) {
      first[a] = low, last[a] = high, cuts[a] = cut;
      low += c.size[a], high += c.size[a], cut += c.tiles[a] + 1;
    }
    // groups of lanes are boxes, one behind the other
    for (int lane = 0; lane < W; lane++)
      for (int a = 2, in = lane % GROUP, of = lane / GROUP; a >= 0; a--) {
        i64 boxes = c.edge[a] / c.group[a];
        lane_place[lane][a] = of % boxes * c.group[a] + in % c.group[a];
        in /= int(c.group[a]), of /= int(boxes);
      }
  }

  // A query head of the units in flight.
  Head head(i64 index) const {
    i64 unit = first_unit + index / group, key = unit % call.K;
    return {unit / call.K, key * group + index % group, key};
  }

  i64 token_row(const Head& h) const { return (h.sample * call.H + h.query) * call.S; }

  bool is_readable(i64 sample, i64 token) const {
    return !call.key_mask || call.key_mask[sample * call.S + token];
  }

  // Whether rows are read where they lie.
  bool lies_packed(const Rows& x) const {
    return call.kind == FLOAT32 && call.is_in_order && !call.key_mask && call.D == width &&
           x.token == width;
  }

  Table table(const Rows& x, const Buffer& packed, i64 unit, i64 ld) const {
    i64 at = first_unit + unit;
    if (packed.data) return {packed.data + unit * rows * ld, ld};
    return {reinterpret_cast<const float*>(x.at(at / call.K, at % call.K, 0, FLOAT32)), ld};
  }
  Table key_rows(i64 unit) const { return table(call.k, keys, unit, words); }
  Table value_rows(i64 unit) const { return table(call.v, values, unit, words); }
  // as the right side of a product that sums over keys
  Table key_sums(i64 unit) const {
    return PAIRS ? table(call.k, key_pairs, unit, width) : key_rows(unit);
  }
  Table value_sums(i64 unit) const {
    return PAIRS ? table(call.v, value_pairs, unit, width) : value_rows(unit);
  }

  void load(const Rows& x, i64 unit, i64 place, float* to) const {
    i64 sample = unit / call.K, token = place < rows ? call.token[place] : -1;
    bool is_there = token >= 0 && is_readable(sample, token);
    load_row(is_there ? x.at(sample, unit % call.K, token, call.kind) : nullptr, call.kind, call.D,
             words, 1, to);
  }

  i64 packs() const { return (rows + PACKED - 1) / PACKED; }

  // Some rows of a unit, as they are; of pairs also with the next one.
  void pack(const Rows& x, i64 task, Buffer& plain, Buffer& pairs) const {
    i64 unit = task / packs(), begin = task % packs() * PACKED, end = std::min(begin + PACKED, rows);
    std::vector<float> held(pairs.data ? 2 * words : 0);
    for (i64 place = begin; place < end; place++) {
      i64 at = unit * rows + place;
      if (plain.data) load(x, first_unit + unit, place, plain.data + at * words);
      if (!pairs.data) continue;
      load(x, first_unit + unit, place, held.data());
      load(x, first_unit + unit, place + 1, held.data() + words);
      const u16* even = reinterpret_cast<const u16*>(held.data());
      u32* to = reinterpret_cast<u32*>(pairs.data + at * width);
      for (i64 d = 0; d < width; d++) to[d] = u32(even[d]) | u32(even[width + d]) << 16;
    }
  }
};

// The queries of a tile, and what they read.
void cut_tile(const Job& j, i64 index, Tile& t) {
  const Call& c = j.call;
  bool is_text = index < j.text_tiles;
  i64 begin[3], end[3], at = index - j.text_tiles;
  for (int a = 2; a >= 0 && !is_text; a--) {
    begin[a] = j.cuts[a][at % c.tiles[a]], end[a] = j.cuts[a][at % c.tiles[a] + 1];
    at /= c.tiles[a];
  }
  t.live = 0;
  for (Range& keys : t.keys) keys = Range();
  for (auto& group : t.of_group)
    for (Range& keys : group) keys = Range();
  Range read[W][3];
  for (int lane = 0; lane < W; lane++) {
    i64 place = 0;
    bool is_there = !is_text || index * W + lane < c.X;
    for (int a = 0; a < 3 && !is_text; a++) {
      i64 x = begin[a] + j.lane_place[lane][a];
      is_there &= x < end[a];
      place = place * c.size[a] + x;
    }
    t.place[lane] = !is_there ? -1 : is_text ? j.P + index * W + lane : place;
    if (!is_there) continue;
    t.live |= 1u << lane;
    for (int a = 0; a < 3; a++) {
      Range& keys = read[lane][a];
      if (is_text) {
        keys.end = c.size[a];
      } else {
        i64 x = begin[a] + j.lane_place[lane][a];
        keys.begin = j.first[a][x], keys.end = j.last[a][x] + 1;
      }
      t.keys[a].take(keys.begin, keys.end);
      t.of_group[lane / GROUP][a].take(keys.begin, keys.end);
    }
  }
  for (int a = 0; a < 3; a++) {
    // lanes that change, then their sums
    t.seen[a].assign(t.keys[a].length() + 1, 0);
    for (int lane = 0; lane < W; lane++)
      if (t.live >> lane & 1) {
        t.seen[a][read[lane][a].begin - t.keys[a].begin] ^= 1u << lane;
        t.seen[a][read[lane][a].end - t.keys[a].begin] ^= 1u << lane;
      }
    for (size_t x = 1; x < t.seen[a].size(); x++) t.seen[a][x] ^= t.seen[a][x - 1];
  }
}

// Part of a plane of the keys of a tile, or of the keys that all read.
struct Piece {
  Range frame, lines, columns;    // of the grid; columns count from P for those that all read
  i64 pitch, begin;               // from line to line, and the first place
  i64 count() const { return lines.length() * columns.length(); }
};

// Calls step(piece) for all keys that a tile reads.
template <typename Step>
void for_pieces(const Job& j, const Tile& t, const Step& step) {
  const Call& c = j.call;
  auto walk = [&](Range frame, const Range& lines, const Range& columns, i64 origin, i64 pitch) {
    i64 wide = (columns.length() + MOST - 1) / MOST;
    for (i64 m = 0; m < wide; m++) {
      // pairs begin at even distances
      i64 step_w = round_up((columns.length() + wide - 1) / wide, 2);
      Range some_columns = Range{columns.begin + m * step_w, columns.begin + (m + 1) * step_w};
      some_columns = some_columns.within(columns);
      if (!some_columns.length()) continue;
      i64 high = (lines.length() * some_columns.length() + MOST - 1) / MOST;
      for (i64 n = 0; n < high; n++) {
        Range some{lines.begin + lines.length() * n / high,
                   lines.begin + lines.length() * (n + 1) / high};
        if (!some.length()) continue;
        step(Piece{frame, some, some_columns, pitch,
                   origin + some.begin * pitch + some_columns.begin});
      }
    }
  };
  for (i64 frame = t.keys[0].begin; frame < t.keys[0].end; frame++)
    walk({frame, frame + 1}, t.keys[1], t.keys[2], frame * c.size[1] * c.size[2], c.size[2]);
  if (c.X) walk({}, {0, 1}, {0, c.X}, j.P, c.X);
}

}  // namespace
