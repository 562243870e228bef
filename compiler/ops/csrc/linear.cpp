// Linear layers over packed weights (layout: linear.h), from one row to many.
//
// Rows. Up to kTile rows of x share each load of the weights; more rows are tiles that take turns
// over a block of a panel, which the first tile brings into the cache and the others find there.
// Weights are thus read from memory once, whatever the number of rows (up to kChunk of them).
//
// Sums. Each output is one chain of additions in ascending order of inputs, spilled as float32
// between blocks: no bit depends on the batch, on tiles or on threads.
//
// Prefetch. While tiles work on one block, the next is fetched, a few lines a step, in the order of
// addresses: the hardware's own prefetch ends at every page and loses about a third of the
// bandwidth, and a tenth is lost where the order skips lines.

#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "linear_rows.h"
#include "pages.h"
#include "parallel.h"
#include "product.h"

namespace fxlm {
namespace {

static_assert(kPanel == kKeys, "pack_keys packs a panel");

constexpr int kTile = 6;             // rows of a register tile
constexpr int64_t kChunk = 480;      // rows whose sums are held at once; a multiple of kTile
// Steps of a panel that several tiles share. With few rows this and the next block must fit the
// first-level cache; with more, the spilling of sums must not count.
constexpr int64_t kBlock = 64, kManyBlock = 128, kManyRows = 24;
// From here on x is what must be kept close: a block of it serves two panels in turn.
constexpr int64_t kPairRows = 48;
constexpr int64_t kAhead = 16;       // steps that a single tile prefetches ahead
// Up to so many rows memory is the bound. Lines are then fetched into the second-level cache: the
// first has few buffers for misses (24 on Zen 4, 12 GB/s a core). More rows want them nearer.
constexpr int64_t kFarRows = 18;

// What to fetch while a tile works: `per_step` lines of 64 bytes each step, up to `end`.
struct Ahead {
  const char *from, *end;
  int per_step;
  bool near;  // into the first-level cache
};

// B of a product (product.h): one panel. `Unit` is what is stored of an output and a step.
template <class Unit>
struct Panel {
  const Unit* base;
  Ahead ahead;
  void prefetch(int k, int column, int) const {
    if (column != 0) return;
    const char* from = ahead.from + int64_t(k) * ahead.per_step * 64;
    if (from >= ahead.end) return;
    for (int line = 0; line < ahead.per_step; ++line)
      ahead.near ? __builtin_prefetch(from + line * 64) : __builtin_prefetch(from + line * 64, 0, 2);
  }
};

struct SingleFloats : Panel<float> {
  using A = float;
  static constexpr int per_step = 1;
  vf operator()(int k, int column) const { return load(base + k * kPanel + column); }
  static vf fma(vf sum, float a, vf b) { return a * b + sum; }
};

struct SingleHalves : Panel<F16> {
  using A = float;
  static constexpr int per_step = 1;
  vf operator()(int k, int column) const { return load(base + k * kPanel + column); }
  static vf fma(vf sum, float a, vf b) { return a * b + sum; }
};

#if defined(__AVX512BF16__)
struct PairedBf16 : Panel<uint32_t> {
  using A = uint32_t;
  static constexpr int per_step = 2;
  vf operator()(int k, int column) const { return bits_load<vf>(base + k * kPanel + column); }
  static vf fma(vf sum, uint32_t a, vf b) { return Pairs::fma(sum, a, b); }
};
#else
struct FloatPair {
  float first, second;
};
struct PairedBf16 : Panel<uint32_t> {
  using A = FloatPair;
  static constexpr int per_step = 2;
  vf operator()(int k, int column) const { return bits_load<vf>(base + k * kPanel + column); }
  static vf fma(vf sum, FloatPair a, vf b) {
    const vu bits = bit_cast<vu>(b);
    const vf low = bit_cast<vf>(bits << 16), high = bit_cast<vf>(bits & 0xffff0000u);
    return a.second * high + (a.first * low + sum);
  }
};
#endif

// ---- one tile ---------------------------------------------------------------------------------

// Vectors a register tile is wide: sums, a line of weights and one factor fit the registers.
constexpr int width_of(int rows) {
  return W == 16 ? 4 : rows == 1 ? 8 : rows == 2 ? 4 : 2;
}

template <int M, class B>
void tile(const typename B::A* a, int lda, const B& b, int steps, float* c) {
  constexpr int N = width_of(M);
  for (int column = 0; column < kPanel; column += N * W)
    product<M, N>(a, lda, b, steps, column, c, int(kPanel));
}

template <class B>
void any_tile(int rows, const typename B::A* a, int lda, const B& b, int steps, float* c) {
  static_assert(kTile == 6);
  switch (rows) {
    case 1:
      return tile<1>(a, lda, b, steps, c);
    case 2:
      return tile<2>(a, lda, b, steps, c);
    case 3:
      return tile<3>(a, lda, b, steps, c);
    case 4:
      return tile<4>(a, lda, b, steps, c);
    case 5:
      return tile<5>(a, lda, b, steps, c);
    default:
      return tile<6>(a, lda, b, steps, c);
  }
}

inline void put(uint32_t* row, int64_t k, Bf16 value) {
  std::memcpy(reinterpret_cast<char*>(row) + k * 2, &value, 2);
}
template <class A, class T>
inline void put(A* row, int64_t k, T value) {
  const float wide = to_float(value);
  std::memcpy(reinterpret_cast<char*>(row) + k * 4, &wide, 4);
}

// ---- the layer --------------------------------------------------------------------------------

template <class T, class B>
class Linear {
  using A = typename B::A;
  using Unit = std::remove_const_t<std::remove_pointer_t<decltype(B::base)>>;

