// What surrounds attention in a transformer block, each in one pass over the tokens: norms with the
// scale and shift that follow them, rotary embedding, gated sums, and GELU.
//
// Letters: B batch, S tokens, C channels, H heads, D head dim.

#include "rows.h"

namespace {

constexpr i64 TOKENS = 32;               // to a task
constexpr i64 NUMBERS = 1 << 16;         // that pay for starting a thread

typedef u16 Halves __attribute__((vector_size(2 * W)));

// (B, S, C) numbers with unit last stride, or null.
struct Tokens {
  char* data;
  i64 sample, token;
  char* at(i64 b, i64 s, i64 size) const {
    return data ? data + (b * sample + s * token) * size : nullptr;
  }
};

// `x`, `y` and `out` are of `kind`, float32 or bfloat16, all else is float32. C and D are multiples
// of the widest vector.
struct Call {
  Tokens x, y, out, scale, shift, cosine, sine;
  i64 B, S, C, D, kind, threads;
  double plus, epsilon;
};

template <int KIND>
INLINE V read(const char* row, i64 c) {
  if (KIND == FLOAT32) return load(reinterpret_cast<const float*>(row) + c);
  Halves x;
  std::memcpy(&x, row + c * 2, sizeof x);
  return (V)(__builtin_convertvector(x, U) << 16);
}

template <int KIND>
INLINE void write(char* row, i64 c, V x) {
  if (KIND == FLOAT32) {
    store(reinterpret_cast<float*>(row) + c, x);
    return;
  }
#if VIDATTN_PAIRS
  __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
#else
  // to nearest, ties to even; what is no number stays none
  U bits = (U)x, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  U none = (U)((I)(x != x));
  Halves halves = __builtin_convertvector((rounded & ~none) | ((bits >> 16 | 0x40) & none), Halves);
#endif
  std::memcpy(row + c * 2, &halves, sizeof halves);
}

#if VIDATTN_WIDTH == 16
INLINE V even(V x) {
  return VIDATTN_SHUFFLE(x, x, 0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 14, 14);
}
INLINE V odd(V x) {
  return VIDATTN_SHUFFLE(x, x, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13, 13, 15, 15);
}
INLINE V exchanged(V x) {
  return VIDATTN_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
#elif VIDATTN_WIDTH == 8
INLINE V even(V x) { return VIDATTN_SHUFFLE(x, x, 0, 0, 2, 2, 4, 4, 6, 6); }
INLINE V odd(V x) { return VIDATTN_SHUFFLE(x, x, 1, 1, 3, 3, 5, 5, 7, 7); }
INLINE V exchanged(V x) { return VIDATTN_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6); }
#else
INLINE V even(V x) { return VIDATTN_SHUFFLE(x, x, 0, 0, 2, 2); }
INLINE V odd(V x) { return VIDATTN_SHUFFLE(x, x, 1, 1, 3, 3); }
INLINE V exchanged(V x) { return VIDATTN_SHUFFLE(x, x, 1, 0, 3, 2); }
#endif

const float* floats(const char* row) { return reinterpret_cast<const float*>(row); }

// Mean zero and variance one over the channels, times (plus + scale), plus shift.
template <int KIND>
void layer_norm(const Call& c, i64 b, i64 s) {
  i64 size = KIND == FLOAT32 ? 4 : 2;
  const char* x = c.x.at(b, s, size);
  const float* scale = floats(c.scale.at(b, s, 4));
  const float* shift = floats(c.shift.at(b, s, 4));
  char* out = c.out.at(b, s, size);
  V sum = splat(0), squares = splat(0);
  for (i64 i = 0; i < c.C; i += W) sum += read<KIND>(x, i);
  V mean = splat(sum_of(sum) / float(c.C));
  for (i64 i = 0; i < c.C; i += W) {
    V away = read<KIND>(x, i) - mean;
    squares += away * away;
  }
  V factor = splat(1 / std::sqrt(sum_of(squares) / float(c.C) + float(c.epsilon)));
  V plus = splat(float(c.plus));
  for (i64 i = 0; i < c.C; i += W) {
    V y = (read<KIND>(x, i) - mean) * factor;
    if (scale) y *= plus + load(scale + i);
    if (shift) y += load(shift + i);
    write<KIND>(out, i, y);
  }
}

// Root mean square one over the channels, times scale; then the pairs of channels of every head are
// turned by the angles of the token, if there are any.
template <int KIND>
void rms_norm(const Call& c, i64 b, i64 s) {
  i64 size = KIND == FLOAT32 ? 4 : 2;
  const char* x = c.x.at(b, s, size);
  const float* scale = floats(c.scale.at(b, s, 4));
  const float* cosine = floats(c.cosine.at(b, s, 4));
  const float* sine = floats(c.sine.at(b, s, 4));
  char* out = c.out.at(b, s, size);
  V squares = splat(0);
  for (i64 i = 0; i < c.C; i += W) {
    V y = read<KIND>(x, i);
    squares += y * y;
  }
  V factor = splat(1 / std::sqrt(sum_of(squares) / float(c.C) + float(c.epsilon)));
  U sign;
  for (int i = 0; i < W; i++) sign[i] = i % 2 ? 0 : 0x80000000u;
  for (i64 head = 0; head < c.C; head += c.D)
    for (i64 d = 0; d < c.D; d += W) {
      V y = read<KIND>(x, head + d) * factor;
      if (scale) y *= load(scale + head + d);
      if (cosine) {
        V turned = (V)((U)exchanged(y) ^ sign);
        y = y * even(load(cosine + d)) + turned * odd(load(sine + d));
      }
      write<KIND>(out, head + d, y);
    }
}

// x + y * scale.
template <int KIND>
void add_scaled(const Call& c, i64 b, i64 s) {
  i64 size = KIND == FLOAT32 ? 4 : 2;
  const char *x = c.x.at(b, s, size), *y = c.y.at(b, s, size);
  const float* scale = floats(c.scale.at(b, s, 4));
  char* out = c.out.at(b, s, size);
  for (i64 i = 0; i < c.C; i += W)
    write<KIND>(out, i, read<KIND>(x, i) + read<KIND>(y, i) * load(scale + i));
}

// x times the share of a normal distribution below it, by the usual approximation with tanh.
template <int KIND>
void gelu(const Call& c, i64 b, i64 s) {
  i64 size = KIND == FLOAT32 ? 4 : 2;
  const char* x = c.x.at(b, s, size);
  char* out = c.out.at(b, s, size);
  const float first = -2 * LOG2E * 0.7978845608f, third = first * 0.044715f;
  for (i64 i = 0; i < c.C; i += W) {
    V y = read<KIND>(x, i), power = y * (y * y * third + first);
    power = -larger(splat(-126), -power);
    write<KIND>(out, i, y / (1 + exp2(power)));
  }
}

void run(const Call& c, void (*row)(const Call&, i64, i64)) {
  i64 runs = (c.S + TOKENS - 1) / TOKENS;
  i64 threads = std::min(c.threads, 1 + c.B * c.S * c.C / NUMBERS);
  share_out(threads, c.B * runs, [&](i64, i64 task) {
    i64 b = task / runs, begin = task % runs * TOKENS, end = std::min(begin + TOKENS, c.S);
    for (i64 s = begin; s < end; s++) row(c, b, s);
  });
}

}  // namespace

extern "C" {
void vidattn_layer_norm(const Call* c) {
  run(*c, c->kind == FLOAT32 ? layer_norm<FLOAT32> : layer_norm<BFLOAT16>);
}
void vidattn_rms_norm(const Call* c) {
  run(*c, c->kind == FLOAT32 ? rms_norm<FLOAT32> : rms_norm<BFLOAT16>);
}
void vidattn_add_scaled(const Call* c) {
  run(*c, c->kind == FLOAT32 ? add_scaled<FLOAT32> : add_scaled<BFLOAT16>);
}
void vidattn_gelu(const Call* c) {
  run(*c, c->kind == FLOAT32 ? gelu<FLOAT32> : gelu<BFLOAT16>);
}
}
