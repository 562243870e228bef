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

#include <algorithm>
#include <memory>
#include <vector>

#include "attention_plan.h"
#include "kv_cache.h"
#include "parallel.h"
#include "product.h"

namespace fxlm {
namespace {

constexpr int kGroup = 64;   // tokens that are expanded and prefetched together; divides kSplit
constexpr int kTiles = kGroup / kTile;
constexpr int64_t kSerialFloats = 1 << 16;  // folding fewer costs less than waking threads

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ---- what the products read -------------------------------------------------------------------

// The tiles of one group, and how many lines of each are to be read; no lines: there is none.
struct Tiles {
  const char* at[kTiles];
  int lines;
  int64_t stride;  // bytes from line to line
  Lines line_of(int tile) const { return {lines ? at[tile] : nullptr, stride}; }
  __attribute__((always_inline)) void prefetch(int line) const {
    if (line >= lines) return;
    for (const char* tile : at) fetch(tile + line * stride);
  }
};

// Floats, or pairs of bf16: what is stored of a lane and a step, and how it is multiplied.
struct FloatUnit {
  using A = float;
  static constexpr int per_step = 1;
  static vf fma(vf sum, float a, vf b) { return a * b + sum; }
  static void store_weights(float* row, int i, vf weights) { store(row + i, weights); }
  static vf exponential(vf x) { return vexp(x); }
};
#if defined(FXLM_PAIRS)
struct PairUnit {
  using A = uint32_t;
  static constexpr int per_step = 2;
  static vf fma(vf sum, uint32_t a, vf b) { return Pairs::fma(sum, a, b); }
  static void store_weights(float* row, int i, vf weights) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)weights);
    std::memcpy(reinterpret_cast<Bf16*>(row) + i, &rounded, sizeof rounded);
  }
  // exp(x) for x <= 0 within 4e-6, a hundredth of what rounding to bf16 takes: 2^n times a
  // polynomial in the fraction, fitted by least squares at Chebyshev points.
  static vf exponential(vf x) {
    const vf t = vmax(broadcast(-200.0f), x) * 1.44269504088896341f;
    const vf n = (vf)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT);
    const vf f = t - n;
    vf y = broadcast(0.00956051021f);
    y = y * f + 0.0559170392f;
    y = y * f + 0.240249811f;
    y = y * f + 0.693121968f;
    y = y * f + 0.999999191f;
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
  }
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
    if (next != nullptr) next->prefetch(column / width * (kTiles * steps) + k);
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

// How a cache becomes units; `expand` null: it holds them already.
struct Format {
  Expand expand;
  Expand copy;  // what to take instead of nothing where a group ends within a tile
  const Codes* codes;
  int bytes;  // an element
};

// One of the two caches.
struct Chunks {
  const char* base;
  int64_t dim, chunk_bytes;
};

// ---- one tile ---------------------------------------------------------------------------------

// Per row: maximum, sum, then the weighted values.
constexpr int kHeader = W;  // maximum at [0], sum at [1]; keeps the values aligned to vectors

template <class T, class Unit>
class Worker {
 public:
  Worker(const Attention& args, const Tile& tile, const Format& format)
      : args_(args),
        tile_(tile),
        format_(format),
        group_(args.heads / args.kv_heads),
        shift_(__builtin_ctzll(args.block_size)),
        table_(args.block_table + tile.sequence * args.table_stride),
        steps_(int(args.dk / Unit::per_step)),
        width_(int(round_up(args.dv, W))),
        ld_(kHeader + width_),
        keys_{static_cast<const char*>(args.k_cache), args.dk, chunk_bytes(args.dk)},
        values_{static_cast<const char*>(args.v_cache), args.dv, chunk_bytes(args.dv)} {
    const int64_t begin = args.query_start[tile.sequence];
    first_token_ = begin;
    first_position_ =
        args.seq_lens[tile.sequence] - (args.query_start[tile.sequence + 1] - begin);
    carve();
    pack_queries();
  }

