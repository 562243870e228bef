// What the kernels of linear layers share around their products: how many threads, and the last
// step of a row, from sums to outputs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "linear.h"
#include "pages.h"
#include "parallel.h"

namespace fxlm {
namespace {

constexpr int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

constexpr int64_t kSerialWork = 1 << 14;  // less is done before another thread has woken up

inline int64_t threads_for(int64_t num_rows, int64_t steps) {  // steps of all panels
  return steps * (num_rows + 4) < kSerialWork ? 1 : num_threads();
}

template <class Body>
void runs(int64_t threads, int64_t count, const Body& body) {
  if (threads > 1 && count > 1)
    for_each_run(count, body);
  else if (count > 0)
    body(0, count);
}

// 32 values -> a line of bf16 past the caches: fetched into them first, the lines of many rows, which
// lie far apart, would take the place of x. False: not done, this is no line. `end_stream` makes
// what a thread has written so seen before what it writes next.
inline bool stream_line(Bf16* out, const vf* values) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(out) % 64 != 0) return false;
  const __m256i low = (__m256i)bf16_bits(values[0]), high = (__m256i)bf16_bits(values[1]);
  _mm512_stream_si512((__m512i*)out, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  return true;
#else
  (void)out, (void)values;
  return false;
#endif
}
inline void end_stream() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// The same for a part of a line, one of several in a row that make it whole.
template <class T>
void stream_part(T* out, vf value) {
  store(out, value);
}
#if defined(__AVX512F__)
inline void stream_part(Bf16* out, vf value) {
  _mm256_stream_si256((__m256i*)out, (__m256i)bf16_bits(value));
}
#endif

// Sums [width] of one row, from column `column` of the result on, and of their factors, if gated
// -> out, by way of the function; of many rows, whole lines past the caches. Not inlined: the same
// bits whoever calls, and no registers saved between the stores, which would wait behind them.
template <class T>
__attribute__((noinline)) void finish_activated(const PackedLinear& args, const float* sums,
                                                const float* factors, int64_t column,
                                                int64_t width, int64_t row, bool many) {
  const int64_t columns = args.epilogue.columns(args.outputs);
  const int last = int(std::min(width, columns - column));
  T* out = static_cast<T*>(args.out) + row * columns + column;
  const T* bias = args.bias ? static_cast<const T*>(args.bias) + column : nullptr;
  const T* others = factors && bias ? bias + columns : nullptr;
  const bool stream = many && last % 32 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  for (int i = 0; i < last; i += W) {
    const int count = std::min(W, last - i);
    vf value = plus_bias(load(sums + i), bias ? bias + i : bias, count);
    value = apply(args.epilogue.function, value);
    if (factors)
      value = value * plus_bias(load(factors + i), others ? others + i : others, count);
    if (stream)
      stream_part(out + i, value);
    else if (count == W)
      store(out + i, value);
    else
      store_part(out + i, value, count);
  }
}

// Sums [width] of one row, from output `column` on -> out, with the bias and a function, no gate.
template <class T>
void finish(const PackedLinear& args, const float* sums, int64_t column, int64_t width,
            int64_t row) {
  if (!args.epilogue.is_none())
    return finish_activated<T>(args, sums, nullptr, column, width, row, false);
  T* out = static_cast<T*>(args.out) + row * args.outputs + column;
  const T* bias = args.bias ? static_cast<const T*>(args.bias) + column : nullptr;
  const int count = int(std::min(width, args.outputs - column));
  if (count <= 0) return;
  int i = 0;
  for (; i + W <= count; i += W)
    store(out + i, bias ? load(sums + i) + load(bias + i) : load(sums + i));
  if (i == count) return;
  const vf last = load(sums + i);
  store_part(out + i, bias ? last + load_part(bias + i, count - i) : last, count - i);
}

// Sums [kPanel] of one row -> out, with whatever follows.
template <class T>
void finish_panel(const PackedLinear& args, const float* sums, int64_t panel, int64_t row) {
  if (args.epilogue.gated)
    finish_activated<T>(args, sums, sums + kPanelPairs, panel * kPanelPairs, kPanelPairs, row,
                        false);
  else
    finish<T>(args, sums, panel * kPanel, kPanel, row);
}

}  // namespace
}  // namespace fxlm
