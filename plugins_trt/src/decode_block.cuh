// Parameters of the decode kernel, the layout of its shared memory, and what a block determines about its slots.
#pragma once

#include "rotary.cuh"
#include "rules.cuh"
#include "state.cuh"

namespace less {

struct DecodeParams {
    AttentionRules rules;
    AttentionShape shape;
    AttentionTensors t;
    int splits;
    float* logits;       // [B,Hk,G,C]; nullptr: they are in shared memory
    float* partials;     // [B,Hk,splits,G,D+2] accumulator, maximum, sum; nullptr for one split and one tile of heads
    uint32_t* counters;  // [B*Hk], used if splits > 1
};

// Shared memory of a block, in floats.
template <class S, int LPR, int GT>
struct DecodeLayout {
    static constexpr int kWidth = LPR * 8;                     // D, rounded up
    static constexpr int kAcc = 0;                             // [kWarps][GT][kWidth]
    static constexpr int kPeak = kAcc + kWarps * GT * kWidth;  // [kWarps][GT]
    static constexpr int kMass = kPeak + kWarps * GT;          // [kWarps][GT]
    static constexpr int kCentring = kMass + kWarps * GT;      // [2][kWidth], with int8 slots
    static constexpr int kReduce =
        kCentring + (kCoded<S> ? 2 * kWidth : 0);            // Choice[kWarps], 24 bytes each, and a flag
    static constexpr int kHeads = kReduce + kWarps * 6 + 2;  // per head: kHeadStats, then weights of H
    static constexpr int kHeadStats = 6;
    static int floats(int group, int rank, int logits) {
        return kHeads + group * (kHeadStats + rank) + rank + group * logits;
    }
};

// Moves the means to those after a step at position `past` in which the slots c in [first, end) with leaves(c) lose
// their tokens; called by all threads. W is D, rounded up.
template <int W, class S, class Leaves>
__device__ __forceinline__ void absorbInMeans(Means const& means, SlotRows<S> const& values, int first, int end,
                                              Leaves const& leaves, int past) {
    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    for (int r = warp; r < means.R; r += kWarps) {
        float total[W / kWarpSize] = {}, mass = 0.f;
        for (int c = first; c < end; ++c) {
            if (!leaves(c)) continue;
            int8_t const* const codes = means.psiOf(c);
            float const share = shareOf(codes[r], warpCodeSum(codes, means.R));
            mass += share;
#pragma unroll
            for (int i = 0; i < W / kWarpSize; ++i) {
                int const d = lane + i * kWarpSize;
                if (d < means.D) total[i] += share * values.at(c, d);
            }
        }
        means.absorb<W>(r, mass, [&](int i) { return total[i]; }, past);
    }
}

// What a block determines about the slots of its head.
struct Choice {
    unsigned long long victim;  // (score, ~index) of the lowest score among those that compete
    int free;                   // first slot that is empty or whose token leaves by position
    int leaving;                // first slot whose token leaves by position
    int leavers;                // number of those
    int stayers;                // number of tokens that may stay
};

__device__ __forceinline__ Choice combined(Choice const& a, Choice const& b) {
    return {min(a.victim, b.victim), min(a.free, b.free), min(a.leaving, b.leaving), a.leavers + b.leavers,
            a.stayers + b.stayers};
}

// Call this only once: nothing protects the scratch memory from being overwritten.
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
