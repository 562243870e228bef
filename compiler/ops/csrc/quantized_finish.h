// The last step of a row of quantized.cpp: from the sums of a panel to outputs, by way of the row's
// scale, the bias, a function and a gate. All of it in float32, rounded once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "quantized.h"
#include "vec.h"

namespace fxlm {
namespace {

inline vf apply(Function function, vf x) {
  switch (function) {
    case Function::none:
      return x;
    case Function::relu:
      return x < 0.0f ? vf{} : x;  // NaN stays NaN
    case Function::silu:
      return x * vsigmoid(x);
    case Function::gelu: {  // x Phi(x)
      const vf tail = 0.5f * verfc(bit_cast<vf>(bit_cast<vu>(x) & 0x7fffffffu) * 0.70710678f);
      return x * (x < 0.0f ? tail : 1.0f - tail);
    }
    case Function::gelu_tanh:  // (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + ...)
      return x * vsigmoid(1.59576912f * (x + 0.044715f * (x * x * x)));
  }
  return x;
}

template <class T>
vf scaled(const float* sums, float row_scale, const T* bias, int count) {
  const vf value = load(sums) * row_scale;
  if (bias == nullptr) return value;
  return value + (count == W ? load(bias) : load_part(bias, count));
}

template <class T>
void write(const QuantizedLinear& args, const float* sums, float row_scale, int64_t panel,
           int64_t row) {
  const int64_t wide = args.gated ? kPanelPairs : kPanel, column = panel * wide;
  const int64_t columns = args.gated ? args.outputs / 2 : args.outputs;
  T* out = static_cast<T*>(args.out) + row * columns + column;
  const T* bias = args.bias ? static_cast<const T*>(args.bias) + column : nullptr;
  const int count = int(std::min(wide, columns - column));
  for (int i = 0; i < count; i += W) {
    const int part = std::min(W, count - i);
    vf value = apply(args.function, scaled(sums + i, row_scale, bias ? bias + i : bias, part));
    if (args.gated)
      value = value * scaled(sums + kPanelPairs + i, row_scale, bias ? bias + columns + i : bias,
                             part);
    if (part == W)
      store(out + i, value);
    else
      store_part(out + i, value, part);
  }
}

// Sums [kPanel] of one row -> out.
void finish(const QuantizedLinear& args, const float* sums, float row_scale, int64_t panel,
            int64_t row) {
  switch (args.dtype) {
    case Dtype::f32:
      return write<float>(args, sums, row_scale, panel, row);
    case Dtype::bf16:
      return write<Bf16>(args, sums, row_scale, panel, row);
    case Dtype::f16:
      return write<F16>(args, sums, row_scale, panel, row);
  }
}

}  // namespace
}  // namespace fxlm
