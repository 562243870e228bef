// Products of rows with a panel of quantized weights on the tile unit (tile.h), for weights on an
// even grid: a family of quantized.cpp beside those of quantized_product.h.
//
// A step of a panel, four inputs of 64 outputs, is a row of the unit's second operand: bytes are
// read as they lie, nibbles are spread into bytes once for all rows. Digits of x are signed bytes,
// so that planes are rows of the first operand. Sums of a segment are exact, and scaled as
// `Integers` scales them: which of the two multiplied shows in no bit.
//
// Few rows: one tile of them against the four of a panel. Many: 2 x 2 tiles over a segment (32 KiB
// at most), which stays near while rows pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "quantized_product.h"
#include "tile.h"

namespace fxlm {
namespace {

#if defined(FXLM_HARDWARE_TILES) || defined(FXLM_EMULATED_TILES)

// One panel, some rows: what `Tiled` reads and adds to. Pointers at the first row and segment.
struct TiledPanel {
  const uint32_t* a;  // [segments][all_rows][planes][units]
  const int32_t* start;
  const Head* heads;
  int64_t all_rows, rows, units;
  const uint32_t* words;  // [panel_steps][kPanel]
  int64_t panel_steps, steps, segments, segments_per_scale;
  const float *scale, *offset;
  float* sums;  // [rows][kPanel]
};

template <bool kNibbles, int P>
struct Tiled {
  using A = uint32_t;
  static constexpr bool integers = true, expands = false, tiled = true, whole = false;
  static constexpr int planes = P, per_step = kNibbles ? 2 : 1, kShift = kNibbles ? 8 : 0;
  static constexpr int kLoose = 2 * kTileRows;  // rows of x that are read past the last
  static A digits(const int8_t* four) { return bits_load<uint32_t>(four); }

  // Segments are whole tiles, or less than one.
  static bool fits(int64_t segment) {
    const int64_t units = (segment + 3) / 4;
    return units <= kTileRows || units % kTileRows == 0;
  }

  static void panel(const TiledPanel& p) {
    alignas(64) static thread_local uint32_t spread[kMostUnits * kPanel];
    tile_configure(shapes(p));
    for (int64_t s = 0; s < p.segments; ++s) {
      const uint32_t* words = p.words + s * p.steps * kPanel;
      const int64_t steps = std::min(p.steps, p.panel_steps - s * p.steps);
      const bool as_they_lie = !kNibbles && steps == p.steps;
      if (!as_they_lie) bytes_of(words, steps, p.units, spread);
      segment(p, s, as_they_lie ? words : spread);
    }
    tile_release();
  }

 private:
  static constexpr int64_t kMostUnits = 128;       // of a segment
  static constexpr int64_t kWidth = kPanel * 4;    // bytes of a step, and of a row of sums
  static constexpr int64_t kAhead = 4 << 10;       // bytes that are prefetched ahead

  static TileShapes shapes(const TiledPanel& p) {
    const int depth = int(std::min<int64_t>(kTileRows, p.units));
    const int rows = int(std::min<int64_t>(kTileRows, p.rows * P));
    TileShapes all{};
    for (int t = 0; t < kTiles; ++t) {
      const bool x = t == 4 || (t == 5 && !few(p)), weights = t > 4 && !x;
      all.rows[t] = uint8_t(weights ? depth : rows);
      all.bytes[t] = uint16_t(x ? 4 * depth : kTileBytes);
    }
    return all;
  }
  static bool few(const TiledPanel& p) { return p.rows * P <= kTileRows; }

