// The matrix unit of AMX: eight tiles of up to 16 rows of 64 bytes, and their products.
//
// Three builds share this interface: with AMX the instructions, with FXLM_EMULATED_TILES a software
// unit of the same semantics (Intel SDM, volume 2: LDTILECFG, TILELOADD, TDPBF16PS, TDPBSSD), for
// tests on any CPU, and otherwise nothing but `kTileUnit == false`. Where the hardware raises #UD,
// the software unit traps.
//
//   tile_configure(shapes)     rows and bytes a row of each tile; clears all tiles
//   tile_zero<T>()             tile_load<T>(from, stride)      tile_store<T>(to, stride)
//   tile_stream<T>(from, stride)  a load that leaves the first-level cache to what is read again
//   tile_dpbf16<C, A, B>()     C[m][n] f32 += sum over k, i of A[m][2k + i] B[k][2n + i]   bf16
//   tile_dpbssd<C, A, B>()     C[m][n] i32 += sum over k, i < 4 of A[m][4k + i] B[k][4n + i]  int8
//   tile_release()             gives the state back; call it when a thread is done
//
// A bf16 product makes two chains of fused multiply-adds a row, one of even and one of odd inputs,
// adds them, then adds that to C; subnormal numbers count as zero. Row m of C depends on row m of A
// alone, so that no bit depends on what other rows are there.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

#if !defined(FXLM_EMULATED_TILES) && defined(__AMX_BF16__) && defined(__linux__)
#define FXLM_HARDWARE_TILES 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fxlm {

constexpr int kTileRows = 16, kTileBytes = 64, kTiles = 8;

struct TileShapes {
  uint8_t rows[kTiles];    // 1 to 16
  uint16_t bytes[kTiles];  // of a row: 4 to 64, a multiple of 4
};

#if defined(FXLM_HARDWARE_TILES)

constexpr bool kTileUnit = true;

// Linux hands out the state of the tiles on request, once for all threads of a process.
inline bool tiles_allowed() {
  static const bool allowed = [] {
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, all = bf16 | tile | int8;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & all) != all) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return allowed;
}

inline void tile_configure(const TileShapes& shapes) {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {};
  static_assert(sizeof(Config) == 64, "the format of LDTILECFG");
  config.palette = 1;
  std::memcpy(config.bytes, shapes.bytes, sizeof shapes.bytes);
  std::memcpy(config.rows, shapes.rows, sizeof shapes.rows);
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
inline void tile_release() { asm volatile("tilerelease" : : : "memory"); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_stream(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dpbf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void tile_dpbssd() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#elif defined(FXLM_EMULATED_TILES)

constexpr bool kTileUnit = true;

inline bool tiles_allowed() { return true; }

struct TileUnit {
  bool configured;
  TileShapes shapes;
  uint8_t data[kTiles][kTileRows][kTileBytes];

  void require(bool legal) const {
    if (!configured || !legal) __builtin_trap();
  }
  void require_product(int c, int a, int b) const {
    require(c != a && c != b && a != b && shapes.rows[c] == shapes.rows[a] &&
            shapes.bytes[c] == shapes.bytes[b] && shapes.bytes[a] == 4 * shapes.rows[b]);
  }
};
inline thread_local TileUnit tile_unit = {};

inline void tile_configure(const TileShapes& shapes) {
  tile_unit = {};
  tile_unit.configured = true;
  tile_unit.shapes = shapes;
  for (int t = 0; t < kTiles; ++t)
    tile_unit.require((shapes.rows[t] == 0) == (shapes.bytes[t] == 0) &&
                      shapes.rows[t] <= kTileRows && shapes.bytes[t] <= kTileBytes &&
                      shapes.bytes[t] % 4 == 0);
}
inline void tile_release() { tile_unit = {}; }

template <int T>
inline void tile_zero() {
  tile_unit.require(tile_unit.shapes.rows[T] > 0);
  std::memset(tile_unit.data[T], 0, sizeof tile_unit.data[T]);
}
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  tile_zero<T>();
  for (int row = 0; row < tile_unit.shapes.rows[T]; ++row)
    std::memcpy(tile_unit.data[T][row], static_cast<const char*>(from) + row * stride,
                tile_unit.shapes.bytes[T]);
}
template <int T>
inline void tile_stream(const void* from, int64_t stride) {
  tile_load<T>(from, stride);
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
  tile_unit.require(tile_unit.shapes.rows[T] > 0);
  for (int row = 0; row < tile_unit.shapes.rows[T]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tile_unit.data[T][row],
                tile_unit.shapes.bytes[T]);
}

inline float without_subnormals(float x) {
  return x < 0x1p-126f && x > -0x1p-126f ? x * 0.0f : x;  // the sign stays
}

// Row of a tile as bf16 -> 32 floats.
inline void tile_floats(const uint8_t* row, float* out) {
  for (int i = 0; i < kTileBytes / 2; ++i)
    out[i] = without_subnormals(to_float(bits_load<Bf16>(row + 2 * i)));
}

template <int C, int A, int B>
inline void tile_dpbf16() {
  TileUnit& unit = tile_unit;
  unit.require_product(C, A, B);
  float a[32], b[kTileRows][32];
  for (int k = 0; k < kTileRows; ++k) tile_floats(unit.data[B][k], b[k]);
  for (int m = 0; m < unit.shapes.rows[C]; ++m) {
    tile_floats(unit.data[A][m], a);
    float chains[32] = {};  // even and odd inputs of each output in turn
    for (int k = 0; k < unit.shapes.rows[B]; ++k)
      for (int i = 0; i < 32; ++i)
        chains[i] = without_subnormals(__builtin_fmaf(a[2 * k + i % 2], b[k][i], chains[i]));
    for (int n = 0; n < unit.shapes.bytes[C] / 4; ++n) {
      uint8_t* at = &unit.data[C][m][4 * n];
      const float product = without_subnormals(chains[2 * n] + chains[2 * n + 1]);
      const float sum = without_subnormals(without_subnormals(bits_load<float>(at)) + product);
      std::memcpy(at, &sum, 4);
    }
  }
}

template <int C, int A, int B>
inline void tile_dpbssd() {
  TileUnit& unit = tile_unit;
  unit.require_product(C, A, B);
  for (int m = 0; m < unit.shapes.rows[C]; ++m)
    for (int n = 0; n < unit.shapes.bytes[C] / 4; ++n) {
      uint8_t* at = &unit.data[C][m][4 * n];
      uint32_t sum = bits_load<uint32_t>(at);  // wraps, as the hardware does
      for (int k = 0; k < unit.shapes.rows[B]; ++k)
        for (int i = 0; i < 4; ++i)
          sum += uint32_t(int32_t(int8_t(unit.data[A][m][4 * k + i])) *
                          int32_t(int8_t(unit.data[B][k][4 * n + i])));
      std::memcpy(at, &sum, 4);
    }
}

#else

constexpr bool kTileUnit = false;

#endif

}  // namespace fxlm
