// Vectors of W floats on GCC's vector extensions: one source for AVX-512, AVX2, NEON and SSE.
// Intrinsics only where the extension has no word for it (max, fp16, bf16 pairs).
// Not here: anything that knows of attention or of sampling.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fxlm {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

enum class Dtype { f32, bf16, f16 };

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline vf broadcast(float x) { return x - vf{}; }

template <int... I>
inline vi iota_of(std::integer_sequence<int, I...>) {
  return vi{I...};
}
inline vi iota() { return iota_of(std::make_integer_sequence<int, W>{}); }

template <class V>
inline V bits_load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline vf load(const float* p) { return bits_load<vf>(p); }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float magnitude = rest < 0x400 ? float(rest) * 0x1p-24f  // subnormal
                                       : bit_cast<float>((rest << 13) + 0x38000000);
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
}

inline vf load(const Bf16* p) {
#if defined(__AVX512F__)  // GCC's own conversion goes through halves
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return bit_cast<vf>(__builtin_convertvector(bits_load<vh>(p), vu) << 16);
#endif
}
inline vf load(const F16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Round to nearest even; NaN stays NaN.
inline vh bf16_bits(vf v) {
  const vu bits = bit_cast<vu>(v);
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : vu{} + 0x7fc0, vh);
}
inline void store(Bf16* p, vf v) {
  const vh out = bf16_bits(v);
  std::memcpy(p, &out, sizeof out);
}
inline uint16_t half_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (rest < 0x38800000) {  // subnormal: let the adder round at bit 2^-24
    const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f);
    return uint16_t(sign | (sum - 0x3f000000));
  }
  return uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}
inline void store(F16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) p[i].bits = half_of(v[i]);
#endif
}

// The first n < W elements of p, then zeros; and the same for stores.
template <class T>
inline vf load_part(const T* p, int n) {
  T part[W] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
inline void store_part(T* p, vf v, int n) {
  T part[W];
  store(part, v);
  std::memcpy(p, part, n * sizeof(T));
}

// NaN in a is ignored: the result is then b.
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline float lanes_max(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float best = v[0];
  for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// Pairwise, in a fixed order.
inline float lanes_sum(vf v) {
#if defined(__AVX512F__)  // the same order
  return _mm512_reduce_add_ps((__m512)v);
#endif
  float part[W];
  store(part, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// exp(x) for x <= 88, within 2 ulp; 0 below -87.3 (where the result would be subnormal).
// Cody and Waite reduction by ln 2, then the degree 6 polynomial of Cephes' expf.
inline __attribute__((always_inline)) vf vexp(vf x) {
  const vf clamped = vmax(x, broadcast(-87.3365f));
  const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = clamped * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  const vf r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  vf y = broadcast(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const vi exponent = (bit_cast<vi>(shifted) - 0x4b400000 + 127) << 23;
  const vf result = y * bit_cast<vf>(exponent);
  return x < -87.3365f ? vf{} : (x == x ? result : x);
}
inline float exp1(float x) { return vexp(broadcast(x))[0]; }

// tanh by exp; absolute error below 2e-7.
inline vf vtanh(vf x) {
  const vf magnitude = bit_cast<vf>(bit_cast<vu>(x) & 0x7fffffff);
  const vf e = vexp(magnitude * -2.0f);
  const vf t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

// Within 3e-7. By AVX-512 without a division: exp(-x) = 2^n 2^r, with a polynomial for r of -0.5 to
// 0.5 (7.5e-8), and one step of Newton's from a reciprocal of 14 bits.
inline vf vsigmoid(vf x) {
#if defined(__AVX512F__)
  const auto is = [](float value) { return _mm512_set1_ps(value); };
  const __m512 log2 = is(-1.44269504f);
  __m512 v = _mm512_min_ps(is(104.0f), _mm512_max_ps(is(-87.0f), (__m512)x));  // NaN stays NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, log2), 0);
  const __m512 r = _mm512_fmsub_ps(v, log2, n);
  __m512 y = _mm512_fmadd_ps(is(0.0013276471f), r, is(0.009675541f));
  y = _mm512_fmadd_ps(y, r, is(0.05550713f));
  y = _mm512_fmadd_ps(y, r, is(0.2402212f));
  y = _mm512_fmadd_ps(y, r, is(0.69314694f));
  y = _mm512_fmadd_ps(y, r, is(1.0f));
  const __m512 d = _mm512_add_ps(_mm512_scalef_ps(y, n), is(1.0f));
  const __m512 near = _mm512_rcp14_ps(d);
  return (vf)_mm512_mul_ps(near, _mm512_fnmadd_ps(d, near, is(2.0f)));
#else
  return 1.0f / (1.0f + vexp(-vmax(x, broadcast(-88.0f))));
#endif
}

// erfc(x) for x >= 0; absolute error below 3e-7. Abramowitz and Stegun 7.1.26.
inline vf verfc(vf x) {
  const vf t = 1.0f / (1.0f + 0.3275911f * x);
  vf y = broadcast(1.061405429f);
  y = y * t - 1.453152027f;
  y = y * t + 1.421413741f;
  y = y * t - 0.284496736f;
  y = y * t + 0.254829592f;
  return y * t * vexp(-(x * x));
}

// W x W in registers, log2(W) butterflies.
template <int S, int... J>
inline void butterfly(vf& a, vf& b, std::integer_sequence<int, J...>) {
#if defined(__clang__)
  const vf first = __builtin_shufflevector(a, b, ((J & S) ? W + J - S : J)...);
  b = __builtin_shufflevector(a, b, ((J & S) ? W + J : J + S)...);
#else
  const vi low = {((J & S) ? W + J - S : J)...};
  const vi high = {((J & S) ? W + J : J + S)...};
  const vf first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
#endif
  a = first;
}
template <int S>
inline void transpose_from(vf (&rows)[W]) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if ((i & S) == 0)
        butterfly<S>(rows[i], rows[i + S], std::make_integer_sequence<int, W>{});
    transpose_from<S * 2>(rows);
  }
}
inline void transpose(vf (&rows)[W]) { transpose_from<1>(rows); }

}  // namespace fxlm
