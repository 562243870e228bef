// Linear layers over quantized weights (quantized.h), from one row to many: x is brought into the
// form that products take, then panels are multiplied by tiles of rows.
//
// Rows of x. For weights on an even grid x becomes integers: int8 with one scale a row where the
// scheme asks for it, otherwise fixed point with one scale a row and segment, 16 bits for 16-bit
// types and 24 for float32. Its error is at most 2**-16 (2**-24) of the segment's largest input,
// which is below what rounding the result to x's type costs. Products and the sums of a segment
// are then exact; of int8 rows and one scale an output, the sum of all inputs is, and is scaled
// once. For other weights x becomes float32, or stays bfloat16.
//
// Tiles take turns over a block of a panel, which the first brings into the cache. While they do,
// the next block is prefetched, a few lines a step.

#include "quantized.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"
#include "quantized_finish.h"
#include "quantized_product.h"
#include "quantized_tiles.h"
#include "tile_product.h"

namespace fxlm {
namespace {

constexpr int kPlaneRows = 6;             // planes of rows in a register tile
constexpr int64_t kChunk = 480;           // rows whose sums are held at once
constexpr int64_t kBlockBytes = 32 << 10; // of a panel that tiles share
constexpr int64_t kAheadBytes = 4 << 10;  // that a single tile prefetches ahead
constexpr int64_t kPackRows = 16;         // rows of x that are one item
constexpr int64_t kSegment = 512;         // inputs: sums of planes stay exact in float32

// ---- rows of x --------------------------------------------------------------------------------

template <class T>
void widen(const T* from, int64_t stride, int64_t count, float* to) {
  int64_t k = 0;
  if (stride == 1)
    for (; k + W <= count; k += W) store(to + k, load(from + k));
  for (; k < count; ++k) to[k] = to_float(from[k * stride]);
}

void read_row(const QuantizedLinear& args, int64_t row, float* to) {
  const int64_t at = args.rows[row];
  switch (args.dtype) {
    case Dtype::f32:
      return widen(static_cast<const float*>(args.x) + at, args.x_stride, args.inputs, to);
    case Dtype::bf16:
      return widen(static_cast<const Bf16*>(args.x) + at, args.x_stride, args.inputs, to);
    case Dtype::f16:
      return widen(static_cast<const F16*>(args.x) + at, args.x_stride, args.inputs, to);
  }
}

inline vf magnitude(vf x) { return bit_cast<vf>(bit_cast<vu>(x) & 0x7fffffffu); }

// The largest magnitude of x[count], a multiple of W; NaN where an input is not finite.
float largest(const float* x, int64_t count) {
  vf most{}, poison{};
  for (int64_t k = 0; k < count; k += W) {
    const vf v = load(x + k);
    most = vmax(magnitude(v), most);
    poison = poison + v * 0.0f;
  }
  return lanes_max(most) + lanes_sum(poison);
}

// To the nearest integer, ties to even; |x| <= 2**23. NaN gives anything.
inline vi nearest(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#endif
  const vi sign = bit_cast<vi>(x) >> 31;
  const vi whole = (bit_cast<vi>(magnitude(x) + 0x1p23f) & 0x7fffffff) - 0x4b000000;
  return (whole ^ sign) - sign;
}

inline void store_bytes(int8_t* to, vi v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
#else
  for (int i = 0; i < W; ++i) to[i] = int8_t(v[i]);
#endif
}

inline int32_t lanes_total(vi v) {
  int32_t sum = 0;
  for (int i = 0; i < W; ++i) sum += v[i];
  return sum;
}

// Digits in base 256, highest plane first, each -128..127; sums of each plane's.
template <int P>
void split(const float* x, int64_t count, float scale, int8_t* const* planes, int32_t* sums) {
  vi total[P] = {};
  for (int64_t k = 0; k < count; k += W) {
    vi rest = nearest(load(x + k) / scale);
    for (int p = P - 1; p > 0; --p) {
      const vi low = (rest << 24) >> 24;
      store_bytes(planes[p] + k, low);
      total[p] += low;
      rest = (rest - low) >> 8;
    }
    store_bytes(planes[0] + k, rest);
    total[0] += rest;
  }
  for (int p = 0; p < P; ++p) sums[p] = lanes_total(total[p]);
}

// Of floats that bfloat16 holds.
inline uint32_t half_pair(float first, float second) {
  return bit_cast<uint32_t>(first) >> 16 | (bit_cast<uint32_t>(second) & 0xffff0000u);
}

// Below the last code that the digits hold: the quotient by a rounded scale may exceed it.
constexpr float largest_code(int planes) {
  return planes == 1 ? 127.0f : planes == 2 ? 127.0f * 256 : 127.0f * 65536;
}

// NaN and a scale that would be no number make every result of the row NaN, by way of the scale.
inline float scale_of(float most, int planes) {
  return most == 0.0f ? 1.0f : most / largest_code(planes);
}

// Whether an output's sum over all inputs is one exact integer.
bool sums_whole(const QuantizedLinear& args) {
  constexpr int64_t most = 1 << 17;  // inputs, whose products are at most 127 * 128
  return args.code == Code::int8 && args.round_rows && args.group >= args.inputs &&
         args.inputs < most;
}

// ---- the layer --------------------------------------------------------------------------------

// Vectors a register tile is wide: sums, weights and one factor fit the registers.
constexpr int width_of(int rows) {
  if (W == 16) return sizeof(Words) == W * 4 || rows <= 4 ? 4 : 2;
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
}

template <class K>
class Layer {
  using A = typename K::A;
  static constexpr int P = K::planes;
  static constexpr int kTile = kPlaneRows / P;

