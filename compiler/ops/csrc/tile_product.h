// Rows times panels of packed weights on the tile unit (tile.h), whatever the type of the products:
// panels are the unit's second operand as they lie, 16 steps of 16 outputs a tile.
//
// Few rows: one tile of rows against the four of a panel, sums in tiles from the first step to the
// last; what bounds it is the stream of weights, fetched a few KiB ahead.
//
// Many rows: 2 x 2 tiles, so that each load serves two products, over blocks of 16 tiles of steps.
// While half a panel of a block (32 KiB) stays in the first-level cache, x streams past it out of
// the second: with loads that do not push the half panel out, the unit runs at 0.93 of its rate,
// with others at 0.7. A half panel lies in every second pair of lines, which would leave half of the
// cache unused, so it is copied; between products, a line or two a step, the next one is. A few
// panels take turns over a block, as x otherwise comes from the third-level cache for each. Sums go
// through memory between blocks, which changes no bit. Sizes: measured on Emerald Rapids (48 KiB
// and 2 MiB a core; docs/performance.md).
//
// A Layer says what is multiplied: `Sum`, `num_rows`, `steps` (words of 4 bytes that an output
// has), `panels`, `packed`, `threads`; `multiply<C, A, B>()`; `pack(first, last, lines)` writes rows
// of x, 64 bytes to each of lines(row, tile), zeros behind the last step; `write(panel, row, left,
// right, many)` takes the sums of a row, the two halves of a panel; side by side where rows are few.
#pragma once

#include "linear_rows.h"
#include "tile.h"

namespace fxlm {
namespace {

#if defined(FXLM_HARDWARE_TILES) || defined(FXLM_EMULATED_TILES)

constexpr int64_t kHalfPanel = kPanel / 2;  // outputs of a 2 x 2 product

template <class Layer>
class TileProduct {
  using Sum = typename Layer::Sum;
  static_assert(sizeof(Sum) == 4);
  static constexpr int64_t kSteps = 16;                 // of a tile
  static constexpr int64_t kTile = kSteps * kPanel;     // words of 16 steps of a panel
  static constexpr int64_t kTilesPerBlock = 16;
  static constexpr int64_t kBlock = kTilesPerBlock * kSteps;
  static constexpr int64_t kPair = 2 * kTileRows;       // rows of a 2 x 2 product
  static constexpr int64_t kChunk = 16 * kPair;         // rows whose sums are held at once
  static constexpr int64_t kGroup = 4;                  // panels that take turns over a block
  static constexpr int64_t kManyPairs = 4;   // of rows, from which on copies and streams pay
  static constexpr int64_t kHalf = kHalfPanel;
  static constexpr int64_t kAhead = 2 * kTile;          // words that few rows prefetch ahead
  static constexpr int64_t kWidth = kPanel * 4;

 public:
  explicit TileProduct(const Layer& layer)
      : layer_(layer),
        steps_(layer.steps),
        tiles_(ceil_div(steps_, kSteps)),
        few_(layer.num_rows <= kTileRows),
        rows_(few_ ? layer.num_rows : ceil_div(layer.num_rows, kPair) * kPair) {}

  void run() {
    static thread_local Scratch buffer;
    a_ = buffer.take<uint32_t>(ceil_div(tiles_, kTilesPerBlock) * kBlock * rows_);
    const int64_t threads = layer_.threads, panels = layer_.panels;
    runs(threads, ceil_div(layer_.num_rows, kTileRows), [&](int64_t first, int64_t last) {
      layer_.pack(first * kTileRows, std::min(layer_.num_rows, last * kTileRows),
                  [this](int64_t row, int64_t tile) { return line_of(row, tile); });
    });
    const int64_t pieces = std::max(ceil_div(rows_, kChunk),
                                    std::min(ceil_div(2 * threads, panels), rows_ / (4 * kPair)));
    const int64_t chunk = few_ ? rows_ : ceil_div(ceil_div(rows_, pieces), kPair) * kPair;
    const int64_t chunks = ceil_div(rows_, chunk);
    const int64_t fair = panels * chunks / (4 * threads);  // so that all threads end together
    const int64_t group = few_ ? 1 : std::clamp<int64_t>(fair, 1, kGroup);
    runs(threads, ceil_div(panels, group) * chunks, [&](int64_t begin, int64_t end) {
      tile_configure(shapes());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i / chunks * group, first = i % chunks * chunk;
        if (few_)
          few_rows(panel);
        else
          many_rows(panel, std::min(group, panels - panel), first, std::min(chunk, rows_ - first));
      }
      tile_release();
      end_stream();
    });
  }

 private:
  TileShapes shapes() const {
    TileShapes all{};
    for (int t = 0; t < kTiles; ++t) {
      const bool weights = few_ ? t >= 5 : t >= 6;
      all.rows[t] = uint8_t(few_ && !weights ? rows_ : kTileRows);
      all.bytes[t] = kTileBytes;
    }
    return all;
  }

