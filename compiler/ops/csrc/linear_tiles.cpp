// bf16 linear layers on the tile unit (tile.h): the panels of linear.h are its second operand as
// they lie, 16 steps of 16 outputs a tile.
//
// Few rows: one tile of rows against the four of a panel, sums in tiles from the first input to the
// last; what bounds it is the stream of weights, fetched a few KiB ahead. Many rows: 2 x 2 tiles,
// so that each load serves two products; a block of 512 inputs of half a panel (32 KiB) stays in
// the first-level cache while rows pass, and 480 rows of x (480 KiB) in the second-level cache.
// Sums go through float32 memory between blocks, which changes no bit.
//
// Tested on the software unit; not yet run on hardware.

#include <vector>

#include "linear_rows.h"
#include "tile.h"

namespace fxlm {

#if !defined(FXLM_HARDWARE_TILES) && !defined(FXLM_EMULATED_TILES)

bool tiled_linear(const PackedLinear&) { return false; }

#else

namespace {

constexpr int64_t kSteps = 16;                  // of a tile: pairs of inputs
constexpr int64_t kTile = kSteps * kPanel;      // units of 16 steps of a panel
constexpr int64_t kTilesPerBlock = 16;
constexpr int64_t kBlock = kTilesPerBlock * kSteps;
constexpr int64_t kPair = 2 * kTileRows;        // rows of a 2 x 2 product
constexpr int64_t kChunk = 15 * kPair;          // rows whose sums are held at once
constexpr int64_t kAhead = 2 * kTile;           // units that few rows prefetch ahead
constexpr int64_t kWidth = kPanel * sizeof(float);

class TiledLinear {
 public:
  explicit TiledLinear(const PackedLinear& args)
      : args_(args),
        steps_(ceil_div(args.inputs, 2)),
        tiles_(ceil_div(steps_, kSteps)),
        panels_(ceil_div(args.outputs, kPanel)),
        few_(args.num_rows <= kTileRows),
        rows_(few_ ? args.num_rows : ceil_div(args.num_rows, kPair) * kPair) {}

