// Attention on the tile unit (tile.h), for bf16 queries over a cache of bf16.
//
// A block of keys is the second operand as it lies: 16 pairs of dimensions of 16 tokens a tile. Of
// values, a tile is 32 tokens: blocks of 16 are copied two by two, which costs little beside the
// products. Whatever the number of rows, a score is summed 32 dimensions a step and a weighted
// value 32 tokens a step, at absolute positions: decode and prefill give the same bits.
//
// Few rows (decode): groups of 64 tokens, head by head, as in attention.cpp; what bounds it is the
// stream of the cache. Many rows (prefill): the keys and values of a split (32 KiB each with heads
// of 64) are found once for all rows of a tile and stay in the second-level cache, from which they
// are streamed past the first while blocks of 32 rows pass: their scores (32 KiB) stay there from
// product to product. 2 x 2 tiles let each load serve two products; of heads of up to 64, queries
// stay in tiles and each load of keys serves two. What a block of rows does not see of the split
// is skipped, 32 tokens at a time.

#include "attention_tiles.h"

#include "tile.h"

#if defined(FXLM_HARDWARE_TILES) || defined(FXLM_EMULATED_TILES)
#include "attention_rows.h"
#endif

namespace fxlm {

#if !defined(FXLM_HARDWARE_TILES) && !defined(FXLM_EMULATED_TILES)

bool tiled_attention(const Attention&) { return false; }

#else

namespace {

constexpr int kStep = 32;              // dimensions or tokens that one product sums
constexpr int kUnits = kTileBytes / 4;  // of a row of a tile: pairs, or sums
constexpr int kBlock = 2 * kTileRows;  // rows of a 2 x 2 product
constexpr int64_t kScoreBytes = kSplit * sizeof(float);  // from row to row

// A matrix of pairs, row by row of a tile.
struct Operand {
  const char* at;
  int64_t stride;
};

class TiledWorker : RowTile {
 public:
  static constexpr int lanes = kUnits;

  TiledWorker(const Attention& args, const Tile& tile, const Format& format)
      : RowTile(args, tile, format, lanes),
        few_(tile.rows <= kTileRows),
        steps_(int(round_up(args.dk, kStep) / 2)) {
    carve();
    for (int64_t m = 0; steps_ > args.dk / 2 && m < tile.all_rows(); ++m)
      std::memset(queries_ + m * steps_ + args.dk / 2, 0, (steps_ - args.dk / 2) * sizeof(float));
    pack_queries<Bf16, 2>(queries_, steps_);
    tile_configure(shapes());
  }
  ~TiledWorker() { tile_release(); }

  void one_split(int64_t index, float* out) {
    if (few_) return few_rows(index, out, false);
    many_rows(index, [&](int row, int count) {
      std::memcpy(out + row * ld_, partial_, count * ld_ * sizeof(float));
    });
  }

  void all_splits() {
    const int rows = int(tile_.all_rows());
    clear(total_, rows);
    for (int64_t i = tile_.low / kSplit; i * kSplit < tile_.high; ++i) {
      if (few_) {
        few_rows(i, partial_, true);
        fold(total_, partial_, rows);
      } else {
        many_rows(i, [&](int row, int count) { fold(total_ + row * ld_, partial_, count); });
      }
    }
    finish<Bf16>(total_, 0, rows);
  }

  void fold_partials(int head, const float* partials) {
    fold_head<Bf16>(head, partials, total_);
  }

 private:
  TileShapes shapes() const {
    TileShapes all{};
    for (int t = 0; t < kTiles; ++t) {
      all.rows[t] = uint8_t(few_ && t < 5 ? tile_.rows : kTileRows);
      all.bytes[t] = kTileBytes;
    }
    return all;
  }

  void carve() {
    const size_t rows = tile_.all_rows(), padded = few_ ? rows : rows + kBlock;
    const size_t part = few_ ? rows : kBlock, tokens = few_ ? kGroup : kSplit;
    Carver carver(padded * steps_ + rows * ld_ + part * kSplit + part * ld_ +
                  tokens * (steps_ + width_ / 2) + 8 * 16);
    queries_ = carver.take(padded * steps_);
    total_ = carver.take(rows * ld_);
    scores_ = carver.take(part * kSplit);
    partial_ = carver.take(part * ld_);
    key_scratch_ = carver.take(tokens * steps_);
    value_scratch_ = carver.take(tokens / 2 * width_);
  }