  // Few rows: [block][row][kBlock]. Many: [block][pair of tiles][tile of steps][2][row][kSteps].
  uint32_t* line_of(int64_t row, int64_t tile) const {
    const int64_t block = tile / kTilesPerBlock, within = tile % kTilesPerBlock;
    if (few_) return a_ + (block * rows_ + row) * kBlock + within * kSteps;
    const int64_t tiles = std::min(kTilesPerBlock, tiles_ - block * kTilesPerBlock);
    const int64_t pair = row / kPair * tiles + within;
    return a_ + block * rows_ * kBlock + pair * kPair * kSteps + row % kPair * kSteps;
  }

  const uint32_t* packed(int64_t panel, int64_t tile) const {
    return layer_.packed + (panel * steps_ + tile * kSteps) * kPanel;
  }

  // ---- few rows -------------------------------------------------------------------------------

  void few_rows(int64_t panel) const {
    alignas(64) Sum sums[kTileRows * kPanel];
    alignas(64) uint32_t rest[kTile];
    if (steps_ % kSteps != 0) {  // behind the panel's last step is another panel
      const int64_t whole = steps_ / kSteps, left = steps_ % kSteps;
      std::memcpy(rest, packed(panel, whole), left * kWidth);
      std::memset(rest + left * kPanel, 0, (kSteps - left) * kWidth);
    }
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const uint32_t* b = (tile + 1) * kSteps > steps_ ? rest : packed(panel, tile);
      fetch<3>(packed(panel, tile) + kAhead, kTile / 16);
      tile_load<4>(line_of(0, tile), kBlock * 4);
      tile_load<5>(b, kWidth), Layer::template multiply<0, 4, 5>();
      tile_load<6>(b + 16, kWidth), Layer::template multiply<1, 4, 6>();
      tile_load<7>(b + 32, kWidth), Layer::template multiply<2, 4, 7>();
      tile_load<5>(b + 48, kWidth), Layer::template multiply<3, 4, 5>();
    }
    tile_store<0>(sums, kWidth), tile_store<1>(sums + 16, kWidth);
    tile_store<2>(sums + 32, kWidth), tile_store<3>(sums + 48, kWidth);
    for (int64_t row = 0; row < layer_.num_rows; ++row)
      layer_.write(panel, row, sums + row * kPanel, sums + row * kPanel + kHalf, false);
  }

  // ---- many rows ------------------------------------------------------------------------------

  // Half a panel, one block of it.
  struct Half {
    const uint32_t* base;  // [steps][kPanel], at the half's first output
    int64_t panel, side, block, steps, tiles;
  };
  Half half(int64_t panel, int64_t side, int64_t block) const {
    const int64_t steps = std::min(kBlock, steps_ - block * kBlock);
    const uint32_t* base = packed(panel, block * kTilesPerBlock) + side * kHalf;
    return {base, panel, side, block, steps, ceil_div(steps, kSteps)};
  }

  // What is done between products. For the next halves: lines are fetched into the second-level
  // cache, steps are copied as tiles, [tile][2][step][16], zeros behind the last. And rows of the
  // product before are written out: by then their sums have reached the cache.
  struct Between {
    const Layer& layer;
    const uint32_t* lines;
    int64_t fetched_a_step = 0, copied_a_step = 0, written_a_step = 0;
    const uint32_t* from = nullptr;
    uint32_t* to = nullptr;
    int64_t copied = 0, steps = 0, all_steps = 0;
    const Sum *left = nullptr, *right = nullptr;
    int64_t panel = 0, row = 0, end = 0;

    inline __attribute__((always_inline)) void go_on() {
      fetch<2>(lines, fetched_a_step);
      lines += fetched_a_step * 16;
      if (copied < all_steps) copy(copied_a_step);
      if (row < end) write(written_a_step);
    }
    void copy(int64_t count) {
      const int64_t to_step = std::min(copied + count, all_steps);
      for (; copied < to_step; ++copied) {
        uint32_t* line = to + copied / kSteps * kSteps * kHalf + copied % kSteps * kSteps;
        const bool zeros = copied >= steps;
        for (int i = 0; i < 2; ++i, line += kSteps * kSteps)
          if (zeros)
            std::memset(line, 0, 64);
          else
            std::memcpy(line, from + copied * kPanel + i * kSteps, 64);
      }
    }
    void write(int64_t count) {
      const int64_t to_row = std::min(row + count, end);
      for (; row < to_row; ++row, left += kHalf, right += kHalf)
        layer.write(panel, row, left, right, true);
    }
  };

  // Second operand: a tile, another of the next 16 outputs, the next steps; bytes from step to step.
  struct Operand {
    const uint32_t* base;
    int64_t beside, below, step;
  };

