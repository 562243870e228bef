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

inline int64_t threads_for(const PackedLinear& args, int64_t steps) {  // steps of all panels
  return steps * (args.num_rows + 4) < kSerialWork ? 1 : num_threads();
}

template <class Body>
void runs(int64_t threads, int64_t count, const Body& body) {
  if (threads > 1 && count > 1)
    for_each_run(count, body);
  else if (count > 0)
    body(0, count);
}

// Sums [width] of one row, from output `column` on -> out, with the bias.
template <class T>
void finish(const PackedLinear& args, const float* sums, int64_t column, int64_t width,
            int64_t row) {
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

}  // namespace
}  // namespace fxlm
