// Paged attention on CPU, for prefill and decode alike.
//
// Rows and tiles. All (query, head) pairs of one sequence that share a KV head are rows of one
// small matrix; up to kRows of them make a tile, so that a key or value is read from memory once
// for the whole group. Prefill is a row of full tiles; in decode, where a head has few rows, a tile
// is several heads, taken in turn group by group: a block's heads lie side by side in the cache, so
// memory is read as a few long streams (short ones leave a third of its bandwidth unused).
//
// Splits. Keys are taken kSplit at a time, at absolute positions 0, kSplit, 2 kSplit...: scores,
// softmax and weighted values of a split stand for themselves, and splits are folded in order.
// Whether one thread walks all splits of a tile or many threads one each is decided by load alone
// and changes no bit; nor does the chunking of a prefill or the company in the batch.
//
// Groups. Within a split, keys and values are taken kGroup tokens at a time. The cache lies as the
// products read it (kv_cache.h), so that they take it where it is; codes, and elements that this
// CPU cannot multiply, are first expanded into a scratch that stays in the first-level cache. Scales
// of keys go on the scores, scales of values on the weights. Blocks lie anywhere, so that the
// hardware cannot tell what comes next: each group prefetches its successor, a little a step.

#include "attention.h"

#include "attention_rows.h"
#include "attention_tiles.h"
#include "product.h"

namespace fxlm {
namespace {

// ---- what the products read -------------------------------------------------------------------

// Floats, or pairs of bf16: what is stored of a lane and a step, and how it is multiplied.
struct FloatUnit : FloatWeights {
  using A = float;
  static vf fma(vf sum, float a, vf b) { return a * b + sum; }
};
#if defined(FXLM_PAIRS)
struct PairUnit : PairWeights {
  using A = uint32_t;
  static vf fma(vf sum, uint32_t a, vf b) { return Pairs::fma(sum, a, b); }
};
#endif

// B of the first product: a pointer for every W keys, `stride` bytes from step to step.
template <class Unit>
struct KeyLanes : Unit {
  const char* const* lanes;
  int64_t stride;
  const Tiles* next;
  KeyLanes(const char* const* l, int64_t s, const Tiles* n) : lanes(l), stride(s), next(n) {}
  KeyLanes quiet() const { return {lanes, stride, nullptr}; }
  __attribute__((always_inline)) void prefetch(int k, int column, int) const {
    if (next != nullptr && column == 0) next->prefetch(k);
  }
  vf operator()(int k, int column) const {
    return bits_load<vf>(lanes[column / W] + k * stride);
  }
};

// B of the second product: a pointer for every tile of tokens, `stride` bytes from step to step.
template <class Unit>
struct ValueRows : Unit {
  static constexpr int steps = kTile / Unit::per_step;  // of a tile
  const char* const* tiles;
  int64_t stride;
  int first;  // step of the group
  const Tiles* next;
  ValueRows(const char* const* t, int64_t s, int f, const Tiles* n)
      : tiles(t), stride(s), first(f), next(n) {}
  ValueRows quiet() const { return {tiles, stride, first, nullptr}; }
  __attribute__((always_inline)) void prefetch(int k, int column, int width) const {
    if (next != nullptr) next->prefetch(column / width * (kGroupTiles * steps) + k);
  }
  vf operator()(int k, int column) const {
    const unsigned step = unsigned(first + k);
    return bits_load<vf>(tiles[step / steps] + step % steps * stride + column * 4);
  }
};

#if defined(FXLM_PAIRS)
// The same two for few rows over 8-bit codes: a step is a line of codes, looked up in registers.
// Sums are the same chains as over expanded pairs, so which of the two is taken changes no bit.
template <bool twos_complement>
struct CodeLines {
  struct A {
    uint32_t pair[2];
  };
  struct Line {
    __m512i first, second;
  };
  static constexpr int tokens = 4;  // of values, a step
  Lookup<twos_complement> lookup;
  const char* const* tiles;
  int64_t stride;
  int first;
  bool keys;
  const Tiles* next;
  CodeLines quiet() const { return {lookup, tiles, stride, first, keys, nullptr}; }
  __attribute__((always_inline)) void prefetch(int k, int column, int width) const {
    if (next != nullptr) next->prefetch(column / width * kGroup / tokens + k);
  }
  __attribute__((always_inline)) Line operator()(int k, int column) const {
    const unsigned step = unsigned(first + k);
    const char* from = keys ? tiles[column / kTile] + k * stride
                            : tiles[step / 4] + step % 4 * stride + column * 4;
    Line line;
    lookup(_mm512_loadu_si512(from), line.first, line.second);
    return line;
  }
  static __attribute__((always_inline)) vf fma(vf sum, A a, const Line& b) {
    return Pairs::fma(Pairs::fma(sum, a.pair[0], (vf)b.first), a.pair[1], (vf)b.second);
  }
};
#endif

// ---- one tile ---------------------------------------------------------------------------------

template <class T, class Unit>
class Worker : RowTile {
 public:
  static constexpr int lanes = W;

