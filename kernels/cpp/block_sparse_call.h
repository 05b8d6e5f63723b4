// What one call of block-sparse attention is told, and what its threads work in.
//
// The letters are those of block_sparse_cpu.cpp.

#pragma once

#include <algorithm>
#include <vector>

#include "amx.h"
#include "rows.h"

namespace {

enum Status { OK, BAD_LISTS, NO_MEMORY };

constexpr int PIECE = 64;                // slots whose products share one packed block
constexpr int VECTORS = PIECE / W;       // vectors to a row of a piece
constexpr int VECTOR_WORDS = W / PAIR;   // words that hold the weights of a vector of slots
constexpr int PIECE_WORDS = PIECE / PAIR;
constexpr int GROUP = AMX ? SIDE : ROWS;     // rows of queries that are multiplied together
constexpr int SLOT_STEP = GRANULE * (AMX ? 2 : 1);  // slots of a packed piece round up to so many
constexpr i64 WORKSPACE = 128ll << 20;   // bytes of packed blocks held at a time, about
constexpr i64 HEADS_PER_TASK = 4;        // heads that share the bits of one predicate

// One call; the class of this name in block_sparse_cpu.py has the same fields.
struct Call {
  Rows q, k, v, out, d_out, d_q, d_k, d_v;
  float* lse;                // (B, H, S)
  const float* delta;        // (B, H, S) what the softmax of each row loses
  float* d_bias;             // (B, H, S_k) or null
  const float* key_bias;     // (B|1, H|1, S_k) or null
  const u8* key_mask;        // (B, S_k) or null
  const i32* order;          // (N,)
  const i32* key_order;      // (N_k,)
  const i64* row_start;      // (R + 1,)
  const i32* num_full;       // (R,)
  const i32* key_block;      // (E,)
  const i32 *box_key, *box_low, *box_high;  // (N_k,), (N,) and (N,), or null
  const i32* mask_id;        // (E,) or null
  const u8* masks;           // (M, n, n)
  i64 guard, bias_sample, bias_head, B, H, K, S, S_k, D, N, N_k, n;
  i64 plan_batch, plan_heads, num_entries, num_masks, kind, threads;
  double scale;
};

// The lists of the key blocks: which query blocks read each.
struct Transposed {
  std::vector<i64> start;    // (rows of key blocks + 1,)
  std::vector<i32> query;    // (E,)
  std::vector<i32> mask;     // (E,) -1 for a whole block, else its mask, 0 for the box
};

// What one thread works in; the arrays lie in one buffer.
struct Scratch {
  Buffer memory;
  float *rows, *out, *scores, *weights, *sums, *tops, *keys, *key_bias;
  // of the backward pass alone
  float *values, *key_pairs, *d_keys, *d_values, *d_scores, *d_pairs, *exact, *line, *d_bias;
  float* across;          // score gradients, queries by keys
  std::vector<u64> bits;
  std::vector<u32> seen;  // vectors of columns that each strip of rows sees
};

struct Head {
  i64 sample, query, key, index;  // index among the query heads in flight
  i64 set;                        // which of the plan's (sample, head) lists
};

struct Job {
  const Call& call;
  i64 nb, nb_k, pieces, ld, slots;  // ld: columns of a packed piece; slots: of a packed block
  i64 group;                  // query heads to a key head
  i64 width, words;           // of a row: D padded, and in words
  std::vector<u64> readable;  // (B|1, nb_k, pieces) bit set for keys that may be read
  i64 readable_stride;
  i64 first_unit = 0, num_units = 0, heads_per_task = 1, parts = 1;
  Buffer keys, values, queries, queries_t, pulls, pulls_t, lse2, delta, d_q;
  Transposed transposed;
  std::vector<i64> part_start;  // (units in flight, parts + 1) key blocks

  explicit Job(const Call& c) : call(c) {
    nb = c.N / c.n;
    nb_k = c.N_k / c.n;
    pieces = (c.n + PIECE - 1) / PIECE;
    ld = std::min<i64>(PIECE, round_up(c.n, SLOT_STEP));
    slots = pieces * ld;
    group = c.H / c.K;
    width = round_up(c.D, GRANULE * PAIR);
    words = width / PAIR;
    readable_stride = c.key_mask ? nb_k * pieces : 0;
    readable.assign(nb_k * pieces * (c.key_mask ? c.B : 1), 0);
    for (i64 b = 0; b < (c.key_mask ? c.B : 1); b++)
      for (i64 slot = 0; slot < c.N_k; slot++) {
        i32 token = c.key_order[slot];
        i64 inside = slot % c.n;
        bool live = token >= 0 && (!c.key_mask || c.key_mask[b * c.S_k + token]);
        i64 at = b * readable_stride + slot / c.n * pieces + inside / PIECE;
        readable[at] |= u64(live) << inside % PIECE;
      }
  }

  // Slots in one piece of a block.
  int piece_slots(i64 piece) const { return int(std::min<i64>(PIECE, call.n - piece * PIECE)); }

  u64 readable_keys(i64 sample, i64 block, i64 piece) const {
    return readable[sample * readable_stride + block * pieces + piece];
  }

  // A query head in flight, counted from the first one of the first unit in flight.
  Head head(i64 index) const {
    i64 unit = first_unit + index / group;
    Head h;
    h.sample = unit / call.K;
    h.key = unit % call.K;
    h.query = h.key * group + index % group;
    h.index = index;
    h.set = (call.plan_batch > 1 ? h.sample : 0) * call.plan_heads;
    h.set += call.plan_heads > 1 ? h.query : 0;
    return h;
  }

  const float* bias(const Head& h) const {
    if (!call.key_bias) return nullptr;
    return call.key_bias + h.sample * call.bias_sample + h.query * call.bias_head;
  }

  // Where the queries of a head, and the keys that it reads, begin in (B, H, S) and (B, H, S_k).
  i64 token_row(const Head& h) const { return (h.sample * call.H + h.query) * call.S; }
  i64 key_row(const Head& h) const { return (h.sample * call.H + h.query) * call.S_k; }
};

}  // namespace
