// What every way to attend shares: the rows and keys of a tile, where they lie, the softmax of a
// split, and totals over splits. The products are in attention.cpp and in attention_tiles.cpp.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "attention_plan.h"
#include "kv_cache.h"
#include "pages.h"

namespace fxlm {
namespace {

constexpr int kGroup = 64;  // tokens that are expanded and prefetched together; divides kSplit
constexpr int kGroupTiles = kGroup / kTile;
constexpr int64_t kSerialFloats = 1 << 16;  // folding fewer costs less than waking threads
constexpr int kHeader = 16;  // of a row: maximum at [0], sum at [1], then the weighted values

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The tiles of one group, and how many lines of each are to be read; no lines: there is none.
struct Tiles {
  const char* at[kGroupTiles];
  int lines;
  int64_t stride;  // bytes from line to line
  Lines line_of(int tile) const { return {lines ? at[tile] : nullptr, stride}; }
  __attribute__((always_inline)) void prefetch(int line) const {
    if (line >= lines) return;
    for (const char* tile : at) fetch(tile + line * stride);
  }
};

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

// How weights are computed and stored: `power` of x is e^(x / per_nat), within an error far below
// that of the type.
struct FloatWeights {
  static constexpr int per_step = 1;
  static constexpr float per_nat = 1.0f;
  static vf power(vf x) { return vexp(x); }
  static void store_weights(float* row, int i, vf weights) { store(row + i, weights); }
  static void store_two(float* row, int i, vf weights, vf next) {
    store_weights(row, i, weights), store_weights(row, i + W, next);
  }
};

struct PairWeights {  // bf16, at the front of the row
  static constexpr int per_step = 2;
#if defined(FXLM_PAIRS)
  // 2^x for x <= 0 within 9e-5, a twentieth of what rounding to bf16 takes: 2^floor(x) times a
  // polynomial in the rest, fitted over [0, 1], exact at 0.
  static constexpr float per_nat = 1.44269504088896341f;
  static vf power(vf x) {
    const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
    vf y = broadcast(0.0770671653f);
    y = y * f + 0.227644825f;
    y = y * f + 0.695116842f;
    y = y * f + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)y, (__m512)x);
  }
  static void store_weights(float* row, int i, vf weights) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)weights);
    std::memcpy(reinterpret_cast<Bf16*>(row) + i, &rounded, sizeof rounded);
  }
  static void store_two(float* row, int i, vf weights, vf next) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)next, (__m512)weights);
    std::memcpy(reinterpret_cast<Bf16*>(row) + i, &rounded, sizeof rounded);
  }
#else
  static constexpr float per_nat = 1.0f;
  static vf power(vf x) { return vexp(x); }
  static void store_weights(float* row, int i, vf weights) {
    store(reinterpret_cast<Bf16*>(row) + i, weights);
  }
  static void store_two(float* row, int i, vf weights, vf next) {
    store_weights(row, i, weights), store_weights(row, i + W, next);
  }
#endif
};

class RowTile {
 protected:
  // `lanes`: what rows of weighted values are a multiple of.
  RowTile(const Attention& args, const Tile& tile, const Format& format, int lanes)
      : args_(args),
        tile_(tile),
        format_(format),
        group_(args.heads / args.kv_heads),
        shift_(__builtin_ctzll(args.block_size)),
        table_(args.block_table + tile.sequence * args.table_stride),
        width_(int(round_up(args.dv, lanes))),
        ld_(kHeader + width_),
        keys_{static_cast<const char*>(args.k_cache), args.dk, chunk_bytes(args.dk)},
        values_{static_cast<const char*>(args.v_cache), args.dv, chunk_bytes(args.dv)} {
    const int64_t begin = args.query_start[tile.sequence];
    first_token_ = begin;
    first_position_ =
        args.seq_lens[tile.sequence] - (args.query_start[tile.sequence + 1] - begin);
    find_places();
  }

  void enter(int64_t split) {
    base_ = split * kSplit;
    begin_ = int(std::max<int64_t>(tile_.low - base_, 0));
    end_ = int(std::min<int64_t>(tile_.high - base_, kSplit));
  }

