// What a policy decides about one token, from its position and score (less_export/less/policies).
#pragma once

#include "device.cuh"

namespace less {

__device__ __forceinline__ bool visible(AttentionRules const& rules, int position, int now) {
    return position >= 0 && position <= now && (rules.window == 0 || position > now - rules.window);
}

// Whether a token may stay, `end` being the position of the next query. A layer that slides by itself keeps its newest
// `window`; a compressed one lets go of what the next query is blind to.
__device__ __forceinline__ bool live(AttentionRules const& rules, int position, int end) {
    int const grace = rules.policy == Policy::kWindow ? 0 : 1;
    return position >= 0 && (rules.window == 0 || position >= end - rules.window + grace);
}

__host__ __device__ __forceinline__ bool keepsScores(AttentionRules const& rules) {
    return rules.policy == Policy::kH2O || rules.policy == Policy::kTova;
}

// Whether a token stays as far as positions say; scores have the last word where there are any.
__device__ __forceinline__ bool mayStay(AttentionRules const& rules, int position, int end) {
    if (!live(rules, position, end)) return false;
    return rules.policy != Policy::kSink || position < rules.heavy || position >= end - rules.recent;
}

// Order of the tokens that compete by score: the newest before all others, then the larger scores. Scores are sums of
// probabilities, so their bits are ordered like themselves.
constexpr uint32_t kNewest = 0x7f800000u;
__device__ __forceinline__ uint32_t rankOf(AttentionRules const& rules, int position, float score, int end) {
    return position >= end - rules.recent ? kNewest : __float_as_uint(score);
}

}  // namespace less
