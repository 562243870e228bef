// Register-tiled products C[m][n] += sum_k A[m][k] B[k][n] of attention, and the packing of keys.
//
// Each C[m][n] is one chain of additions in ascending k, whatever tile it falls in: how rows are
// cut changes no bit. A B is a small struct: what it loads, how it multiplies, what it prefetches.
// The pairs of bf16 are packed as AMX wants its second operand: a B for tiles belongs here.
#pragma once

#include <type_traits>

#include "vec.h"

namespace fxlm {
namespace {

constexpr int kKeys = 64;                  // keys packed at a time
constexpr int kColumns = W == 16 ? 4 : 2;  // vectors a register tile is wide

// Blocks of the cache lie anywhere, so that the hardware cannot tell what comes next. Each B
// prefetches in its inner loop, a little a step, what will be read after it: memory and arithmetic
// then overlap. `quiet` is the same B without, for all passes but the first.

#if defined(__AVX512BF16__)
// Pairs of bf16: each lane adds the products of its two pairs.
struct Pairs {
  static vf fma(vf sum, uint32_t a, vf b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};
#endif

template <int M, int N, class B>
inline __attribute__((always_inline)) void product(const typename B::A* a, int lda, const B& b,
                                                   int steps, int column, float* c, int ldc) {
  vf sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[m][n] = load(c + m * ldc + column + n * W);
#pragma GCC unroll 1
  for (int k = 0; k < steps; ++k) {
    b.prefetch(k, column, N * W);
    decltype(b(0, 0)) line[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) line[n] = b(k, column + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const typename B::A factor = a[m * lda + k];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] = B::fma(sum[m][n], factor, line[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(c + m * ldc + column + n * W, sum[m][n]);
}

template <int M, class B>
void product_columns(const typename B::A* a, int lda, const B& b, int steps, int columns, float* c,
                     int ldc) {
  int n = 0;
  for (; n + kColumns * W <= columns; n += kColumns * W)
    product<M, kColumns>(a, lda, b, steps, n, c, ldc);
  for (; n < columns; n += W) product<M, 1>(a, lda, b, steps, n, c, ldc);
}

// `columns` is a multiple of W.
template <class B>
void product_rows(const typename B::A* a, int lda, const B& first, int steps, int columns,
                  float* c, int ldc, int rows) {
  B b = first;
  auto take = [&](auto size) {
    constexpr int M = decltype(size)::value;
    product_columns<M>(a, lda, b, steps, columns, c, ldc);
    a += M * lda;
    c += M * ldc;
    rows -= M;
    b = first.quiet();
  };
  while (rows >= 6) take(std::integral_constant<int, 6>{});
  if (rows >= 4) take(std::integral_constant<int, 4>{});
  if (rows >= 2) take(std::integral_constant<int, 2>{});
  if (rows >= 1) take(std::integral_constant<int, 1>{});
}

// ---- packing ----------------------------------------------------------------------------------

template <class B, class T>
inline vf load_steps(const T* row, int width) {  // the next W steps of a row, zeros past `width`
  constexpr int count = W * B::per_step;
  if constexpr (B::per_step == 1) {
    return width >= count ? load(row) : load_part(row, width);
  } else {
    if (width >= count) return bits_load<vf>(row);
    T part[count] = {};
    std::memcpy(part, row, width * sizeof(T));
    return bits_load<vf>(part);
  }
}

// rows[kKeys] of `width` elements -> packed[step][kKeys]; steps are rounded up to W.
template <class B, class T>
void pack_keys(const T* const* rows, int width, void* packed) {
  float* out = static_cast<float*>(packed);
  for (int first = 0; first < kKeys; first += W)
    for (int step = 0; step * B::per_step < width; step += W) {
      const int column = step * B::per_step;
      vf block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) block[i] = load_steps<B>(rows[first + i] + column, width - column);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + int64_t(step + i) * kKeys + first, block[i]);
    }
}

}  // namespace
}  // namespace fxlm