  // ---- the second operands

  // `rows` rows of 16 units each -> rows side by side, the rest of `all` rows zeros.
  static void copy_tile(const char* from, int64_t stride, int rows, int all, float* to) {
    for (int row = 0; row < all; ++row)
      for (int i = 0; i < kUnits; i += W)
        store(to + row * kUnits + i, row < rows ? bits_load<vf>(from + row * stride + i * 4) : vf{});
  }

  // The keys of tile `i` of the scratch: where they lie if a product can read them there, else
  // copied; never null.
  Operand find_keys(int i, const char* tile) {
    const int64_t stride = args_.block_size * 4;
    float* to = key_scratch_ + i * steps_ * kUnits;
    const int rows = int(args_.dk / 2);
    if (tile == nullptr) {  // those scores are masked
    } else if (rows != steps_) {
      copy_tile(tile, stride, rows, steps_, to);
    } else {
      return {tile, stride};
    }
    return {reinterpret_cast<const char*>(to), kTileBytes};
  }

  // The values of 32 tokens from `at` on, step `i` of the scratch. Tokens that no row sees are
  // zeroed: what they hold may be anything, and a weight of zero does not undo NaN.
  Operand find_values(int i, int at, const char* const* tiles) {
    float* to = value_scratch_ + i * kUnits * width_;
    const bool whole = at >= begin_ && at + kStep <= end_;
    if (whole && args_.block_size >= kStep && args_.dv == width_)
      return {tiles[0], width_ * 4};
    for (int half = 0; half < 2; ++half) {
      float* here = to + half * kTile / 2 * width_;
      if (tiles[half] == nullptr)
        std::memset(here, 0, kTile / 2 * width_ * sizeof(float));
      else
        for (int row = 0; row < kTile / 2; ++row)
          copy_row(tiles[half] + row * args_.dv * 4, here + row * width_);
    }
    for (int j = 0; j < kStep && !whole; ++j)
      if (at + j < begin_ || at + j >= end_) clear_token(to + j / 2 * width_, j % 2);
    return {reinterpret_cast<const char*>(to), width_ * 4};
  }

  void copy_row(const char* from, float* to) const {
    int d = 0;
    for (; d + W <= args_.dv; d += W) store(to + d, bits_load<vf>(from + d * 4));
    for (; d < args_.dv; ++d) std::memcpy(to + d, from + d * 4, 4);
  }

  void clear_token(float* row, int which) const {
    const uint32_t keep = which == 0 ? 0xffff0000 : 0x0000ffff;
    for (int d = 0; d < width_; d += W)
      store(row + d, bit_cast<vf>(bit_cast<vu>(load(row + d)) & keep));
  }

  // ---- few rows

  void few_rows(int64_t index, float* out, bool more) {
    enter(index);
    const int first = begin_ / kGroup * kGroup, last = int(round_up(end_, kGroup));
    Tiles next = tiles_of(keys_, 0, first);
    walk(keys_, first, next, tiles_of(values_, 0, first), [&](int head, int at, const Tiles& here) {
      score_few(here, next, queries_ + row_of(head) * steps_, scores_of(head) + at);
    });
    walk(values_, first, next, more ? tiles_of(keys_, 0, kSplit) : Tiles{},
         [&](int head, int at, const Tiles& here) {
           if (at == first) weigh(head, first, last, out);
           mix_few(head, at, here, next, at == first, out + row_of(head) * ld_ + kHeader);
         });
  }

  float* scores_of(int head) const { return scores_ + row_of(head) * kSplit; }

  void weigh(int head, int first, int last, float* out) {
    const int m = row_of(head);
    softmax<PairWeights>(scores_ + m * kSplit, m, int(tile_.rows), first, last, out + m * ld_);
  }

