// Neighborhood attention on a CPU, forward and backward: the engine behind neighborhood_cpu.py.
//
// Compiled for one instruction set, of vectors of VIDATTN_WIDTH floats: 16 with AVX-512, 8 with
// AVX2, 4 with any. VIDATTN_PAIRS says that numbers are bfloat16, and multiplied two at a time.
//
// A vector holds the scores of one key with a tile of queries, one to a lane: so keys are read
// where they lie, one number for all lanes, and a tile visits the box of the keys around it, no
// more. Whether a query reads a key is one bit of a lane, the product of three bits of the axes.
// Maxima, powers and sums stay within their lanes. Sums over values run on groups of GROUP lanes,
// each over the keys that it reads itself. Softmax is online in base 2, its maximum moved only when
// a score passes it by more than 2 ** SLACK.
//
// Letters: B batch, H query heads, K key heads, S tokens, D head dim, P places of the grid, X
// tokens that all read, and that read all. A unit is one (sample, key head); a word is 4 bytes of
// packed numbers: one float, or a pair of bfloat16. Axes are t, h, w.
//
// Its parts, each on top of the one before: neighborhood_call.h, what a call is told and how it is
// cut; neighborhood_forward.h, attention; neighborhood_backward.h, gradients.

#include "neighborhood_backward.h"

namespace {

constexpr i64 TASKS = 8;                 // tasks for each thread, so that all end together

// Keys around a tile of one axis.
Range around(const Job& j, int axis, i64 tile) {
  Range keys;
  for (i64 x = j.cuts[axis][tile]; x < j.cuts[axis][tile + 1]; x++)
    keys.take(j.first[axis][x], j.last[axis][x] + 1);
  return keys;
}

// Keys of every tile, and the places between the first and the last of them.
struct Costs {
  std::vector<i64> keys;
  std::vector<Range> places;
  i64 total = 0;