  Worker(const Attention& args, const Tile& tile, const Format& format)
      : RowTile(args, tile, format, lanes), steps_(int(args.dk / Unit::per_step)) {
    carve();
    pack_queries<T, Unit::per_step>(reinterpret_cast<float*>(queries_), steps_);
  }

  void one_split(int64_t index, float* out) { split(index, out, false); }

  void all_splits() {
    clear(total_, int(tile_.all_rows()));
    for (int64_t i = tile_.low / kSplit; i * kSplit < tile_.high; ++i) {
      split(i, partial_, true);
      fold(total_, partial_, int(tile_.all_rows()));
    }
    finish<T>(total_, 0, int(tile_.all_rows()));
  }

  void fold_partials(int head, const float* partials) {
    fold_head<T>(head, partials, total_);
  }

 private:
  // Partial results of one split -> rows of `out`, ld_ floats each. `more`: the next split follows.
  void split(int64_t index, float* out, bool more) {
    enter(index);
    const int first = begin_ / kGroup * kGroup, last = int(round_up(end_, W));
    for (int m = 0; m < tile_.all_rows(); ++m) {
      std::memset(scores_ + m * kSplit + first, 0, (last - first) * sizeof(float));
      std::memset(out + m * ld_ + kHeader, 0, width_ * sizeof(float));
    }
    Tiles next = tiles_of(keys_, 0, first);
    walk(keys_, first, next, tiles_of(values_, 0, first), [&](int head, int at, const Tiles& here) {
      score_keys(head, at, std::min(last - at, kGroup), here, next);
    });
    walk(values_, first, next, more ? tiles_of(keys_, 0, kSplit) : Tiles{},
         [&](int head, int at, const Tiles& here) {
           if (at == first) weigh(head, first, last, out);
           mix_values(head, at, here, next, out + row_of(head) * ld_);
         });
  }

  void carve() {
    constexpr int value_steps = kGroup / Unit::per_step;
    const size_t rows = tile_.all_rows();
    Carver carver(rows * (kSplit + steps_ + 2 * ld_) + steps_ * kGroup + value_steps * width_ +
                  8 * 16);
    scores_ = carver.take(rows * kSplit);
    partial_ = carver.take(rows * ld_);
    total_ = carver.take(rows * ld_);
    expanded_keys_ = carver.take(steps_ * kGroup);
    expanded_values_ = carver.take(value_steps * width_);
    queries_ = reinterpret_cast<typename Unit::A*>(carver.take(rows * steps_));
  }

  // ---- the two products

  // Whether codes are looked up in registers: for the few rows that then take them at once.
  bool looks_up() const {
    return Unit::per_step == 2 && format_.codes && tile_.rows <= 4 && args_.dv == width_;
  }

#if defined(FXLM_PAIRS)
  template <bool twos_complement>
  void multiply_codes(const float* a, int lda, const char* const* tiles, int64_t stride, int first,
                      int steps, bool keys, const Tiles& next, int columns, float* c, int ldc) {
    using B = CodeLines<twos_complement>;
    const B b{Lookup<twos_complement>(*format_.codes), tiles, stride, first, keys, &next};
    product_rows(reinterpret_cast<const typename B::A*>(a), lda, b, steps, columns, c, ldc,
                 int(tile_.rows));
  }
  template <class... More>
  void multiply_codes_of_store(More&&... more) {
    if (args_.store == Store::int8)
      multiply_codes<true>(more...);
    else
      multiply_codes<false>(more...);
  }
#else
  template <class... More>
  void multiply_codes_of_store(More&&...) {}
#endif

  void score_codes(int head, int at, int columns, const Tiles& here, const Tiles& next) {
    const char* tiles[kGroupTiles];
    for (int i = 0; i < kGroupTiles; ++i) tiles[i] = here.at[i];
    const char* some = nullptr;  // stands for what no row sees: those scores are masked
    for (const char* tile : tiles) some = some ? some : tile;
    for (const char*& tile : tiles) tile = tile ? tile : some;
    multiply_codes_of_store(reinterpret_cast<const float*>(queries_of(head)), steps_ / 2, tiles,
                            args_.block_size * 4, 0, steps_ / 2, true, next, columns,
                            scores_of(head) + at, kSplit);
  }

