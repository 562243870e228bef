// The last step of a panel of quantized.cpp: from sums to outputs, by way of each row's scale, the
// bias, a function and a gate. All of it in float32, rounded once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "quantized.h"
#include "vec.h"

namespace fxlm {
namespace {

// Sums [count][kPanel] of rows from `first` on -> out. Plain: neither function nor gate.
template <class T, bool kPlain>
void write(const QuantizedLinear& args, const float* sums, const float* row_scale, int64_t panel,
           int64_t first, int64_t count) {
  const bool gated = !kPlain && args.epilogue.gated;
  const int64_t wide = gated ? kPanelPairs : kPanel, column = panel * wide;
  const int64_t columns = kPlain ? args.outputs : args.epilogue.columns(args.outputs);
  const int last = int(std::min(wide, columns - column));
  const T* bias = args.bias ? static_cast<const T*>(args.bias) + column : nullptr;
  for (int64_t row = first; row < first + count; ++row, sums += kPanel) {
    T* out = static_cast<T*>(args.out) + row * columns + column;
    for (int i = 0; i < last; i += W) {
      const int part = std::min(W, last - i);
      vf value = plus_bias(load(sums + i) * row_scale[row], bias ? bias + i : bias, part);
      if (!kPlain) value = apply(args.epilogue.function, value);
      if (gated)
        value = value * plus_bias(load(sums + kPanelPairs + i) * row_scale[row],
                                  bias ? bias + columns + i : bias, part);
      if (part == W)
        store(out + i, value);
      else
        store_part(out + i, value, part);
    }
  }
}

template <class T, class... Of>
void write_any(const QuantizedLinear& args, Of... of) {
  if (args.epilogue.is_none())
    write<T, true>(args, of...);
  else
    write<T, false>(args, of...);
}

template <class... Of>
void finish(const QuantizedLinear& args, Of... of) {
  switch (args.dtype) {
    case Dtype::f32:
      return write_any<float>(args, of...);
    case Dtype::bf16:
      return write_any<Bf16>(args, of...);
    case Dtype::f16:
      return write_any<F16>(args, of...);
  }
}

}  // namespace
}  // namespace fxlm
