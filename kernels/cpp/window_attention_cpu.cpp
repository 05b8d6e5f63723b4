// Attention inside windows on a CPU, forward and backward: the engine behind
// window_attention_cpu.py.
//
// Compiled for one instruction set, of vectors of VIDATTN_WIDTH floats: 16 with AVX-512, 8 with
// AVX2, 4 with any. A window of one head is gathered into the caches of a core, and stays there
// from its scores to its output: neither windows nor scores are ever written to memory. The
// backward pass computes the weights again, so that the forward pass keeps nothing.
//
// Letters: B batch, H heads, R windows of a sample, n queries and m keys of a window, D and E
// numbers of a key and of its slot, F numbers of a value, M tables of hidden pairs. A vector is as
// many floats as a register holds, a strip is ROWS rows.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "rows.h"

namespace {

enum Status { OK, NO_MEMORY = 2 };

constexpr i64 QUERIES = 64;              // queries whose weights are held at a time
constexpr float SHORTEST = 1e-12f;       // length that cosines divide by at least

// Memory of (B, tokens, H, numbers) with unit last stride; strides count numbers.
struct Tokens {
  float* data;
  i64 sample, token, head;
  float* at(i64 b, i64 t, i64 h) const { return data + b * sample + t * token + h * head; }
};

// One call; the class of this name in window_attention_cpu.py has the same fields.
struct Call {
  Tokens q, k, v, out;       // out: the output, or what it is pulled by
  Tokens d_q, d_k, d_v;
  const float* scale;        // (H,)
  const float* bias;         // (H, n, m) or null
  const float* hidden;       // (M, n, m) or null
  const float* slots;        // (m, E) or null
  float* d_scale;            // (parts, H)
  float* d_bias;             // (parts, H, n, m) or null
  const i32* queries;        // (R, n) token
  const i32* keys;           // (R, m) token, -1 for zeros
  const i32* kind;           // (R,) which of the hidden tables
  i64 B, H, R, n, m, D, E, F, M;
  i64 is_cosine, is_shared, parts, threads;  // shared: some key stands in several windows
};

// A product of matrices; the left one is stored the other way with ACROSS.
struct Product {
  float* out;
  i64 out_ld;
  const float* left;
  i64 left_ld;
  const float* right;
  i64 right_ld, depth;
};

template <int N, bool ACROSS, bool ADDS>
void multiply_tile(const Product& p, i64 row, i64 column) {
  V acc[ROWS][N] = {};
  const float *left = p.left + row * (ACROSS ? 1 : p.left_ld), *right = p.right + column;
#pragma GCC unroll 2
  for (i64 k = 0; k < p.depth; k++) {
    V b[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) b[n] = load(right + k * p.right_ld + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
      V a = splat(ACROSS ? left[k * p.left_ld + m] : left[m * p.left_ld + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[m][n] += a * b[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      float* at = p.out + (row + m) * p.out_ld + column + n * W;
      store(at, ADDS ? load(at) + acc[m][n] : acc[m][n]);
    }
}

// out = left right, or out += left right, for whole strips of rows and whole vectors of columns.
template <bool ACROSS, bool ADDS>
void multiply(const Product& p, i64 rows, i64 columns) {
  static constexpr void (*TILES[])(const Product&, i64, i64) = {
      multiply_tile<1, ACROSS, ADDS>, multiply_tile<2, ACROSS, ADDS>,
      multiply_tile<3, ACROSS, ADDS>, multiply_tile<TILE, ACROSS, ADDS>};
  for (i64 column = 0; column < columns;) {
    // a narrow tile does not keep the registers busy
    i64 rest = (columns - column) / W;
    i64 tile = rest == TILE + 1 ? TILE - 1 : std::min<i64>(rest, TILE);
    for (i64 row = 0; row < rows; row += ROWS) TILES[tile - 1](p, row, column);
    column += tile * W;
  }
}

// Sizes of a window, rounded up to whole strips and vectors, and what one thread works in.
struct Scratch {
  i64 n, m, depth, width, values;  // queries held, keys, numbers of a query, of it and of a value
  std::vector<float> memory;
  float *queries, *keys, *keys_t, *value, *value_t, *weights, *out, *lengths;
  // of the backward pass alone
  float *pull, *d_scores, *d_queries, *d_keys, *d_value;

  void carve(const Call& c, bool is_backward) {
    depth = c.D + c.E;
    n = round_up(std::min(c.n, QUERIES), ROWS);
    m = round_up(c.m, W);
    width = round_up(depth, W);
    values = round_up(c.F, W);
    i64 backward = is_backward ? 1 : 0;
    struct { float** at; i64 size; } parts[] = {
        {&queries, n * width}, {&keys, m * width}, {&keys_t, width * m}, {&value, m * values},
        {&value_t, backward * values * m}, {&weights, n * m}, {&out, n * values},
        {&lengths, n + m},
        {&pull, backward * n * values}, {&d_scores, backward * n * m},
        {&d_queries, backward * n * width}, {&d_keys, backward * m * width},
        {&d_value, backward * m * values}};
    i64 total = 0;
    for (auto& part : parts) total += part.size;
    memory.assign(total, 0);
    float* next = memory.data();
    for (auto& part : parts) *part.at = next, next += part.size;
  }
};

INLINE void copy_row(float* to, const float* from, i64 count, float factor) {
  i64 d = 0;
  for (; d + W <= count; d += W) store(to + d, load(from + d) * factor);
  for (; d < count; d++) to[d] = from[d] * factor;
}

INLINE float dot(const float* a, const float* b, i64 count) {
  V sum = {};
  i64 d = 0;
  for (; d + W <= count; d += W) sum += load(a + d) * load(b + d);
  float total = sum_of(sum);
  for (; d < count; d++) total += a[d] * b[d];
  return total;
}

// What a query or key is multiplied by: one over its length where cosines are asked for.
INLINE float unit_factor(const Call& c, const float* row) {
  if (!c.is_cosine) return 1;
  return 1 / std::max(std::sqrt(dot(row, row, c.D)), SHORTEST);
}

// What is added to scores, base 2: a bias for each head, and tables of hidden pairs.
struct Tables {
  i64 ld, bias_step, hidden_step;
  std::vector<float> bias, hidden;  // (H or 1, n, keys), (M, n, keys)

  explicit Tables(const Call& c) {
    ld = round_up(c.m, W);
    bias_step = c.bias ? c.n * ld : 0;
    hidden_step = c.n * ld;
    bias = filled(c.bias, c.bias ? c.H : 1, -INFINITY, c);
    hidden = filled(c.hidden, c.M, 0, c);
  }

  // (count, n, ld) from (count, n, m), with `beyond` where there are no keys.
  std::vector<float> filled(const float* from, i64 count, float beyond, const Call& c) {
    std::vector<float> to(count * c.n * ld, beyond);
    for (i64 row = 0; row < count * c.n; row++)
      for (i64 j = 0; j < c.m; j++) to[row * ld + j] = from ? from[row * c.m + j] * LOG2E : 0;
    return to;
  }
};

// A window of one head.
struct Window {
  i64 sample, head;
  const i32 *queries, *keys;
  const float *bias, *hidden;  // (n, keys), hidden may be null
  float* d_bias;               // (n, keys) or null
  const Window* next;          // whose tokens are fetched meanwhile, or null
};

// Ask for what slot i of a window needs: rows lie too far apart to be foreseen.
INLINE void fetch(const Call& c, const Window& w, i64 i) {
  auto ask = [&](const Tokens& x, i64 token) {
    if (token >= 0) {
      __builtin_prefetch(x.at(w.sample, token, w.head));
      __builtin_prefetch(x.at(w.sample, token, w.head) + 16);
    }
  };
  ask(c.q, w.queries[i]), ask(c.out, w.queries[i]);
  if (i < c.m) ask(c.k, w.keys[i]), ask(c.v, w.keys[i]);
}

void gather_keys(const Call& c, const Window& w, Scratch& s, bool is_backward) {
  for (i64 j = 0; j < c.m; j++) {
    float *key = s.keys + j * s.width, *value = s.value + j * s.values;
    i64 token = w.keys[j];
    if (token < 0) {
      std::memset(key, 0, c.D * 4);
      std::memset(value, 0, c.F * 4);
    } else {
      const float* from = c.k.at(w.sample, token, w.head);
      float factor = unit_factor(c, from);
      s.lengths[s.n + j] = factor;
      copy_row(key, from, c.D, factor);
      copy_row(value, c.v.at(w.sample, token, w.head), c.F, 1);
    }
    if (c.E) std::memcpy(key + c.D, c.slots + j * c.E, c.E * 4);
  }
  transpose(s.keys, s.m, s.width, s.keys_t);
  if (is_backward) transpose(s.value, s.m, s.values, s.value_t);
}

// The weights of `count` queries from `first` on, which sum to 1.
void weigh(const Call& c, const Window& w, i64 first, i64 count, Scratch& s) {
  float base = c.scale[w.head] * LOG2E;
  for (i64 i = 0; i < count; i++) {
    const float* from = c.q.at(w.sample, w.queries[first + i], w.head);
    s.lengths[i] = unit_factor(c, from);
    float *to = s.queries + i * s.width;
    copy_row(to, from, c.D, s.lengths[i] * base);
    copy_row(to + c.D, from + c.D, c.E, LOG2E);
  }
  multiply<false, false>({s.weights, s.m, s.queries, s.width, s.keys_t, s.m, s.depth},
                         round_up(count, ROWS), s.m);
  for (i64 i = 0; i < count; i++) {
    float* row = s.weights + i * s.m;
    const float* bias = w.bias + (first + i) * s.m;
    const float* hidden = w.hidden ? w.hidden + (first + i) * s.m : nullptr;
    V highest = splat(-INFINITY);
    if (w.next) fetch(c, *w.next, first + i);
    for (i64 j = 0; j < s.m; j += W) {
      V x = load(row + j) + load(bias + j);
      if (hidden) x += load(hidden + j);
      store(row + j, x);
      highest = larger(highest, x);
    }
    V top = splat(largest_of(highest)), sum = {};
    for (i64 j = 0; j < s.m; j += W) {
      V x = exp2(load(row + j) - top);
      store(row + j, x);
      sum += x;
    }
    V share = splat(1 / sum_of(sum));
    for (i64 j = 0; j < s.m; j += W) store(row + j, load(row + j) * share);
  }
}

void attend(const Call& c, const Window& w, Scratch& s) {
  gather_keys(c, w, s, false);
  for (i64 first = 0; first < c.n; first += QUERIES) {
    i64 count = std::min(QUERIES, c.n - first);
    weigh(c, w, first, count, s);
    multiply<false, false>({s.out, s.values, s.weights, s.m, s.value, s.values, c.m},
                           round_up(count, ROWS), s.values);
    for (i64 i = 0; i < count; i++)
      copy_row(c.out.at(w.sample, w.queries[first + i], w.head), s.out + i * s.values, c.F, 1);
  }
}

// From the gradient of a row of length 1 to that of the row itself, which `factor` multiplied.
INLINE void pull_through_length(float* gradient, const float* unit, i64 count, float factor) {
  float along = dot(gradient, unit, count);
  for (i64 d = 0; d < count; d++) gradient[d] = (gradient[d] - unit[d] * along) * factor;
}

// The gradients of the scores, from the weights and what the output is pulled by.
void pull_scores(const Call& c, const Window& w, i64 first, i64 count, Scratch& s) {
  multiply<false, false>({s.d_scores, s.m, s.pull, s.values, s.value_t, s.m, c.F},
                         round_up(count, ROWS), s.m);
  for (i64 i = 0; i < count; i++) {
    float* row = s.d_scores + i * s.m;
    float* d_bias = w.d_bias ? w.d_bias + (first + i) * s.m : nullptr;
    const float* weights = s.weights + i * s.m;
    V sum = {};
    for (i64 j = 0; j < s.m; j += W) sum += load(row + j) * load(weights + j);
    V mean = splat(sum_of(sum));
    for (i64 j = 0; j < s.m; j += W) {
      V x = (load(row + j) - mean) * load(weights + j);
      store(row + j, x);
      if (d_bias) store(d_bias + j, load(d_bias + j) + x);
    }
  }
}

// The gradients of `count` queries; what the scale gets from them.
float put_queries(const Call& c, const Window& w, i64 first, i64 count, Scratch& s) {
  float scale = c.scale[w.head], d_scale = 0;
  for (i64 i = 0; i < count; i++) {
    float *row = s.d_queries + i * s.width, *query = s.queries + i * s.width;
    if (c.is_cosine) {
      for (i64 d = 0; d < c.D; d++) query[d] /= scale * LOG2E;
      d_scale += dot(row, query, c.D);
      pull_through_length(row, query, c.D, s.lengths[i]);
    }
    float* to = c.d_q.at(w.sample, w.queries[first + i], w.head);
    copy_row(to, row, c.D, scale);
    copy_row(to + c.D, row + c.D, c.E, 1);
  }
  return d_scale;
}

INLINE void put_row(const Call& c, float* to, float* row, i64 count) {
  if (c.is_shared)
    for (i64 d = 0; d < count; d++) to[d] += row[d];
  else
    std::memcpy(to, row, count * 4);
}

void put_keys(const Call& c, const Window& w, Scratch& s) {
  for (i64 j = 0; j < c.m; j++) {
    i64 token = w.keys[j];
    if (token < 0) continue;
    float* row = s.d_keys + j * s.width;
    for (i64 d = 0; d < c.D; d++) row[d] *= LN2;
    if (c.is_cosine) pull_through_length(row, s.keys + j * s.width, c.D, s.lengths[s.n + j]);
    put_row(c, c.d_k.at(w.sample, token, w.head), row, c.D);
    put_row(c, c.d_v.at(w.sample, token, w.head), s.d_value + j * s.values, c.F);
  }
}

// The gradients of a window; what the scale gets from them.
float pull(const Call& c, const Window& w, Scratch& s) {
  gather_keys(c, w, s, true);
  std::fill(s.d_keys, s.d_keys + s.m * s.width, 0);
  std::fill(s.d_value, s.d_value + s.m * s.values, 0);
  float d_scale = 0;
  for (i64 first = 0; first < c.n; first += QUERIES) {
    i64 count = std::min(QUERIES, c.n - first), rows = round_up(count, ROWS);
    weigh(c, w, first, count, s);
    for (i64 i = 0; i < count; i++)
      copy_row(s.pull + i * s.values, c.out.at(w.sample, w.queries[first + i], w.head), c.F, 1);
    pull_scores(c, w, first, count, s);
    i64 keys = round_up(c.m, ROWS);
    multiply<true, true>({s.d_value, s.values, s.weights, s.m, s.pull, s.values, count}, keys,
                         s.values);
    multiply<true, true>({s.d_keys, s.width, s.d_scores, s.m, s.queries, s.width, count}, keys,
                         s.width);
    multiply<false, false>({s.d_queries, s.width, s.d_scores, s.m, s.keys, s.width, c.m}, rows,
                           s.width);
    d_scale += put_queries(c, w, first, count, s);
  }
  put_keys(c, w, s);
  return d_scale;
}

// Some of the windows, of all heads: a window stays in the cache while its heads take their turns.
void run_part(const Call& c, const Tables& t, i64 part, bool is_backward, Scratch& s) {
  // keys of several windows are added up by one thread
  i64 step = c.is_shared ? c.R : 1, all = c.B * c.R / step;
  i64 begin = all * part / c.parts * step, end = all * (part + 1) / c.parts * step;
  std::vector<double> d_scale(c.H);
  std::vector<float> d_bias(c.d_bias ? c.H * t.bias_step : 0);
  auto window_at = [&](i64 at) {
    i64 head = at % c.H, index = at / c.H % c.R, kind = c.M ? c.kind[index] : 0;
    Window w = {at / c.H / c.R, head, c.queries + index * c.n, c.keys + index * c.m};
    w.bias = t.bias.data() + head * t.bias_step;
    // the first table hides nothing
    w.hidden = kind ? t.hidden.data() + kind * t.hidden_step : nullptr;
    w.d_bias = c.d_bias ? d_bias.data() + head * t.bias_step : nullptr;
    return w;
  };
  Window next = window_at(begin * c.H);
  for (i64 at = begin * c.H; at < end * c.H; at++) {
    Window w = next;
    if (at + 1 < end * c.H) next = window_at(at + 1), w.next = &next;
    if (is_backward)
      d_scale[w.head] += pull(c, w, s);
    else
      attend(c, w, s);
  }
  for (i64 head = 0; is_backward && head < c.H; head++)
    c.d_scale[part * c.H + head] = float(d_scale[head]);
  for (i64 row = 0; c.d_bias && row < c.H * c.n; row++)
    std::memcpy(c.d_bias + (part * c.H * c.n + row) * c.m, &d_bias[row * t.ld], c.m * 4);
}

void run_all(const Call& c, bool is_backward) {
  Tables tables(c);
  std::vector<Scratch> scratch(std::min(c.threads, c.parts));
  for (Scratch& s : scratch) s.carve(c, is_backward);
  share_out(i64(scratch.size()), c.parts, [&](i64 thread, i64 part) {
    run_part(c, tables, part, is_backward, scratch[thread]);
  });
}

int run(const Call* call, bool is_backward) {
  try {
    run_all(*call, is_backward);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  return OK;
}
}  // namespace

extern "C" {
int vidattn_windows_forward(const Call* call) { return run(call, false); }
int vidattn_windows_backward(const Call* call) { return run(call, true); }
}