  void run() {
    static thread_local std::vector<float> buffer;
    const int64_t blocks = ceil_div(tiles_, kTilesPerBlock);
    a_ = reinterpret_cast<uint32_t*>(aligned(buffer, blocks * kBlock * rows_));
    const int64_t threads = threads_for(args_, panels_ * steps_);
    runs(threads, ceil_div(args_.num_rows, kTileRows), [&](int64_t first, int64_t last) {
      const int64_t end = std::min(args_.num_rows, last * kTileRows);
      for (int64_t row = first * kTileRows; row < end; ++row) pack_row(row);
    });
    const int64_t pieces = std::max(ceil_div(rows_, kChunk),
                                    std::min(ceil_div(2 * threads, panels_), rows_ / (4 * kPair)));
    const int64_t chunk = few_ ? rows_ : ceil_div(ceil_div(rows_, pieces), kPair) * kPair;
    const int64_t chunks = ceil_div(rows_, chunk);
    runs(threads, panels_ * chunks, [&](int64_t begin, int64_t end) {
      tile_configure(shapes());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % chunks * chunk;
        one_panel(i / chunks, first, std::min(chunk, rows_ - first));
      }
      tile_release();
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

  // Row of x -> a_[block][row][kBlock]; zeros behind the last input, to the end of its tile.
  void pack_row(int64_t row) {
    const Bf16* from = static_cast<const Bf16*>(args_.x) + args_.rows[row];
    const int64_t stride = args_.x_stride;
    for (int64_t first = 0; first < args_.inputs; first += 2 * kBlock) {
      Bf16* to = reinterpret_cast<Bf16*>(a_ + first / 2 * rows_ + row * kBlock);
      const int64_t count = std::min(2 * kBlock, args_.inputs - first);
      if (stride == 1)
        std::memcpy(to, from + first, count * sizeof(Bf16));
      else
        for (int64_t k = 0; k < count; ++k) to[k] = from[(first + k) * stride];
      const int64_t whole = ceil_div(count, 2 * kSteps) * 2 * kSteps;
      std::memset(to + count, 0, (whole - count) * sizeof(Bf16));
    }
  }

  void one_panel(int64_t panel, int64_t first, int64_t count) {
    static thread_local std::vector<float> buffer;
    float* sums = aligned(buffer, count * kPanel + kTile);
    // The last tile may have fewer steps than rows: what is behind them is another panel.
    uint32_t* rest = reinterpret_cast<uint32_t*>(sums + count * kPanel);
    const auto* base = static_cast<const uint32_t*>(args_.packed) + panel * steps_ * kPanel;
    const int64_t whole = steps_ / kSteps, left = steps_ % kSteps;
    std::memcpy(rest, base + whole * kTile, left * kWidth);
    std::memset(rest + left * kPanel, 0, (kSteps - left) * kWidth);
    const Weights weights{base, rest, whole};
    if (few_)
      few_rows(weights, sums);
    else
      many_rows(weights, first, count, sums);
    const int64_t end = std::min(count, args_.num_rows - first);
    for (int64_t row = 0; row < end; ++row)
      finish<Bf16>(args_, sums + row * kPanel, panel * kPanel, first + row);
  }

  struct Weights {
    const uint32_t *base, *rest;
    int64_t whole;  // tiles that lie in base
    const uint32_t* operator()(int64_t tile) const {
      return tile < whole ? base + tile * kTile : rest;
    }
  };

  void few_rows(const Weights& weights, float* sums) const {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const uint32_t* b = weights(tile);
      const int64_t block = tile / kTilesPerBlock, within = tile % kTilesPerBlock;
      fetch<3>(weights.base + tile * kTile + kAhead, kTile / 16);
      tile_load<4>(a_ + block * kBlock * rows_ + within * kSteps, kBlock * 4);
      tile_load<5>(b, kWidth), tile_dpbf16<0, 4, 5>();
      tile_load<6>(b + 16, kWidth), tile_dpbf16<1, 4, 6>();
      tile_load<7>(b + 32, kWidth), tile_dpbf16<2, 4, 7>();
      tile_load<5>(b + 48, kWidth), tile_dpbf16<3, 4, 5>();
    }
    tile_store<0>(sums, kWidth), tile_store<1>(sums + 16, kWidth);
    tile_store<2>(sums + 32, kWidth), tile_store<3>(sums + 48, kWidth);
  }

  void many_rows(const Weights& weights, int64_t first, int64_t count, float* sums) const {
    const int64_t lines = kTile / 16 * kPair / (2 * count) + 1;  // to fetch a product
    for (int64_t tile = 0; tile < tiles_; tile += kTilesPerBlock) {
      const int64_t end = std::min(tiles_, tile + kTilesPerBlock);
      const uint32_t* next = weights.base + end * kTile;
      for (int64_t column = 0; column < kPanel; column += 32)
        for (int64_t row = 0; row < count; row += kPair) {
          const uint32_t* a = a_ + tile * kSteps * rows_ + (first + row) * kBlock;
          pair_of_rows(weights, tile, end, column, a, sums + row * kPanel + column, next, lines);
          next += (end - tile) * lines * 16;
        }
    }
  }

  static void pair_of_rows(const Weights& weights, int64_t tile, int64_t end, int64_t column,
                           const uint32_t* a, float* sums, const uint32_t* next, int64_t lines) {
    float* below = sums + kTileRows * kPanel;
    if (tile == 0) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
      tile_load<0>(sums, kWidth), tile_load<1>(sums + 16, kWidth);
      tile_load<2>(below, kWidth), tile_load<3>(below + 16, kWidth);
    }
    for (; tile < end; ++tile, a += kSteps, next += lines * 16) {
      const uint32_t* b = weights(tile) + column;
      fetch<2>(next, lines);
      tile_load<4>(a, kBlock * 4), tile_load<6>(b, kWidth);
      tile_dpbf16<0, 4, 6>();
      tile_load<7>(b + 16, kWidth), tile_dpbf16<1, 4, 7>();
      tile_load<5>(a + kTileRows * kBlock, kBlock * 4);
      tile_dpbf16<2, 5, 6>(), tile_dpbf16<3, 5, 7>();
    }
    tile_store<0>(sums, kWidth), tile_store<1>(sums + 16, kWidth);
    tile_store<2>(below, kWidth), tile_store<3>(below + 16, kWidth);
  }

  // Prefetches lines of 64 bytes into the first-level cache (3) or the second (2).
  template <int Level>
  static void fetch(const uint32_t* from, int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + i * 16, 0, Level);
  }

  const PackedLinear& args_;
  const int64_t steps_, tiles_, panels_;
  const bool few_;
  const int64_t rows_;  // of x as packed, some of them without meaning
  uint32_t* a_ = nullptr;
};

}  // namespace

bool tiled_linear(const PackedLinear& args) {
  if (!tiles_allowed()) return false;
  TiledLinear(args).run();
  return true;
}

#endif

}  // namespace fxlm
