// Which tokens keep a slot, and where new ones go; the rules of less_export.less.policies.
#pragma once

#include <vector>

#include "layer.h"

namespace less {

// Candidates are the C slots, then the valid tokens of the chunk.
struct Choice {
    std::vector<char> held, kept;
    // The slot that each token of the chunk takes, -1 if none.
    std::vector<int> slot;
};

// `score` of every candidate is read by policies with scores only. Returns false if a policy that keeps everything has
// more tokens than slots.
bool choose(Layer const& layer, State const& state, Tokens const& tokens, float const* score, Choice* choice);

}  // namespace less
