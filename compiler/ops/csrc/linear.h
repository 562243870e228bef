// Linear layers over packed weights on CPU: the arguments, with no torch type in sight.
//
// Packed weights are panels of kPanel outputs, each one sequential stream: [panel][step][kPanel]
// units. A unit holds `per_step` inputs of one output: two for bf16 (the pairs that vdpbf16ps and
// AMX tiles take), one otherwise. What lies past the weight's sizes is zero.
#pragma once

#include <cstdint>

#include "epilogue.h"
#include "vec.h"

namespace fxlm {

constexpr int64_t inputs_per_step(Dtype dtype) { return dtype == Dtype::bf16 ? 2 : 1; }

struct PackWeight {
  Dtype dtype;
  const void* weight;  // [outputs, inputs], dense in its last dimension
  int64_t outputs, inputs, row_stride;
  bool gated;  // panels hold as many of the first half of the outputs as of the second
  void* packed;
};

struct PackedLinear {
  Dtype dtype;  // of x, packed, bias and out
  Epilogue epilogue;
  const void* x;
  const int64_t* rows;    // where each row of x begins, in elements
  int64_t x_stride;       // between neighbours in a row of x
  int64_t num_rows, inputs, outputs;
  const void* packed;
  const void* bias;       // [outputs] or null
  void* out;              // [num_rows, outputs], or half as many if gated; contiguous
};

struct PackedRows {
  Dtype dtype;
  const void* packed;
  const int64_t* ids;  // checked
  int64_t count, inputs;
  void* out;  // [count, inputs], contiguous
};

void pack_weight(const PackWeight& args);
void packed_linear(const PackedLinear& args);
bool tiled_linear(const PackedLinear& args);  // bf16 on AMX; false: not done, there is none
void packed_rows(const PackedRows& args);

}  // namespace fxlm