  // Partial results of one split -> rows of `out`, ld_ floats each. `more`: the next split follows.
  void split(int64_t index, float* out, bool more) {
    base_ = index * kSplit;
    begin_ = int(std::max<int64_t>(tile_.low - base_, 0));
    end_ = int(std::min<int64_t>(tile_.high - base_, kSplit));
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

  void all_splits() {
    clear(0, tile_.heads);
    for (int64_t i = tile_.low / kSplit; i * kSplit < tile_.high; ++i) {
      split(i, partial_, true);
      fold(0, tile_.heads, partial_);
    }
    finish(0, tile_.heads);
  }

  // The splits of one of the tile's heads.
  void fold_partials(int head, const float* partials) {
    clear(head, head + 1);
    for (int64_t i = 0; i < tile_.splits(); ++i)
      fold(head, head + 1, partials + i * tile_.all_rows() * ld_);
    finish(head, head + 1);
  }

 private:
  int row_of(int head) const { return head * int(tile_.rows); }
  int64_t in_head(int64_t row) const { return tile_.first_row + row % tile_.rows; }
  int64_t position(int64_t row) const { return first_position_ + in_head(row) / group_; }
  int64_t head(int64_t row) const {
    return (tile_.head + row / tile_.rows) * group_ + in_head(row) % group_;
  }
  int64_t token(int64_t row) const { return first_token_ + in_head(row) / group_; }
  int64_t chunk_bytes(int64_t dim) const {
    return args_.block_size * (dim * format_.bytes + (format_.codes ? 4 : 0));
  }

  void carve() {
    constexpr int value_steps = kGroup / Unit::per_step;
    const size_t rows = tile_.all_rows();
    const size_t floats = rows * (kSplit + steps_ + 2 * ld_) + steps_ * kGroup +
                          value_steps * width_ + 8 * W;
    static thread_local std::vector<float> buffer;
    if (buffer.size() < floats) buffer.resize(floats);
    auto address = reinterpret_cast<uintptr_t>(buffer.data());
    float* next = buffer.data() + (round_up(address, 64) - address) / 4;
    auto take = [&next](size_t count) { return std::exchange(next, next + round_up(count, W)); };
    scores_ = take(rows * kSplit);
    partial_ = take(rows * ld_);
    total_ = take(rows * ld_);
    expanded_keys_ = take(steps_ * kGroup);
    expanded_values_ = take(value_steps * width_);
    queries_ = reinterpret_cast<typename Unit::A*>(next);
  }

  void pack_queries() {
    const T* q = static_cast<const T*>(args_.q.data);
    for (int64_t m = 0; m < tile_.all_rows(); ++m) {
      const T* from = q + head(m) * args_.q.head + token(m) * args_.q.token;
      typename Unit::A* to = queries_ + m * steps_;
      if (Unit::per_step == 2 && args_.q.dim == 1) {
        std::memcpy(to, from, args_.dk * sizeof(T));
        continue;
      }
      for (int64_t d = 0; d < args_.dk; ++d) {
        const T value = from[d * args_.q.dim];
        if constexpr (Unit::per_step == 2)
          std::memcpy(reinterpret_cast<char*>(to) + d * sizeof(T), &value, sizeof(T));
        else
          to[d] = to_float(value);
      }
    }
  }

  // ---- where tokens lie; `at` counts from the split's first position

  int inside(int at) const { return int((base_ + at) & (args_.block_size - 1)); }

  // The chunk of a tile; null where no row sees any of its tokens: the block may be gone.
  const char* chunk_of(const Chunks& cache, int head, int at) const {
    if (base_ + at >= tile_.high || base_ + at + kTile <= tile_.low) return nullptr;
    const int64_t block = table_[(base_ + at) >> shift_];
    return cache.base + (block * args_.kv_heads + tile_.head + head) * cache.chunk_bytes;
  }

  // What is unseen of a group that is seen is null.
  Tiles tiles_of(const Chunks& cache, int head, int at) const {
    const bool keys = &cache == &keys_;
    const int64_t bytes = cache.dim * format_.bytes;  // of a token
    Tiles tiles{{}, base_ + at < tile_.high ? int(bytes * kTile / 64) : 0,
                keys ? args_.block_size * 4 : 64};
    for (int i = 0; i < kTiles; ++i)
      if (const char* chunk = chunk_of(cache, head, at + i * kTile))
        tiles.at[i] = chunk + inside(at + i * kTile) * (keys ? 4 : bytes);
    return tiles;
  }

  // Visits each group of the split, head by head; `next` is what follows, at last `then`.
  template <class Visit>
  void walk(const Chunks& cache, int first, Tiles& next, const Tiles& then, const Visit& visit) {
    for (int at = first; at < end_; at += kGroup)
      for (int head = 0; head < tile_.heads; ++head) {
        const Tiles here = next;
        next = head + 1 < tile_.heads ? tiles_of(cache, head + 1, at)
               : at + kGroup < end_   ? tiles_of(cache, 0, at + kGroup)
                                      : then;
        visit(head, at, here);
      }
  }

  // Where the scales of W tokens lie. Those of tokens that no row sees are masked with the score.
  void find_scales(int head, int first) {
    static const float none[kTile] = {};
    for (int at = first; at < end_; at += kTile) {
      const char *k = chunk_of(keys_, head, at), *v = chunk_of(values_, head, at);
      const int64_t key = args_.block_size * args_.dk, value = args_.block_size * args_.dv;
      for (int w = 0; w < kTile; w += W) {
        const int64_t place = (inside(at) + w) * 4;
        key_scales_[(at + w) / W] = k ? reinterpret_cast<const float*>(k + key + place) : none;
        value_scales_[(at + w) / W] = v ? reinterpret_cast<const float*>(v + value + place) : none;
      }
    }
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
    const char* tiles[kTiles];
    for (int i = 0; i < kTiles; ++i) tiles[i] = here.at[i];
    const char* some = nullptr;  // stands for what no row sees: those scores are masked
    for (const char* tile : tiles) some = some ? some : tile;
    for (const char*& tile : tiles) tile = tile ? tile : some;
    multiply_codes_of_store(reinterpret_cast<const float*>(queries_of(head)), steps_ / 2, tiles,
                            args_.block_size * 4, 0, steps_ / 2, true, next, columns,
                            scores_of(head) + at, kSplit);
  }

  void mix_codes(int head, int at, const Tiles& here, const Tiles& next, float* out) {
    const int begin = std::max(begin_ - at, 0), end = std::min(end_ - at, kGroup);
    const char* tiles[kTiles];
    for (int i = 0; i < kTiles; ++i) {
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
    for (int i = 0; i < kTiles; ++i) {
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
    const char* tiles[kTiles];
    for (int i = 0; i < kTiles; ++i)
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

  // ---- softmax

  // All rows of a head. It is not done for all heads at once, since memory would idle meanwhile.
  void weigh(int head, int first, int last, float* out) {
    if (format_.codes) find_scales(head, first);
    for (int m = row_of(head); m < row_of(head + 1); ++m) softmax(m, first, last, out + m * ld_);
  }

  // Scores of row m over [first, last) -> weights in place (bf16 at the front of the row where the
  // product takes pairs); maximum and sum into the header.
  void softmax(int m, int first, int last, float* header) {
    float* scores = scores_ + m * kSplit;
    const int64_t at = position(m);
    int64_t from = 0;
    if (args_.window > 0) from = std::max(from, at - args_.window + 1);
    if (args_.chunk > 0) from = std::max(from, at / args_.chunk * args_.chunk);
    const int low = int(std::min<int64_t>(std::max<int64_t>(from - base_, 0), kSplit));
    const int high = int(std::min<int64_t>(std::max<int64_t>(at + 1 - base_, 0), kSplit));
    const float top = adjust(scores, first, last, low, high, head(m), int(at - base_));
    header[0] = top;
    // A row that sees nothing here has weights of zero, not NaN.
    header[1] = exponentials(scores, first, last, top == -kInfinity ? 0.0f : top);
  }

  // Scores as the rules want them; -infinity outside of [low, high). Returns the maximum.
  float adjust(float* scores, int first, int last, int low, int high, int64_t head, int query) {
    const vf hidden = broadcast(-kInfinity);
    const bool plain = args_.softcap == 0 && args_.slopes == nullptr;
    const vi lanes = iota();
    const float slope = args_.slopes ? args_.slopes[head] : 0.0f;
    const float cap = args_.softcap, inverse_cap = cap > 0 ? args_.scale / cap : 0.0f;
    vf best = hidden;
    for (int i = first; i < last; i += W) {
      vf x = load(scores + i);
      if (format_.codes) x *= load(key_scales_[i / W]);
      const vi key = lanes + i;
      if (plain) {
        x *= args_.scale;
      } else {
        x = cap > 0 ? cap * vtanh(x * inverse_cap) : x * args_.scale;
        if (args_.slopes) x += slope * __builtin_convertvector(key - query, vf);
      }
      if (i < low || i + W > high) x = (key >= low) & (key < high) ? x : hidden;
      store(scores + i, x);
      best = vmax(x, best);
    }
    return lanes_max(best);
  }

  float exponentials(float* scores, int first, int last, float shift) {
    vf sum{};
    for (int i = first; i < last; i += W) {
      const vf x = load(scores + i);
      vf weight = Unit::exponential(x - shift);
      sum += weight;
      if (format_.codes) {  // the scale of an unseen token may be anything
        const vf scaled = weight * load(value_scales_[i / W]);
        weight = x == -kInfinity ? vf{} : scaled;
      }
      Unit::store_weights(scores, i, weight);
    }
    return lanes_sum(sum);
  }

  // ---- totals of the rows of heads [from, to)

  void clear(int from, int to) {
    for (int m = row_of(from); m < row_of(to); ++m) {
      std::memset(total_ + m * ld_, 0, ld_ * sizeof(float));
      total_[m * ld_] = -kInfinity;
    }
  }

  // total <- total with the rows of one more split.
  void fold(int from, int to, const float* split) {
    for (int m = row_of(from); m < row_of(to); ++m) {
      float* total = total_ + m * ld_;
      const float* more = split + m * ld_;
      if (more[0] == -kInfinity && more[1] == 0.0f) continue;
      const float top = total[0] > more[0] ? total[0] : more[0];
      const float old = exp1(total[0] - top), young = exp1(more[0] - top);
      total[0] = top;
      total[1] = total[1] * old + more[1] * young;
      for (int d = kHeader; d < ld_; d += W)
        store(total + d, load(total + d) * old + load(more + d) * young);
    }
  }

  void finish(int from, int to) {
    T* out = static_cast<T*>(args_.out);
    for (int m = row_of(from); m < row_of(to); ++m) {
      const float* total = total_ + m * ld_;
      float factor = 1.0f / total[1];
      if (args_.sinks) {
        const float sink = args_.sinks[head(m)], top = total[0] > sink ? total[0] : sink;
        const float old = exp1(total[0] - top);
        factor = old / (total[1] * old + exp1(sink - top));
      }
      T* to = out + (token(m) * args_.heads + head(m)) * args_.dv;
      int d = 0;
      for (; d + W <= args_.dv; d += W) store(to + d, load(total + kHeader + d) * factor);
      if (d < args_.dv)
        store_part(to + d, load(total + kHeader + d) * factor, int(args_.dv) - d);
    }
  }

  const Attention& args_;
  const Tile& tile_;
  const Format& format_;
  const int64_t group_;
  const int shift_;  // of a block's size
  const int32_t* table_;    // blocks of the sequence
  const int steps_, width_, ld_;
  const Chunks keys_, values_;
  int64_t first_token_, first_position_;
  int64_t base_ = 0;         // first position of the current split
  int begin_ = 0, end_ = 0;  // keys of the current split that some row sees
  float *scores_, *partial_, *total_, *expanded_keys_, *expanded_values_;
  typename Unit::A* queries_;
  const float *key_scales_[kSplit / W], *value_scales_[kSplit / W];
};

// ---- running ----------------------------------------------------------------------------------

template <class T, class Unit>
void run(const Attention& args, const Format& format) {
  const Plan plan = make_plan(args);
  const int64_t ld = kHeader + round_up(args.dv, W);
  const std::unique_ptr<float[]> partials(new float[plan.partial_rows * ld]);
  for_each_item(int64_t(plan.items.size()), [&](int64_t i) {
    const Item& item = plan.items[i];
    const Tile& tile = plan.tiles[item.tile];
    Worker<T, Unit> worker(args, tile, format);
    if (item.split < 0)
      worker.all_splits();
    else
      worker.split(tile.low / kSplit + item.split,
                   partials.get() + (tile.partials + item.split * tile.all_rows()) * ld, false);
  });
  auto fold = [&](int64_t i) {
    const Tile& tile = plan.tiles[plan.parted[i].tile];
    Worker<T, Unit>(args, tile, format)
        .fold_partials(plan.parted[i].head, partials.get() + tile.partials * ld);
  };
  const int64_t count = int64_t(plan.parted.size());
  if (plan.partial_rows * ld < kSerialFloats)
    for (int64_t i = 0; i < count; ++i) fold(i);
  else
    for_each_item(count, fold);
}

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
      return run<float, FloatUnit>(args, format_of(args));
    case Dtype::bf16:
#if defined(FXLM_PAIRS)
      return run<Bf16, PairUnit>(args, pair_format_of(args));
#else
      return run<Bf16, FloatUnit>(args, format_of(args));
#endif
    case Dtype::f16:
      return run<F16, FloatUnit>(args, format_of(args));
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
