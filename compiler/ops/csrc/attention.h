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

// What the caches hold: elements of q's type, or codes with a scale a token.
enum class Store { same, int8, fp8 };

struct Attention {
  Dtype dtype;  // of q, k, v and out
  Store store;
  Strided q, k, v;
  void *k_cache, *v_cache;  // [blocks, kv_heads] chunks (kv_cache.h), contiguous
  void* out;                // [tokens, heads, dv], contiguous
  const int64_t* slots;     // [tokens]
  const int32_t *query_start, *seq_lens, *block_table;
  int64_t table_stride;
  int64_t tokens, sequences, heads, kv_heads, dk, dv, block_size;
  int64_t window, chunk;  // 0 = off
  float scale, softcap;   // softcap 0 = off
  const float *sinks, *slopes;  // [heads] or null
  const float *k_scale, *v_scale;  // [kv_heads], scales to store codes with; null: of each token
};

// Writes k and v at their slots (nothing where k.data is null).
void write_cache(const Attention& args);
// Whether the kernels serve these sizes; others are left to the reference.
bool covers(const Attention& args);
// Attends; the arguments have been checked, block numbers and lengths among them.
void paged_attention(const Attention& args);

}  // namespace fxlm
