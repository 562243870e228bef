// Products of a tile of rows with a panel of quantized weights, codes decoded in registers.
//
// Families. `Integers` multiplies bytes exactly: rows of x come as planes of signed bytes (one
// for int8 activations, two or three for the digits of 16- or 24-bit fixed point), weights as
// unsigned bytes. `Decoded` widens codes to float32, for codes that are on no even grid.
//
// Sums. A segment of inputs is summed by itself, then scaled and added to the sum of the output:
// one chain in ascending order of segments. What a sum goes through depends on neither the rows of
// a tile nor its columns; every multiply-add is spelled out, so the compiler decides on none.
#pragma once

#include <cstdint>

#include "quantized.h"
#include "vec.h"

namespace fxlm {
namespace {

inline vf fused(vf a, vf b, vf c) {  // a * b + c
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

// ---- four bytes times four bytes, added to 32 bits --------------------------------------------

// Digits: four signed bytes of x. Words: the weights of four inputs and W outputs, made ready.
// kShift of a code: what Words hold beyond the code's value, owed back as kShift * sum of x.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Digits = uint32_t;
using Words = vu;
constexpr int kShift8 = 128, kShift4 = 8;

inline Digits digits(const int8_t* four) { return bits_load<uint32_t>(four); }
inline Words words8(vu codes) { return codes ^ 0x80808080u; }
inline Words low_words(vu codes) { return codes & 0x0f0f0f0fu; }
inline Words high_words(vu codes) { return (codes >> 4) & 0x0f0f0f0fu; }
inline vi dot(vi sum, const Words& w, Digits x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(int(x)));
#else
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(int(x)));
#endif
}
#else
// 16-bit pairs, so that no product saturates: inputs 0 and 2, and 1 and 3, of each word.
struct Digits {
  uint32_t even, odd;
};
struct Words {
  vi even, odd;
};
constexpr int kShift8 = 0, kShift4 = 8;

inline uint32_t pair(int first, int second) {
  return uint32_t(uint16_t(first)) | uint32_t(uint16_t(second)) << 16;
}
inline Digits digits(const int8_t* four) {
  return {pair(four[0], four[2]), pair(four[1], four[3])};
}
typedef int16_t vs __attribute__((vector_size(W * 4)));
inline Words words8(vu codes) {
  const vs halves = bit_cast<vs>(codes);
  return {bit_cast<vi>((halves << 8) >> 8), bit_cast<vi>(halves >> 8)};
}
inline Words unsigned_words(vu codes) {
  return {bit_cast<vi>(codes & 0x00ff00ffu), bit_cast<vi>((codes >> 8) & 0x00ff00ffu)};
}
inline Words low_words(vu codes) { return unsigned_words(codes & 0x0f0f0f0fu); }
inline Words high_words(vu codes) { return unsigned_words((codes >> 4) & 0x0f0f0f0fu); }
inline vi pair_dot(vi sum, vi w, uint32_t x) {
#if defined(__AVX512BW__)
  return sum + (vi)_mm512_madd_epi16((__m512i)w, _mm512_set1_epi32(int(x)));
#elif defined(__AVX2__)
  return sum + (vi)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(int(x)));
#elif defined(__SSE2__)
  return sum + (vi)_mm_madd_epi16((__m128i)w, _mm_set1_epi32(int(x)));
#else
  return sum + ((w << 16) >> 16) * int32_t(int16_t(x)) + (w >> 16) * (int32_t(x) >> 16);
#endif
}
inline vi dot(vi sum, const Words& w, const Digits& x) {
  return pair_dot(pair_dot(sum, w.even, x.even), w.odd, x.odd);
}
#endif

// ---- one segment ------------------------------------------------------------------------------

// Where a tile reads and adds: pointers at its first row, this segment, this column of the panel.
struct Weights {
  const uint32_t* words;  // [steps][kPanel]
  const float* scale;     // [kPanel]
  const float* offset;    // alike, or null
};