 public:
  explicit Linear(const PackedLinear& args)
      : args_(args),
        steps_(ceil_div(args.inputs, B::per_step)),
        block_(args.num_rows <= kTile       ? std::max<int64_t>(steps_, 1)
               : args.num_rows < kManyRows ? kBlock
                                           : kManyBlock),
        together_(args.num_rows < kPairRows ? 1 : 2),
        panels_(ceil_div(args.outputs, kPanel)) {}

  void run() {
    const int64_t blocks = ceil_div(steps_, block_);
    static thread_local Scratch buffer;
    a_ = buffer.take<A>(blocks * block_ * args_.num_rows);
    const int64_t threads = threads_for(args_.num_rows, panels_ * steps_);
    runs(threads, ceil_div(args_.num_rows, kPackRows), [&](int64_t first, int64_t last) {
      const int64_t end = std::min(args_.num_rows, last * kPackRows);
      for (int64_t row = first * kPackRows; row < end; ++row) pack_row(row);
    });
    // Rows are cut where the panels alone would leave threads idle.
    const int64_t groups = ceil_div(panels_, together_);
    const int64_t pieces = std::max(ceil_div(args_.num_rows, kChunk),
                                    std::min(ceil_div(2 * threads, groups),
                                             ceil_div(args_.num_rows, 8 * kTile)));
    const int64_t chunk = ceil_div(ceil_div(args_.num_rows, pieces), kTile) * kTile;
    const int64_t chunks = ceil_div(args_.num_rows, chunk);
    runs(threads, groups * chunks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % chunks * chunk, panel = i / chunks * together_;
        some_panels(panel, std::min(together_, panels_ - panel), row,
                    std::min(chunk, args_.num_rows - row));
      }
    });
  }

 private:
  static constexpr int64_t kPackRows = 16;

  // Row of x -> a_[block][row][block_]; zeros behind the last input of an odd number.
  void pack_row(int64_t row) {
    const T* from = static_cast<const T*>(args_.x) + args_.rows[row];
    const int64_t width = block_ * B::per_step, stride = args_.x_stride;
    for (int64_t first = 0; first < args_.inputs; first += width) {
      A* to = a_ + first / width * block_ * args_.num_rows + row * block_;
      const int64_t count = std::min(width, args_.inputs - first);
      if (count % B::per_step != 0) to[count / B::per_step] = A{};
      if (stride == 1)
        for (int64_t k = 0; k < count; ++k) put(to, k, from[first + k]);
      else
        for (int64_t k = 0; k < count; ++k) put(to, k, from[(first + k) * stride]);
    }
  }

  void some_panels(int64_t panel, int64_t panels, int64_t first, int64_t count) {
    static thread_local Scratch buffer;
    float* sums = buffer.take<float>(panels * count * kPanel);
    std::memset(sums, 0, panels * count * kPanel * sizeof(float));
    const Unit* base = static_cast<const Unit*>(args_.packed) + panel * steps_ * kPanel;
    for (int64_t step = 0; step < steps_; step += block_)
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t next = i + 1 < panels ? steps_ : block_ - i * steps_;
        one_block(base + (i * steps_ + step) * kPanel, next,
                  a_ + step * args_.num_rows + first * block_,
                  int(std::min(block_, steps_ - step)), count, sums + i * count * kPanel);
      }
    for (int64_t i = 0; i < panels; ++i)
      for (int64_t row = 0; row < count; ++row)
        finish_panel<T>(args_, sums + (i * count + row) * kPanel, panel + i, first + row);
  }

  // `next`: steps from this block to the one that is read after it.
  void one_block(const Unit* base, int64_t next, const A* a, int steps, int64_t count,
                 float* sums) {
    constexpr int64_t lines = kPanel * sizeof(Unit) / 64;  // of a step
    const int64_t tiles = ceil_div(count, kTile), rest = count % tiles;
    const char* from = reinterpret_cast<const char*>(base + (tiles == 1 ? kAhead : next) * kPanel);
    const int64_t per_step = ceil_div(lines, tiles);
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      const int rows = int(count / tiles + (i < rest));
      B b;
      b.base = base;
      b.ahead = {from + steps * lines * i / tiles * 64, from + steps * lines * (i + 1) / tiles * 64,
                 int(per_step), count > kFarRows};
      any_tile(rows, a + row * block_, int(block_), b, steps, sums + row * kPanel);
      row += rows;
    }
  }

  const PackedLinear& args_;
  const int64_t steps_, block_, together_, panels_;
  A* a_ = nullptr;
};

