// Linear layers over quantized weights on CPU: the arguments, with no torch type in sight.
//
// The layout of packed codes and scales, and what a code means, is described in ../quantized.py:
// panels of kPanel outputs; four neighbouring inputs of an output are one 32-bit word.
#pragma once

#include <cstdint>

#include "linear.h"
#include "vec.h"

namespace fxlm {

// int4: nibbles, code + 8. table4: nibbles, an index. fp8: e4m3fn; its NaN is read as 480.
enum class Code { int8, int4, table4, fp8 };

constexpr int64_t inputs_per_word(Code code) {
  return code == Code::int4 || code == Code::table4 ? 8 : 4;
}

struct QuantizedLinear {
  Dtype dtype;  // of x, bias and out
  Code code;
  Epilogue epilogue;
  bool round_rows;        // each row of x is rounded to int8 first
  const void* x;
  const int64_t* rows;    // where each row of x begins, in elements
  int64_t x_stride;       // between neighbours in a row of x
  int64_t num_rows, inputs, outputs;
  int64_t group;          // inputs that share a scale, at least 1
  const void* packed;
  const float* scale;     // [panels, groups, kPanel]
  const float* offset;    // alike, or null
  const float* table;     // [16] where code is table4
  const void* bias;       // [outputs] or null
  void* out;              // [num_rows, outputs], or half as many if gated; contiguous
};

struct PackCodes {
  Code code;
  const void* codes;  // [outputs, inputs], dense in its last dimension
  int64_t outputs, inputs, row_stride;
  bool gated;  // panels hold as many of the first half of the outputs as of the second
  void* packed;
};

// Inputs that are summed before a scale is applied: a group or, of a large one, an equal part.
// 0 where the kernels cannot cut the groups: the reference serves.
int64_t segment_inputs(Code code, int64_t group, int64_t inputs);

void quantized_linear(const QuantizedLinear& args);
void pack_codes(const PackCodes& args);

}  // namespace fxlm
