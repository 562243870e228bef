// Paged attention on CPU: the arguments, with no torch type in sight.
#pragma once

#include <cstdint>

#include "vec.h"

namespace fxlm {

// A tensor [heads, tokens, width] with any strides, counted in elements; data null = absent.
struct Strided {
  void* data;
  int64_t head, token, dim;
};

struct Attention {
  Dtype dtype;  // of q, k, v, both caches and out
  Strided q, k, v;
  void *k_cache, *v_cache;  // [blocks, kv_heads, block_size, dk | dv], contiguous
  void* out;                // [tokens, heads, dv], contiguous
  const int64_t* slots;     // [tokens]
  const int32_t *query_start, *seq_lens, *block_table;
  int64_t table_stride;
  int64_t tokens, sequences, heads, kv_heads, dk, dv, block_size;
  int64_t window, chunk;  // 0 = off
  float scale, softcap;   // softcap 0 = off
  const float *sinks, *slopes;  // [heads] or null
};

// Writes k and v at their slots (nothing where k.data is null).
void write_cache(const Attention& args);
// Attends; the arguments have been checked, block numbers and lengths among them.
void paged_attention(const Attention& args);

}  // namespace fxlm