// ---- packing ----------------------------------------------------------------------------------

template <int S>
struct PerStep {
  static constexpr int per_step = S;
};

// Units of 4 bytes: transposed in registers.
template <class T, int S>
void pack_panel(const T* const* rows, int64_t inputs, char* out) {
  constexpr int64_t width = W * S;
  const int64_t whole = inputs / width * width, steps = ceil_div(inputs, S);
  pack_keys<PerStep<S>>(rows, int(whole), out);
  if (whole == inputs) return;
  const T* tails[kPanel];
  for (int i = 0; i < kPanel; ++i) tails[i] = rows[i] + whole;
  float rest[W * kPanel];
  pack_keys<PerStep<S>>(tails, int(inputs - whole), rest);
  const int64_t done = whole / S;
  std::memcpy(out + done * kPanel * 4, rest, (steps - done) * kPanel * 4);
}

void pack_halves(const F16* const* rows, int64_t inputs, F16* out) {
  for (int64_t k = 0; k < inputs; ++k)
    for (int i = 0; i < kPanel; ++i) out[k * kPanel + i] = rows[i][k];
}

template <class T>
void pack(const PackWeight& args) {
  const int64_t per_step = inputs_per_step(args.dtype);
  const int64_t unit = per_step * int64_t(sizeof(T)), steps = ceil_div(args.inputs, per_step);
  const std::vector<T> zeros(args.inputs);
  for_each_item(ceil_div(args.outputs, kPanel), [&](int64_t panel) {
    const T* rows[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t row = output_at(panel, i, args.outputs, args.gated);
      rows[i] = row < args.outputs ? static_cast<const T*>(args.weight) + row * args.row_stride
                                   : zeros.data();
    }
    char* out = static_cast<char*>(args.packed) + panel * steps * kPanel * unit;
    if constexpr (std::is_same_v<T, F16>)
      pack_halves(rows, args.inputs, reinterpret_cast<F16*>(out));
    else
      pack_panel<T, int(4 / sizeof(T))>(rows, args.inputs, out);
  });
}

template <class T>
void read_rows(const PackedRows& args) {
  const int64_t per_step = inputs_per_step(args.dtype), steps = ceil_div(args.inputs, per_step);
  const T* packed = static_cast<const T*>(args.packed);
  auto one = [&](int64_t i) {
    const int64_t id = args.ids[i];
    const T* from = packed + (id / kPanel * steps * kPanel + id % kPanel) * per_step;
    T* to = static_cast<T*>(args.out) + i * args.inputs;
    for (int64_t k = 0; k < args.inputs; ++k)
      to[k] = from[k / per_step * kPanel * per_step + k % per_step];
  };
  if (args.count < 8)
    for (int64_t i = 0; i < args.count; ++i) one(i);
  else
    for_each_item(args.count, one);
}

}  // namespace

void pack_weight(const PackWeight& args) {
  const int64_t per_step = inputs_per_step(args.dtype);
  const int64_t width = args.dtype == Dtype::f32 ? 4 : 2;
  prefer_large_pages(args.packed, ceil_div(args.outputs, kPanel) * kPanel *
                                      ceil_div(args.inputs, per_step) * per_step * width);
  switch (args.dtype) {
    case Dtype::f32:
      return pack<float>(args);
    case Dtype::bf16:
      return pack<Bf16>(args);
    case Dtype::f16:
      return pack<F16>(args);
  }
}

void packed_linear(const PackedLinear& args) {
  if (args.num_rows == 0 || args.outputs == 0) return;
  switch (args.dtype) {
    case Dtype::f32:
      return Linear<float, SingleFloats>(args).run();
    case Dtype::bf16:
      if (tiled_linear(args)) return;
      return Linear<Bf16, PairedBf16>(args).run();
    case Dtype::f16:
      return Linear<F16, SingleHalves>(args).run();
  }
}

void packed_rows(const PackedRows& args) {
  if (args.dtype == Dtype::f32)
    read_rows<float>(args);
  else
    read_rows<Bf16>(args);  // 16 bits are 16 bits; the dtype decides on pairs
}

}  // namespace fxlm
