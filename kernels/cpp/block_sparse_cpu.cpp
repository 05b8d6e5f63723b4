// Block-sparse attention on a CPU, forward and backward: the engine behind block_sparse_cpu.py.
//
// Compiled for one instruction set, of vectors of VIDATTN_WIDTH floats: 16 with AVX-512, 8 with
// AVX2, 4 with any. VIDATTN_PAIRS says that numbers are bfloat16, and multiplied two at a time.
//
// Tokens are gathered through the layout's order into packed blocks, cut into pieces of up to 64
// slots; products run on tiles of 4 rows by up to 4 vectors held in registers. Softmax is online in
// base 2, its maximum moved only when a score passes it by more than 2 ** SLACK.
//
// Letters: B batch, H query heads, K key heads, S queries, S_k keys, D head dim, N and N_k their
// slots, n slots to a block, nb and nb_k their blocks, R plan rows, E listed blocks, M masks. A unit is one (sample, key head); a piece is up
// to 64 slots of a block; a vector is as many floats or slots as a register holds; a strip is ROWS
// rows; a word is 4 bytes of packed numbers: one float, or a pair of bfloat16.
//
// Its parts, each on top of the one before: block_sparse_call.h, what a call is told;
// block_sparse_products.h, products of packed rows; block_sparse_forward.h, attention;
// block_sparse_backward.h, gradients. Here are threads, and what the library gives.

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <vector>

#include "block_sparse_backward.h"

namespace {

// Products and sums in a second of one thread that does nothing else.
double measure_peak() {
  constexpr int COUNT = 12;  // enough to hide how long one takes, few enough for 16 registers
  constexpr i64 TIMES = 1 << 21;
  volatile float half = 0.5f;
  V a = splat(half), b = splat(half), sums[COUNT];
  // all different, or the compiler would make one of them
  for (int n = 0; n < COUNT; n++) sums[n] = splat(half + float(n));
  auto begin = std::chrono::steady_clock::now();
  for (i64 i = 0; i < TIMES; i++)
#pragma GCC unroll 12
    for (int n = 0; n < COUNT; n++) sums[n] = fused(b, a, sums[n]);
  for (int n = 0; n < COUNT; n++) half = sum_of(sums[n]);
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return 2.0 * COUNT * TIMES * W * PAIR / seconds.count();
}

// Powers in a second, likewise, read from the closest memory, summed and written there.
double measure_exp_rate() {
  constexpr int COUNT = 1024, TIMES = 1 << 12;
  alignas(64) float x[COUNT];
  for (int i = 0; i < COUNT; i++) x[i] = -float(i) / COUNT;
  volatile float top = 0;
  auto begin = std::chrono::steady_clock::now();
  for (int t = 0; t < TIMES; t++) {
    V sums[4] = {};
    for (int i = 0; i < COUNT; i += 4 * W)
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) {
        V weight = exp2(load(x + i + n * W) - splat(top));
        sums[n] += weight;
        store(x + i + n * W, -weight);
      }
    top = sum_of(sums[0] + sums[1] + sums[2] + sums[3]) * 1e-9f;
  }
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return double(COUNT) * TIMES / seconds.count();
}

// Every index is inside what it points into.
bool lists_are_sound(const Call& c) {
  i64 nb = c.N / c.n, rows = c.plan_batch * c.plan_heads * nb;
  for (i64 slot = 0; slot < c.N; slot++)
    if (c.order[slot] < -1 || c.order[slot] >= c.S) return false;
  for (i64 slot = 0; slot < c.N_k; slot++)
    if (c.key_order[slot] < -1 || c.key_order[slot] >= c.S_k) return false;
  if (c.row_start[0] != 0 || c.row_start[rows] != c.num_entries) return false;
  for (i64 row = 0; row < rows; row++) {
    i64 begin = c.row_start[row], end = c.row_start[row + 1];
    if (begin > end || end > c.num_entries) return false;
    if (c.num_full[row] < 0 || c.num_full[row] > end - begin) return false;
    bool partial = c.num_full[row] < end - begin;
    if (partial && !c.box_key && !c.mask_id) return false;
    for (i64 e = begin; e < end; e++) {
      if (c.key_block[e] < 0 || c.key_block[e] >= c.N_k / c.n) return false;
      if (c.mask_id && e - begin >= c.num_full[row])
        if (c.mask_id[e] < 0 || c.mask_id[e] >= c.num_masks) return false;
    }
  }
  return true;
}

Transposed transpose(const Call& c) {
  i64 nb = c.N / c.n, nb_k = c.N_k / c.n, sets = c.plan_batch * c.plan_heads, rows = sets * nb;
  Transposed t;
  t.start.assign(sets * nb_k + 1, 0);
  t.query.resize(c.num_entries);
  t.mask.resize(c.num_entries);
  for (i64 row = 0; row < rows; row++)
    for (i64 e = c.row_start[row]; e < c.row_start[row + 1]; e++)
      t.start[row / nb * nb_k + c.key_block[e] + 1]++;
  for (i64 row = 0; row < sets * nb_k; row++) t.start[row + 1] += t.start[row];
  std::vector<i64> next(t.start.begin(), t.start.end() - 1);
  for (i64 row = 0; row < rows; row++)
    for (i64 e = c.row_start[row]; e < c.row_start[row + 1]; e++) {
      i64 at = next[row / nb * nb_k + c.key_block[e]]++;
      bool whole = e - c.row_start[row] < c.num_full[row];
      t.query[at] = i32(row % nb);
      t.mask[at] = whole ? -1 : c.mask_id ? c.mask_id[e] : 0;
    }
  return t;
}

