// The state after a chunk: what leaves is absorbed, what stays takes its slot.
//
// Integers that are stored must be those of the other implementations, so every operation is rounded by itself: this
// file's functions are compiled without fused multiply-add.
#pragma once

#include "choose.h"
#include "layer.h"

namespace less {

// `score` of the slots, then of the chunk's tokens.
void settle(Layer const& layer, Tokens const& tokens, Choice const& choice, float const* score, State* state);

}  // namespace less