 public:
  explicit Layer(const QuantizedLinear& args)
      : args_(args),
        per_word_(inputs_per_word(args.code)),
        segment_(std::max<int64_t>(segment_inputs(args.code, args.group, args.inputs), 1)),
        segments_(ceil_div(args.inputs, segment_)),
        steps_(ceil_div(segment_, per_word_)),
        panel_steps_(ceil_div(args.inputs, per_word_)),
        units_(steps_ * K::per_step),
        block_(args.num_rows <= kTile ? std::max<int64_t>(segments_, 1)
                                      : std::max<int64_t>(kBlockBytes / (steps_ * 256), 1)),
        panels_(ceil_div(args.outputs, kPanel)),
        scales_(ceil_div(args.inputs, args.group)),
        whole_(K::whole && sums_whole(args)) {}

  void run() {
    const int64_t threads = threads_for(args_.num_rows, panels_ * panel_steps_);
    prepare(threads);
    // Neighbouring panels are one item, so that what is prefetched is used; rows are cut where
    // the panels alone would leave threads idle.
    const int64_t group = std::max<int64_t>(1, panels_ / (8 * threads));
    const int64_t groups = ceil_div(panels_, group);
    const int64_t pieces = std::max(
        ceil_div(args_.num_rows, kChunk),
        std::min(ceil_div(2 * threads, groups), ceil_div(args_.num_rows, 8 * kPlaneRows)));
    const int64_t chunk = ceil_div(ceil_div(args_.num_rows, pieces), kTile) * kTile;
    const int64_t chunks = ceil_div(args_.num_rows, chunk);
    each(threads, groups * chunks, [&](int64_t i) {
      const int64_t first = i % chunks * chunk, panel = i / chunks * group;
      for (int64_t p = panel; p < std::min(panels_, panel + group); ++p)
        one_panel(p, first, std::min(chunk, args_.num_rows - first));
    });
  }

 private:
  template <class Body>
  static void each(int64_t threads, int64_t count, const Body& body) {
    if (threads > 1 && count > 1)
      for_each_item(count, body);
    else
      for (int64_t i = 0; i < count; ++i) body(i);
  }

  // ---- x, as [segment][row][plane][units]; zeros behind the last input -------------------------

  void prepare(int64_t threads) {
    static thread_local Scratch a, start, heads, scales;
    const int64_t rows = args_.num_rows;
    a_ = a.take<A>((segments_ * rows * P + K::kLoose) * units_);
    start_ = start.take<int32_t>(segments_ * rows * P);
    heads_ = heads.take<Head>(segments_ * rows);
    row_scale_ = scales.take<float>(rows);
    each(threads, ceil_div(rows, kPackRows), [&](int64_t i) {
      const int64_t last = std::min(rows, (i + 1) * kPackRows);
      for (int64_t row = i * kPackRows; row < last; ++row) prepare_row(row);
    });
  }