typedef void (*Step)(const Job&, i64, Scratch&);

struct Team {
  std::vector<Scratch> scratch;

  Team(const Call& c, double flops) {
    double useful = std::min<double>(double(c.threads), 1 + flops / THREAD_FLOPS);
    scratch = std::vector<Scratch>(std::max<i64>(1, i64(useful)));
  }

  void run(const Job& job, i64 num_tasks, Step step) {
    share_out(i64(scratch.size()), num_tasks,
              [&](i64 thread, i64 task) { step(job, task, scratch[thread]); });
  }
};

double count_flops(const Call& c, double products) {
  double pairs = double(c.num_entries) * c.n * c.n;
  pairs *= double(c.B * c.H) / double(c.plan_batch * c.plan_heads);
  return 2 * products * pairs * c.D;
}

// Carves arrays out of the buffer of a thread.
struct Carver {
  float* at;
  float* take(i64 floats) {
    float* taken = at;
    at += round_up(floats, GRANULE);
    return taken;
  }
};

void prepare_forward(const Job& j, Scratch& s) {
  i64 rows = round_up(j.call.n, GROUP), longest = 0;
  i64 plan_rows = j.call.plan_batch * j.call.plan_heads * j.nb;
  for (i64 row = 0; row < plan_rows; row++)
    longest = std::max<i64>(
        longest, j.call.row_start[row + 1] - j.call.row_start[row] - j.call.num_full[row]);
  s.memory.grow(rows * (j.words + j.width + PIECE + GRANULE + 1) + PIECE * j.words + PIECE +
                GROUP * PIECE + 8 * GRANULE);
  Carver carve{s.memory.data};
  s.rows = carve.take(rows * j.words);
  s.out = carve.take(rows * j.width);
  s.scores = carve.take(GROUP * PIECE);
  s.weights = carve.take(rows * PIECE);
  s.sums = carve.take(rows * GRANULE);
  s.tops = carve.take(rows);
  s.keys = carve.take(PIECE * j.words);
  s.key_bias = carve.take(PIECE);
  s.bits.resize(longest * rows * j.pieces);
  s.seen.resize(rows / ROWS);
}

void prepare_backward(const Job& j, Scratch& s) {
  s.memory.grow(j.slots * (3 * j.words + 2 * j.width + 1) + 6 * PIECE * PIECE + j.width +
                PIECE * j.words + PIECE + 15 * GRANULE);
  Carver carve{s.memory.data};
  s.keys = carve.take(j.slots * j.words);
  s.values = carve.take(j.slots * j.words);
  s.key_pairs = carve.take(j.slots * j.words);
  s.d_keys = carve.take(j.slots * j.width);
  s.d_values = carve.take(j.slots * j.width);
  s.weights = carve.take(PIECE * PIECE);
  s.d_scores = carve.take(PIECE * PIECE);
  s.d_pairs = carve.take(PIECE * PIECE);
  s.scores = carve.take(PIECE * PIECE);
  s.across = carve.take(PIECE * PIECE);
  // words of floats need no second, exact copy
  s.exact = PAIR == 1 ? s.weights : carve.take(PIECE * PIECE);
  s.line = carve.take(j.width);
  s.rows = carve.take(PIECE * j.words);
  s.key_bias = carve.take(PIECE);
  s.d_bias = carve.take(j.slots);
  s.bits.resize(PIECE);
  s.seen.resize(PIECE / ROWS);
}

// Zeros for the tokens that stand in no slot, which nobody wrote.
void clear(const Call& c, const Rows& x, i64 heads, const std::vector<i64>& unplaced) {
  i64 size = c.kind == FLOAT32 ? 4 : 2;
  for (i64 row = 0; row < c.B * heads; row++)
    for (i64 token : unplaced) {
      i64 at = row / heads * x.sample + row % heads * x.head + token * x.token;
      std::memset(x.data + at * size, 0, c.D * size);
    }
}

void clear(const Call& c, float* x, i64 tokens, float value, const std::vector<i64>& unplaced) {
  for (i64 row = 0; x && row < c.B * c.H; row++)
    for (i64 token : unplaced) x[row * tokens + token] = value;
}

// The tokens that stand in no slot.
std::vector<i64> unplaced_tokens(const i32* order, i64 slots, i64 tokens) {
  std::vector<bool> placed(tokens, false);
  std::vector<i64> unplaced;
  for (i64 slot = 0; slot < slots; slot++)
    if (order[slot] >= 0) placed[order[slot]] = true;
  for (i64 token = 0; token < tokens; token++)
    if (!placed[token]) unplaced.push_back(token);
  return unplaced;
}