  void mix_codes(int head, int at, const Tiles& here, const Tiles& next, float* out) {
    const int begin = std::max(begin_ - at, 0), end = std::min(end_ - at, kGroup);
    const char* tiles[kGroupTiles];
    for (int i = 0; i < kGroupTiles; ++i) {
      tiles[i] = here.at[i];
      const int token = i * kTile;
      if (tiles[i] == nullptr || (token >= begin && token + kTile <= end)) continue;
      auto* copy = reinterpret_cast<uint8_t*>(expanded_values_) + token * args_.dv;
      std::memcpy(copy, tiles[i], kTile * args_.dv);
      for (int j = 0; j < kTile; ++j)
        for (int d = 0; d < args_.dv && (token + j < begin || token + j >= end); ++d)
          copy[place<1>(j, d, args_.dv)] = 0;  // which is 0.0 as int8 and as fp8
      tiles[i] = reinterpret_cast<const char*>(copy);
    }
    const int first = begin / 4, last = (end + 3) / 4;
    multiply_codes_of_store(scores_of(head) + at / 2 + first * 2, kSplit / 2, tiles, args_.dv * 4, first,
                            last - first, false, next, width_, out + kHeader, ld_);
  }

  typename Unit::A* queries_of(int head) const { return queries_ + row_of(head) * steps_; }
  float* scores_of(int head) const { return scores_ + row_of(head) * kSplit; }

  // Scores of `columns` keys.
  void score_keys(int head, int at, int columns, const Tiles& here, const Tiles& next) {
    if (looks_up()) return score_codes(head, at, columns, here, next);
    const char* lanes[kGroup / W];
    const bool direct = format_.expand == nullptr;
    const char* some = here.at[0];  // stands for what no row sees: those scores are masked
    for (int i = 1; some == nullptr; ++i) some = here.at[i];
    for (int i = 0; i < kGroupTiles; ++i) {
      const char* from = here.at[i] ? here.at[i] : some;
      if (!direct && here.at[i] != nullptr)
        format_.expand(from, args_.block_size, int(args_.dk), kTile, format_.codes,
                       next.line_of(i), expanded_keys_ + i * kTile, kGroup);
      if (!direct) from = reinterpret_cast<const char*>(expanded_keys_ + i * kTile);
      for (int w = 0; w < kTile; w += W) lanes[(i * kTile + w) / W] = from + w * 4;
    }
    const int64_t stride = 4 * (direct ? args_.block_size : kGroup);
    product_rows(queries_of(head), steps_, KeyLanes<Unit>{lanes, stride, direct ? &next : nullptr},
                 steps_, columns, scores_of(head) + at, kSplit, int(tile_.rows));
  }

  // Adds the weighted values of a group to `out`, the rows of a head.
  void mix_values(int head, int at, const Tiles& here, const Tiles& next, float* out) {
    if (looks_up()) return mix_codes(head, at, here, next, out);
    constexpr int per = Unit::per_step;
    const int begin = std::max(begin_ - at, 0), end = std::min(end_ - at, kGroup);
    const char* tiles[kGroupTiles];
    for (int i = 0; i < kGroupTiles; ++i)
      tiles[i] = here.at[i] == nullptr
                     ? nullptr
                     : find_values(i, here.at[i], begin, end, next.line_of(i));
    const int first = begin / per, last = (end + per - 1) / per;
    const auto* weights = reinterpret_cast<const typename Unit::A*>(scores_of(head)) + at / per;
    const bool direct = format_.expand == nullptr;
    product_rows(weights + first, kSplit,
                 ValueRows<Unit>{tiles, width_ * 4, first, direct ? &next : nullptr}, last - first,
                 width_, out + kHeader, ld_, int(tile_.rows));
  }

  // Tile i of a group: where it is in the cache, or expanded, with tokens outside of [begin, end)
  // zeroed: what they hold may be anything, and a weight of zero does not undo NaN.
  const char* find_values(int i, const char* tile, int begin, int end, Lines ahead) {
    constexpr int per = Unit::per_step;
    const int at = i * kTile;
    const bool whole = at >= begin && at + kTile <= end;
    if (format_.expand == nullptr && whole && args_.dv == width_) return tile;
    float* to = expanded_values_ + at / per * width_;
    const Expand expand = format_.expand ? format_.expand : format_.copy;
    expand(tile, args_.dv, kTile, int(args_.dv), format_.codes, ahead, to, width_);
    for (int j = 0; j < kTile && !whole; ++j)
      if (at + j < begin || at + j >= end) clear_step(to + j / per * width_, j % per);
    return reinterpret_cast<const char*>(to);
  }

