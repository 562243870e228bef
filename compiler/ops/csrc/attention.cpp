// Paged attention on CPU, for prefill and decode alike.
//
// Rows and tiles. All (query, head) pairs of one sequence that share a KV head are rows of one
// small matrix; up to kRows of them make a tile, so that a key or value is read from memory once
// for the whole group. Decode is a tile of `group` rows, prefill a row of full tiles.
//
// Splits. Keys are taken kSplit at a time, at absolute positions 0, kSplit, 2 kSplit...: scores,
// softmax and weighted values of a split stand for themselves, and splits are folded in order.
// Whether one thread walks all splits of a tile or many threads one each is decided by load alone
// and changes no bit; nor does the chunking of a prefill or the company in the batch.
//
// Scores of kKeys keys at a time: keys are packed to columns, then a register-tiled product
// (product.h); no horizontal sums.

#include "attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "parallel.h"
#include "product.h"

namespace fxlm {
namespace {

constexpr int kSplit = 256;  // keys a partial softmax; a multiple of kKeys
constexpr int kRows = 64;    // rows a tile, unless one group is larger
constexpr int kMaxRows = 128;
constexpr int64_t kSerialFloats = 1 << 16;  // folding fewer costs less than waking threads
constexpr int kValues = 32;  // values a pass of the second product: stays in the first-level cache

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ---- one tile ---------------------------------------------------------------------------------

struct Tile {
  int64_t sequence, head;    // head: of the KV heads
  int64_t first_row, rows;   // row r of a sequence and KV head: query r / group, head r % group
  int64_t low, high;         // keys that some row sees
  int64_t partials;          // where its partials start, in rows; -1 = walked by one thread
  int64_t splits() const { return (high - 1) / kSplit - low / kSplit + 1; }
  int64_t cost() const { return splits() * rows; }
};

struct Item {
  int32_t tile, split;  // split -1 = all
};

// Per row: maximum, sum, then the weighted values.
constexpr int kHeader = W;  // maximum at [0], sum at [1]; keeps the values aligned to vectors

template <class T, class B>
class Worker {
 public:
  Worker(const Attention& args, const Tile& tile)
      : args_(args),
        tile_(tile),
        group_(args.heads / args.kv_heads),
        steps_(int((args.dk + B::per_step - 1) / B::per_step)),
        width_(int(round_up(args.dv, W))),
        ld_(kHeader + width_),
        packs_values_(args.dv % W != 0 || (sizeof(T) < 4 && tile.rows >= 16)) {
    const int64_t begin = args.query_start[tile.sequence];
    first_token_ = begin;
    first_position_ =
        args.seq_lens[tile.sequence] - (args.query_start[tile.sequence + 1] - begin);
    carve();
    pack_queries();
  }

  // Partial results of one split -> rows of `out`, ld_ floats each.
  void split(int64_t index, float* out) {
    const int64_t base = index * kSplit;
    begin_ = int(std::max<int64_t>(tile_.low - base, 0));
    end_ = int(std::min<int64_t>(tile_.high - base, kSplit));
    find_rows(base);
    const int first = begin_ / kKeys * kKeys, last = int(round_up(end_, kKeys));
    for (int key = first; key < last; key += kKeys) {
      pack_keys<B>(key_rows_ + key, int(args_.dk), packed_);
      for (int m = 0; m < tile_.rows; ++m)
        std::memset(scores_ + m * kSplit + key, 0, kKeys * sizeof(float));
      const NextKeys next{reinterpret_cast<const char* const*>(key_rows_ + key + kKeys),
                          B::per_step * int(sizeof(T))};
      product_rows(queries_, steps_, B{static_cast<const typename B::A*>(packed_), next}, steps_,
                   kKeys, scores_ + key, kSplit, int(tile_.rows));
    }
    prefetch_values(begin_);
    for (int m = 0; m < tile_.rows; ++m) softmax(m, base, first, last, out + m * ld_);
    mix_values(out);
  }

  void all_splits() {
    float* total = total_;
    clear(total);
    for (int64_t i = tile_.low / kSplit; i * kSplit < tile_.high; ++i) {
      split(i, partial_);
      fold(total, partial_);
    }
    finish(total);
  }

  void fold_partials(const float* partials) {
    clear(total_);
    for (int64_t i = 0; i < tile_.splits(); ++i) fold(total_, partials + i * tile_.rows * ld_);
    finish(total_);
  }