  void prepare_row(int64_t row) {
    static thread_local Scratch buffer;
    const int64_t padded = segments_ * segment_ + kSegment;
    float* x = buffer.take<float>(padded);
    read_row(args_, row, x);
    std::memset(x + args_.inputs, 0, (padded - args_.inputs) * sizeof(float));
    row_scale_[row] = 1.0f;
    if (args_.round_rows)
      row_scale_[row] = scale_of(largest(x, ceil_div(args_.inputs, W) * W), 1);
    for (int64_t s = 0; s < segments_; ++s) {
      const int64_t count = std::min(segment_, args_.inputs - s * segment_);
      prepare_segment(x + s * segment_, count, s * args_.num_rows + row, row_scale_[row]);
    }
  }

  void prepare_segment(const float* x, int64_t count, int64_t at, float row_scale) {
    float part[kSegment + 2 * W] = {};  // zeros behind the segment, not the next one's inputs
    std::memcpy(part, x, count * sizeof(float));
    const int64_t padded = ceil_div(count, W) * W;
    if constexpr (K::integers)
      write_digits(part, padded, at, row_scale);
    else
      write_floats(part, padded, at, row_scale);
  }

  void write_digits(const float* x, int64_t count, int64_t at, float row_scale) {
    alignas(64) int8_t bytes[P][kSegment + 2 * W] = {};
    int8_t* planes[P];
    for (int p = 0; p < P; ++p) planes[p] = bytes[p];
    const float scale = P == 1 ? row_scale : scale_of(largest(x, count), P);
    int32_t sums[P];
    split<P>(x, count, scale, planes, sums);
    for (int p = 0; p < P; ++p) {
      start_[at * P + p] = -K::kShift * sums[p];
      A* to = a_ + (at * P + p) * units_;
      for (int64_t i = 0; i < units_; ++i) to[i] = K::digits(bytes[p] + 4 * i);
    }
    float sum = float(sums[0]);
    for (int p = 1; p < P; ++p) sum = sum * 256.0f + float(sums[p]);
    heads_[at] = {scale, P == 1 ? sum : sum * scale};
  }

  void write_floats(float* x, int64_t count, int64_t at, float row_scale) {
    if (args_.round_rows)
      for (int64_t k = 0; k < count; k += W)
        store(x + k, to_floats(nearest(load(x + k) / row_scale)));
    vf sum{};
    for (int64_t k = 0; k < count; k += W) sum = sum + load(x + k);
    heads_[at] = {1.0f, lanes_sum(sum)};
    A* to = a_ + at * units_;
    if constexpr (std::is_same_v<A, float>) std::memcpy(to, x, units_ * sizeof(float));
    if constexpr (K::expands)
      for (int64_t i = 0; i < units_; ++i)
        to[i] = half_pair(x[i / 2 * 4 + i % 2], x[i / 2 * 4 + i % 2 + 2]);
  }

  // ---- products -------------------------------------------------------------------------------

  void one_panel(int64_t panel, int64_t first, int64_t count) {
    static thread_local Scratch buffer;
    float* sums = buffer.take<float>(count * kPanel);
    std::memset(sums, 0, count * kPanel * sizeof(float));
    if constexpr (K::tiled)
      on_tiles(panel, first, count, sums);
    else
      for (int64_t s = 0; s < segments_; s += block_)
        one_block(panel, s, std::min(block_, segments_ - s), first, count, sums);
    if (whole_)
      for (int64_t row = 0; row < count; ++row)
        scale_whole(sums + row * kPanel, kPanel, args_.scale + panel * kPanel,
                    args_.offset ? args_.offset + panel * kPanel : nullptr,
                    args_.offset ? row_sum(first + row) : 0.0f);
    finish(args_, sums, row_scale_, panel, first, count);
  }

  float row_sum(int64_t row) const {  // exact: each addend is a whole number, the sum below 2**24
    float sum = 0.0f;
    for (int64_t s = 0; s < segments_; ++s) sum += heads_[s * args_.num_rows + row].sum;
    return sum;
  }

