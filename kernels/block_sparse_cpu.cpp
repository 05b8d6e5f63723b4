// Block-sparse attention on a CPU, forward and backward: the engine behind block_sparse_cpu.py.
//
// Compiled for one instruction set, of vectors of VIDATTN_WIDTH floats: 16 with AVX-512, 8 with
// AVX2, 4 with any. VIDATTN_PAIRS says that numbers are bfloat16, and multiplied two at a time.
//
// Tokens are gathered through the layout's order into packed blocks, cut into pieces of up to 64
// slots; products run on tiles of 4 rows by up to 4 vectors held in registers. Softmax is online in
// base 2, its maximum moved only when a score passes it by more than 2 ** SLACK.
//
// Letters: B batch, H query heads, K key heads, S tokens, D head dim, N slots, n slots to a block,
// nb blocks, R plan rows, E listed blocks, M masks. A unit is one (sample, key head); a piece is up
// to 64 slots of a block; a vector is as many floats or slots as a register holds; a strip is ROWS
// rows; a word is 4 bytes of packed numbers: one float, or a pair of bfloat16.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "vectors.h"

namespace {

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint64_t u64;

enum Status { OK, BAD_LISTS, NO_MEMORY };
enum Kind { FLOAT32, BFLOAT16, FLOAT16 };

constexpr int PIECE = 64;                // slots whose products share one packed block
constexpr int GRANULE = 16;              // padding rounds up to so many: the widest vector
constexpr int VECTORS = PIECE / W;       // vectors to a row of a piece
constexpr bool PAIRS = VIDATTN_PAIRS;    // whether a word holds a pair of bfloat16
constexpr int PAIR = PAIRS ? 2 : 1;      // numbers to a word
constexpr int VECTOR_WORDS = W / PAIR;   // words that hold the weights of a vector of slots
constexpr int PIECE_WORDS = PIECE / PAIR;
constexpr float LOWEST = -1e30f;         // maximum of a row that has seen no key
constexpr float NEVER = 1e30f;           // log-sum-exp of a row that gets no weights
constexpr float SLACK = 8;               // weights may reach 2 ** SLACK before the maximum moves
constexpr i64 WORKSPACE = 128ll << 20;   // bytes of packed blocks held at a time, about
constexpr double THREAD_FLOPS = 4e6;     // work that pays for starting a thread
constexpr i64 HUGE_PAGE = 2 << 20;       // in bytes; with small ones, blocks miss the page tables
constexpr i64 HEADS_PER_TASK = 4;        // heads that share the bits of one predicate

// Memory of (.., heads, tokens, D) numbers with unit last stride; strides count numbers.
struct Rows {
  char* data;
  i64 sample, head, token;
};

// One call; the class of this name in block_sparse_cpu.py has the same fields.
struct Call {
  Rows q, k, v, out, d_out, d_q, d_k, d_v;
  float* lse;                // (B, H, S)
  const float* delta;        // (B, H, S) what the softmax of each row loses
  float* d_bias;             // (B, H, S) or null
  const float* key_bias;     // (B|1, H|1, S) or null
  const u8* key_mask;        // (B, S) or null
  const i32* order;          // (N,)
  const i64* row_start;      // (R + 1,)
  const i32* num_full;       // (R,)
  const i32* key_block;      // (E,)
  const i32 *box_key, *box_low, *box_high;  // (N,) or null
  const i32* mask_id;        // (E,) or null
  const u8* masks;           // (M, n, n)
  i64 guard, bias_sample, bias_head, B, H, K, S, D, N, n;
  i64 plan_batch, plan_heads, num_entries, num_masks, kind, threads;
  double scale;
};

struct Buffer {
  float* data = nullptr;
  void grow(i64 floats) {
    std::free(data);
    i64 page = floats * 4 < HUGE_PAGE ? 64 : HUGE_PAGE, bytes = round_up(floats * 4 + 64, page);
    data = static_cast<float*>(std::aligned_alloc(page, bytes));
    if (!data) throw std::bad_alloc();
#ifdef __linux__
    if (page == HUGE_PAGE) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
};

// The lists of the key blocks: which query blocks read each.
struct Transposed {
  std::vector<i64> start;    // (plan rows + 1,)
  std::vector<i32> query;    // (E,)
  std::vector<i32> mask;     // (E,) -1 for a whole block, else its mask, 0 for the box
};

// What one thread works in; the arrays lie in one buffer.
struct Scratch {
  Buffer memory;
  float *rows, *out, *weights, *sums, *tops, *keys, *key_bias;
  // of the backward pass alone
  float *values, *key_pairs, *d_keys, *d_values, *d_scores, *d_pairs, *exact, *line, *d_bias;
  std::vector<u64> bits;
  std::vector<u32> seen;  // vectors of columns that each strip of rows sees
};

struct Head {
  i64 sample, query, key, index;  // index among the query heads in flight
  i64 set;                        // which of the plan's (sample, head) lists
};

struct Job {
  const Call& call;
  i64 nb, pieces, ld, slots;  // ld: columns of a packed piece; slots: of a packed block
  i64 group;                  // query heads to a key head
  i64 width, words;           // of a row: D padded, and in words
  std::vector<u64> readable;  // (B|1, nb, pieces) bit set for keys that may be read
  i64 readable_stride;
  i64 first_unit = 0, num_units = 0, heads_per_task = 1, parts = 1;
  Buffer keys, values, queries, queries_t, pulls, pulls_t, lse2, delta, d_q;
  Transposed transposed;
  std::vector<i64> part_start;  // (units in flight, parts + 1) key blocks