  void many_rows(int64_t panel, int64_t panels, int64_t first, int64_t count) const {
    static thread_local Scratch memory, copies;
    Sum* sums = memory.take<Sum>(panels * count * kPanel);
    uint32_t* here = copies.take<uint32_t>(2 * kBlock * kHalf);
    uint32_t* there = here + kBlock * kHalf;
    const int64_t pairs = count / kPair, blocks = ceil_div(tiles_, kTilesPerBlock);
    const int64_t halves = 2 * panels * blocks;
    const auto part = [&](int64_t i) {
      if (i >= halves) return half(panel + panels, 0, 0);
      return half(panel + i / 2 % panels, i % 2, i / (2 * panels));
    };
    const bool many = pairs >= kManyPairs;
    const auto copied = [&](const Half& h) { return many || h.steps % kSteps != 0; };
    bool ready = false;
    for (int64_t i = 0; i < halves; ++i) {
      const Half now = part(i), next = part(i + 1), fetched = part(i / 2 * 2 + 2);
      const int64_t products = pairs * now.tiles, lines = fetched.tiles * (kTile / 32);
      Between between{layer_, fetched.base + now.side * lines * 16};
      between.fetched_a_step = ceil_div(lines, products);
      between.written_a_step = ceil_div(kPair, now.tiles);
      between.panel = now.panel;
      if (copied(now) && !ready) {
        between.from = now.base, between.to = here;
        between.steps = now.steps, between.all_steps = now.tiles * kSteps;
        between.copy(kBlock);
      }
      ready = i + 1 < halves && copied(next);
      between.from = next.base, between.to = there, between.copied = 0;
      between.steps = next.steps, between.all_steps = ready ? next.tiles * kSteps : 0;
      between.copied_a_step = ceil_div(between.all_steps, products);
      const Operand b = copied(now) ? Operand{here, kSteps * kSteps, kSteps * kHalf, 64}
                                    : Operand{now.base, kSteps, kTile, kWidth};
      const uint32_t* a = line_of(first, now.block * kTilesPerBlock);
      Sum* row_sums = sums + i % (2 * panels) * count * kHalf;
      for (int64_t row = first; row < first + count; row += kPair) {
        if (many)
          product<true>(a, b, now.tiles, now.block == 0, row_sums, between);
        else
          product<false>(a, b, now.tiles, now.block == 0, row_sums, between);
        if (now.block + 1 == blocks && now.side == 1) {
          between.write(kPair);  // what is left
          between.right = row_sums, between.left = row_sums - count * kHalf;
          between.row = row, between.end = std::min(row + kPair, layer_.num_rows);
        }
        a += now.tiles * kPair * kSteps;
        row_sums += kPair * kHalf;
      }
      between.write(kPair);
      if (ready) std::swap(here, there);
    }
  }

  template <bool kStream, int T>
  static void read_tile(const void* from, int64_t stride) {
    kStream ? tile_stream<T>(from, stride) : tile_load<T>(from, stride);
  }

  // 32 rows of x by 32 outputs: sums[row][kHalf] += a b over some tiles of steps. Tiles are loaded
  // as soon as the product that needed what they held is under way.
  template <bool kStream>
  static void product(const uint32_t* a, const Operand& b, int64_t tiles, bool first, Sum* sums,
                      Between& between) {
    constexpr int64_t row = kHalf * sizeof(Sum);
    Sum* below = sums + kTileRows * kHalf;
    if (first) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
      read_tile<kStream, 0>(sums, row), read_tile<kStream, 1>(sums + 16, row);
      read_tile<kStream, 2>(below, row), read_tile<kStream, 3>(below + 16, row);
    }
    const uint32_t* at = b.base;
    read_tile<kStream, 4>(a, 64), read_tile<kStream, 5>(a + kTileRows * kSteps, 64);
    tile_load<6>(at, b.step), tile_load<7>(at + b.beside, b.step);
    for (int64_t tile = 1; tile < tiles; ++tile) {
      a += kPair * kSteps, at += b.below;
      between.go_on();
      Layer::template multiply<0, 4, 6>(), Layer::template multiply<1, 4, 7>();
      read_tile<kStream, 4>(a, 64);
      Layer::template multiply<2, 5, 6>(), tile_load<6>(at, b.step);
      Layer::template multiply<3, 5, 7>(), tile_load<7>(at + b.beside, b.step);
      read_tile<kStream, 5>(a + kTileRows * kSteps, 64);
    }
    between.go_on();
    Layer::template multiply<0, 4, 6>(), Layer::template multiply<1, 4, 7>();
    Layer::template multiply<2, 5, 6>(), Layer::template multiply<3, 5, 7>();
    tile_store<0>(sums, row), tile_store<1>(sums + 16, row);
    tile_store<2>(below, row), tile_store<3>(below + 16, row);
  }

  // Prefetches lines of 64 bytes into the first-level cache (3) or the second (2).
  template <int Level>
  static void fetch(const uint32_t* from, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + i * 16, 0, Level);
  }

  const Layer& layer_;
  const int64_t steps_, tiles_;
  const bool few_;
  const int64_t rows_;  // of x as packed, some of them without meaning
  uint32_t* a_ = nullptr;
};

#endif

}  // namespace
}  // namespace fxlm