  void clear_step(float* row, int which) {
    if (Unit::per_step == 1) {
      std::memset(row, 0, width_ * sizeof(float));
    } else {
      const uint32_t keep = which == 0 ? 0xffff0000 : 0x0000ffff;
      for (int d = 0; d < width_; d += W)
        store(row + d, bit_cast<vf>(bit_cast<vu>(load(row + d)) & keep));
    }
  }

  // Softmax of all rows of a head. It is not done for all heads at once, since memory would idle
  // meanwhile.
  void weigh(int head, int first, int last, float* out) {
    if (format_.codes) find_scales(head, first);
    const int m = row_of(head);
    softmax<Unit>(scores_ + m * kSplit, m, int(tile_.rows), first, last, out + m * ld_);
  }

  const int steps_;
  float *scores_, *partial_, *total_, *expanded_keys_, *expanded_values_;
  typename Unit::A* queries_;
};

// ---- writing ----------------------------------------------------------------------------------

template <class T, bool keys>
void write_heads(const Attention& args, int64_t token) {
  const Strided& from = keys ? args.k : args.v;
  const int64_t dim = keys ? args.dk : args.dv, size = args.block_size;
  const int64_t block = args.slots[token] / size, offset = args.slots[token] % size;
  const bool coded = args.store != Store::same;
  const int64_t bytes = size * (coded ? dim + 4 : dim * int64_t(sizeof(T)));
  for (int64_t head = 0; head < args.kv_heads; ++head) {
    const T* x = static_cast<const T*>(from.data) + head * from.head + token * from.token;
    char* chunk = static_cast<char*>(keys ? args.k_cache : args.v_cache) +
                  (block * args.kv_heads + head) * bytes;
    const float* fixed = keys ? args.k_scale : args.v_scale;
    if (coded)
      write_codes<T, keys>(x, from.dim, dim, offset, size, args.store, fixed ? fixed[head] : 0.0f,
                           chunk);
    else
      scatter<keys>(x, from.dim, dim, offset, size, reinterpret_cast<T*>(chunk));
  }
}

template <class T>
void write_tokens(const Attention& args) {
  constexpr int64_t batch = 32;  // tokens an item
  for_each_item((args.tokens + batch - 1) / batch, [&](int64_t i) {
    for (int64_t t = i * batch; t < std::min(args.tokens, (i + 1) * batch); ++t) {
      if (args.slots[t] < 0) continue;
      write_heads<T, true>(args, t);
      write_heads<T, false>(args, t);
    }
  });
}

Format format_of(const Attention& args) {
  if (args.store != Store::same)
    return {floats_of_codes, nullptr, &codes_of(args.store), 1};
  switch (args.dtype) {
    case Dtype::f32:
      return {nullptr, copy_units<1>, nullptr, 4};
    case Dtype::bf16:
      return {floats_of_halves<Bf16>, nullptr, nullptr, 2};
    default:
      return {floats_of_halves<F16>, nullptr, nullptr, 2};
  }
}

#if defined(FXLM_PAIRS)
Format pair_format_of(const Attention& args) {
  switch (args.store) {
    case Store::int8:
      return {pairs_of_codes<true>, nullptr, &codes_of(args.store), 1};
    case Store::fp8:
      return {pairs_of_codes<false>, nullptr, &codes_of(args.store), 1};
    default:
      return {nullptr, copy_units<2>, nullptr, 2};
  }
}
#endif

}  // namespace

void write_cache(const Attention& args) {
  if (args.k.data == nullptr) return;
  switch (args.dtype) {
    case Dtype::f32:
      return write_tokens<float>(args);
    case Dtype::bf16:
      return write_tokens<Bf16>(args);
    case Dtype::f16:
      return write_tokens<F16>(args);
  }
}

void paged_attention(const Attention& args) {
  switch (args.dtype) {
    case Dtype::f32:
      return run<Worker<float, FloatUnit>>(args, format_of(args), kRows);
    case Dtype::bf16:
      if (tiled_attention(args)) return;
#if defined(FXLM_PAIRS)
      return run<Worker<Bf16, PairUnit>>(args, pair_format_of(args), kRows);
#else
      return run<Worker<Bf16, FloatUnit>>(args, format_of(args), kRows);
#endif
    case Dtype::f16:
      return run<Worker<F16, FloatUnit>>(args, format_of(args), kRows);
  }
}

bool covers(const Attention& args) {
  const int64_t size = args.block_size, most = 2048;
  const bool blocks = size % kTile == 0 && (size & (size - 1)) == 0;
  const int64_t per_unit = args.store != Store::same ? 4 : args.dtype == Dtype::f32 ? 1 : 2;
  const bool values = args.store == Store::same || args.dv % 4 == 0;
  return blocks && values && args.dk % per_unit == 0 && args.dk <= most && args.dv <= most;
}

}  // namespace fxlm
