// Checks tile.h, whichever unit it was built for, against plain loops; exits with the number of the
// first check that fails. With an argument it does what the hardware refuses, and must not return.
#include <cstdlib>

#include "tile.h"

using namespace fxlm;

namespace {

Bf16 bf16(float x) { return {uint16_t(bit_cast<uint32_t>(x) >> 16)}; }

TileShapes shapes_of(int rows, int steps, int columns) {  // C 0, A 1, B 2
  TileShapes shapes{};
  shapes.rows[0] = shapes.rows[1] = uint8_t(rows);
  shapes.rows[2] = uint8_t(steps);
  shapes.bytes[0] = shapes.bytes[2] = uint16_t(columns * 4);
  shapes.bytes[1] = uint16_t(steps * 4);
  return shapes;
}

bool integers(int rows, int steps, int columns) {
  int8_t a[16][64] = {}, b[16][64] = {};
  int32_t c[16][16] = {}, want[16][16] = {};
  for (int i = 0; i < 16 * 64; ++i) {
    a[i / 64][i % 64] = int8_t(i * 37 + 128);
    b[i / 64][i % 64] = int8_t(i * 91);
  }
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n)
      for (int k = 0; k < 4 * steps; ++k) want[m][n] += a[m][k] * b[k / 4][4 * n + k % 4];
  tile_configure(shapes_of(rows, steps, columns));
  tile_zero<0>();
  tile_load<1>(a, 64);
  tile_load<2>(b, 64);
  tile_dpbssd<0, 1, 2>();
  tile_store<0>(c, 64);
  tile_release();
  return std::memcmp(c, want, sizeof c) == 0;
}

// Products of the even and of the odd inputs of one output, from `begin` on.
float product(const float (&even)[2], const float (&odd)[2], float begin, float factor = 1.0f) {
  Bf16 a[4], b[2][2];
  for (int k = 0; k < 2; ++k) {
    a[2 * k] = bf16(even[k]), a[2 * k + 1] = bf16(odd[k]);
    b[k][0] = b[k][1] = bf16(factor);
  }
  float c = begin;
  tile_configure(shapes_of(1, 2, 1));
  tile_load<0>(&c, 4);
  tile_load<1>(a, 8);
  tile_load<2>(b, 4);
  tile_dpbf16<0, 1, 2>();
  tile_store<0>(&c, 4);
  tile_release();
  return c;
}

}  // namespace

int main(int count, char**) {
  if (!tiles_allowed()) return 1;
  if (count > 1) {
    TileShapes shapes = shapes_of(4, 4, 4);
    shapes.rows[2] = 5;  // A is 4 steps wide
    tile_configure(shapes);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>();
    tile_dpbssd<0, 1, 2>();
    return 0;
  }
  if (!integers(16, 16, 16)) return 2;
  if (!integers(3, 5, 7)) return 3;
  // 2^30 + 1 is 2^30 in float32: the ones survive where their chain holds nothing larger.
  const float big = 0x1p30f;
  if (product({big, -big}, {1, 1}, 0) != 2) return 4;        // chains of even and odd inputs
  if (product({big, 1}, {-big, 1}, 0) != 0) return 5;        // each rounds by itself
  if (product({1, 1}, {1, 1}, big) != big) return 6;         // the sum of four comes last
  if (product({1, 1}, {1, 1}, -4) != 0) return 7;
  if (product({0x1p-127f, 0}, {0, 0}, 0, 0x1p60f) != 0) return 8;  // a subnormal input is zero
  if (product({0x1p-100f, 0}, {0, 0}, 0, 0x1p-30f) != 0) return 9;  // so is such a result
  return 0;
}