  explicit Job(const Call& c) : call(c) {
    nb = c.N / c.n;
    pieces = (c.n + PIECE - 1) / PIECE;
    ld = std::min<i64>(PIECE, round_up(c.n, GRANULE));
    slots = pieces * ld;
    group = c.H / c.K;
    width = round_up(c.D, GRANULE * PAIR);
    words = width / PAIR;
    readable_stride = c.key_mask ? nb * pieces : 0;
    readable.assign(nb * pieces * (c.key_mask ? c.B : 1), 0);
    for (i64 b = 0; b < (c.key_mask ? c.B : 1); b++)
      for (i64 slot = 0; slot < c.N; slot++) {
        i32 token = c.order[slot];
        i64 inside = slot % c.n;
        bool live = token >= 0 && (!c.key_mask || c.key_mask[b * c.S + token]);
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

  i64 token_row(const Head& h) const { return (h.sample * call.H + h.query) * call.S; }
};

inline float as_float(u32 x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

inline u32 as_bits(float x) {
  u32 y;
  std::memcpy(&y, &x, 4);
  return y;
}

inline i64 piece_at(const Job& j, i64 owner, i64 block, i64 piece) {
  return (owner * j.nb + block) * j.pieces + piece;
}

INLINE U load(const i32* from) {
  U x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

#if VIDATTN_WIDTH == 16
INLINE u32 bits_of_equal(U a, U b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
INLINE bool any_above(V a, V b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
}
// Minus infinity where `bits` lacks a lane.
INLINE V hide(V x, u32 bits) {
  return (V)_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)bits, (__m512)x);
}
#else
#if VIDATTN_WIDTH == 8
INLINE u32 bits_of(I mask) { return u32(_mm256_movemask_ps((__m256)mask)); }
#else
INLINE u32 bits_of(I mask) {
  mask &= I{1, 2, 4, 8};
  return u32(mask[0] | mask[1] | mask[2] | mask[3]);
}
#endif
INLINE u32 bits_of_equal(U a, U b) { return bits_of((I)(a == b)); }
INLINE bool any_above(V a, V b) { return bits_of((I)(a > b)) != 0; }
// Minus infinity where `bits` lacks a lane.
INLINE V hide(V x, u32 bits) {
  I lane;
  for (int i = 0; i < W; i++) lane[i] = 1 << i;
  return (lane & i32(bits)) == lane ? x : splat(-INFINITY);
}
#endif

// acc + a * b, over both numbers of a word.
INLINE V fused(V acc, V a, V b) {
#if VIDATTN_PAIRS
  return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#else
  return acc + a * b;
#endif
}

// A vector as words of packed numbers.
INLINE void store_packed(float* to, V x) {
#if VIDATTN_PAIRS
  __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &half, sizeof half);
#else
  store(to, x);
#endif
}

// 2 ** x, and 2 ** LEAST for all that is below; with MASKED 0 where `hide` was. The polynomials are
// minimax.
template <bool MASKED = false>
INLINE V exp2(V given) {
  V x = larger(splat(LEAST), given);
#if VIDATTN_WIDTH == 16
  V f = (V)_mm512_reduce_ps((__m512)x, 1), p;  // x minus its floor
  if (PAIRS) {
    // 7.5e-5, far below the rounding of a bfloat16 weight
    p = 7.80245215e-2f * f + 2.26067171e-1f;
    p = p * f + 6.95833504e-1f;
    p = p * f + 9.99925196e-1f;
  } else {
    p = 1.87757669e-3f * f + 8.98934063e-3f;
    p = p * f + 5.58263175e-2f;
    p = p * f + 2.40153611e-1f;
    p = p * f + 6.93153083e-1f;
    p = p * f + 9.99999940e-1f;
  }
  if (MASKED) {
    __mmask16 seen = _mm512_cmp_ps_mask((__m512)given, _mm512_set1_ps(2 * LEAST), _CMP_NLT_UQ);
    return (V)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)x);
  }
  return (V)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  // the sum rounds x to a whole number, which its last bits then hold
  const V magic = splat(12582912.0f);
  V whole = x + magic, f = x - (whole - magic);
  V p = 1.32764725e-3f * f + 9.67554189e-3f;
  p = p * f + 5.55071309e-2f;
  p = p * f + 2.40221202e-1f;
  p = p * f + 6.93146944e-1f;
  p = p * f + 1.00000012f;
  V power = (V)((U)p + ((U)whole << 23));
  return MASKED ? (V)((I)power & ~(I)(given < splat(2 * LEAST))) : power;
#endif
}

INLINE float from_half(u16 x) {
  u32 size = u32(x & 0x7fff) << 13;
  float scaled = as_float(size) * as_float(0x77800000);  // 2 ** 112
  u32 bits = as_bits(scaled) | ((x & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);
  return as_float(bits | u32(x & 0x8000) << 16);
}

INLINE u16 to_half(float x) {
  u32 sign = as_bits(x) >> 16 & 0x8000, size = as_bits(x) & 0x7fffffff;
  // to nearest, ties to even; the sum with 0.5 rounds what is subnormal as a half
  u32 normal = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
  u32 subnormal = as_bits(as_float(size) + 0.5f) - as_bits(0.5f);
  u32 half = size < 113u << 23 ? subnormal : normal;
  half = size >= 0x477ff000 ? 0x7c00 : half;
  half = size > 0x7f800000 ? 0x7e00 : half;
  return u16(sign | half);
}

INLINE u16 to_bfloat16(float x) {
  u32 bits = as_bits(x);
  u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return u16((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

// One token as packed numbers, 0 for no token; floats are multiplied by `factor`, pairs are not.
void load_row(const Job& j, const Rows& x, i64 sample, i64 head, i64 token, float factor,
              float* to) {
  i64 D = j.call.D, at = sample * x.sample + head * x.head + token * x.token;
  const u16* halves = reinterpret_cast<const u16*>(x.data) + at;
  const float* floats = reinterpret_cast<const float*>(x.data) + at;
  if (token < 0) {
    std::memset(to, 0, j.words * 4);
    return;
  }
  if (PAIRS) {
    std::memset(to + D / PAIR, 0, (j.words - D / PAIR) * 4);
    std::memcpy(to, halves, D * 2);
    return;
  }
  i64 d = 0;
  if (j.call.kind == FLOAT32) {
    for (; d + W <= D; d += W) store(to + d, load(floats + d) * factor);
    for (; d < D; d++) to[d] = floats[d] * factor;
  } else if (j.call.kind == BFLOAT16) {
    for (; d < D; d++) to[d] = as_float(u32(halves[d]) << 16) * factor;
  } else {
    for (; d < D; d++) to[d] = from_half(halves[d]) * factor;
  }
  for (; d < j.width; d++) to[d] = 0;
}

void store_row(const Job& j, const Rows& x, i64 sample, i64 head, i64 token, const float* from,
               float factor) {
  i64 D = j.call.D, at = sample * x.sample + head * x.head + token * x.token;
  u16* halves = reinterpret_cast<u16*>(x.data) + at;
  float* floats = reinterpret_cast<float*>(x.data) + at;
  if (j.call.kind == FLOAT32)
    for (i64 d = 0; d < D; d++) floats[d] = from[d] * factor;
  else if (j.call.kind == BFLOAT16)
    for (i64 d = 0; d < D; d++) halves[d] = to_bfloat16(from[d] * factor);
  else
    for (i64 d = 0; d < D; d++) halves[d] = to_half(from[d] * factor);
}

// The rows of one piece, (ld, words), zeros in slots that `readable` lacks.
void load_piece(const Job& j, const Rows& x, i64 sample, i64 head, i64 block, i64 piece,
                u64 readable, float factor, float* to) {
  const i32* order = j.call.order + block * j.call.n + piece * PIECE;
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
  i64 unit = task / j.nb, block = task % j.nb;
  Head h = j.head(unit * j.group);
  for (i64 piece = 0; piece < j.pieces; piece++) {
    i64 at = piece_at(j, unit, block, piece) * j.ld * j.words;
    u64 readable = j.readable_keys(h.sample, block, piece);
    float* values = j.values.data + at;
    load_piece(j, j.call.k, h.sample, h.key, block, piece, readable, 1, s.keys);
    transpose(s.keys, j.ld, j.words, j.keys.data + at);
    load_piece(j, j.call.v, h.sample, h.key, block, piece, readable, 1, PAIRS ? s.keys : values);
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
  float *weights, *tops, *sums, *out;
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
  scores<N>(acc, s.queries, s.words, s.keys, s.ld, s.depth, vectors);
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) at[n] = vectors[n];
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

// The bias of the keys of a piece, base 2.
const float* load_bias(const Job& j, const Head& h, i64 block, i64 piece, float* to) {
  const float* bias = j.bias(h);
  if (!bias) return nullptr;
  const i32* order = j.call.order + block * j.call.n + piece * PIECE;
  int slots = j.piece_slots(piece);
  for (int i = 0; i < j.ld; i++)
    to[i] = i < slots && order[i] >= 0 ? bias[order[i]] * LOG2E : 0;
  return to;
}

INLINE u64 low_bits(int count) { return count == 64 ? ~0ull : (1ull << count) - 1; }

// Asks for a share of packed memory that is needed soon.
INLINE void fetch(const float* from, i64 words, i64 share, i64 shares) {
  i64 lines = words / GRANULE;
  for (i64 i = lines * share / shares; i < lines * (share + 1) / shares; i++)
    __builtin_prefetch(from + i * GRANULE, 0, 2);
}

// `next` is where the next piece begins in the packed keys and values.
void attend_piece(const Job& j, const Head& h, i64 block, i64 piece, i64 next, const u64* bits,
                  Scratch& s) {
  const Call& c = j.call;
  u64 readable = j.readable_keys(h.sample, block, piece);
  if (!readable) return;
  u64 padded = low_bits(int(round_up(j.piece_slots(piece), GRANULE)));
  bool masked = bits || readable != padded;
  i64 strips = round_up(c.n, ROWS) / ROWS;
  i64 at = piece_at(j, h.index / j.group, block, piece) * j.ld * j.words;
  const float* bias = load_bias(j, h, block, piece, s.key_bias);
  Strip strip{nullptr, j.keys.data + at, j.words, j.ld, depth_of(j), bias, float(c.scale) * LOG2E,
              {}, nullptr, nullptr, nullptr, nullptr, j.width};
  auto visit = [&](i64 r) {
    strip.queries = s.rows + r * ROWS * j.words;
    strip.weights = s.weights + r * ROWS * PIECE_WORDS;
    strip.tops = s.tops + r * ROWS;
    strip.sums = s.sums + r * ROWS * GRANULE;
    strip.out = s.out + r * ROWS * j.width;
  };
  for (i64 r = 0; r < strips; r++) {
    fetch(j.keys.data + next, j.ld * j.words, r, strips);
    fetch(j.values.data + next, j.ld * j.words, r, strips);
    s.seen[r] = vectors_of(padded);
    if (!masked) continue;
    u64 any = 0;
    for (int m = 0; m < ROWS; m++)
      any |= strip.bits[m] = bits ? bits[r * ROWS + m] & readable : readable;
    s.seen[r] = vectors_of(any);
    visit(r);
    const List list(s.seen[r]);
    for (int i = 0, n; i < list.count; i += n)
      weigh_tile<true>(strip, list.vector + i, n = next_tile(list.count - i));
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
      i64 next = piece_at(j, unit, after, is_last ? 0 : piece + 1) * j.ld * j.words;
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
  i64 block = task % j.nb, begin = task / j.nb * j.heads_per_task, known = -1;
  i64 end = std::min(begin + j.heads_per_task, j.num_units * j.group);
  for (i64 index = begin; index < end; index++) {
    Head h = j.head(index);
    if (h.set != known) fill_bits(j, h.set * j.nb + block, s);
    known = h.set;
    attend_block(j, h, block, s);
  }
}

// One head of queries as both sides of the products of the gradient: rows, and rows transposed.
void pack_both(const Job& j, const Rows& x, const Head& h, i64 block, i64 piece, float factor,
               float* rows, float* across, float* space) {
  float* loaded = PAIRS ? space : rows;
  u64 all = low_bits(j.piece_slots(piece));
  load_piece(j, x, h.sample, h.query, block, piece, all, factor, loaded);
  transpose(loaded, j.ld, j.words, across);
  if (PAIRS) pack_pairs(j, loaded, rows);
}

void pack_queries(const Job& j, i64 task, Scratch& s) {
  const Call& c = j.call;
  i64 index = task / j.nb, block = task % j.nb;
  Head h = j.head(index);
  for (i64 piece = 0; piece < j.pieces; piece++) {
    i64 place = piece_at(j, index, block, piece) * j.ld, at = place * j.words;
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

// Weights of ROWS keys from row r on, for N vectors of queries.
template <int N, bool MASKED>
void weigh_keys(const Pull& p, const Scratch& s, int r, const u8* vectors) {
  V acc[ROWS][N];
  scores<N>(acc, p.keys + r * p.words, p.words, p.queries_t, p.ld, p.depth, vectors);
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
  scores<N>(acc, p.values + r * p.words, p.words, p.pulls_t, p.ld, p.depth, vectors);
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

// Zeros where hidden score gradients would be read across rows.
void clear_unseen(const Scratch& s, int r, Set unseen) {
  const List list(unseen);
  for (int m = 0; m < ROWS; m += PAIR)
    for (int i = 0; i < list.count; i++)
      store((PAIRS ? s.d_pairs : s.d_scores) + (r + m) / PAIR * PIECE + list.vector[i] * W, V{});
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
    if (!p.bits) continue;
    seen &= vectors_of(p.bits[r] | p.bits[r + 1] | p.bits[r + 2] | p.bits[r + 3]);
    clear_unseen(s, r, p.queries_seen & ~seen);
  }
  run_tiles(p, s, p.bits ? WEIGH_SEEN : WEIGH);
  run_tiles(p, s, PULL);
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
  const i64* start = &j.transposed.start[h.set * j.nb + block];
  i64 floats = j.ld * j.words, heads = j.num_units * j.group;
  for (i64 e = start[0]; e < start[1]; e++)
    for (i64 piece = 0; piece < j.pieces; piece++) {
      u64 readable = j.readable_keys(h.sample, block, piece);
      if (!readable) continue;
      i64 query = j.transposed.query[e];
      const float* bias = load_bias(j, h, block, piece, s.key_bias);
      for (i64 other = 0; other < j.pieces; other++) {
        i64 at = piece_at(j, h.index, query, other);
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
  for (i64 piece = 0; piece < j.pieces; piece++) {
    u64 readable = j.readable_keys(h.sample, block, piece);
    i64 at = piece * j.ld * j.words;
    load_piece(j, c.k, h.sample, h.key, block, piece, readable, 1, s.keys + at);
    load_piece(j, c.v, h.sample, h.key, block, piece, readable, 1, s.values + at);
    if (PAIRS) pack_pairs(j, s.keys + at, s.key_pairs + at);
  }
  std::memset(s.d_keys, 0, j.slots * j.width * 4);
  std::memset(s.d_values, 0, j.slots * j.width * 4);
  const i32* order = c.order + block * c.n;
  for (i64 g = 0; g < j.group; g++) {
    Head head = j.head(unit * j.group + g);
    std::fill(s.d_bias, s.d_bias + j.slots, 0.0f);
    pull_head(j, head, block, part, s);
    for (i64 i = 0; i < c.n && c.d_bias; i++)
      if (order[i] >= 0) c.d_bias[j.token_row(head) + order[i]] = s.d_bias[i];
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
  if (c.row_start[0] != 0 || c.row_start[rows] != c.num_entries) return false;
  for (i64 row = 0; row < rows; row++) {
    i64 begin = c.row_start[row], end = c.row_start[row + 1];
    if (begin > end || end > c.num_entries) return false;
    if (c.num_full[row] < 0 || c.num_full[row] > end - begin) return false;
    bool partial = c.num_full[row] < end - begin;
    if (partial && !c.box_key && !c.mask_id) return false;
    for (i64 e = begin; e < end; e++) {
      if (c.key_block[e] < 0 || c.key_block[e] >= nb) return false;
      if (c.mask_id && e - begin >= c.num_full[row])
        if (c.mask_id[e] < 0 || c.mask_id[e] >= c.num_masks) return false;
    }
  }
  return true;
}

Transposed transpose(const Call& c) {
  i64 nb = c.N / c.n, rows = c.plan_batch * c.plan_heads * nb;
  Transposed t;
  t.start.assign(rows + 1, 0);
  t.query.resize(c.num_entries);
  t.mask.resize(c.num_entries);
  for (i64 row = 0; row < rows; row++)
    for (i64 e = c.row_start[row]; e < c.row_start[row + 1]; e++)
      t.start[row - row % nb + c.key_block[e] + 1]++;
  for (i64 row = 0; row < rows; row++) t.start[row + 1] += t.start[row];
  std::vector<i64> next(t.start.begin(), t.start.end() - 1);
  for (i64 row = 0; row < rows; row++)
    for (i64 e = c.row_start[row]; e < c.row_start[row + 1]; e++) {
      i64 at = next[row - row % nb + c.key_block[e]]++;
      bool whole = e - c.row_start[row] < c.num_full[row];
      t.query[at] = i32(row % nb);
      t.mask[at] = whole ? -1 : c.mask_id ? c.mask_id[e] : 0;
    }
  return t;
}

typedef void (*Step)(const Job&, i64, Scratch&);

// Threads that take tasks one by one. They are started for each step: nothing outlives a call, so
// calls from many threads, and from a forked process, do not meet.
struct Team {
  std::vector<Scratch> scratch;

  Team(const Call& c, double flops) {
    double useful = std::min<double>(double(c.threads), 1 + flops / THREAD_FLOPS);
    scratch = std::vector<Scratch>(std::max<i64>(1, i64(useful)));
  }

  void run(const Job& job, i64 num_tasks, Step step) {
    std::atomic<i64> next{0};
    auto work = [&](i64 thread) {
      for (i64 task; (task = next.fetch_add(1)) < num_tasks;) step(job, task, scratch[thread]);
    };
    std::vector<std::thread> others;
    i64 wanted = std::min<i64>(i64(scratch.size()), num_tasks) - 1;
    others.reserve(std::max<i64>(0, wanted));
    try {
      for (i64 t = 0; t < wanted; t++) others.emplace_back(work, t + 1);
    } catch (const std::system_error&) {
      // no more threads to be had: those that run take the rest
    }
    work(0);
    for (auto& thread : others) thread.join();
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
  i64 rows = round_up(j.call.n, ROWS), longest = 0;
  i64 plan_rows = j.call.plan_batch * j.call.plan_heads * j.nb;
  for (i64 row = 0; row < plan_rows; row++)
    longest = std::max<i64>(
        longest, j.call.row_start[row + 1] - j.call.row_start[row] - j.call.num_full[row]);
  s.memory.grow(rows * (j.words + j.width + PIECE + GRANULE + 1) + PIECE * j.words + PIECE +
                7 * GRANULE);
  Carver carve{s.memory.data};
  s.rows = carve.take(rows * j.words);
  s.out = carve.take(rows * j.width);
  s.weights = carve.take(rows * PIECE);
  s.sums = carve.take(rows * GRANULE);
  s.tops = carve.take(rows);
  s.keys = carve.take(PIECE * j.words);
  s.key_bias = carve.take(PIECE);
  s.bits.resize(longest * rows * j.pieces);
  s.seen.resize(rows / ROWS);
}

void prepare_backward(const Job& j, Scratch& s) {
  s.memory.grow(j.slots * (3 * j.words + 2 * j.width + 1) + 4 * PIECE * PIECE + j.width +
                PIECE * j.words + PIECE + 13 * GRANULE);
  Carver carve{s.memory.data};
  s.keys = carve.take(j.slots * j.words);
  s.values = carve.take(j.slots * j.words);
  s.key_pairs = carve.take(j.slots * j.words);
  s.d_keys = carve.take(j.slots * j.width);
  s.d_values = carve.take(j.slots * j.width);
  s.weights = carve.take(PIECE * PIECE);
  s.d_scores = carve.take(PIECE * PIECE);
  s.d_pairs = carve.take(PIECE * PIECE);
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
void clear_unplaced(const Call& c, const Rows& x, i64 heads, const std::vector<bool>& placed) {
  i64 size = c.kind == FLOAT32 ? 4 : 2;
  for (i64 row = 0; row < c.B * heads; row++)
    for (i64 token = 0; token < c.S; token++) {
      i64 at = row / heads * x.sample + row % heads * x.head + token * x.token;
      if (!placed[token]) std::memset(x.data + at * size, 0, c.D * size);
    }
}

void clear_unplaced(const Call& c, float* x, float value, const std::vector<bool>& placed) {
  for (i64 row = 0; x && row < c.B * c.H; row++)
    for (i64 token = 0; token < c.S; token++)
      if (!placed[token]) x[row * c.S + token] = value;
}

// Which tokens stand in a slot; empty where all do.
std::vector<bool> placed_tokens(const Call& c) {
  std::vector<bool> placed(c.S, false);
  i64 count = 0;
  for (i64 slot = 0; slot < c.N; slot++)
    if (c.order[slot] >= 0 && !placed[c.order[slot]]) placed[c.order[slot]] = true, count++;
  return count == c.S ? std::vector<bool>() : placed;
}

i64 units_at_a_time(const Call& c, i64 bytes_per_unit) {
  i64 all = c.B * c.K, fit = std::max<i64>(1, WORKSPACE / std::max<i64>(1, bytes_per_unit));
  return std::min(all, fit);
}

void forward(const Call& c) {
  Job job(c);
  Team team(c, count_flops(c, 2));
  for (Scratch& s : team.scratch) prepare_forward(job, s);
  i64 floats = job.nb * job.slots * job.words, step = units_at_a_time(c, 8 * floats);
  job.keys.grow(step * floats);
  job.values.grow(step * job.nb * job.slots * job.words);
  bool has_rule = c.box_key || c.mask_id;
  for (i64 unit = 0; unit < c.B * c.K; unit += step) {
    job.first_unit = unit;
    job.num_units = std::min(step, c.B * c.K - unit);
    i64 heads = job.num_units * job.group;
    // sharing the bits of a predicate must leave every thread enough tasks
    i64 room = heads * job.nb / (8 * i64(team.scratch.size()));
    job.heads_per_task = has_rule ? std::max<i64>(1, std::min(HEADS_PER_TASK, room)) : 1;
    team.run(job, job.num_units * job.nb, pack_keys);
    i64 chunks = (heads + job.heads_per_task - 1) / job.heads_per_task;
    team.run(job, chunks * job.nb, attend);
  }
  std::vector<bool> placed = placed_tokens(c);
  if (placed.empty()) return;
  clear_unplaced(c, c.out, c.H, placed);
  clear_unplaced(c, c.lse, -INFINITY, placed);
}
// Cuts the key blocks of every unit in flight into parts of about equal work, each of which adds up
// its own gradient of the queries: so many threads share a unit, and sums keep their order.
void cut_parts(Job& job, i64 threads) {
  i64 parts = (2 * threads + job.num_units - 1) / job.num_units;
  job.parts = threads == 1 ? 1 : std::max<i64>(1, std::min<i64>({parts, job.nb, 16}));
  job.part_start.assign(job.num_units * (job.parts + 1), job.nb);
  for (i64 unit = 0; unit < job.num_units; unit++) {
    auto work = [&](i64 block) {
      i64 entries = 1;
      for (i64 g = 0; g < job.group; g++) {
        i64 set = job.head(unit * job.group + g).set;
        const i64* start = &job.transposed.start[set * job.nb + block];
        entries += start[1] - start[0];
      }
      return entries;
    };
    i64 total = 0, done = 0, part = 0;
    for (i64 block = 0; block < job.nb; block++) total += work(block);
    i64* start = &job.part_start[unit * (job.parts + 1)];
    for (i64 block = 0; block < job.nb; block++) {
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
  std::vector<bool> placed = placed_tokens(c);
  if (placed.empty()) return;
  clear_unplaced(c, c.d_q, c.H, placed);
  clear_unplaced(c, c.d_k, c.K, placed);
  clear_unplaced(c, c.d_v, c.K, placed);
  clear_unplaced(c, c.d_bias, 0, placed);
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