  void on_tiles(int64_t panel, int64_t first, int64_t count, float* sums) const {
    const int64_t scales = panel * scales_ * kPanel;
    K::panel({a_ + first * P * units_, start_ + first * P, heads_ + first, args_.num_rows, count,
              units_, static_cast<const uint32_t*>(args_.packed) + panel * panel_steps_ * kPanel,
              panel_steps_, steps_, segments_, scales_ == 1 ? segments_ : args_.group / segment_,
              args_.scale + scales, args_.offset ? args_.offset + scales : nullptr, sums});
  }

  void one_block(int64_t panel, int64_t segment, int64_t count, int64_t first, int64_t rows,
                 float* sums) {
    constexpr int lines = 4;  // of a step
    const int64_t tiles = ceil_div(rows, kTile), rest = rows % tiles;
    const int64_t distance = tiles == 1 ? kAheadBytes : block_ * steps_ * 256;
    const uint32_t* words = static_cast<const uint32_t*>(args_.packed) +
                            (panel * panel_steps_ + segment * steps_) * kPanel;
    const bool expanded = K::expands && tiles > 1;
    if (expanded) words = expand(words, std::min(count * steps_, panel_steps_ - segment * steps_));
    for (int64_t i = 0, row = 0; i < tiles; ++i) {
      const Place place{words, expanded, panel, segment, count, first + row,
                        {distance, int(lines * i / tiles), int(lines * (i + 1) / tiles)}};
      const int size = int(rows / tiles + (i < rest));
      any_tile(size, place, sums + row * kPanel);
      row += size;
    }
  }

  const uint32_t* expand(const uint32_t* words, int64_t steps) const {
    static thread_local Scratch buffer;
    uint32_t* to = buffer.take<uint32_t>(steps * K::per_step * kPanel);
    if constexpr (K::expands) K::expand(words, steps, args_.table, {kAheadBytes, 0, 4}, to);
    return to;
  }

  struct Place {
    const uint32_t* words;
    bool expanded;
    int64_t panel, segment, segments, row;
    Prefetch prefetch;
  };

  void any_tile(int rows, const Place& place, float* sums) const {
    switch (rows) {
      case 1:
        return tile<1>(place, sums);
      case 2:
        return tile<2>(place, sums);
      case 3:
        if constexpr (kTile >= 3) return tile<3>(place, sums);
        break;
      case 4:
        if constexpr (kTile >= 4) return tile<4>(place, sums);
        break;
      case 5:
        if constexpr (kTile >= 5) return tile<5>(place, sums);
        break;
      default:
        if constexpr (kTile >= 6) return tile<6>(place, sums);
    }
  }

  template <int M>
  void tile(const Place& place, float* sums) const {
    if constexpr (K::expands)
      if (place.expanded)
        return columns<M>(place, K::per_step, sums, [](auto... of) {
          K::template segment<M, width_of(M * P), true>(of...);
        });
    if constexpr (K::whole)
      if (whole_)
        return columns<M>(place, 1, sums,
                          [](auto... of) { K::template segment<M, width_of(M), true>(of...); });
    columns<M>(place, 1, sums,
               [](auto... of) { K::template segment<M, width_of(M * P)>(of...); });
  }

  template <int M, class Product>
  void columns(const Place& place, int64_t lines, float* sums, const Product& product) const {
    const int64_t parts = args_.group / segment_;  // segments of a group; one group may end early
    for (int column = 0; column < kPanel; column += width_of(M * P) * W)
      for (int64_t i = 0; i < place.segments; ++i) {
        const int64_t s = place.segment + i, at = s * args_.num_rows + place.row;
        const int64_t group = scales_ == 1 ? 0 : s / parts;
        const int64_t scales = (place.panel * scales_ + group) * kPanel + column;
        const Weights w{place.words + i * steps_ * lines * kPanel + column, args_.scale + scales,
                        args_.offset == nullptr ? nullptr : args_.offset + scales};
        product(a_ + at * P * units_, int(units_), start_ + at * P, heads_ + at, w,
                int(std::min(steps_, panel_steps_ - s * steps_)), place.prefetch, column == 0,
                sums + column, args_.table);
      }
  }

