// Rows of numbers in tensors, and packed; the memory and the threads that engines work with.

#pragma once

#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "numbers.h"

namespace {

constexpr double THREAD_FLOPS = 4e6;     // work that pays for starting a thread
constexpr i64 HUGE_PAGE = 2 << 20;       // in bytes; with small ones, blocks miss the page tables

// Memory of (.., heads, tokens, D) numbers with unit last stride; strides count numbers.
struct Rows {
  char* data;
  i64 sample, head, token;
  char* at(i64 b, i64 h, i64 t, i64 kind) const {
    return data + (b * sample + h * head + t * token) * (kind == FLOAT32 ? 4 : 2);
  }
};

// D numbers as packed words, zeros behind them, or for null; floats are multiplied by `factor`,
// pairs are not.
void load_row(const char* from, i64 kind, i64 D, i64 words, float factor, float* to) {
  if (!from || PAIRS) {
    i64 held = from ? D * 2 : 0;
    if (held) std::memcpy(to, from, held);
    std::memset(reinterpret_cast<char*>(to) + held, 0, words * 4 - held);
    return;
  }
  const u16* halves = reinterpret_cast<const u16*>(from);
  const float* floats = reinterpret_cast<const float*>(from);
  i64 d = 0;
  if (kind == FLOAT32) {
    for (; d + W <= D; d += W) store(to + d, load(floats + d) * factor);
    for (; d < D; d++) to[d] = floats[d] * factor;
  } else if (kind == BFLOAT16) {
    for (; d < D; d++) to[d] = as_float(u32(halves[d]) << 16) * factor;
  } else {
    for (; d < D; d++) to[d] = from_half(halves[d]) * factor;
  }
  for (; d < words; d++) to[d] = 0;
}

void store_row(const float* from, float factor, i64 kind, i64 D, char* to) {
  u16* halves = reinterpret_cast<u16*>(to);
  float* floats = reinterpret_cast<float*>(to);
  if (kind == FLOAT32)
    for (i64 d = 0; d < D; d++) floats[d] = from[d] * factor;
  else if (kind == BFLOAT16)
    for (i64 d = 0; d < D; d++) halves[d] = to_bfloat16(from[d] * factor);
  else
    for (i64 d = 0; d < D; d++) halves[d] = to_half(from[d] * factor);
}

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

// Calls step(thread, task) for every task, on up to so many threads, which take tasks one by one.
// They are started for each call: nothing outlives it, so calls from many threads, and from a forked
// process, do not meet.
template <typename Step>
void share_out(i64 threads, i64 num_tasks, const Step& step) {
  std::atomic<i64> next{0};
  auto work = [&](i64 thread) {
    for (i64 task; (task = next.fetch_add(1)) < num_tasks;) step(thread, task);
  };
  std::vector<std::thread> others;
  i64 wanted = std::min(threads, num_tasks) - 1;
  others.reserve(std::max<i64>(0, wanted));
  try {
    for (i64 thread = 1; thread <= wanted; thread++) others.emplace_back(work, thread);
  } catch (const std::system_error&) {
    // no more threads to be had: those that run take the rest
  }
  work(0);
  for (auto& thread : others) thread.join();
}

}  // namespace
