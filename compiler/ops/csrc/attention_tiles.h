// Attention on the tile unit (tile.h), for bf16 queries.
#pragma once

#include "attention.h"

namespace fxlm {

// Attends as paged_attention does; false, with nothing done, where there is no tile unit.
bool tiled_attention(const Attention& args);

}  // namespace fxlm
