// bf16 linear layers on the tile unit (tile.h): the panels of linear.h are its second operand as
// they lie, 16 steps of 16 outputs a tile.
//
// Few rows: one tile of rows against the four of a panel, sums in tiles from the first input to the
// last; what bounds it is the stream of weights, fetched a few KiB ahead.
//
// Many rows: 2 x 2 tiles, so that each load serves two products, over blocks of 512 inputs. While
// half a panel of a block (32 KiB) stays in the first-level cache, x streams past it out of the
// second: with loads that do not push the half panel out, the unit runs at 0.93 of its rate, with
// others at 0.7. A half panel lies in every second pair of lines, which would leave half of the
// cache unused, so it is copied; between products, a line or two a step, the next one is. A few
// panels take turns over a block, as x otherwise comes from the third-level cache for each. Sums go
// through float32 memory between blocks, which changes no bit. Sizes: measured on Emerald Rapids
// (48 KiB and 2 MiB a core; docs/performance.md).

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
constexpr int64_t kChunk = 16 * kPair;          // rows whose sums are held at once
constexpr int64_t kGroup = 4;                   // panels that take turns over a block
constexpr int64_t kManyPairs = 4;               // of rows, from which on copies and streams pay
constexpr int64_t kHalf = kPanel / 2;           // outputs of a 2 x 2 product
constexpr int64_t kSums = kPair * kHalf;
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
    static thread_local Scratch buffer;
    a_ = buffer.take<uint32_t>(ceil_div(tiles_, kTilesPerBlock) * kBlock * rows_);
    const int64_t threads = threads_for(args_, panels_ * steps_);
    runs(threads, ceil_div(args_.num_rows, kTileRows), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) pack_rows(i * kTileRows);
    });
    const int64_t pieces = std::max(ceil_div(rows_, kChunk),
                                    std::min(ceil_div(2 * threads, panels_), rows_ / (4 * kPair)));
    const int64_t chunk = few_ ? rows_ : ceil_div(ceil_div(rows_, pieces), kPair) * kPair;
    const int64_t chunks = ceil_div(rows_, chunk);
    const int64_t fair = panels_ * chunks / (4 * threads);  // so that all threads end together
    const int64_t group = few_ ? 1 : std::clamp<int64_t>(fair, 1, kGroup);
    runs(threads, ceil_div(panels_, group) * chunks, [&](int64_t begin, int64_t end) {
      tile_configure(shapes());
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i / chunks * group, first = i % chunks * chunk;
        if (few_)
          few_rows(panel);
        else
          many_rows(panel, std::min(group, panels_ - panel), first, std::min(chunk, rows_ - first));
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

  // Up to 16 rows of x -> a_, a few lines of each in turn: both sides are then read and written in
  // short runs. Zeros behind the last input, to the end of its tile.
  void pack_rows(int64_t first) {
    constexpr int64_t kRun = 4, kInputs = 2 * kSteps;  // tiles; of a tile
    const int64_t end = std::min(args_.num_rows, first + kTileRows), stride = args_.x_stride;
    for (int64_t begin = 0; begin < tiles_; begin += kRun)
      for (int64_t row = first; row < end; ++row) {
        const Bf16* x = static_cast<const Bf16*>(args_.x) + args_.rows[row];
        for (int64_t tile = begin; tile < std::min(begin + kRun, tiles_); ++tile) {
          const Bf16* from = x + tile * kInputs * stride;
          Bf16* to = reinterpret_cast<Bf16*>(line_of(row, tile));
          const int64_t count = std::min(kInputs, args_.inputs - tile * kInputs);
          if (stride == 1 && count == kInputs) {
            std::memcpy(to, from, kInputs * sizeof(Bf16));
            continue;
          }
          for (int64_t k = 0; k < count; ++k) to[k] = from[k * stride];
          std::memset(to + count, 0, (kInputs - count) * sizeof(Bf16));
        }
      }
  }

  // Few rows: [block][row][kBlock]. Many: [block][pair of tiles][tile of inputs][2][row][kSteps].
  uint32_t* line_of(int64_t row, int64_t tile) const {
    const int64_t block = tile / kTilesPerBlock, within = tile % kTilesPerBlock;
    if (few_) return a_ + (block * rows_ + row) * kBlock + within * kSteps;
    const int64_t pair = row / kPair * tiles_of(block) + within;
    return a_ + block * rows_ * kBlock + pair * kPair * kSteps + row % kPair * kSteps;
  }
  int64_t tiles_of(int64_t block) const {
    return std::min(kTilesPerBlock, tiles_ - block * kTilesPerBlock);
  }

  const uint32_t* packed(int64_t panel, int64_t tile) const {
    return static_cast<const uint32_t*>(args_.packed) + (panel * steps_ + tile * kSteps) * kPanel;
  }

  // The last tile of a panel may have fewer steps than rows: what is behind them is another panel.
  void whole_tile(int64_t panel, uint32_t* to) const {
    const int64_t whole = steps_ / kSteps, left = steps_ % kSteps;
    std::memcpy(to, packed(panel, whole), left * kWidth);
    std::memset(to + left * kPanel, 0, (kSteps - left) * kWidth);
  }

  void few_rows(int64_t panel) const {
    alignas(64) float sums[kTileRows * kPanel];
    alignas(64) uint32_t rest[kTile];
    if (steps_ % kSteps != 0) whole_tile(panel, rest);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t tile = 0; tile < tiles_; ++tile) {
      const uint32_t* b = (tile + 1) * kSteps > steps_ ? rest : packed(panel, tile);
      fetch<3>(packed(panel, tile) + kAhead, kTile / 16);
      tile_load<4>(line_of(0, tile), kBlock * 4);
      tile_load<5>(b, kWidth), tile_dpbf16<0, 4, 5>();
      tile_load<6>(b + 16, kWidth), tile_dpbf16<1, 4, 6>();
      tile_load<7>(b + 32, kWidth), tile_dpbf16<2, 4, 7>();
      tile_load<5>(b + 48, kWidth), tile_dpbf16<3, 4, 5>();
    }
    tile_store<0>(sums, kWidth), tile_store<1>(sums + 16, kWidth);
    tile_store<2>(sums + 32, kWidth), tile_store<3>(sums + 48, kWidth);
    for (int64_t row = 0; row < args_.num_rows; ++row)
      finish<Bf16>(args_, sums + row * kPanel, panel * kPanel, kPanel, row);
  }

  // Half a panel, one block of it.
  struct Half {
    const uint32_t* base;  // [steps][kPanel], at the half's first output
    int64_t column, side, block, steps, tiles;
  };
  Half half(int64_t panel, int64_t side, int64_t block) const {
    const int64_t steps = std::min(kBlock, steps_ - block * kBlock);
    const uint32_t* base = packed(panel, block * kTilesPerBlock) + side * kHalf;
    return {base, panel * kPanel + side * kHalf, side, block, steps, ceil_div(steps, kSteps)};
  }

  // Sums [kHalf] -> a whole line of out, past the caches: fetched into them first, the lines of many
  // rows, which lie far apart, would take the place of x. False: not done, it is no whole line.
  static bool stream(const PackedLinear& args, const float* sums, int64_t column, int64_t row) {
#if defined(__AVX512F__)
    static_assert(kHalf == 2 * W);
    Bf16* out = static_cast<Bf16*>(args.out) + row * args.outputs + column;
    if (args.outputs - column < kHalf || reinterpret_cast<uintptr_t>(out) % 64 != 0) return false;
    vf low = load(sums), high = load(sums + W);
    if (args.bias) {
      const Bf16* bias = static_cast<const Bf16*>(args.bias) + column;
      low += load(bias), high += load(bias + W);
    }
    const __m256i first = (__m256i)bf16_bits(low), second = (__m256i)bf16_bits(high);
    _mm512_stream_si512((__m512i*)out, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
    return true;
#else
    (void)args, (void)sums, (void)column, (void)row;
    return false;
#endif
  }
  static void end_stream() {  // what was written past the caches is seen before what comes
#if defined(__AVX512F__)
    _mm_sfence();
#endif
  }

  // What is done between products. For the next halves: lines are fetched into the second-level
  // cache, steps are copied as tiles, [tile][2][step][16], zeros behind the last. And rows of the
  // product before are written out: by then their sums have reached the cache.
  struct Between {
    const PackedLinear& args;
    const uint32_t* lines;
    int64_t fetched_a_step, copied_a_step, written_a_step;
    const uint32_t* from;
    uint32_t* to;
    int64_t copied, steps, all_steps;
    const float* sums;
    int64_t column, row, end;

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
      for (const int64_t to_row = std::min(row + count, end); row < to_row; ++row, sums += kHalf)
        if (!stream(args, sums, column, row)) finish<Bf16>(args, sums, column, kHalf, row);
    }
  };

  // Second operand: a tile, another of the next 16 outputs, the next inputs; bytes from step to step.
  struct Operand {
    const uint32_t* base;
    int64_t beside, below, step;
  };

  void many_rows(int64_t panel, int64_t panels, int64_t first, int64_t count) const {
    static thread_local Scratch memory, copies;
    float* sums = memory.take<float>(panels * count * kPanel);
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
      Between between{args_, fetched.base + now.side * lines * 16};
      between.fetched_a_step = ceil_div(lines, products);
      between.written_a_step = ceil_div(kPair, now.tiles);
      between.column = now.column;
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
      float* row_sums = sums + i % (2 * panels) * count * kHalf;
      for (int64_t row = first; row < first + count; row += kPair) {
        if (many)
          product<true>(a, b, now.tiles, now.block == 0, row_sums, between);
        else
          product<false>(a, b, now.tiles, now.block == 0, row_sums, between);
        if (now.block + 1 == blocks) {
          between.write(kPair);  // what is left
          between.sums = row_sums, between.row = row;
          between.end = std::min(row + kPair, args_.num_rows);
        }
        a += now.tiles * kPair * kSteps;
        row_sums += kSums;
      }
      between.write(kPair);
      if (ready) std::swap(here, there);
    }
  }

  template <bool kStream, int T>
  static void read_tile(const void* from, int64_t stride) {
    kStream ? tile_stream<T>(from, stride) : tile_load<T>(from, stride);
  }

  // 32 rows of x by 32 outputs: sums[row][kHalf] += a b over some tiles of inputs.
  template <bool kStream>
  static void product(const uint32_t* a, const Operand& b, int64_t tiles, bool first, float* sums,
                      Between& between) {
    constexpr int64_t row = kHalf * sizeof(float);
    float* below = sums + kTileRows * kHalf;
    if (first) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
      read_tile<kStream, 0>(sums, row), read_tile<kStream, 1>(sums + 16, row);
      read_tile<kStream, 2>(below, row), read_tile<kStream, 3>(below + 16, row);
    }
    const uint32_t* at = b.base;
    for (int64_t tile = 0; tile < tiles; ++tile, a += kPair * kSteps, at += b.below) {
      between.go_on();
      read_tile<kStream, 4>(a, 64), tile_load<6>(at, b.step);
      tile_dpbf16<0, 4, 6>();
      tile_load<7>(at + b.beside, b.step), tile_dpbf16<1, 4, 7>();
      read_tile<kStream, 5>(a + kTileRows * kSteps, 64);
      tile_dpbf16<2, 5, 6>(), tile_dpbf16<3, 5, 7>();
    }
    tile_store<0>(sums, row), tile_store<1>(sums + 16, row);
    tile_store<2>(below, row), tile_store<3>(below + 16, row);
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