  // Steps as bytes, zeros behind the last.
  static void bytes_of(const uint32_t* words, int64_t steps, int64_t units, uint32_t* out) {
    for (int64_t k = 0; k < steps; ++k)
      for (int c = 0; c < kPanel; c += W) {
        const uint32_t* from = words + k * kPanel + c;
        fetch(from);
        const vu codes = bits_load<vu>(from);
        uint32_t* to = out + k * per_step * kPanel + c;
        const vu low = kNibbles ? codes & 0x0f0f0f0fu : codes, high = (codes >> 4) & 0x0f0f0f0fu;
        std::memcpy(to, &low, sizeof low);
        if (kNibbles) std::memcpy(to + kPanel, &high, sizeof high);
      }
    const int64_t done = steps * per_step;
    std::memset(out + done * kPanel, 0, (units - done) * kWidth);
  }
  static void fetch(const uint32_t* from) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead, 0, 2);
  }

  static void segment(const TiledPanel& p, int64_t s, const uint32_t* b) {
    alignas(64) int32_t products[2 * kTileRows * kPanel];
    const int64_t count = few(p) ? p.rows : 2 * kTileRows / P;
    for (int64_t row = 0; row < p.rows; row += count) {
      const int64_t at = s * p.all_rows + row;
      const uint32_t* a = p.a + at * P * p.units;
      if (few(p)) {
        one_by_four(a, b, p.units, products);
      } else {
        two_by_two(a, b, p.units, products);
        two_by_two(a, b + kPanel / 2, p.units, products + kPanel / 2);
      }
      const int64_t scales = s / p.segments_per_scale * kPanel;
      const Weights w{nullptr, p.scale + scales, p.offset ? p.offset + scales : nullptr};
      const int64_t last = std::min(count, p.rows - row);
      for (int64_t i = 0; i < last; ++i)
        add(products + i * P * kPanel, p.start + (at + i) * P, p.heads + at + i, w,
            p.sums + (row + i) * kPanel);
    }
  }

  static void one_by_four(const uint32_t* a, const uint32_t* b, int64_t units, int32_t* out) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t k = 0; k < units; k += kTileRows, b += kTileRows * kPanel) {
      if (!kNibbles)
        for (int line = 0; line < kTileRows * 4; ++line) fetch(b + line * 16);
      tile_load<4>(a + k, units * 4);
      tile_load<5>(b, kWidth), tile_dpbssd<0, 4, 5>();
      tile_load<6>(b + 16, kWidth), tile_dpbssd<1, 4, 6>();
      tile_load<7>(b + 32, kWidth), tile_dpbssd<2, 4, 7>();
      tile_load<5>(b + 48, kWidth), tile_dpbssd<3, 4, 5>();
    }
    tile_store<0>(out, kWidth), tile_store<1>(out + 16, kWidth);
    tile_store<2>(out + 32, kWidth), tile_store<3>(out + 48, kWidth);
  }

  static void two_by_two(const uint32_t* a, const uint32_t* b, int64_t units, int32_t* out) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t k = 0; k < units; k += kTileRows, b += kTileRows * kPanel) {
      tile_load<4>(a + k, units * 4), tile_load<6>(b, kWidth);
      tile_dpbssd<0, 4, 6>();
      tile_load<7>(b + 16, kWidth), tile_dpbssd<1, 4, 7>();
      tile_load<5>(a + kTileRows * units + k, units * 4);
      tile_dpbssd<2, 5, 6>(), tile_dpbssd<3, 5, 7>();
    }
    int32_t* below = out + kTileRows * kPanel;
    tile_store<0>(out, kWidth), tile_store<1>(out + 16, kWidth);
    tile_store<2>(below, kWidth), tile_store<3>(below + 16, kWidth);
  }

  static void add(const int32_t* products, const int32_t* start, const Head* head,
                  const Weights& w, float* sums) {
    for (int c = 0; c < kPanel; c += W) {
      vi acc[P][1];
      for (int r = 0; r < P; ++r)
        acc[r][0] = bits_load<vi>(products + r * kPanel + c) + start[r];
      const Weights here{nullptr, w.scale + c, w.offset ? w.offset + c : nullptr};
      add_planes<1, 1, P>(acc, head, here, sums + c);
    }
  }
};

#endif

}  // namespace
}  // namespace fxlm