  const QuantizedLinear& args_;
  const int64_t per_word_, segment_, segments_, steps_, panel_steps_, units_, block_, panels_,
      scales_;  // of an output
  const bool whole_;
  A* a_ = nullptr;
  int32_t* start_ = nullptr;
  Head* heads_ = nullptr;
  float* row_scale_ = nullptr;
};

#if defined(FXLM_HARDWARE_TILES) || defined(FXLM_EMULATED_TILES)
// int8 rows and weights, a scale an output: the tiles of tile_product.h, four inputs a step.
struct Int8Layer {
  using Sum = int32_t;
  const QuantizedLinear& args;
  int64_t num_rows, steps, panels;
  const uint32_t* packed;
  int64_t threads;
  float *row_scale, *row_sum;

  template <int C, int A, int B>
  static void multiply() {
    tile_dpbssd<C, A, B>();
  }

  template <class Lines>
  void pack(int64_t first, int64_t last, const Lines& lines) const {
    static thread_local Scratch floats;
    for (int64_t row = first; row < last; ++row) {
      const Bf16* x = static_cast<const Bf16*>(args.x) + args.rows[row];
      if (args.dtype == Dtype::bf16 && args.x_stride == 1) {
        pack_row(x, row, lines);
      } else {
        float* wide = floats.take<float>(args.inputs);
        read_row(args, row, wide);
        pack_row(wide, row, lines);
      }
    }
  }

  void write(int64_t panel, int64_t row, const int32_t* left, const int32_t* right,
             bool many) const {
    if (many && args.dtype == Dtype::bf16 && lines(panel, row, left, right)) return;
    alignas(64) float sums[kPanel];
    std::memcpy(sums, left, sizeof sums / 2);
    std::memcpy(sums + kHalfPanel, right, sizeof sums / 2);
    scale_whole(sums, kPanel, args.scale + panel * kPanel,
                args.offset ? args.offset + panel * kPanel : nullptr, row_sum[row]);
    finish(args, sums, row_scale, panel, row, 1);
  }

 private:
  template <class T, class Lines>
  void pack_row(const T* x, int64_t row, const Lines& lines) const {
    const int64_t whole = args.inputs / W * W;
    const auto at = [&](int64_t k) {
      return k < whole ? load(x + k) : load_part(x + k, int(std::max(args.inputs - k, int64_t{0})));
    };
    vf most{}, poison{};
    for (int64_t k = 0; k < args.inputs; k += W) {
      const vf v = at(k);
      most = vmax(magnitude(v), most);
      poison = poison + v * 0.0f;
    }
    const float scale = scale_of(lanes_max(most) + lanes_sum(poison), 1);
    const bool usual = scale > 0x1p-100f && scale < 0x1p100f;  // nothing below over- or underflows
    const vf divisor = broadcast(scale), inverse = broadcast(1.0f / scale);
    vi sum{};
    for (int64_t tile = 0; tile * kTileBytes < args.inputs; ++tile) {
      int8_t* line = reinterpret_cast<int8_t*>(lines(row, tile));
      for (int64_t k = 0; k < kTileBytes; k += W) {
        const vf v = at(tile * kTileBytes + k);
        const vi code = nearest(usual ? quotient(v, divisor, inverse) : v / divisor);
        store_bytes(line + k, code);
        sum += code;
      }
    }
    row_scale[row] = scale;
    row_sum[row] = float(lanes_total(sum));
  }

  // x / y as a division rounds it (Markstein), which takes the unit ten times as long.
  static vf quotient(vf x, vf y, vf inverse) {
    const vf near = x * inverse;
    return fused(fused(-near, y, x), inverse, near);
  }

  // Whole lines of a bf16 result, past the caches; false: not written, they are none.
  bool lines(int64_t panel, int64_t row, const int32_t* left, const int32_t* right) const {
    if (args.epilogue.gated) return line(panel, row, left, 0, panel * kHalfPanel, right);
    const int64_t first = panel * kPanel;
    return line(panel, row, left, 0, first, nullptr) &&
           line(panel, row, right, kHalfPanel, first + kHalfPanel, nullptr);
  }