 private:
  int64_t position(int64_t row) const { return first_position_ + (tile_.first_row + row) / group_; }
  int64_t head(int64_t row) const { return tile_.head * group_ + (tile_.first_row + row) % group_; }
  int64_t token(int64_t row) const { return first_token_ + (tile_.first_row + row) / group_; }

  void carve() {
    const size_t rows = tile_.rows;
    const size_t floats = rows * steps_ + round_up(steps_, W) * kKeys + rows * kSplit +
                          2 * rows * ld_ + size_t(kValues) * width_;
    static thread_local std::vector<float> buffer;
    if (buffer.size() < floats + W) buffer.resize(floats + W);
    auto address = reinterpret_cast<uintptr_t>(buffer.data());
    float* next = buffer.data() + (round_up(address, W * 4) - address) / 4;
    auto take = [&next](size_t count) { return std::exchange(next, next + round_up(count, W)); };
    scores_ = take(rows * kSplit);
    partial_ = take(rows * ld_);
    total_ = take(rows * ld_);
    packed_ = take(round_up(steps_, W) * kKeys);
    packed_values_ = take(size_t(kValues) * width_);
    queries_ = reinterpret_cast<typename B::A*>(next);
  }

  void pack_queries() {
    const T* q = static_cast<const T*>(args_.q.data);
    for (int64_t m = 0; m < tile_.rows; ++m) {
      const T* from = q + head(m) * args_.q.head + token(m) * args_.q.token;
      typename B::A* to = queries_ + m * steps_;
      if constexpr (B::per_step == 2) to[steps_ - 1] = 0;
      for (int64_t d = 0; d < args_.dk; ++d) {
        const T value = from[d * args_.q.dim];
        if constexpr (B::per_step == 2)
          std::memcpy(reinterpret_cast<char*>(to) + d * sizeof(T), &value, sizeof(T));
        else
          to[d] = to_float(value);
      }
    }
  }

  // Where each key and value of the split lies, and the keys that come next, to be prefetched.
  // Positions that no row sees stand for a seen one: their blocks may be gone, and what they
  // hold is masked.
  void find_rows(int64_t base) {
    const int32_t* table = args_.block_table + tile_.sequence * args_.table_stride;
    const T* keys = static_cast<const T*>(args_.k_cache);
    const T* values = static_cast<const T*>(args_.v_cache);
    const int known = int(std::min<int64_t>(tile_.high - base, kSplit + kKeys));
    int64_t block = (base + begin_) / args_.block_size;
    int64_t offset = base + begin_ - block * args_.block_size;
    for (int i = begin_; i < known; ++block, offset = 0) {
      const int64_t row = (table[block] * args_.kv_heads + tile_.head) * args_.block_size + offset;
      const int stop = int(std::min<int64_t>(known, i + args_.block_size - offset));
      for (int64_t j = 0; i < stop; ++i, ++j) {
        key_rows_[i] = keys + (row + j) * args_.dk;
        value_rows_[i] = values + (row + j) * args_.dv;
      }
    }
    for (int i = begin_ / kKeys * kKeys; i < begin_; ++i) key_rows_[i] = key_rows_[begin_];
    for (int i = known; i < kSplit + kKeys; ++i) {
      key_rows_[i] = key_rows_[known - 1];
      value_rows_[i] = value_rows_[known - 1];
    }
  }

  void prefetch_values(int first) {
    const int last = std::min(end_, first + kValues), bytes = int(args_.dv * sizeof(T));
    for (int i = first; i < last; ++i)
      for (int at = 0; at < bytes; at += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(value_rows_[i]) + at);
  }

  // Scores of row m over [first, last) -> weights in place; maximum and sum into the header.
  void softmax(int m, int64_t base, int first, int last, float* header) {
    float* scores = scores_ + m * kSplit;
    const int64_t at = position(m);
    int64_t from = 0;
    if (args_.window > 0) from = std::max(from, at - args_.window + 1);
    if (args_.chunk > 0) from = std::max(from, at / args_.chunk * args_.chunk);
    const int low = int(std::min<int64_t>(std::max<int64_t>(from - base, 0), kSplit));
    const int high = int(std::min<int64_t>(std::max<int64_t>(at + 1 - base, 0), kSplit));
    const vi lanes = iota();
    const float slope = args_.slopes ? args_.slopes[head(m)] : 0.0f;
    const float cap = args_.softcap, inverse_cap = cap > 0 ? args_.scale / cap : 0.0f;
    vf best = broadcast(-kInfinity);
    for (int i = first; i < last; i += W) {
      const vi key = lanes + i;
      vf x = load(scores + i);
      x = cap > 0 ? cap * vtanh(x * inverse_cap) : x * args_.scale;
      if (args_.slopes) x += slope * __builtin_convertvector(key - int(at - base), vf);
      x = (key >= low) & (key < high) ? x : broadcast(-kInfinity);
      store(scores + i, x);
      best = vmax(x, best);
    }
    const float top = lanes_max(best);
    header[0] = top;
    // A row that sees nothing here has weights of zero, not NaN.
    const float shift = top == -kInfinity ? 0.0f : top;
    vf sum{};
    for (int i = first; i < last; i += W) {
      const vf weight = vexp(load(scores + i) - shift);
      store(scores + i, weight);
      sum += weight;
    }
    header[1] = lanes_sum(sum);
  }

