// Sampling on CPU: the arguments, with no torch type in sight.
#pragma once

#include <cstdint>

#include "vec.h"

namespace fxlm {

// Columns as fxlm::sample's schema has them; strides of rows in elements, columns are dense.
struct Sample {
  Dtype dtype;  // of logits
  const void* logits;
  int64_t rows, vocabulary, logits_stride;
  const float* floats;
  int64_t floats_stride;
  const int64_t* ints;
  int64_t ints_stride;
  const int32_t* adjust_start;
  const int64_t* adjust_ids;
  const int32_t* adjust_counts;
  const float* adjust_bias;
  int64_t adjusts, max_logprobs;
  int64_t* token_ids;
  float* logprobs;
  int64_t* logprob_ids;
  int64_t* ranks;
};

void sample(const Sample& args);

}  // namespace fxlm