  // The outputs from `first` on: of half a panel, each times that of `up`, if given.
  bool line(int64_t panel, int64_t row, const int32_t* sums, int64_t half, int64_t first,
            const int32_t* up) const {
    const int64_t columns = up ? args.outputs / 2 : args.outputs;
    if (columns - first < kHalfPanel) return false;
    vf values[kHalfPanel / W];
    for (int i = 0; i < kHalfPanel / W; ++i) {
      values[i] = apply(args.epilogue.function, output(panel, row, sums, half, first, i));
      if (up) values[i] = values[i] * output(panel, row, up, kHalfPanel, columns + first, i);
    }
    return stream_line(static_cast<Bf16*>(args.out) + row * columns + first, values);
  }

  // A vector of sums of half a panel as outputs; the bias of its first is `bias`.
  vf output(int64_t panel, int64_t row, const int32_t* sums, int64_t half, int64_t bias,
            int i) const {
    const int64_t column = panel * kPanel + half + i * W;
    vf sum = to_floats(bits_load<vi>(sums + i * W)) * load(args.scale + column);
    if (args.offset) sum = fused(broadcast(row_sum[row]), load(args.offset + column), sum);
    const vf value = sum * row_scale[row];
    return args.bias ? value + load(static_cast<const Bf16*>(args.bias) + bias + i * W) : value;
  }
};

bool run_whole(const QuantizedLinear& args) {
  if (!sums_whole(args) || !tiles_allowed()) return false;
  static thread_local Scratch scales, sums;
  const int64_t steps = ceil_div(args.inputs, 4), panels = ceil_div(args.outputs, kPanel);
  const Int8Layer layer{args, args.num_rows, steps, panels,
                        static_cast<const uint32_t*>(args.packed),
                        threads_for(args.num_rows, panels * steps),
                        scales.take<float>(args.num_rows), sums.take<float>(args.num_rows)};
  TileProduct<Int8Layer>(layer).run();
  return true;
}
#endif

template <bool kNibbles, int P>
void run_planes(const QuantizedLinear& args) {
#if defined(FXLM_HARDWARE_TILES) || defined(FXLM_EMULATED_TILES)
  if constexpr (!kNibbles && P == 1)
    if (run_whole(args)) return;
  using OnTiles = Tiled<kNibbles, P>;
  if (OnTiles::fits(segment_inputs(args.code, args.group, args.inputs)) && tiles_allowed())
    return Layer<OnTiles>(args).run();
#endif
  Layer<Integers<kNibbles, P>>(args).run();
}

template <bool kNibbles>
void run_integers(const QuantizedLinear& args) {
  if (args.round_rows) return run_planes<kNibbles, 1>(args);
  if (args.dtype == Dtype::f32) return run_planes<kNibbles, 3>(args);
  return run_planes<kNibbles, 2>(args);
}

// Inputs that bfloat16 holds are multiplied in it, where the CPU can.
template <class Wide>
void run_decoded(const QuantizedLinear& args) {
#if defined(__AVX512BF16__)
  using Pairs = std::conditional_t<Wide::nibbles, Table4Pairs, Fp8Pairs>;
  if (args.dtype == Dtype::bf16 || args.round_rows) return Layer<Halves<Pairs>>(args).run();
#endif
  Layer<Decoded<Wide>>(args).run();
}

}  // namespace

int64_t segment_inputs(Code code, int64_t group, int64_t inputs) {
  if (group >= inputs) return kSegment;
  const int64_t step = inputs_per_word(code);
  for (int64_t size = kSegment / step * step; size > 0; size -= step)
    if (group % size == 0) return size;
  return 0;
}

void quantized_linear(const QuantizedLinear& args) {
  if (args.num_rows == 0 || args.outputs == 0) return;
  switch (args.code) {
    case Code::int8:
      return run_integers<false>(args);
    case Code::int4:
      return run_integers<true>(args);
    case Code::table4:
      return run_decoded<Table4>(args);
    case Code::fp8:
      return run_decoded<Fp8>(args);
  }
}

}  // namespace fxlm
