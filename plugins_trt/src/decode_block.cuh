// What a block of the decode kernel is given, how it lays out its shared memory, and what it finds out about the slots.
#pragma once

#include "rules.cuh"

namespace less {

struct DecodeParams {
    AttentionRules rules;
    AttentionShape shape;
    AttentionTensors t;
    int splits;
    float* logits;       // [B,Hk,G,C], or nullptr: they stay in shared memory
    float* partials;     // [B,Hk,splits,G,D+2] accumulator, maximum, sum; nullptr: one split, one tile of heads
    uint32_t* counters;  // [B*Hk] where splits > 1
};

// Shared memory of a block, in floats.
template <int LPR, int GT>
struct DecodeLayout {
    static constexpr int kWidth = LPR * 8;                     // D, rounded up
    static constexpr int kAcc = 0;                             // [kWarps][GT][kWidth]
    static constexpr int kPeak = kAcc + kWarps * GT * kWidth;  // [kWarps][GT]
    static constexpr int kMass = kPeak + kWarps * GT;          // [kWarps][GT]
    static constexpr int kReduce = kMass + kWarps * GT;        // [kWarps] of Choice, 24 bytes each, and a flag
    static constexpr int kHeads = kReduce + kWarps * 6 + 2;    // per head: see Head
    static constexpr int kHeadStats = 6;
    static int floats(int group, int rank, int keptLogits) {
        return kHeads + group * (kHeadStats + rank) + rank + group * keptLogits;
    }
};

// What a block finds out about the slots of its head.
struct Choice {
    unsigned long long victim;  // (score, ~index) of the lowest score among those that compete
    int free;                   // first slot that holds nothing or something that leaves by position
    int leaving;                // first slot that leaves by position
    int leavers;                // how many do
    int stayers;                // how many may stay
};

__device__ __forceinline__ Choice combined(Choice const& a, Choice const& b) {
    return {min(a.victim, b.victim), min(a.free, b.free), min(a.leaving, b.leaving), a.leavers + b.leavers,
            a.stayers + b.stayers};
}

// To be called once: the scratch is not protected from another use.
__device__ __forceinline__ Choice blockCombined(Choice mine, Choice* scratch) {
    mine = {warpMin(mine.victim), warpMin(mine.free), warpMin(mine.leaving), warpSum(mine.leavers),
            warpSum(mine.stayers)};
    int const tid = threadIdx.x;
    if (tid % kWarpSize == 0) scratch[tid / kWarpSize] = mine;
    __syncthreads();
    Choice all = scratch[0];
    for (int w = 1; w < kWarps; ++w) all = combined(all, scratch[w]);
    return all;
}

}  // namespace less