  void mix_values(float* out) {
    for (int m = 0; m < tile_.rows; ++m)
      std::memset(out + m * ld_ + kHeader, 0, width_ * sizeof(float));
    // Steps start at fixed positions, so that the order of sums does not depend on the tile.
    for (int i = begin_; i < end_; i += kValues) {
      const int count = std::min(kValues, end_ - i);
      if (packs_values_) {
        prefetch_values(i + kValues);
        const float* lines[kValues];
        for (int j = 0; j < count; ++j) lines[j] = pack_value(value_rows_[i + j], j);
        product_rows(scores_ + i, kSplit, Rows<float>{lines, 0}, count, width_, out + kHeader, ld_,
                     int(tile_.rows));
      } else {
        product_rows(scores_ + i, kSplit, Rows<T>{value_rows_ + i, kValues}, count, width_,
                     out + kHeader, ld_, int(tile_.rows));
      }
    }
  }

  const float* pack_value(const T* from, int j) {
    float* line = packed_values_ + int64_t(j) * width_;
    int d = 0;
    for (; d + W <= args_.dv; d += W) store(line + d, load(from + d));
    if (d < args_.dv) store(line + d, load_part(from + d, int(args_.dv) - d));
    return line;
  }

  void clear(float* rows) {
    for (int64_t m = 0; m < tile_.rows; ++m) {
      std::memset(rows + m * ld_, 0, ld_ * sizeof(float));
      rows[m * ld_] = -kInfinity;
    }
  }

  // total <- total with the rows of one more split.
  void fold(float* total, const float* more) {
    for (int64_t m = 0; m < tile_.rows; ++m, total += ld_, more += ld_) {
      if (more[0] == -kInfinity && more[1] == 0.0f) continue;
      const float top = total[0] > more[0] ? total[0] : more[0];
      const float old = exp1(total[0] - top), young = exp1(more[0] - top);
      total[0] = top;
      total[1] = total[1] * old + more[1] * young;
      for (int d = kHeader; d < ld_; d += W)
        store(total + d, load(total + d) * old + load(more + d) * young);
    }
  }