i64 units_at_a_time(const Call& c, i64 bytes_per_unit) {
  i64 all = c.B * c.K, fit = std::max<i64>(1, WORKSPACE / std::max<i64>(1, bytes_per_unit));
  return std::min(all, fit);
}

void forward(const Call& c) {
  Job job(c);
  Team team(c, count_flops(c, 2));
  for (Scratch& s : team.scratch) prepare_forward(job, s);
  i64 floats = job.nb_k * job.slots * job.words, step = units_at_a_time(c, 8 * floats);
  job.keys.grow(step * floats);
  job.values.grow(step * floats);
  bool has_rule = c.box_key || c.mask_id;
  for (i64 unit = 0; unit < c.B * c.K; unit += step) {
    job.first_unit = unit;
    job.num_units = std::min(step, c.B * c.K - unit);
    i64 heads = job.num_units * job.group;
    // sharing the bits of a predicate must leave every thread enough tasks
    i64 room = heads * job.nb / (8 * i64(team.scratch.size()));
    job.heads_per_task = has_rule ? std::max<i64>(1, std::min(HEADS_PER_TASK, room)) : 1;
    team.run(job, job.num_units * job.nb_k, pack_keys);
    i64 chunks = (heads + job.heads_per_task - 1) / job.heads_per_task;
    team.run(job, chunks * job.nb, attend);
  }
  std::vector<i64> unplaced = unplaced_tokens(c.order, c.N, c.S);
  clear(c, c.out, c.H, unplaced);
  clear(c, c.lse, c.S, -INFINITY, unplaced);
}

// Cuts the key blocks of every unit in flight into parts of about equal work, each of which adds up
// its own gradient of the queries: so many threads share a unit, and sums keep their order.
void cut_parts(Job& job, i64 threads) {
  i64 parts = (2 * threads + job.num_units - 1) / job.num_units;
  job.parts = threads == 1 ? 1 : std::max<i64>(1, std::min<i64>({parts, job.nb_k, 16}));
  job.part_start.assign(job.num_units * (job.parts + 1), job.nb_k);
  for (i64 unit = 0; unit < job.num_units; unit++) {
    auto work = [&](i64 block) {
      i64 entries = 1;
      for (i64 g = 0; g < job.group; g++) {
        i64 set = job.head(unit * job.group + g).set;
        const i64* start = &job.transposed.start[set * job.nb_k + block];
        entries += start[1] - start[0];
      }
      return entries;
    };
    i64 total = 0, done = 0, part = 0;
    for (i64 block = 0; block < job.nb_k; block++) total += work(block);
    i64* start = &job.part_start[unit * (job.parts + 1)];
    for (i64 block = 0; block < job.nb_k; block++) {
      while (part < job.parts && done * job.parts >= total * part) start[part++] = block;
      done += work(block);
    }
  }
}

void backward(const Call& c) {
  Job job(c);
  job.transposed = transpose(c);
  Team team(c, count_flops(c, 5));
  i64 threads = i64(team.scratch.size());
  for (Scratch& s : team.scratch) prepare_backward(job, s);
  i64 tokens = job.nb * job.slots * job.group, floats = tokens * job.words;
  i64 step = std::max(units_at_a_time(c, 16 * floats + 4 * tokens * job.width),
                      std::min(threads, c.B * c.K));
  for (Buffer* b : {&job.queries, &job.queries_t, &job.pulls, &job.pulls_t}) b->grow(step * floats);
  for (Buffer* b : {&job.lse2, &job.delta}) b->grow(step * tokens);
  i64 held = 0;
  for (i64 unit = 0; unit < c.B * c.K; unit += step) {
    job.first_unit = unit;
    job.num_units = std::min(step, c.B * c.K - unit);
    cut_parts(job, threads);
    i64 needed = job.parts * job.num_units * tokens * job.width;
    if (needed > held) job.d_q.grow(held = needed);
    i64 blocks = job.num_units * job.group * job.nb;
    team.run(job, blocks, pack_queries);
    team.run(job, job.num_units * job.parts, pull);
    team.run(job, blocks, put_d_q);
  }
  clear(c, c.d_q, c.H, unplaced_tokens(c.order, c.N, c.S));
  std::vector<i64> unplaced = unplaced_tokens(c.key_order, c.N_k, c.S_k);
  clear(c, c.d_k, c.K, unplaced);
  clear(c, c.d_v, c.K, unplaced);
  clear(c, c.d_bias, c.S_k, 0, unplaced);
}

int run(const Call* call, void (*direction)(const Call&)) {
  if (!lists_are_sound(*call)) return BAD_LISTS;
  try {
    direction(*call);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  return OK;
}
}  // namespace

extern "C" {
double vidattn_peak() { return measure_peak(); }
double vidattn_exp_rate() { return measure_exp_rate(); }
int vidattn_forward(const Call* call) { return run(call, forward); }
int vidattn_backward(const Call* call) { return run(call, backward); }
}
