// Codes into panels (layout: ../quantized.py). Words of four codes are transposed in registers; of
// 4-bit codes two neighbouring words become one.

#include <algorithm>
#include <cstring>
#include <vector>

#include "pages.h"
#include "parallel.h"
#include "product.h"
#include "quantized.h"

namespace fxlm {
namespace {

constexpr int64_t kStrip = 1024;  // inputs that are transposed at a time

struct Words {
  static constexpr int per_step = 1;
};

// What lies behind the inputs and the outputs: a code that is stored as 0.
constexpr int fill_of(Code code) { return code == Code::int4 ? -8 : 0; }

// rows[kPanel] of `count` inputs -> [ceil(count / 4)][kPanel] words, `fill` behind the inputs.
void transposed(const int8_t* const* rows, int64_t count, int fill, uint32_t* out) {
  alignas(64) int8_t parts[kPanel][kStrip];
  const float* starts[kPanel];
  const bool whole = count % (4 * W) == 0;
  for (int64_t i = 0; i < kPanel; ++i) {
    if (!whole) {
      std::memcpy(parts[i], rows[i], count);
      std::memset(parts[i] + count, fill, kStrip - count);
    }
    starts[i] = reinterpret_cast<const float*>(whole ? rows[i] : parts[i]);
  }
  pack_keys<Words>(starts, int((count + 4 * W - 1) / (4 * W) * W), out);
}

// Two words of codes -> one of nibbles. `flip` adds 8 to each four-bit code.
void join(const uint32_t* words, int64_t pairs, uint32_t flip, uint32_t* out) {
  for (int64_t s = 0; s < pairs; ++s)
    for (int64_t i = 0; i < kPanel; i += W) {
      const vu low = bits_load<vu>(words + 2 * s * kPanel + i);
      const vu high = bits_load<vu>(words + (2 * s + 1) * kPanel + i);
      const vu joined = ((low ^ flip) & 0x0f0f0f0fu) | ((high ^ flip) & 0x0f0f0f0fu) << 4;
      std::memcpy(out + s * kPanel + i, &joined, sizeof joined);
    }
}

void pack_panel(const PackCodes& args, const int8_t* const* rows, uint32_t* out) {
  alignas(64) static thread_local uint32_t words[kStrip / 4 * kPanel];
  const int64_t per_word = inputs_per_word(args.code);
  const int64_t steps = (args.inputs + per_word - 1) / per_word;
  for (int64_t first = 0; first < args.inputs; first += kStrip) {
    const int8_t* starts[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) starts[i] = rows[i] + first;
    const int64_t count = std::min(kStrip, args.inputs - first), step = first / per_word;
    const int64_t here = std::min(kStrip / per_word, steps - step);
    if ((count & (8 * W - 1)) != 0) std::memset(words, fill_of(args.code), sizeof words);
    transposed(starts, count, fill_of(args.code), words);
    if (per_word == 4)
      std::memcpy(out + step * kPanel, words, here * kPanel * 4);
    else
      join(words, here, args.code == Code::int4 ? 0x08080808u : 0u, out + step * kPanel);
  }
}

}  // namespace

void pack_codes(const PackCodes& args) {
  const int64_t per_word = inputs_per_word(args.code);
  const int64_t panels = (args.outputs + kPanel - 1) / kPanel;
  const int64_t steps = (args.inputs + per_word - 1) / per_word;
  prefer_large_pages(args.packed, panels * steps * kPanel * 4);
  const std::vector<int8_t> missing(args.inputs, int8_t(fill_of(args.code)));
  for_each_item(panels, [&](int64_t panel) {
    const int8_t* rows[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t row = output_at(panel, i, args.outputs, args.gated);
      rows[i] = row < args.outputs
                    ? static_cast<const int8_t*>(args.codes) + row * args.row_stride
                    : missing.data();
    }
    pack_panel(args, rows, static_cast<uint32_t*>(args.packed) + panel * steps * kPanel);
  });
}

}  // namespace fxlm