  void finish(const float* total) {
    T* out = static_cast<T*>(args_.out);
    for (int64_t m = 0; m < tile_.rows; ++m, total += ld_) {
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
  const int64_t group_;
  const int steps_, width_, ld_;
  const bool packs_values_;
  int64_t first_token_, first_position_;
  int begin_ = 0, end_ = 0;  // keys of the current split that some row sees
  float *scores_, *partial_, *total_, *packed_values_;
  void* packed_;
  typename B::A* queries_;
  const T* key_rows_[kSplit + kKeys];
  const T* value_rows_[kSplit + kKeys];
};

// ---- planning ---------------------------------------------------------------------------------

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Item> items;    // dearest first
  std::vector<int32_t> parted;  // tiles whose splits are walked by several threads
  int64_t partial_rows = 0;
};

void plan_sequence(const Attention& args, int64_t sequence, std::vector<Tile>& tiles) {
  const int64_t queries = args.query_start[sequence + 1] - args.query_start[sequence];
  const int64_t group = args.heads / args.kv_heads, rows = queries * group;
  const int64_t most = std::max<int64_t>(kRows, std::min<int64_t>(group, kMaxRows));
  const int64_t start = args.seq_lens[sequence] - queries;
  for (int64_t first = 0; first < rows; first += most) {
    Tile tile{sequence, 0, first, std::min(most, rows - first), 0, 0, -1};
    const int64_t at = start + first / group;
    if (args.window > 0) tile.low = std::max<int64_t>(0, at - args.window + 1);
    if (args.chunk > 0) tile.low = std::max(tile.low, at / args.chunk * args.chunk);
    tile.high = start + (first + tile.rows - 1) / group + 1;
    for (tile.head = 0; tile.head < args.kv_heads; ++tile.head) tiles.push_back(tile);
  }
}

// A tile is parted where it alone would keep one thread busy while others have nothing to do.
Plan make_plan(const Attention& args) {
  Plan plan;
  int64_t total = 0;
  for (int64_t i = 0; i < args.sequences; ++i) plan_sequence(args, i, plan.tiles);
  for (const Tile& tile : plan.tiles) total += tile.cost();
  const int64_t threads = num_threads();
  for (size_t i = 0; i < plan.tiles.size(); ++i) {
    Tile& tile = plan.tiles[i];
    const bool parted = threads > 1 && tile.splits() > 1 && tile.cost() * threads * 4 > total;
    if (!parted) {
      plan.items.push_back({int32_t(i), -1});
      continue;
    }
    tile.partials = plan.partial_rows;
    plan.partial_rows += tile.splits() * tile.rows;
    plan.parted.push_back(int32_t(i));
    for (int64_t s = 0; s < tile.splits(); ++s) plan.items.push_back({int32_t(i), int32_t(s)});
  }
  auto cost = [&plan](const Item& item) {
    const Tile& tile = plan.tiles[item.tile];
    return item.split < 0 ? tile.cost() : tile.rows;
  };
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
  return plan;
}

template <class T, class B>
void run(const Attention& args) {
  const Plan plan = make_plan(args);
  const int64_t ld = kHeader + round_up(args.dv, W);
  const std::unique_ptr<float[]> partials(new float[plan.partial_rows * ld]);
  for_each_item(int64_t(plan.items.size()), [&](int64_t i) {
    const Item& item = plan.items[i];
    const Tile& tile = plan.tiles[item.tile];
    Worker<T, B> worker(args, tile);
    if (item.split < 0)
      worker.all_splits();
    else
      worker.split(tile.low / kSplit + item.split,
                   partials.get() + (tile.partials + item.split * tile.rows) * ld);
  });
  auto fold = [&](int64_t i) {
    const Tile& tile = plan.tiles[plan.parted[i]];
    Worker<T, B>(args, tile).fold_partials(partials.get() + tile.partials * ld);
  };
  const int64_t count = int64_t(plan.parted.size());
  if (plan.partial_rows * ld < kSerialFloats)
    for (int64_t i = 0; i < count; ++i) fold(i);
  else
    for_each_item(count, fold);
}

template <class T>
void write_heads(const Attention& args, const Strided& from, void* cache, int64_t width,
                 int64_t token) {
  const int64_t slot = args.slots[token];
  const int64_t block = slot / args.block_size, offset = slot % args.block_size;
  for (int64_t head = 0; head < args.kv_heads; ++head) {
    const T* source =
        static_cast<const T*>(from.data) + head * from.head + token * from.token;
    T* target = static_cast<T*>(cache) +
                ((block * args.kv_heads + head) * args.block_size + offset) * width;
    if (from.dim == 1)
      std::memcpy(target, source, width * sizeof(T));
    else
      for (int64_t d = 0; d < width; ++d) target[d] = source[d * from.dim];
  }
}

template <class T>
void write_tokens(const Attention& args) {
  constexpr int64_t batch = 32;  // tokens an item
  for_each_item((args.tokens + batch - 1) / batch, [&](int64_t i) {
    for (int64_t t = i * batch; t < std::min(args.tokens, (i + 1) * batch); ++t) {
      if (args.slots[t] < 0) continue;
      write_heads<T>(args, args.k, args.k_cache, args.dk, t);
      write_heads<T>(args, args.v, args.v_cache, args.dv, t);
    }
  });
}

}  // namespace

void write_cache(const Attention& args) {
  if (args.k.data == nullptr) return;
  if (args.dtype == Dtype::f32)
    write_tokens<float>(args);
  else
    write_tokens<Bf16>(args);  // 16 bits are 16 bits
}

void paged_attention(const Attention& args) {
#if defined(__AVX512BF16__)
  using PackedBf16 = Pairs;
#else
  using PackedBf16 = Floats;
#endif
  switch (args.dtype) {
    case Dtype::f32:
      return run<float, Floats>(args);
    case Dtype::bf16:
      return run<Bf16, PackedBf16>(args);
    case Dtype::f16:
      return run<F16, Floats>(args);
  }
}

}  // namespace fxlm