  void score_few(const Tiles& here, const Tiles& next, const float* queries, float* scores) {
    Operand keys[kGroupTiles];
    for (int i = 0; i < kGroupTiles; ++i) keys[i] = find_keys(i, here.at[i]);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int step = 0; step < steps_; step += kUnits) {
      tile_load<4>(queries + step, steps_ * 4);
      for (int line = step; line < step + kUnits; ++line) next.prefetch(line);
      auto b = [&](int i) { return keys[i].at + step * keys[i].stride; };
      tile_load<5>(b(0), keys[0].stride), tile_dpbf16<0, 4, 5>();
      tile_load<6>(b(1), keys[1].stride), tile_dpbf16<1, 4, 6>();
      tile_load<7>(b(2), keys[2].stride), tile_dpbf16<2, 4, 7>();
      tile_load<5>(b(3), keys[3].stride), tile_dpbf16<3, 4, 5>();
    }
    tile_store<0>(scores, kScoreBytes), tile_store<1>(scores + 16, kScoreBytes);
    tile_store<2>(scores + 32, kScoreBytes), tile_store<3>(scores + 48, kScoreBytes);
  }

  // Adds the weighted values of a group to `out`, or begins with them.
  void mix_few(int head, int at, const Tiles& here, const Tiles& next, bool begin, float* out) {
    constexpr int count = kGroup / kStep;
    Operand values[count];
    for (int i = 0; i < count; ++i)
      values[i] = find_values(i, at + i * kStep, here.at + 2 * i);
    const char* weights = reinterpret_cast<const char*>(scores_of(head)) + at * sizeof(Bf16);
    const int64_t ld = ld_ * 4;
    for (int column = 0; column < width_; column += kUnits) {
      for (int line = column / 2; line < column / 2 + kUnits / 2; ++line) next.prefetch(line);
      if (begin)
        tile_zero<0>();
      else
        tile_load<0>(out + column, ld);
      for (int i = 0; i < count; ++i) {
        tile_load<4>(weights + i * kStep * sizeof(Bf16), kScoreBytes);
        tile_load<5>(values[i].at + column * 4, values[i].stride), tile_dpbf16<0, 4, 5>();
      }
      tile_store<0>(out + column, ld);
    }
  }

  // ---- many rows

  // Rows of a tile that are taken at once, and the keys of the split that they see: whole steps.
  struct Block {
    int row, count, low, last;  // last <= low: none
  };

  Block block_at(int head, int first) const {
    const int row = row_of(head) + first;
    const int count = std::min(int(tile_.rows) - first, kBlock);
    const int low = std::max(seen_at(position(row)).low, begin_) / kStep * kStep;
    const int high = std::min(seen_at(position(row + count - 1)).high, end_);
    return {row, count, low, low < high ? int(round_up(high, kStep)) : low};
  }

  // Leaves the partial results of each block of rows of a split in partial_ and calls
  // done(row, count).
  template <class Done>
  void many_rows(int64_t index, const Done& done) {
    enter(index);
    for (int head = 0; head < tile_.heads; ++head) {
      find_split(head);
      for (int first = 0; first < tile_.rows; first += kBlock) {
        const Block block = block_at(head, first);
        if (steps_ == 2 * kUnits)
          score_short(block);
        else
          for (int at = block.low; at < block.last; at += kStep)
            score_block(queries_ + block.row * steps_, split_keys_ + at / kTile, scores_ + at);
        softmax<PairWeights>(scores_, block.row, block.count, block.low, block.last, partial_);
        for (int column = 0; column < width_ && block.low < block.last; column += 2 * kUnits)
          mix_block(block, column);
        done(block.row, block.count);
      }
    }
  }

  void find_split(int head) {
    const int first = begin_ / kStep * kStep;
    for (int at = first; at < end_; at += kStep) {
      const int i = at / kTile, step = at / kStep;
      const char* tiles[2];
      for (int half = 0; half < 2; ++half)
        split_keys_[i + half] = find_keys(i + half, tile_of(keys_, head, at + half * kTile));
      for (int half = 0; half < 2; ++half) tiles[half] = tile_of(values_, head, at + half * kTile);
      split_values_[step] = find_values(step, at, tiles);
    }
  }

