// Sampling on CPU: adjust, filter, draw, and log-probabilities, a row a thread.
//
// No sort of the vocabulary. Greedy is one read of the row. top_k and top_p cut the order (logit
// descending, id ascending) at a last token, which is looked for in the pool of tokens within e^-6
// of the best by quickselect, and where that pool is too small, in wider ones. What is left runs
// an exponential race, in which each token's noise depends on (seed, counter, token) alone: two
// models that give similar logits draw the same token more often than any cut of one uniform
// would let them. Sums are double and each row is one thread's: a draw depends on its row alone.
//
// Compiled with -ffp-contract=off: adjusted logits equal the reference's bit by bit.

#include "sample.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace fxlm {
namespace {

constexpr float kGreedyBelow = 1e-5f;
constexpr float kPools[] = {6.0f, 10.0f, kInfinity};  // nats below the best token
constexpr int kBlock = 16 * W;  // logits looked at together
constexpr float kLargest = std::numeric_limits<float>::max();

enum { kTemperature, kTopP, kMinP, kRepetition, kPresence, kFrequency };
enum { kTopK, kSeed, kCounter, kNumLogprobs, kTarget };

uint64_t splitmix64(uint64_t state) {
  uint64_t z = state + 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}
// 53 random bits for each token of a position: noise(stream(seed, counter), token).
uint64_t stream(int64_t seed, int64_t counter) {
  return splitmix64(splitmix64(uint64_t(seed)) + uint64_t(counter));
}
uint64_t noise(uint64_t stream, int64_t token) { return splitmix64(stream + uint64_t(token)) >> 11; }

constexpr int kLanes = W / 2;
typedef uint64_t vl __attribute__((vector_size(kLanes * 8)));

// Whether one of the noises of `count` tokens is below the limit.
bool any_below(uint64_t stream, int64_t token, int count, uint64_t limit) {
  vl state, found{};
  for (int i = 0; i < kLanes; ++i) state[i] = stream + uint64_t(token + i) + 0x9E3779B97F4A7C15;
  for (int i = 0; i < count; i += kLanes, state += kLanes) {
    vl z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    found |= (vl)((z ^ z >> 31) >> 11 < limit);
  }
  uint64_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= found[i];
  return any != 0;
}

// NaN -> -inf; +inf -> the largest float; -0 -> +0.
inline vf finite(vf x) {
  x = vmax(x, broadcast(-kInfinity));
  return (x > kLargest ? broadcast(kLargest) : x) + 0.0f;
}
inline float finite1(float x) { return finite(broadcast(x))[0]; }

// Calls body(index, vector) over the row; the last vector is filled up with -inf.
template <class T, class Body>
inline void for_vectors(const T* row, int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + W <= end; i += W) body(i, finite(load(row + i)));
  if (i < end) {
    const vf x = finite(load_part(row + i, int(end - i)));
    body(i, iota() < int(end - i) ? x : broadcast(-kInfinity));
  }
}

template <class T>
float block_max(const T* row, int64_t begin, int64_t end) {
  vf best[4];
  for (auto& b : best) b = broadcast(-kInfinity);
  int64_t i = begin;
  for (; i + 4 * W <= end; i += 4 * W)
    for (int j = 0; j < 4; ++j) best[j] = vmax(load(row + i + j * W), best[j]);
  for_vectors(row, i, end, [&](int64_t, vf x) { best[0] = vmax(x, best[0]); });
  return finite1(lanes_max(vmax(vmax(best[0], best[1]), vmax(best[2], best[3]))));
}

template <class T>
inline float value(const T* row, int64_t i) {
  return finite1(to_float(row[i]));
}

// Lowest index of the greatest logit; 0 where there is none.
template <class T>
int64_t argmax(const T* row, int64_t count) {
  float best = -kInfinity;
  int64_t where = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min<int64_t>(count, begin + kBlock);
    const float top = block_max(row, begin, end);
    if (!(top > best)) continue;
    best = top;
    where = begin;
    while (value(row, where) != best) ++where;
  }
  return where;
}

// ---- ordered pool -----------------------------------------------------------------------------

// Ascending keys are (logit descending, id ascending).
inline uint64_t key_of(float logit, int64_t id) {
  const uint32_t bits = bit_cast<uint32_t>(logit);
  const uint32_t ascending = bits & 0x80000000 ? ~bits : bits | 0x80000000;
  return uint64_t(~ascending) << 32 | uint64_t(id);
}
inline int64_t id_of(uint64_t key) { return int64_t(key & 0xffffffff); }

struct Scratch {
  std::vector<float> logits, weights;
  std::vector<uint64_t> keys;

  void reserve(size_t count) {
    if (keys.size() >= count) return;
    logits.resize(count);
    weights.resize(count);
    keys.resize(count);
  }
};

// The first `size` keys of the scratch.
struct Pool {
  uint64_t* keys;
  size_t size;
};

double mass_of(const float* weights, Pool pool, size_t begin, size_t end) {
  double mass = 0;
  for (; begin < end; ++begin) mass += weights[id_of(pool.keys[begin])];
  return mass;
}

