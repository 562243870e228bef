// The rate of this CPU's products: of vectors with operands in registers, of tiles with operands in
// the first-level cache, one load a product, as in any kernel. None can exceed it.
// `peak.py` compiles it and calls one function a thread; each returns operations done.
#include <cstdint>

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <immintrin.h>

namespace {

// Operands as in a model: random, or nothing but zeros.
struct alignas(64) Operands {
  uint16_t bf16[4][512];  // of the size of a tile each
  explicit Operands(bool zeros) {
    uint32_t state = 1;
    for (auto& tile : bf16)
      for (uint16_t& one : tile) {
        state = state * 1664525 + 1013904223;
        const uint32_t sign = state >> 31 << 15, exponent = 0x3f00 - (state >> 24 & 3) * 0x80;
        one = zeros ? 0 : uint16_t(sign | exponent | (state >> 16 & 0x7f));
      }
  }
};

#if defined(__AMX_TILE__)
bool configure() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return false;  // ask Linux for the tiles
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  asm volatile("tilezero %tmm0; tilezero %tmm1; tilezero %tmm2; tilezero %tmm3");
  return true;
}

// 2 x 2 products, each operand loaded once for two of them.
#define PRODUCTS(op)                                                            \
  asm volatile("tileloadd (%0,%4,1), %%tmm4; tileloadd (%2,%4,1), %%tmm6;" op    \
               " %%tmm6, %%tmm4, %%tmm0; tileloadd (%3,%4,1), %%tmm7;" op         \
               " %%tmm7, %%tmm4, %%tmm1; tileloadd (%1,%4,1), %%tmm5;" op         \
               " %%tmm6, %%tmm5, %%tmm2;" op " %%tmm7, %%tmm5, %%tmm3"           \
               :                                                                \
               : "r"(data.bf16[0]), "r"(data.bf16[1]), "r"(data.bf16[2]),       \
                 "r"(data.bf16[3]), "r"(64L)                                    \
               : "memory")

double bf16(int64_t rounds, bool zeros) {
  if (!configure()) return 0;
  const Operands data(zeros);
  for (int64_t i = 0; i < rounds; ++i) PRODUCTS("tdpbf16ps");
  asm volatile("tilerelease");
  return 2.0 * rounds * 4 * 16 * 16 * 32;
}
#else
double bf16(int64_t, bool) { return 0; }
#endif

}  // namespace

extern "C" {

// 2 x 2 products of tiles: 4 x 16 x 16 outputs, 32 bf16 or 64 int8 inputs deep.
double tiles_bf16(int64_t rounds) { return bf16(rounds, false); }
double tiles_bf16_zeros(int64_t rounds) { return bf16(rounds, true); }

double tiles_int8(int64_t rounds) {
#if defined(__AMX_TILE__)
  if (!configure()) return 0;
  const Operands data(false);
  for (int64_t i = 0; i < rounds; ++i) PRODUCTS("tdpbssd");
  asm volatile("tilerelease");
  return 2.0 * rounds * 4 * 16 * 16 * 64;
#else
  return 0;
#endif
}

// 24 sums in registers, so that no product waits for the one before.
#define SUMS(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11) \
    op(12) op(13) op(14) op(15) op(16) op(17) op(18) op(19) op(20) op(21) op(22) op(23)
#define FILL(i) "vmovdqu64 (%0), %%zmm" #i ";"
#define CLOBBER "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
    "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19",   \
    "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25"
// Sums that stay finite: the factors have either sign.
#define FILL_ALL()              \
  const Operands data(false);   \
  asm volatile(SUMS(FILL) FILL(24) "vmovdqu64 64(%0), %%zmm25;" : : "r"(&data) : CLOBBER, "memory")

double vectors_bf16(int64_t rounds) {
#if defined(__AVX512BF16__)
#define ONE(i) "vdpbf16ps %%zmm24, %%zmm25, %%zmm" #i ";"
  FILL_ALL();
  for (int64_t i = 0; i < rounds; ++i) asm volatile(SUMS(ONE) : : : CLOBBER);
#undef ONE
  return 2.0 * rounds * 24 * 16 * 2;
#else
  return 0;
#endif
}

double vectors_int8(int64_t rounds) {
#if defined(__AVX512VNNI__)
#define ONE(i) "vpdpbusd %%zmm24, %%zmm25, %%zmm" #i ";"
  FILL_ALL();
  for (int64_t i = 0; i < rounds; ++i) asm volatile(SUMS(ONE) : : : CLOBBER);
#undef ONE
  return 2.0 * rounds * 24 * 16 * 4;
#else
  return 0;
#endif
}

double vectors_float32(int64_t rounds) {
#if defined(__AVX512F__)
#define ONE(i) "vfmadd231ps %%zmm24, %%zmm25, %%zmm" #i ";"
  FILL_ALL();
  for (int64_t i = 0; i < rounds; ++i) asm volatile(SUMS(ONE) : : : CLOBBER);
#undef ONE
  return 2.0 * rounds * 24 * 16;
#else
  return 0;
#endif
}
}
