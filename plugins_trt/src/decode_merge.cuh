// Decode: the weights of everything that a query sees: the splits, the new token, and the low-rank term.
#pragma once

#include "decode_block.cuh"

namespace less {

// The softmax of a head over all slots; called by all lanes of a warp. Also writes the factors of its splits.
template <class Block>
__device__ __forceinline__ Softmax mergeSplits(Block const& block, int g) {
    int const lane = threadIdx.x % kWarpSize, parts = block.direct() ? Block::Shared::kParts : block.p.splits;
    Softmax part{-kInfinity, 0.f};
    if (lane < parts && block.direct()) {
        part = block.shared.softmaxes[lane][g];
    } else if (lane < parts) {
        float2 const stored = __ldcg(block.softmaxOf(lane, g));
        part = {stored.x, stored.y};
    }
    float const top = warpMax(part.peak), factor = expDifference(part.peak, top);
    if (lane < parts && !block.direct()) block.arrays().factors[g * parts + lane] = factor;
    return {top, warpSum(factor * part.mass)};
}

// The logit of the new token; called by all lanes of a warp.
template <class Block>
__device__ __forceinline__ float newLogitOf(Block const& block, int g) {
    int const D = block.D;
    auto const q = block.elements(block.p.t.q, static_cast<long>(block.G) * D), newKey = block.elements(block.p.t.k, D);
    float dot = 0.f;
    for (int d = threadIdx.x % kWarpSize; d < D; d += kWarpSize) dot += q[g * D + d] * newKey[d];
    return warpSum(dot) * block.p.rules.scale;
}

// The low-rank term of a head, a feature at a time: exp(log phi) z is its part of the sum of weights.
template <class Block>
struct LowRank {
    Block const& block;
    Means const means;
    bool const inMeans;
    float const* const logPhi;  // [R]
    float* const weights;       // [R] of H
    int const lane;

    __device__ __forceinline__ LowRank(Block const& of, int g)
        : block(of),
          means(Means::of(of.p.t, of.stateHead, of.p.shape)),
          inMeans(keepsMeans<typename Block::Slot>(of.p.shape)),
          logPhi(of.p.t.logPhiQ + (of.head * of.G + g) * of.R),
          weights(of.arrays().lowWeights + g * of.R),
          lane(threadIdx.x % kWarpSize) {}

    // The largest log of a part.
    __device__ __forceinline__ float peak() const {
        float low = -kInfinity;
        for (int r = lane; r < block.R; r += kWarpSize) {
            if (means.z[r] > 0.f) low = fmaxf(low, logPhi[r] + __logf(means.z[r]));
        }
        return warpMax(low);
    }
    // The sum of the parts relative to exp(all); writes the weights of H, which are not divided by the sum of all yet.
    __device__ __forceinline__ float total(float all) const {
        float sum = 0.f;
        for (int r = lane; r < block.R; r += kWarpSize) {
            float const mass = means.z[r], part = mass > 0.f ? expDifference(logPhi[r] + __logf(mass), all) : 0.f;
            sum += part;
            float const mean = inMeans ? part * means.scales[r] : part / mass;
            weights[r] = mass > 0.f ? mean : 0.f;
        }
        return warpSum(sum);
    }
    __device__ __forceinline__ void normalise(float norm) const {
        for (int r = lane; r < block.R; r += kWarpSize) weights[r] *= norm;  // written by the same lane
    }
};

// The weights of all heads, one warp per head; called by all threads.
template <class Block>
__device__ __forceinline__ void weigh(Block const& block) {
    bool const absorb = block.p.rules.absorb != 0;
    for (int g = threadIdx.x / kWarpSize; g < block.G; g += kWarps) {
        Softmax const slots = mergeSplits(block, g);
        float const newLogit = newLogitOf(block, g);
        float const exact = fmaxf(slots.peak, newLogit);
        float const exactTotal = slots.mass * expDifference(slots.peak, exact) + __expf(newLogit - exact);
        LowRank<Block> const lowRank(block, g);
        float const low = absorb ? lowRank.peak() : -kInfinity;
        float const all = fmaxf(exact, low);
        float const lowTotal = absorb ? lowRank.total(all) : 0.f;
        float const norm = 1.f / (exactTotal * __expf(exact - all) + lowTotal);
        if (absorb) lowRank.normalise(norm);
        if (threadIdx.x % kWarpSize == 0) {
            block.arrays().heads[g] = {exact, 1.f / exactTotal, expDifference(slots.peak, all) * norm,
                                       __expf(newLogit - all) * norm, __expf(newLogit - exact) / exactTotal};
        }
    }
}

}  // namespace less