// Last key of the shortest prefix, in order, whose mass reaches the goal.
uint64_t last_of_mass(Pool pool, const float* weights, double goal) {
  size_t low = 0, high = pool.size;
  double before = 0;
  while (high - low > 32) {
    const size_t middle = low + (high - low) / 2;
    std::nth_element(pool.keys + low, pool.keys + middle, pool.keys + high);
    const double mass = before + mass_of(weights, pool, low, middle);
    if (mass >= goal) {
      high = middle;
    } else {
      before = mass;
      low = middle;
    }
  }
  std::sort(pool.keys + low, pool.keys + high);
  while (low + 1 < high && before + weights[id_of(pool.keys[low])] < goal)
    before += weights[id_of(pool.keys[low++])];
  return pool.keys[std::min(low, pool.size - 1)];
}

// The keys of all logits >= at_least; no branch on a single logit.
Pool gather(Scratch& scratch, int64_t count, float at_least) {
  const float* logits = scratch.logits.data();
  Pool pool{scratch.keys.data(), 0};
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min<int64_t>(count, begin + kBlock);
    if (block_max(logits, begin, end) < at_least) continue;
    for (int64_t i = begin; i < end; ++i) {
      pool.keys[pool.size] = key_of(logits[i], i);
      pool.size += logits[i] >= at_least;
    }
  }
  return pool;
}

// Weights of all tokens (0 below min_p) into scratch; returns their sum.
double weigh(Scratch& scratch, int64_t count, float best, float inverse, float min_p) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    vf sum{};
    for_vectors(scratch.logits.data(), begin, std::min<int64_t>(count, begin + kBlock),
                [&](int64_t i, vf x) {
                  vf weight = vexp((x - best) * inverse);
                  weight = weight >= min_p ? weight : vf{};
                  store(scratch.weights.data() + i, weight);  // padded to W
                  sum += weight;
                });
    total += lanes_sum(sum);
  }
  return total;
}

// The last key, in order, that top_k and top_p leave of the adjusted logits in scratch.
uint64_t last_kept(Scratch& scratch, int64_t count, float best, const float* floats, int64_t k) {
  const float temperature = floats[kTemperature], top_p = floats[kTopP];
  const bool limited = k > 0 && k < count, nucleus = top_p < 1.0f;
  if (!limited && !nucleus) return ~uint64_t(0);
  const double all =
      nucleus ? weigh(scratch, count, best, 1.0f / temperature, std::min(floats[kMinP], 1.0f)) : 0;
  const float* weights = scratch.weights.data();
  for (const float nats : kPools) {
    const bool complete = nats == kInfinity;
    Pool pool = gather(scratch, count, best - nats * temperature);
    if (limited && pool.size < size_t(k) && !complete) continue;
    if (limited && pool.size >= size_t(k)) {
      std::nth_element(pool.keys, pool.keys + k - 1, pool.keys + pool.size);
      pool.size = size_t(k);
    }
    if (!nucleus) return pool.keys[k - 1];
    const double held = mass_of(weights, pool, 0, pool.size);
    const double goal = std::max(double(top_p), 0.0) * (limited ? held : all);
    if (held >= goal || complete) return last_of_mass(pool, weights, goal);
  }
  return ~uint64_t(0);  // not reached: the complete pool always answers
}

// One token of the adjusted logits in scratch, with the probabilities that the filters leave: the
// least exponential / weight wins, where each token has an exponential of its own.
int64_t draw(Scratch& scratch, int64_t count, const float* floats, const int64_t* ints) {
  const float* logits = scratch.logits.data();
  int64_t winner = argmax(logits, count);
  const float best = logits[winner];
  if (best == -kInfinity) return 0;
  const float inverse = 1.0f / floats[kTemperature], min_p = std::min(floats[kMinP], 1.0f);
  const uint64_t last = last_kept(scratch, count, best, floats, ints[kTopK]);
  const uint64_t bits = stream(ints[kSeed], ints[kCounter]);
  double least = kInfinity;
  auto enter = [&](int64_t i) {
    const float x = (logits[i] - best) * inverse;
    if (key_of(logits[i], i) > last || (min_p > 0.0f && !(exp1(x) >= min_p))) return;
    const double time = -std::log1p(-double(noise(bits, i)) * 0x1p-53) / std::exp(double(x));
    if (!(time < least)) return;
    least = time;
    winner = i;
  };
  enter(winner);
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min<int64_t>(count, begin + kBlock);
    const float top = block_max(logits, begin, end);
    if (key_of(top, begin) > last) continue;
    // An exponential, -log(1 - u), is at least u: most blocks are done with their uniforms.
    const double limit = std::min(least * std::exp(double((top - best) * inverse)), 1.0);
    if (!any_below(bits, begin, int(end - begin), uint64_t(limit * 0x1p53) + 1)) continue;
    for (int64_t i = begin; i < end; ++i)
      if (double(noise(bits, i)) * 0x1p-53 <= limit) enter(i);
  }
  return winner;
}