// Lines [first, last) of each step, `distance` bytes on from what is read, into the second-level
// cache (linear.cpp says why).
struct Prefetch {
  int64_t distance;
  int first, last;
  void operator()(const uint32_t* step) const {
    const char* from = reinterpret_cast<const char*>(step) + distance;
    for (int line = first; line < last; ++line) __builtin_prefetch(from + line * 64, 0, 2);
  }
};

// What a row of x is in a segment, beyond its digits.
struct Head {
  float scale;  // of planes; unused for one plane, whose scale belongs to the whole row
  float sum;    // of the inputs, as rounded
};

template <int M, int N>
inline __attribute__((always_inline)) void add_scaled(const vf (&acc)[M][N], const Head* heads,
                                                      const Weights& w, float* sums) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* to = sums + m * kPanel + n * W;
      vf sum = fused(acc[m][n], load(w.scale + n * W), load(to));
      if (w.offset != nullptr)
        sum = fused(broadcast(heads[m].sum), load(w.offset + n * W), sum);
      store(to, sum);
    }
}

// The same of exact sums, P planes a row.
template <int M, int N, int P>
inline __attribute__((always_inline)) void add_planes(const vi (&acc)[M * P][N], const Head* heads,
                                                      const Weights& w, float* sums) {
  vf values[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      vf value = to_floats(acc[m * P][n]);
#pragma GCC unroll 8
      for (int p = 1; p < P; ++p)
        value = fused(value, broadcast(256.0f), to_floats(acc[m * P + p][n]));
      values[m][n] = P > 1 ? value * broadcast(heads[m].scale) : value;
    }
  add_scaled<M, N>(values, heads, w, sums);
}

// P planes: x = scale * (plane0 * 256**(P-1) + ... ); the digits of a row's planes lie one after
// another. `start`: -kShift * sum of each plane's bytes.
template <bool kNibbles, int P>
struct Integers {
  using A = Digits;
  static constexpr bool integers = true, expands = false, tiled = false;
  static constexpr bool whole = !kNibbles && P == 1;  // can be, where an output has one scale
  static constexpr int planes = P, kShift = kNibbles ? kShift4 : kShift8, kLoose = 0;
  static constexpr int per_step = kNibbles ? 2 : 1;  // digits a step takes
  static A digits(const int8_t* four) { return fxlm::digits(four); }

  // kWhole: sums are exact integers from the first segment to the last, scaled when all are there.
  template <int M, int N, bool kWhole = false>
  static inline __attribute__((always_inline)) void segment(
      const A* a, int stride, const int32_t* start, const Head* heads, const Weights& w, int steps,
      const Prefetch& prefetch, bool fetch, float* sums, const float*) {
    constexpr int R = M * P;
    vi acc[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        acc[r][n] = vi{} + start[r];
        if constexpr (kWhole) acc[r][n] += bits_load<vi>(sums + r * kPanel + n * W);
      }
#pragma GCC unroll 1
    for (int k = 0; k < steps; ++k) {
      const uint32_t* step = w.words + int64_t(k) * kPanel;
      if (fetch) prefetch(step);
#pragma GCC unroll 8
      for (int half = 0; half < per_step; ++half) {
        Words line[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          const vu codes = bits_load<vu>(step + n * W);
          line[n] = !kNibbles ? words8(codes) : half == 0 ? low_words(codes) : high_words(codes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const A x = a[r * stride + k * per_step + half];
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) acc[r][n] = dot(acc[r][n], line[n], x);
        }
      }
    }
    if constexpr (kWhole) {
      static_assert(P == 1);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          std::memcpy(sums + r * kPanel + n * W, &acc[r][n], sizeof(vi));
    } else {
      add_planes<M, N, P>(acc, heads, w, sums);
    }
  }
};

// Exact integer sums of one row and `count` outputs -> floats in their place.
inline void scale_whole(float* sums, int count, const float* scale, const float* offset,
                        float row_sum) {
  for (int i = 0; i < count; i += W) {
    vf sum = to_floats(bits_load<vi>(sums + i)) * load(scale + i);
    if (offset != nullptr) sum = fused(broadcast(row_sum), load(offset + i), sum);
    store(sums + i, sum);
  }
}

