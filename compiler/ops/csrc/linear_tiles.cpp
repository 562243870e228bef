// bf16 linear layers on the tile unit (tile_product.h): a step is a pair of inputs.

#include <cstring>

#include "tile_product.h"

namespace fxlm {

#if !defined(FXLM_HARDWARE_TILES) && !defined(FXLM_EMULATED_TILES)

bool tiled_linear(const PackedLinear&) { return false; }

#else

namespace {

static_assert(kHalfPanel == kPanelPairs, "gates and factors are the halves of a panel");

struct Bf16Layer {
  using Sum = float;
  const PackedLinear& args;
  int64_t num_rows, steps, panels;
  const uint32_t* packed;
  int64_t threads;

  template <int C, int A, int B>
  static void multiply() {
    tile_dpbf16<C, A, B>();
  }

  // Sixteen rows at a time, a few lines of each in turn: both sides are read and written in runs.
  template <class Lines>
  void pack(int64_t first, int64_t last, const Lines& lines) const {
    constexpr int64_t kRun = 4, kInputs = 32;  // tiles; of a tile
    const int64_t tiles = ceil_div(args.inputs, kInputs), stride = args.x_stride;
    for (; first < last; first += kTileRows)
      for (int64_t begin = 0; begin < tiles; begin += kRun)
        for (int64_t row = first; row < std::min<int64_t>(last, first + kTileRows); ++row) {
          const Bf16* x = static_cast<const Bf16*>(args.x) + args.rows[row];
          for (int64_t tile = begin; tile < std::min(begin + kRun, tiles); ++tile) {
            const Bf16* from = x + tile * kInputs * stride;
            Bf16* to = reinterpret_cast<Bf16*>(lines(row, tile));
            const int64_t count = std::min(kInputs, args.inputs - tile * kInputs);
            if (stride == 1 && count == kInputs) {
              std::memcpy(to, from, kInputs * sizeof(Bf16));
              continue;
            }
            for (int64_t k = 0; k < count; ++k) to[k] = from[k * stride];
            std::memset(to + count, 0, (kInputs - count) * sizeof(Bf16));
          }
        }
  }

  void write(int64_t panel, int64_t row, const float* left, const float* right, bool many) const {
    if (!many) return finish_panel<Bf16>(args, left, panel, row);  // right lies behind left
    if (args.epilogue.gated)
      return finish_activated<Bf16>(args, left, right, panel * kHalfPanel, kHalfPanel, row, true);
    const int64_t column = panel * kPanel;
    if (!args.epilogue.is_none()) {
      finish_activated<Bf16>(args, left, nullptr, column, kHalfPanel, row, true);
      finish_activated<Bf16>(args, right, nullptr, column + kHalfPanel, kHalfPanel, row, true);
      return;
    }
    if (!stream(left, column, row)) finish<Bf16>(args, left, column, kHalfPanel, row);
    if (!stream(right, column + kHalfPanel, row))
      finish<Bf16>(args, right, column + kHalfPanel, kHalfPanel, row);
  }

  // A whole line of the result; false: not written, it is none.
  bool stream(const float* sums, int64_t column, int64_t row) const {
    if (args.outputs - column < kHalfPanel) return false;
    const Bf16* bias = args.bias ? static_cast<const Bf16*>(args.bias) + column : nullptr;
    vf values[kHalfPanel / W];
    for (int i = 0; i < kHalfPanel / W; ++i) {
      values[i] = load(sums + i * W);
      if (bias) values[i] = values[i] + load(bias + i * W);
    }
    return stream_line(static_cast<Bf16*>(args.out) + row * args.outputs + column, values);
  }
};

}  // namespace

bool tiled_linear(const PackedLinear& args) {
  if (!tiles_allowed()) return false;
  const int64_t steps = ceil_div(args.inputs, 2), panels = ceil_div(args.outputs, kPanel);
  const Bf16Layer layer{args, args.num_rows, steps, panels,
                        static_cast<const uint32_t*>(args.packed),
                        threads_for(args.num_rows, panels * steps)};
  TileProduct<Bf16Layer>(layer).run();
  return true;
}

#endif

}  // namespace fxlm