// ---- one row ----------------------------------------------------------------------------------

template <class T>
void adjust(const Sample& args, int64_t r, const T* row, float* logits) {
  for_vectors(row, 0, args.vocabulary, [&](int64_t i, vf x) { store(logits + i, x); });
  const float* floats = args.floats + r * args.floats_stride;
  const int64_t begin = std::max(args.adjust_start[r], 0);
  const int64_t end = std::min<int64_t>(args.adjust_start[r + 1], args.adjusts);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = args.adjust_ids[i];
    if (id < 0 || id >= args.vocabulary) continue;
    const int32_t times = args.adjust_counts[i];
    float x = logits[id];
    if (times >= 0) x = x > 0 ? x / floats[kRepetition] : x * floats[kRepetition];
    x = x - floats[kFrequency] * float(std::max(times, 0));
    x = x - floats[kPresence] * float(times > 0);
    logits[id] = finite1(x + args.adjust_bias[i]);
  }
}

template <class T>
int64_t choose(const Sample& args, int64_t r, const T* row) {
  const int64_t* ints = args.ints + r * args.ints_stride;
  const float* floats = args.floats + r * args.floats_stride;
  if (ints[kTarget] >= 0) return ints[kTarget];
  const bool drawn = floats[kTemperature] >= kGreedyBelow;
  if (!drawn && args.adjust_start[r] >= args.adjust_start[r + 1])
    return argmax(row, args.vocabulary);
  static thread_local Scratch scratch;
  scratch.reserve(size_t(args.vocabulary) + W);  // vectors are stored whole
  adjust(args, r, row, scratch.logits.data());
  return drawn ? draw(scratch, args.vocabulary, floats, ints)
               : argmax(scratch.logits.data(), args.vocabulary);
}

// The `want` greatest logits in order, by insertion: few, and rare after the first blocks.
template <class T>
int64_t top_logits(const T* row, int64_t count, int64_t want, float* best, int64_t* ids) {
  int64_t size = 0;
  for (int64_t begin = 0; begin < count && want > 0; begin += kBlock) {
    const int64_t end = std::min<int64_t>(count, begin + kBlock);
    if (size == want && !(block_max(row, begin, end) > best[size - 1])) continue;
    for (int64_t i = begin; i < end; ++i) {
      const float x = value(row, i);
      if (size == want && !(x > best[size - 1])) continue;
      int64_t at = size < want ? size++ : size - 1;
      for (; at > 0 && x > best[at - 1]; --at) {
        best[at] = best[at - 1];
        ids[at] = ids[at - 1];
      }
      best[at] = x;
      ids[at] = i;
    }
  }
  return size;
}

// Of the raw logits; the row's first column is the chosen token.
template <class T>
void write_logprobs(const Sample& args, int64_t r, const T* row) {
  const int64_t columns = args.max_logprobs + 1;
  float* logprobs = args.logprobs + r * columns;
  int64_t* ids = args.logprob_ids + r * columns;
  std::fill(logprobs, logprobs + columns, -kInfinity);
  std::fill(ids, ids + columns, 0);
  args.ranks[r] = 0;
  const int64_t asked = args.ints[r * args.ints_stride + kNumLogprobs];
  if (asked < 0) return;
  const int64_t token = args.token_ids[r];
  const float best = block_max(row, 0, args.vocabulary);
  const float chosen = token < args.vocabulary ? value(row, token) : -kInfinity;
  double total = 0;
  int64_t above = 0;
  for (int64_t begin = 0; begin < args.vocabulary; begin += kBlock) {
    vf sum{};
    vi greater{};
    for_vectors(row, begin, std::min<int64_t>(args.vocabulary, begin + kBlock),
                [&](int64_t, vf x) {
                  sum += vexp(x - best);
                  greater -= x > chosen;
                });
    total += lanes_sum(sum);
    for (int i = 0; i < W; ++i) above += greater[i];
  }
  args.ranks[r] = above + 1;
  ids[0] = token;
  logprobs[0] = chosen;
  const int64_t want = std::min(asked, args.max_logprobs);
  const int64_t found = top_logits(row, args.vocabulary, want, logprobs + 1, ids + 1);
  if (best == -kInfinity) return;
  const double norm = double(best) + __builtin_log(total);
  for (int64_t i = 0; i <= found; ++i) logprobs[i] = float(double(logprobs[i]) - norm);
}

template <class T>
void run(const Sample& args) {
  for_each_item(args.rows, [&](int64_t r) {
    const T* row = static_cast<const T*>(args.logits) + r * args.logits_stride;
    args.token_ids[r] = choose(args, r, row);
    write_logprobs(args, r, row);
  });
}

}  // namespace

void sample(const Sample& args) {
  switch (args.dtype) {
    case Dtype::f32:
      return run<float>(args);
    case Dtype::bf16:
      return run<Bf16>(args);
    case Dtype::f16:
      return run<F16>(args);
  }
}

}  // namespace fxlm
