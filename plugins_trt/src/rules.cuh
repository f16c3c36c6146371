// The decisions of a policy about one token, based on its position and score (less_export/less/policies).
#pragma once

#include "device.cuh"

namespace less {

// The newest position that is behind the window of a query at position `now`; -1, as in empty slots, without a window.
__device__ __forceinline__ int lastHidden(AttentionRules const& rules, int now) {
    return rules.window == 0 ? -1 : max(-1, now - rules.window);
}

__device__ __forceinline__ bool visible(AttentionRules const& rules, int position, int now) {
    return position > lastHidden(rules, now) && position <= now;
}

// Whether a token is still within the window; `end` is the position of the next query. A layer with policy window keeps
// the newest `window` tokens; a compressed sliding layer drops tokens that the next query cannot see.
__device__ __forceinline__ bool live(AttentionRules const& rules, int position, int end) {
    int const grace = rules.policy == Policy::kWindow ? 0 : 1;
    return position >= 0 && (rules.window == 0 || position >= end - rules.window + grace);
}

__host__ __device__ __forceinline__ bool keepsScores(AttentionRules const& rules) {
    return rules.policy == Policy::kH2O || rules.policy == Policy::kTova;
}

// Whether a token's position allows it to stay. Policies with scores then decide by score.
__device__ __forceinline__ bool mayStay(AttentionRules const& rules, int position, int end) {
    if (!live(rules, position, end)) return false;
    return rules.policy != Policy::kSink || position < rules.heavy || position >= end - rules.recent;
}

// Ranks tokens that compete by score: the newest above all others, then by score. Scores are sums of probabilities,
// hence not negative, so their bits sort in the same order.
constexpr uint32_t kNewest = 0x7f800000u;
__device__ __forceinline__ uint32_t rankOf(AttentionRules const& rules, int position, float score, int end) {
    return position >= end - rules.recent ? kNewest : __float_as_uint(score);
}

// How much of a score is left after this many more tokens.
__device__ __forceinline__ float fadedBy(AttentionRules const& rules, int tokens) {
    return rules.decay == 1.f ? 1.f : powf(rules.decay, static_cast<float>(tokens));
}

}  // namespace less