  void score_block(const float* a, const Operand* keys, float* scores) const {
    const int64_t ld = steps_ * 4;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    const Operand b = keys[0], c = keys[1];
    for (int step = 0; step < steps_; step += kUnits) {
      tile_load<4>(a + step, ld), tile_stream<6>(b.at + step * b.stride, b.stride);
      tile_dpbf16<0, 4, 6>();
      tile_stream<7>(c.at + step * c.stride, c.stride), tile_dpbf16<1, 4, 7>();
      tile_load<5>(a + kTileRows * steps_ + step, ld);
      tile_dpbf16<2, 5, 6>(), tile_dpbf16<3, 5, 7>();
    }
    float* below = scores + kTileRows * kSplit;
    tile_store<0>(scores, kScoreBytes), tile_store<1>(scores + 16, kScoreBytes);
    tile_store<2>(below, kScoreBytes), tile_store<3>(below + 16, kScoreBytes);
  }

  // Scores of heads of two steps: the queries stay in tiles.
  void score_short(const Block& block) {
    const float* a = queries_ + block.row * steps_;
    const int64_t ld = steps_ * 4;
    tile_load<0>(a, ld), tile_load<1>(a + kUnits, ld);
    a += kTileRows * steps_;
    tile_load<2>(a, ld), tile_load<3>(a + kUnits, ld);
    for (int at = block.low; at < block.last; at += kTile) {
      const Operand b = split_keys_[at / kTile];
      tile_zero<4>(), tile_zero<5>();
      tile_stream<6>(b.at, b.stride), tile_dpbf16<4, 0, 6>(), tile_dpbf16<5, 2, 6>();
      tile_stream<7>(b.at + kUnits * b.stride, b.stride);
      tile_dpbf16<4, 1, 7>(), tile_dpbf16<5, 3, 7>();
      tile_store<4>(scores_ + at, kScoreBytes);
      tile_store<5>(scores_ + kTileRows * kSplit + at, kScoreBytes);
    }
  }

  // Weighted values of 32 lanes, or of the last 16, from `column` on.
  void mix_block(const Block& block, int column) {
    const bool both = column + kUnits < width_;
    const int64_t ld = ld_ * 4;
    float* out = partial_ + kHeader + column;
    float* below = out + kTileRows * ld_;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int at = block.low; at < block.last; at += kStep) {
      const Operand b = split_values_[at / kStep];
      const char* a = reinterpret_cast<const char*>(scores_) + at * sizeof(Bf16);
      tile_load<4>(a, kScoreBytes), tile_stream<6>(b.at + column * 4, b.stride);
      tile_dpbf16<0, 4, 6>();
      tile_load<5>(a + kTileRows * kScoreBytes, kScoreBytes), tile_dpbf16<2, 5, 6>();
      if (!both) continue;
      tile_stream<7>(b.at + column * 4 + kTileBytes, b.stride);
      tile_dpbf16<1, 4, 7>(), tile_dpbf16<3, 5, 7>();
    }
    tile_store<0>(out, ld), tile_store<2>(below, ld);
    if (both) tile_store<1>(out + kUnits, ld), tile_store<3>(below + kUnits, ld);
  }

  const bool few_;
  const int steps_;  // of a query, in units: whole tiles
  float *queries_, *total_, *scores_, *partial_, *key_scratch_, *value_scratch_;
  Operand split_keys_[kSplit / kTile], split_values_[kSplit / kStep];
};

}  // namespace

bool tiled_attention(const Attention& args) {
  // A tile loaded right after vectors have written it waits for them: codes, which are expanded into
  // scratch, decode 1.3 times as fast on vectors, and prefill must have the bits of decoding.
  if (args.store != Store::same || !tiles_allowed()) return false;
  // Large tiles find keys and values seldom; threads want some eight to share work evenly.
  const int64_t share = args.tokens * args.heads / (8 * num_threads());
  const int64_t rows = std::min<int64_t>(std::max<int64_t>(share, kRows), kMostRows);
  run<TiledWorker>(args, {nullptr, nullptr, nullptr, 2}, rows / kBlock * kBlock);
  return true;
}

#endif

}  // namespace fxlm
