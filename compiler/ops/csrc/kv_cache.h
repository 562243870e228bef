// How one block of one KV head lies in memory (a chunk), and moving values in and out of it.
//
// A chunk is a matrix [steps][lanes] of which products take a step after a step, all lanes at once:
// keys have a step a dimension and a lane a token, values a step a token and a lane a dimension.
// Steps that one instruction multiplies and adds lie side by side:
//
//   32 bit   [steps][lanes]
//   16 bit   [steps / 2][lanes][2]
//    8 bit   [steps / 4][lanes / 4][2][4][2], behind it a float32 scale a token
//
// so that no product has to transpose anything, and one line of 8-bit codes becomes two vectors of
// pairs by interleaving two table look-ups. AMX takes its second operand in the same order.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "vec.h"

namespace fxlm {
namespace {

constexpr int kTile = 16;  // blocks are multiples of it, and what is expanded at a time

template <int bytes>
inline uint64_t place(uint64_t step, uint64_t lane, uint64_t lanes) {  // unsigned: shifts and masks
  if constexpr (bytes == 4) return step * lanes + lane;
  if constexpr (bytes == 2) return (step / 2 * lanes + lane) * 2 + step % 2;
  return (step / 4 * (lanes / 4) + lane / 4) * 16 + step / 2 % 2 * 8 + lane % 4 * 2 + step % 2;
}

// ---- 8-bit codes ------------------------------------------------------------------------------

// int8: two's complement in -127..127. fp8: e4m3 of the OCP specification: no infinities, largest
// 448, 0x7f is NaN.
inline float largest(Store store) { return store == Store::int8 ? 127.0f : 448.0f; }

inline float e4m3_magnitude(int code) {
  const int exponent = code >> 3, mantissa = code & 7;
  if (code == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  return exponent == 0 ? float(mantissa) * 0x1p-9f
                       : std::ldexp(float(8 + mantissa), exponent - 10);
}

// Round to nearest even; |x| <= 448.
inline uint8_t e4m3_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), rest = bits & 0x7fffffff;
  const uint32_t sign = bits >> 24 & 0x80;
  // Below 2^-6, subnormal: let the adder round at bit 2^-9. Both are computed, to be vectorized.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(rest) + 16384.0f) - 0x46800000;
  const uint32_t usual = (rest - 0x3c000000 + 0x7ffff + (rest >> 20 & 1)) >> 20;
  return uint8_t(sign | (rest < 0x3c800000 ? small : usual));
}

// What codes stand for: magnitudes as bf16, cut in bytes, by the low seven bits; values by all.
struct Codes {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
  float value[256];
  explicit Codes(Store store) {
    for (int i = 0; i < 128; ++i) {
      const float x = store == Store::int8 ? float(i) : e4m3_magnitude(i);
      const uint32_t bits = bit_cast<uint32_t>(x) >> 16;  // exact: both have 8 bits or fewer
      low[i] = uint8_t(bits);
      high[i] = uint8_t(bits >> 8);
      value[i] = x;
      value[128 + i] = store == Store::int8 ? float(i - 128) : -x;
    }
  }
};
inline const Codes& codes_of(Store store) {
  static const Codes int8(Store::int8), fp8(Store::fp8);
  return store == Store::int8 ? int8 : fp8;
}

// x[count] -> codes; returns the scale by which they are to be multiplied. NaN if not finite.
inline float quantize(const float* x, int64_t count, Store store, float fixed, uint8_t* codes) {
  const float most = largest(store);
  uint32_t top = 0;  // magnitudes are ordered as their bits are
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bit_cast<uint32_t>(x[i]) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
  if (top >= 0x7f800000) {
    std::memset(codes, 0, count);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = fixed > 0.0f ? fixed : std::max(bit_cast<float>(top) / most, 0x1p-64f);
  const float inverse = 1.0f / scale;
  const auto clamped = [=](float value) {
    const float y = value * inverse;
    return y > most ? most : y < -most ? -most : y;
  };
  if (store == Store::fp8)
    for (int64_t i = 0; i < count; ++i) codes[i] = e4m3_of(clamped(x[i]));
  else  // adding 1.5 * 2^23 rounds to an integer, whose low byte is the code
    for (int64_t i = 0; i < count; ++i)
      codes[i] = uint8_t(bit_cast<uint32_t>(clamped(x[i]) + 12582912.0f));
  return scale;
}

// ---- out of a chunk ---------------------------------------------------------------------------

// Into the second-level cache: a line on its way to the first holds one of that cache's few buffers
// for misses (24 on Zen 4, which at 130 ns is 12 GB/s a core and no more).
// Inlined by force: GCC takes a function that only prefetches for one without effect.
inline __attribute__((always_inline)) void fetch(const char* line) {
  __builtin_prefetch(line, 0, 2);
}

// What is read next, line by line; null: nothing.
struct Lines {
  const char* at;
  int64_t stride;
  __attribute__((always_inline)) void fetch_one() {
    if (at == nullptr) return;
    fetch(at);
    at += stride;
  }
};

// A part of a chunk, `steps` by `count` lanes of `lanes` that a step has, -> rows of `ld` units, a
// row for every `per_step` steps. Meanwhile as many lines of `ahead` are prefetched as are read.
using Expand = void (*)(const char* from, int64_t lanes, int steps, int count, const Codes* codes,
                        Lines ahead, void* out, int64_t ld);

// Units as they are: floats, or pairs of 16 bits.
template <int per_step>
void copy_units(const char* from, int64_t lanes, int steps, int count, const Codes*, Lines, void* out, int64_t ld) {
  for (int row = 0; row * per_step < steps; ++row)
    std::memcpy(static_cast<float*>(out) + row * ld, from + row * lanes * 4, count * 4);
}

template <class T>
inline void split_pairs(vu pairs, vf& first, vf& second) {
  if constexpr (std::is_same_v<T, Bf16>) {
    first = bit_cast<vf>(pairs << 16);
    second = bit_cast<vf>(pairs & 0xffff0000u);
  } else {
    T low[W], high[W];
    const vh a = __builtin_convertvector(pairs & 0xffffu, vh);
    const vh b = __builtin_convertvector(pairs >> 16, vh);
    std::memcpy(low, &a, sizeof low);
    std::memcpy(high, &b, sizeof high);
    first = load(low);
    second = load(high);
  }
}

template <class T>
void floats_of_halves(const char* from, int64_t lanes, int steps, int count, const Codes*,
                      Lines ahead, void* out, int64_t ld) {
  float *first = static_cast<float*>(out), *second = first + ld;
  for (int step = 0; step < steps; step += 2, from += lanes * 4, first += 2 * ld, second += 2 * ld) {
    int i = 0;
    for (; i + W <= count; i += W) {
      if (i % kTile == 0) ahead.fetch_one();
      vf a, b;
      split_pairs<T>(bits_load<vu>(from + i * 4), a, b);
      store(first + i, a);
      store(second + i, b);
    }
    for (; i < count; ++i) {
      T pair[2];
      std::memcpy(pair, from + i * 4, sizeof pair);
      first[i] = to_float(pair[0]);
      second[i] = to_float(pair[1]);
    }
  }
}

inline void floats_of_codes(const char* from, int64_t lanes, int steps, int count,
                            const Codes* codes, Lines ahead, void* out, int64_t ld) {
  float* to = static_cast<float*>(out);
  for (int step = 0; step < steps; step += 4, from += lanes * 4, to += 4 * ld)
    for (int i = 0; i < count; i += 4) {
      if (i % kTile == 0) ahead.fetch_one();
      const auto* unit = reinterpret_cast<const uint8_t*>(from + i * 4);
      for (int s = 0; s < 4; ++s)
        for (int l = 0; l < 4; ++l)
          to[s * ld + i + l] = codes->value[unit[s / 2 * 8 + l * 2 + s % 2]];
    }
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define FXLM_PAIRS 1

// 64 codes at a time: magnitudes out of two tables of bytes, the sign put back, bytes interleaved.
template <bool twos_complement>
struct Lookup {
  __m512i low[2], high[2];
  explicit Lookup(const Codes& codes) {
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(codes.low + i * 64);
      high[i] = _mm512_load_si512(codes.high + i * 64);
    }
  }
  // Codes of 16 lanes and 4 steps -> pairs of the first two steps, and of the other two.
  void operator()(__m512i code, __m512i& first, __m512i& second) const {
    const __m512i index = twos_complement ? _mm512_abs_epi8(code) : code;
    const __m512i tail = _mm512_permutex2var_epi8(low[0], index, low[1]);
    const __m512i bare = _mm512_permutex2var_epi8(high[0], index, high[1]);
    const __m512i signs = _mm512_set1_epi8(char(0x80));
    const __m512i head = _mm512_ternarylogic_epi32(bare, code, signs, 0xf8);  // a | (b & c)
    first = _mm512_unpacklo_epi8(tail, head);
    second = _mm512_unpackhi_epi8(tail, head);
  }
};

template <bool twos_complement>
void pairs_of_codes(const char* from, int64_t lanes, int steps, int count, const Codes* codes,
                    Lines ahead, void* out, int64_t ld) {
  const Lookup<twos_complement> lookup(*codes);
  const int whole = count & ~15, rest = count - whole;
  uint32_t* to = static_cast<uint32_t*>(out);
  for (int step = 0; step < steps; step += 4, from += lanes * 4, to += 2 * ld) {
    __m512i first, second;
    for (int i = 0; i < whole; i += 16) {
      ahead.fetch_one();
      lookup(_mm512_loadu_si512(from + i * 4), first, second);
      _mm512_storeu_si512(to + i, first);
      _mm512_storeu_si512(to + ld + i, second);
    }
    if (rest != 0) {
      const __mmask16 mask = __mmask16((1u << rest) - 1);
      lookup(_mm512_maskz_loadu_epi32(mask, from + whole * 4), first, second);
      _mm512_mask_storeu_epi32(to + whole, mask, first);
      _mm512_mask_storeu_epi32(to + ld + whole, mask, second);
    }
  }
}
#endif

// ---- into a chunk -----------------------------------------------------------------------------

// One token of one head: x[dim], `stride` apart, at `offset` of a chunk of `tokens`.
template <bool keys, class T>
void scatter(const T* x, int64_t stride, int64_t dim, int64_t offset, int64_t tokens, T* to) {
  constexpr int64_t unit = 4 / sizeof(T);  // dims that follow one place alike
  for (int64_t d = 0; d + unit <= dim; d += unit, x += unit * stride) {
    if constexpr (keys) {
      T* here = to + place<sizeof(T)>(d, offset, tokens);
      for (int64_t i = 0; i < unit; ++i) here[place<sizeof(T)>(i, 0, 4)] = x[i * stride];
    } else {
      T* here = to + place<sizeof(T)>(offset, d, dim);
      for (int64_t i = 0; i < unit; ++i) here[place<sizeof(T)>(0, i, 4)] = x[i * stride];
    }
  }
  for (int64_t d = dim - dim % unit; d < dim; ++d, x += stride)
    to[keys ? place<sizeof(T)>(d, offset, tokens) : place<sizeof(T)>(offset, d, dim)] = *x;
}

template <class T, bool keys>
void write_codes(const T* x, int64_t stride, int64_t dim, int64_t offset, int64_t tokens,
                 Store store, float fixed, void* chunk) {
  constexpr int64_t most = 2048;
  float values[most];
  uint8_t codes[most];
  uint8_t* to = static_cast<uint8_t*>(chunk);
  for (int64_t d = 0; d < dim; ++d) values[d] = to_float(x[d * stride]);
  const float scale = quantize(values, dim, store, fixed, codes);
  scatter<keys>(codes, 1, dim, offset, tokens, to);
  std::memcpy(to + tokens * dim + offset * 4, &scale, 4);
}

}  // namespace
}  // namespace fxlm