// ---- codes on no even grid --------------------------------------------------------------------

// e4m3fn has the fields of a float32 whose exponent is 120 less; subnormals included.
struct Fp8 {
  static constexpr bool nibbles = false;
  struct Ready {};
  static Ready ready(const float*) { return {}; }
  template <int I>
  static vf decode(vu codes, const Ready&) {
    const vi top = bit_cast<vi>(I == 3 ? codes : codes << (24 - 8 * I));
    return bit_cast<vf>((top >> 4) & int32_t(0x87f00000)) * 0x1p120f;
  }
};

struct Table4 {
  static constexpr bool nibbles = true;
#if defined(__AVX512F__)
  using Ready = vf;
  static Ready ready(const float* table) { return load(table); }
#elif defined(__AVX2__)
  struct Ready {
    vf low, high;
  };
  static Ready ready(const float* table) { return {load(table), load(table + 8)}; }
#else
  using Ready = const float*;
  static Ready ready(const float* table) { return table; }
#endif
  template <int I>  // 0..3: low nibbles, 4..7: high ones
  static vf decode(vu codes, const Ready& table) {
    const vu index = codes >> (I % 4 * 8 + I / 4 * 4);
#if defined(__AVX512F__)
    return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps((__m256)table.low, (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)table.high, (__m256i)index);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
    vf v;
    for (int i = 0; i < W; ++i) v[i] = table[index[i] & 15];
    return v;
#endif
  }
};

template <class Code>
struct Decoded {
  using A = float;
  static constexpr bool integers = false, expands = false, tiled = false, whole = false;
  static constexpr int planes = 1, kLoose = 0;
  static constexpr int per_step = Code::nibbles ? 8 : 4;

  template <int M, int N, int I = 0>
  static inline __attribute__((always_inline)) void inputs(
      vf (&acc)[M][N], const vu (&codes)[N], const A* a, int stride,
      const typename Code::Ready& ready) {
    if constexpr (I < per_step) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const vf line = Code::template decode<I>(codes[n], ready);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
          acc[m][n] = fused(line, broadcast(a[m * stride + I]), acc[m][n]);
      }
      inputs<M, N, I + 1>(acc, codes, a, stride, ready);
    }
  }

  template <int M, int N>
  static inline __attribute__((always_inline)) void segment(
      const A* a, int stride, const int32_t*, const Head* heads, const Weights& w, int steps,
      const Prefetch& prefetch, bool fetch, float* sums, const float* table) {
    const typename Code::Ready ready = Code::ready(table);
    vf acc[M][N] = {};
#pragma GCC unroll 1
    for (int k = 0; k < steps; ++k) {
      const uint32_t* step = w.words + int64_t(k) * kPanel;
      if (fetch) prefetch(step);
      vu codes[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) codes[n] = bits_load<vu>(step + n * W);
      inputs<M, N>(acc, codes, a + k * per_step, stride, ready);
    }
    add_scaled<M, N>(acc, heads, w, sums);
  }
};

#if defined(__AVX512BF16__)
// The same in bfloat16, for inputs that are bfloat16 or int8: pairs (0, 2) and (1, 3) of each four
// inputs, since the bytes of a word decode two by two in place. A table is rounded to bfloat16.
struct Fp8Pairs {
  static constexpr int per_step = 2;
  using Ready = __m512i;
  static Ready ready(const float*) {  // subnormals: m * 2**-9
    alignas(64) uint16_t words[32] = {};
    for (int m = 0; m < 8; ++m) words[m] = uint16_t(bit_cast<uint32_t>(m * 0x1p-9f) >> 16);
    return _mm512_load_si512(words);
  }
  template <int I>
  static vu decode(vu codes, const Ready& subnormals) {
    const __m512i at = I == 0 ? (__m512i)codes : _mm512_srli_epi16((__m512i)codes, 8);
    const __m512i high = I == 1 ? (__m512i)codes : _mm512_slli_epi16((__m512i)codes, 8);
    const __m512i shifted = _mm512_and_si512(_mm512_slli_epi16(at, 4), _mm512_set1_epi16(0x07f0));
    const __m512i normal = _mm512_add_epi16(shifted, _mm512_set1_epi16(0x3c00));
    const __mmask32 small = _mm512_testn_epi16_mask(at, _mm512_set1_epi16(0x0078));
    const __m512i magnitude = _mm512_mask_permutexvar_epi16(normal, small, at, subnormals);
    // magnitude | (high & 0x8000)
    return (vu)_mm512_ternarylogic_epi32(magnitude, high, _mm512_set1_epi16(short(0x8000)), 0xf8);
  }
};