  explicit Costs(const Job& j) : keys(j.num_tiles, j.rows), places(j.num_tiles, Range{0, j.P}) {
    const Call& c = j.call;
    std::vector<Range> of_axis[3];
    for (int a = 0; a < 3; a++)
      for (i64 tile = 0; tile < c.tiles[a]; tile++) of_axis[a].push_back(around(j, a, tile));
    i64 index = j.text_tiles;
    for (const Range& t : of_axis[0])
      for (const Range& h : of_axis[1])
        for (const Range& w : of_axis[2]) {
          keys[index] = t.length() * h.length() * w.length() + c.X;
          places[index].begin = (t.begin * c.size[1] + h.begin) * c.size[2] + w.begin;
          places[index++].end = ((t.end - 1) * c.size[1] + h.end - 1) * c.size[2] + w.end;
        }
    for (i64 x : keys) total += x;
  }
};

i64 num_threads(const Job& j, const Costs& costs, i64 products) {
  double flops = 2.0 * double(products * j.call.D * W * j.call.B * j.call.H) * double(costs.total);
  return std::max<i64>(1, std::min<i64>(j.call.threads, i64(1 + flops / THREAD_FLOPS)));
}

// Carves arrays out of the buffer of a thread.
void prepare(const Job& j, bool is_backward, Scratch& s) {
  i64 back = is_backward ? 1 : 0, keys = (MOST + KEYS) * W, pairs = PAIRS ? back : 0;
  struct { float** at; i64 size; } parts[] = {
      {&s.rows, W * j.words}, {&s.across, W * j.words}, {&s.out, W * j.width}, {&s.weights, keys},
      {&s.pulls, back * W * j.words}, {&s.pulls_across, back * W * j.words},
      {&s.d_scores, back * keys}, {&s.row_pairs, pairs * W * j.words},
      {&s.pull_pairs, pairs * W * j.words}, {&s.lane_weights, pairs * keys / 2},
      {&s.lane_d_scores, pairs * keys / 2}};
  i64 total = 0;
  for (auto& part : parts) total += round_up(part.size, GRANULE);
  s.memory.grow(total);
  float* next = s.memory.data;
  for (auto& part : parts) *part.at = next, next += round_up(part.size, GRANULE);
}

// Rows of keys and values in the forms that are asked for, of the units in flight.
void pack(const Job& j, const Rows& x, i64 threads, Buffer& plain, Buffer& pairs) {
  if (plain.data || pairs.data)
    share_out(threads, j.num_units * j.packs(),
              [&](i64, i64 task) { j.pack(x, task, plain, pairs); });
}

void forward(const Call& c) {
  Job job(c);
  Costs costs(job);
  i64 threads = num_threads(job, costs, 2), all = c.B * c.K;
  std::vector<Scratch> scratch(threads);
  for (Scratch& s : scratch) prepare(job, false, s);
  i64 step = std::max<i64>(1, std::min(all, WORKSPACE / (job.rows * job.width * 8)));
  if (!job.lies_packed(c.k)) job.keys.grow(step * job.rows * job.words);
  if (PAIRS)
    job.value_pairs.grow(step * job.rows * job.width);
  else if (!job.lies_packed(c.v))
    job.values.grow(step * job.rows * job.words);
  for (i64 unit = 0; unit < all; unit += step) {
    job.first_unit = unit, job.num_units = std::min(step, all - unit);
    Buffer none;
    pack(job, c.k, threads, job.keys, none);
    pack(job, c.v, threads, job.values, job.value_pairs);
    // neighbours share most of their keys
    i64 heads = job.num_units * job.group, num_tiles = job.num_tiles;
    i64 run = std::max<i64>(1, std::min(c.tiles[2], heads * num_tiles / (threads * TASKS)));
    i64 runs = (num_tiles + run - 1) / run;
    share_out(threads, heads * runs, [&](i64 thread, i64 task) {
      i64 begin = task % runs * run, end = std::min(begin + run, num_tiles);
      for (i64 tile = begin; tile < end; tile++) attend(job, task / runs, tile, scratch[thread]);
    });
  }
}

// Cuts the tiles of every unit in flight into parts of about equal work: so many threads share a
// unit, and sums keep their order.
std::vector<Part> cut_parts(const Job& j, const Costs& costs, i64 threads) {
  i64 count = j.num_units % threads ? (2 * threads + j.num_units - 1) / j.num_units : 1;
  count = std::min<i64>({count, j.num_tiles, 16});
  std::vector<Part> parts;
  i64 rows = 0;
  for (i64 unit = 0; unit < j.num_units; unit++) {
    i64 tile = 0, done = 0;
    for (i64 n = 0; n < count; n++) {
      Part part{unit, tile, tile, {}, rows};
      while (tile < j.num_tiles && (n + 1 == count || done * count < costs.total * (n + 1))) {
        part.places.take(costs.places[tile].begin, costs.places[tile].end);
        done += costs.keys[tile++];
      }
      part.end = tile;
      rows += part.places.length() + j.call.X;
      parts.push_back(part);
    }
  }
  return parts;
}

void backward(const Call& c) {
  Job job(c);
  Costs costs(job);
  i64 threads = num_threads(job, costs, 5), all = c.B * c.K;
  std::vector<Scratch> scratch(threads);
  for (Scratch& s : scratch) prepare(job, true, s);
  i64 fit = WORKSPACE / (job.rows * job.width * 16);
  i64 step = std::min(all, std::max(threads, fit)), held = 0;
  if (!job.lies_packed(c.k)) job.keys.grow(step * job.rows * job.words);
  if (!job.lies_packed(c.v)) job.values.grow(step * job.rows * job.words);
  if (PAIRS) job.key_pairs.grow(step * job.rows * job.width);
  Buffer none, d_k, d_v;
  for (i64 unit = 0; unit < all; unit += step) {
    job.first_unit = unit, job.num_units = std::min(step, all - unit);
    pack(job, c.k, threads, job.keys, job.key_pairs);
    pack(job, c.v, threads, job.values, none);
    std::vector<Part> parts = cut_parts(job, costs, threads);
    i64 floats = (parts.back().at + parts.back().places.length() + c.X) * job.width;
    if (floats > held) d_k.grow(floats), d_v.grow(floats), held = floats;
    share_out(threads, i64(parts.size()), [&](i64 thread, i64 task) {
      const Part& part = parts[task];
      i64 own = (part.places.length() + c.X) * job.width, at = part.at * job.width;
      std::memset(d_k.data + at, 0, own * 4);
      std::memset(d_v.data + at, 0, own * 4);
      for (i64 g = 0; g < job.group; g++)
        for (i64 tile = part.begin; tile < part.end; tile++)
          pull_tile(job, part, part.unit * job.group + g, tile, d_k.data + at, d_v.data + at,
                    scratch[thread]);
    });
    share_out(threads, job.num_units * job.packs(),
              [&](i64, i64 task) { put_gains(job, parts, task, d_k.data, d_v.data); });
  }
}

int run(const Call* call, void (*direction)(const Call&)) {
  try {
    direction(*call);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  return OK;
}
}  // namespace

extern "C" {
int vidattn_neighborhood_forward(const Call* call) { return run(call, forward); }
int vidattn_neighborhood_backward(const Call* call) { return run(call, backward); }
}
