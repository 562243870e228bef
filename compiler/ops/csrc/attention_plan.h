// How attention is cut into work: tiles of rows, and splits of keys (attention.cpp says what they are).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "parallel.h"

namespace fxlm {
namespace {

constexpr int kSplit = 256;  // keys a partial softmax
constexpr int kRows = 64;    // rows a tile of several heads, and of one where vectors multiply
constexpr int kMaxRows = 128;
constexpr int kMostRows = 256;  // of a tile, whatever the kernel asks for
constexpr int kReading = 8;  // what reading a split costs, in rows

struct Tile {
  int64_t sequence;
  int64_t head, heads;       // the first of its KV heads, and how many they are
  int64_t first_row, rows;   // row r of a sequence and KV head: query r / group, head r % group
  int64_t low, high;         // keys that some row sees
  int64_t partials;          // where its partials start, in rows; -1 = walked by one thread
  int64_t splits() const { return (high - 1) / kSplit - low / kSplit + 1; }
  int64_t all_rows() const { return heads * rows; }  // head by head
  int64_t cost() const { return splits() * heads * (rows + kReading); }
};

struct Item {
  int32_t tile, split;  // split -1 = all
};

struct Folding {
  int32_t tile, head;
};

struct Plan {
  std::vector<Tile> tiles;
  std::vector<Item> items;    // dearest first
  std::vector<Folding> parted;  // heads of tiles whose splits are walked by several threads
  int64_t partial_rows = 0;
};

// How many heads a tile may have before threads are left without work.
int64_t heads_of_tile(const Attention& args) {
  int64_t splits = 0;
  for (int64_t i = 0; i < args.sequences; ++i) {
    const int64_t length = args.seq_lens[i];
    splits += ((args.window > 0 ? std::min(length, args.window) : length) + kSplit - 1) / kSplit;
  }
  const int64_t pieces = (num_threads() * 4 + splits - 1) / std::max<int64_t>(splits, 1);
  return std::max<int64_t>(args.kv_heads / std::min(pieces, args.kv_heads), 1);
}

void plan_sequence(const Attention& args, int64_t sequence, int64_t most_heads, int64_t most_rows,
                   std::vector<Tile>& tiles) {
  const int64_t queries = args.query_start[sequence + 1] - args.query_start[sequence];
  const int64_t group = args.heads / args.kv_heads, rows = queries * group;
  const int64_t most = std::max(most_rows, std::min<int64_t>(group, kMaxRows));
  const int64_t start = args.seq_lens[sequence] - queries;
  for (int64_t first = 0; first < rows; first += most) {
    Tile tile{sequence, 0, 0, first, std::min(most, rows - first), 0, 0, -1};
    const int64_t at = start + first / group;
    if (args.window > 0) tile.low = std::max<int64_t>(0, at - args.window + 1);
    if (args.chunk > 0) tile.low = std::max(tile.low, at / args.chunk * args.chunk);
    tile.high = start + (first + tile.rows - 1) / group + 1;
    const int64_t heads = std::max<int64_t>(std::min(most_heads, kRows / tile.rows), 1);
    for (; tile.head < args.kv_heads; tile.head += heads) {
      tile.heads = std::min(heads, args.kv_heads - tile.head);
      tiles.push_back(tile);
    }
  }
}

// A tile has up to `most_rows` rows, unless one group is larger. It is parted where it alone would
// keep one thread busy while others have nothing to do.
Plan make_plan(const Attention& args, int64_t most_rows) {
  Plan plan;
  int64_t total = 0;
  const int64_t heads = heads_of_tile(args);
  for (int64_t i = 0; i < args.sequences; ++i) plan_sequence(args, i, heads, most_rows, plan.tiles);
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
    plan.partial_rows += tile.splits() * tile.all_rows();
    for (int64_t head = 0; head < tile.heads; ++head)
      plan.parted.push_back({int32_t(i), int32_t(head)});
    for (int64_t s = 0; s < tile.splits(); ++s) plan.items.push_back({int32_t(i), int32_t(s)});
  }
  auto cost = [&plan](const Item& item) {
    const Tile& tile = plan.tiles[item.tile];
    return item.split < 0 ? tile.cost() : tile.cost() / tile.splits();
  };
  std::stable_sort(plan.items.begin(), plan.items.end(),
                   [&](const Item& a, const Item& b) { return cost(a) > cost(b); });
  return plan;
}

}  // namespace
}  // namespace fxlm
