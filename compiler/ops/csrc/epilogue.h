// What linear layers over packed weights have in common (../epilogue.py): panels, and what is done
// to float32 sums before they are rounded to the type of the result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vec.h"

namespace fxlm {

constexpr int64_t kPanel = 64;

// Outputs of a panel that its result has: of a gated weight, half are gates, half are factors.
constexpr int kPanelPairs = kPanel / 2;

enum class Function { none, relu, silu, gelu, gelu_tanh };

// Gated: function(y[:, :outputs / 2]) * y[:, outputs / 2:] is the result.
struct Epilogue {
  Function function = Function::none;
  bool gated = false;
  bool is_none() const { return function == Function::none && !gated; }
  int64_t columns(int64_t outputs) const { return gated ? outputs / 2 : outputs; }
};

// The output at a place of a panel; none is `outputs`.
inline int64_t output_at(int64_t panel, int64_t place, int64_t outputs, bool gated) {
  if (!gated) return std::min(panel * kPanel + place, outputs);
  const int64_t half = outputs / 2, pair = panel * kPanelPairs + place % kPanelPairs;
  return pair < half ? place / kPanelPairs * half + pair : outputs;
}

namespace {

// The first `count` of `bias` are added, if there is one.
template <class T>
vf plus_bias(vf value, const T* bias, int count) {
  if (bias == nullptr) return value;
  return value + (count == W ? load(bias) : load_part(bias, count));
}

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

}  // namespace
}  // namespace fxlm