struct Table4Pairs {
  static constexpr int per_step = 4;
  using Ready = __m512i;
  static Ready ready(const float* table) {  // twice: an index has one bit too many
    Bf16 halves[32];
    store(halves, load(table));
    std::memcpy(halves + 16, halves, 32);
    return _mm512_loadu_si512(halves);
  }
  template <int I>
  static vu decode(vu codes, const Ready& table) {
    return (vu)_mm512_permutexvar_epi16((__m512i)(codes >> (I % 2 * 8 + I / 2 * 4)), table);
  }
};

// Many rows share what `expand` decodes: [step][per_step][kPanel] pairs.
template <class Code>
struct Halves {
  using A = uint32_t;
  static constexpr bool integers = false, expands = true, tiled = false, whole = false;
  static constexpr int planes = 1, kLoose = 0;
  static constexpr int per_step = Code::per_step;

  static void expand(const uint32_t* words, int64_t steps, const float* table,
                     const Prefetch& prefetch, uint32_t* out) {
    const typename Code::Ready ready = Code::ready(table);
    for (int64_t k = 0; k < steps; ++k) {
      prefetch(words + k * kPanel);
      for (int c = 0; c < kPanel; c += W)
        expand_one(bits_load<vu>(words + k * kPanel + c), ready,
                   out + k * per_step * kPanel + c);
    }
  }
  template <int I = 0>
  static inline void expand_one(vu codes, const typename Code::Ready& ready, uint32_t* out) {
    if constexpr (I < per_step) {
      const vu line = Code::template decode<I>(codes, ready);
      std::memcpy(out + I * kPanel, &line, sizeof line);
      expand_one<I + 1>(codes, ready, out);
    }
  }

  template <int M, int N, bool kExpanded, int I = 0>
  static inline __attribute__((always_inline)) void inputs(
      vf (&acc)[M][N], const uint32_t* step, const A* a, int stride,
      const typename Code::Ready& ready) {
    if constexpr (I < per_step) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        vu line;
        if constexpr (kExpanded)
          line = bits_load<vu>(step + I * kPanel + n * W);
        else
          line = Code::template decode<I>(bits_load<vu>(step + n * W), ready);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
          acc[m][n] = (vf)_mm512_dpbf16_ps((__m512)acc[m][n],
                                           (__m512bh)_mm512_set1_epi32(int(a[m * stride + I])),
                                           (__m512bh)line);
      }
      inputs<M, N, kExpanded, I + 1>(acc, step, a, stride, ready);
    }
  }

  template <int M, int N, bool kExpanded = false>
  static inline __attribute__((always_inline)) void segment(
      const A* a, int stride, const int32_t*, const Head* heads, const Weights& w, int steps,
      const Prefetch& prefetch, bool fetch, float* sums, const float* table) {
    const typename Code::Ready ready = Code::ready(table);
    vf acc[M][N] = {};
#pragma GCC unroll 1
    for (int k = 0; k < steps; ++k) {
      const uint32_t* step = w.words + int64_t(k) * kPanel * (kExpanded ? per_step : 1);
      if (!kExpanded && fetch) prefetch(step);
      inputs<M, N, kExpanded>(acc, step, a + k * per_step, stride, ready);
    }
    add_scaled<M, N>(acc, heads, w, sums);
  }
};
#endif

}  // namespace
}  // namespace fxlm