  int row_of(int head) const { return head * int(tile_.rows); }
  int64_t head(int64_t row) const { return places_[row].head; }
  int64_t token(int64_t row) const { return first_token_ + places_[row].query; }
  int64_t position(int64_t row) const { return first_position_ + places_[row].query; }

  void find_places() {
    Place* to = places_;
    for (int64_t h = tile_.head; h < tile_.head + tile_.heads; ++h) {
      int32_t query = int32_t(tile_.first_row / group_), of_group = int32_t(tile_.first_row % group_);
      for (int64_t r = 0; r < tile_.rows; ++r) {
        *to++ = {query, int32_t(h * group_) + of_group};
        if (++of_group == group_) of_group = 0, ++query;
      }
    }
  }
  int64_t chunk_bytes(int64_t dim) const {
    return args_.block_size * (dim * format_.bytes + (format_.codes ? 4 : 0));
  }

  // Hands out pieces of a buffer of the thread, aligned to lines.
  class Carver {
   public:
    explicit Carver(size_t floats) {
      static thread_local Scratch buffer;
      next_ = buffer.take<float>(int64_t(floats));
    }
    float* take(size_t count) { return std::exchange(next_, next_ + round_up(count, 16)); }

   private:
    float* next_;
  };

  // Queries as units, `ld` floats from row to row.
  template <class T, int per_step>
  void pack_queries(float* to, int ld) const {
    const T* q = static_cast<const T*>(args_.q.data);
    for (int64_t m = 0; m < tile_.all_rows(); ++m, to += ld) {
      const T* from = q + head(m) * args_.q.head + token(m) * args_.q.token;
      if (per_step == 2 && args_.q.dim == 1) {
        std::memcpy(to, from, args_.dk * sizeof(T));
        continue;
      }
      for (int64_t d = 0; d < args_.dk; ++d) {
        const T value = from[d * args_.q.dim];
        if constexpr (per_step == 2)
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

  // The first line of a tile; null as above.
  const char* tile_of(const Chunks& cache, int head, int at) const {
    const char* chunk = chunk_of(cache, head, at);
    const int64_t bytes = &cache == &keys_ ? 4 : cache.dim * format_.bytes;  // of a token
    return chunk ? chunk + inside(at) * bytes : nullptr;
  }

  // What is unseen of a group that is seen is null.
  Tiles tiles_of(const Chunks& cache, int head, int at) const {
    const int64_t bytes = cache.dim * format_.bytes * kTile;
    Tiles tiles{{}, base_ + at < tile_.high ? int(bytes / 64) : 0,
                &cache == &keys_ ? args_.block_size * 4 : 64};
    for (int i = 0; i < kGroupTiles; ++i) tiles.at[i] = tile_of(cache, head, at + i * kTile);
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

  // ---- softmax

  // Keys of the split that a row sees.
  struct Seen {
    int low, high;
  };
  Seen seen_at(int64_t position) const {
    int64_t from = 0;
    if (args_.window > 0) from = std::max(from, position - args_.window + 1);
    if (args_.chunk > 0) from = std::max(from, position / args_.chunk * args_.chunk);
    return {int(std::min<int64_t>(std::max<int64_t>(from - base_, 0), kSplit)),
            int(std::min<int64_t>(std::max<int64_t>(position + 1 - base_, 0), kSplit))};
  }

  // Scores of rows [m, m + count) over [first, last) -> weights in place; maxima and sums into the
  // headers, ld_ apart. A row that sees nothing here has weights of zero, not NaN. Vectors that no
  // row of four sees are skipped.
  template <class Weights>
  void softmax(float* scores, int m, int count, int first, int last, float* headers) const {
    for (; count >= 4; count -= 4, m += 4, scores += 4 * kSplit, headers += 4 * ld_)
      softmax_of<Weights, 4>(scores, m, first, last, headers);
    for (; count > 0; --count, ++m, scores += kSplit, headers += ld_)
      softmax_of<Weights, 1>(scores, m, first, last, headers);
  }

  template <class Weights, int R>
  __attribute__((noinline)) void softmax_of(float* scores, int m, int first, int last,
                                            float* headers) const {
    Seen seen[R], some{kSplit, 0}, all{0, kSplit};  // by some row, by all
    for (int r = 0; r < R; ++r) {
      seen[r] = seen_at(position(m + r));
      some = {std::min(some.low, seen[r].low), std::max(some.high, seen[r].high)};
      all = {std::max(all.low, seen[r].low), std::min(all.high, seen[r].high)};
    }
    const bool none = some.low >= some.high;
    const int from = none ? first : std::max(first, some.low / W * W);
    const int to = none ? first : std::min<int>(last, int(round_up(some.high, W)));
    const bool plain = args_.softcap == 0 && !args_.slopes && !format_.codes && args_.scale > 0;
    for (int r = 0; r < R && !plain; ++r)
      adjust(scores + r * kSplit, from, to, head(m + r), int(position(m + r) - base_));
    for (int i = from; i < to; i += W) {
      if (i >= all.low && i + W <= all.high) {
        i = all.high / W * W - W;  // all rows see what lies between
        continue;
      }
      for (int r = 0; r < R; ++r) hide(scores + r * kSplit, i, seen[r]);
    }
    const float factor = plain ? args_.scale : 1.0f, slope = factor * Weights::per_nat;
    float tops[R], sums[R];
    highest<R>(scores, from, to, tops);
    if (format_.codes)
      exponentials<Weights, R, true>(scores, from, to, slope, tops, sums);
    else
      exponentials<Weights, R, false>(scores, from, to, slope, tops, sums);
    for (int r = 0; r < R; ++r) {
      headers[r * ld_] = tops[r] * factor;
      headers[r * ld_ + 1] = sums[r];
      float* row = scores + r * kSplit;
      for (int i = first; i < from; i += W) Weights::store_weights(row, i, vf{});
      for (int i = to; i < last; i += W) Weights::store_weights(row, i, vf{});
    }
  }

  // -infinity for what a row does not see.
  static void hide(float* scores, int i, Seen seen) {
    const vi key = iota() + i;
    const vf x = load(scores + i);
    store(scores + i, (key >= seen.low) & (key < seen.high) ? x : broadcast(-kInfinity));
  }

  // Scores as the rules want them.
  void adjust(float* scores, int from, int to, int64_t head, int query) const {
    const bool sloped = args_.slopes != nullptr;
    const float slope = sloped ? args_.slopes[head] : 0.0f;
    const float cap = args_.softcap, inverse_cap = cap > 0 ? args_.scale / cap : 0.0f;
    for (int i = from; i < to; i += W) {
      vf x = load(scores + i);
      if (format_.codes) x *= load(key_scales_[i / W]);
      x = cap > 0 ? cap * vtanh(x * inverse_cap) : x * args_.scale;
      if (sloped) x += slope * __builtin_convertvector(iota() + (i - query), vf);
      store(scores + i, x);
    }
  }

  template <int R>
  static void highest(const float* scores, int from, int to, float* tops) {
    vf best[R];
    for (vf& row : best) row = broadcast(-kInfinity);
    for (int i = from; i < to; i += W)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) best[r] = vmax(load(scores + r * kSplit + i), best[r]);
    for (int r = 0; r < R; ++r) tops[r] = lanes_max(best[r]);
  }

  template <class Weights, int R, bool coded>
  void exponentials(float* scores, int from, int to, float slope, const float* tops,
                    float* sums) const {
    vf sum[R], shift[R];
    for (int r = 0; r < R; ++r)
      sum[r] = vf{}, shift[r] = broadcast(tops[r] == -kInfinity ? 0.0f : -tops[r] * slope);
    auto weigh = [&](int r, int i) __attribute__((always_inline)) {
      const vf x = load(scores + r * kSplit + i);
      const vf weight = Weights::power(x * slope + shift[r]);
      sum[r] += weight;
      if (!coded) return weight;
      const vf scaled = weight * load(value_scales_[i / W]);
      return x == -kInfinity ? vf{} : scaled;  // the scale of an unseen token may be anything
    };
    int i = from;
    for (; i + 2 * W <= to; i += 2 * W)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vf weight = weigh(r, i);
        Weights::store_two(scores + r * kSplit, i, weight, weigh(r, i + W));
      }
    for (int r = 0; i < to && r < R; ++r)
      Weights::store_weights(scores + r * kSplit, i, weigh(r, i));
    for (int r = 0; r < R; ++r) sums[r] = lanes_sum(sum[r]);
  }

  // ---- totals of rows, each ld_ floats

  void clear(float* total, int rows) const {
    for (int m = 0; m < rows; ++m, total += ld_) {
      std::memset(total, 0, ld_ * sizeof(float));
      total[0] = -kInfinity;
    }
  }

  // total <- total with the rows of one more split.
  void fold(float* total, const float* more, int rows) const {
    for (int first = 0; first < rows; first += W) {
      const int count = std::min(rows - first, W);
      float tops[W] = {}, news[W] = {}, olds[W], youngs[W];
      for (int i = 0; i < count; ++i) tops[i] = total[i * ld_], news[i] = more[i * ld_];
      const vf top = load(tops) > load(news) ? load(tops) : load(news);
      store(olds, vexp(load(tops) - top));
      store(youngs, vexp(load(news) - top));
      store(tops, top);
      for (int i = 0; i < count; ++i, total += ld_, more += ld_) {
        if (more[0] == -kInfinity && more[1] == 0.0f) continue;
        const float old = olds[i], young = youngs[i];
        total[0] = tops[i];
        total[1] = total[1] * old + more[1] * young;
        for (int d = kHeader; d < ld_; d += W)
          store(total + d, load(total + d) * old + load(more + d) * young);
      }
    }
  }

  // The splits of one of the tile's heads -> the output, by way of `total`.
  template <class T>
  void fold_head(int head, const float* partials, float* total) const {
    const int first = row_of(head), rows = int(tile_.rows);
    clear(total, rows);
    for (int64_t i = 0; i < tile_.splits(); ++i)
      fold(total, partials + (i * tile_.all_rows() + first) * ld_, rows);
    finish<T>(total, first, rows);
  }

  // Totals of the rows from m on -> the output.
  template <class T>
  void finish(const float* total, int m, int rows) const {
    for (const int end = m + rows; m < end; ++m, total += ld_) {
      float factor = 1.0f / total[1];
      if (args_.sinks) {
        const float sink = args_.sinks[head(m)], top = total[0] > sink ? total[0] : sink;
        const float old = exp1(total[0] - top);
        factor = old / (total[1] * old + exp1(sink - top));
      }
      T* to = static_cast<T*>(args_.out) + (token(m) * args_.heads + head(m)) * args_.dv;
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
  const int shift_;       // of a block's size
  const int32_t* table_;  // blocks of the sequence
  const int width_, ld_;
  const Chunks keys_, values_;
  int64_t first_token_, first_position_;
  struct Place {
    int32_t query, head;  // of a row: from the first of the sequence on, and of all heads
  } places_[kMostRows];
  int64_t base_ = 0;         // first position of the current split
  int begin_ = 0, end_ = 0;  // keys of the current split that some row sees
  const float *key_scales_[kSplit / W], *value_scales_[kSplit / W];
};

// ---- running ----------------------------------------------------------------------------------

// A Worker takes one tile: all of it, one split, or the folding of one head's splits.
template <class Worker>
void run(const Attention& args, const Format& format, int64_t most_rows) {
  const Plan plan = make_plan(args, most_rows);
  const int64_t ld = kHeader + round_up(args.dv, Worker::lanes);
  const std::unique_ptr<float[]> partials(new float[plan.partial_rows * ld]);
  for_each_item(int64_t(plan.items.size()), [&](int64_t i) {
    const Item& item = plan.items[i];
    const Tile& tile = plan.tiles[item.tile];
    Worker worker(args, tile, format);
    if (item.split < 0)
      worker.all_splits();
    else
      worker.one_split(tile.low / kSplit + item.split,
                       partials.get() + (tile.partials + item.split * tile.all_rows()) * ld);
  });
  auto fold = [&](int64_t i) {
    const Tile& tile = plan.tiles[plan.parted[i].tile];
    Worker(args, tile, format).fold_partials(plan.parted[i].head, partials.get() + tile.partials * ld);
  };
  const int64_t count = int64_t(plan.parted.size());
  if (plan.partial_rows * ld < kSerialFloats)
    for (int64_t i = 0; i < count; ++i) fold(i);
  else
    for_each_item(count, fold);
}

}  // namespace
}  // namespace fxlm
