// Decode: scores, which token leaves, the output, and the state after the step.
#pragma once

#include "decode_block.cuh"

namespace less {

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

// What the step does to the slots.
struct Moves {
    int target;   // where the new token goes; C: nowhere
    int victim;   // the slot that loses its token by score, or C
    int leaver;   // the first slot that loses its token, or C
    int leavers;  // slots whose token leaves by position
};

template <class Block>
struct Settling {
    using S = typename Block::Slot;
    static constexpr int kAhead = 2;  // slots in flight per thread
    Block const& block;
    AttentionRules const& rules;
    int const tid, next;  // position of the next query
    int const G, C, D, R;
    float* const slotScores;
    Elements<typename Block::T> const psis;
    Means const means;
    bool const inMeans;
    float* const h;  // [R,D]

    __device__ __forceinline__ explicit Settling(Block const& of)
        : block(of),
          rules(of.p.rules),
          tid(threadIdx.x),
          next(of.now + 1),
          G(of.G),
          C(of.C),
          D(of.D),
          R(of.R),
          slotScores(of.p.t.presentScore + of.stateHead * of.C),
          psis(of.slotPsi()),
          means(Means::of(of.p.t, of.stateHead, of.p.shape)),
          inMeans(keepsMeans<S>(of.p.shape)),
          h(static_cast<float*>(of.p.t.presentH) + of.stateHead * of.R * of.D) {}

    // The scores after this step of the slots first + u * kThreads that exist; without a token, anything.
    __device__ __forceinline__ void findScores(int first, float (&score)[kAhead]) const {
        float before[kAhead];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            bool const old = rules.policy == Policy::kH2O && first + u * kThreads < C;
            before[u] = old ? slotScores[first + u * kThreads] * rules.decay : 0.f;
            score[u] = 0.f;  // of this step alone, so that adding it to the long-running sum rounds once
        }
#pragma unroll 2
        for (int g = 0; g < G; ++g) {
            HeadWeights const& head = block.arrays().heads[g];
            float logit[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u)
                logit[u] = first + u * kThreads < C ? block.logit(g, first + u * kThreads) : -kInfinity;
#pragma unroll
            for (int u = 0; u < kAhead; ++u) score[u] += expDifference(logit[u], head.exactPeak) * head.exactScale;
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) score[u] += before[u];
    }

    // Updates the scores and chooses which token leaves.
    __device__ __forceinline__ Moves choose() const {
        bool const scores = keepsScores(rules);
        Choice choice{~0ull, C, C, 0, 0};
        for (int first = tid; first < C; first += kAhead * kThreads) {
            int positions[kAhead];
            float score[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u)
                positions[u] = first + u * kThreads < C ? block.positions[first + u * kThreads] : -1;
            if (scores) findScores(first, score);
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                int const c = first + u * kThreads, position = positions[u];
                if (c >= C) break;
                bool const stays = mayStay(rules, position, next);
                if (position < 0 || !stays) choice.free = min(choice.free, c);
                if (position >= 0 && !stays) {
                    choice.leaving = min(choice.leaving, c);
                    ++choice.leavers;
                }
                if (scores && position >= 0) {
                    slotScores[c] = score[u];
                    if (stays) {
                        unsigned long long const rank = rankOf(rules, position, score[u], next);
                        choice.victim = min(choice.victim, rank << 32 | (0xffffffffu - static_cast<unsigned>(c)));
                    }
                }
                choice.stayers += stays;
            }
        }
        choice = blockCombined(choice, block.shared.choices);
        // With the new token there is one too many: the lowest score leaves, of equal scores the higher index.
        bool const evict = scores && choice.stayers == C;
        int const victim = evict ? static_cast<int>(0xffffffffu - static_cast<unsigned>(choice.victim)) : C;
        return {min(choice.free, victim), victim, min(choice.leaving, victim), choice.leavers};
    }

    // The sums of the slots of a head, in four columns.
    __device__ __forceinline__ float4 slotSums(int g, int d) const {
        if (block.direct()) return *reinterpret_cast<float4 const*>(block.onlySums + g * Block::kWidth + d);
        float4 sum{};
        float const* const factors = block.arrays().factors + g * block.p.splits;
#pragma unroll 4
        for (int s = 0; s < block.p.splits; ++s) {
            float const factor = factors[s];
            float4 const part = loadPublished(block.sumsOf(s, g) + d);
            sum = {sum.x + factor * part.x, sum.y + factor * part.y, sum.z + factor * part.z, sum.w + factor * part.w};
        }
        return sum;
    }

    // Adds the low-rank term of a head in four columns.
    __device__ __forceinline__ void addFeatures(int g, int d, float4& result) const {
        float const* const weights = block.arrays().lowWeights + g * R;
        auto const add = [&](auto const& elements) {
#pragma unroll 2  // registers: four at a time spill on sm_90
            for (int r = 0; r < R; ++r) {
                float4 const x = elements(r);
                result.x += weights[r] * x.x;
                result.y += weights[r] * x.y;
                result.z += weights[r] * x.z;
                result.w += weights[r] * x.w;
            }
        };
        if (inMeans) {
            add([&](int r) {
                float2 const low = means.codes(r, d), high = means.codes(r, d + 2);
                return make_float4(low.x, low.y, high.x, high.y);
            });
        } else {
            add([&](int r) { return *reinterpret_cast<float4 const*>(h + r * D + d); });
        }
    }

    // Writes the output, four columns of a head per thread, and absorbs the first leaver into sums H and z.
    __device__ __forceinline__ void writeOutput(Moves const& moves) const {
        bool const absorbs = rules.absorb && !inMeans && moves.leaver < C;
        int const pieces = D / 4;
        auto const out = block.elements(block.p.t.out, static_cast<long>(G) * D);
        auto const newValue = block.elements(block.p.t.v, D);
        for (int x = tid; x < G * pieces; x += kThreads) {
            int const g = x / pieces, d = x % pieces * 4;
            HeadWeights const& head = block.arrays().heads[g];
            float4 result = slotSums(g, d);
            result.x = result.x * head.oldWeight + newValue[d] * head.newWeight;
            result.y = result.y * head.oldWeight + newValue[d + 1] * head.newWeight;
            result.z = result.z * head.oldWeight + newValue[d + 2] * head.newWeight;
            result.w = result.w * head.oldWeight + newValue[d + 3] * head.newWeight;
            if (rules.absorb) addFeatures(g, d, result);
            out.set(g * D + d, result.x);
            out.set(g * D + d + 1, result.y);
            out.set(g * D + d + 2, result.z);
            out.set(g * D + d + 3, result.w);
        }
        if (!absorbs) return;
        __syncthreads();  // H has been read for all heads
        long const leaver = static_cast<long>(moves.leaver) * R;
        for (int x = tid; x < R * pieces; x += kThreads) {
            int const r = x / pieces, d = x % pieces * 4;
            float const psi = psis[leaver + r];
            float4& sum = *reinterpret_cast<float4*>(h + r * D + d);
            sum = {sum.x + psi * block.values.at(moves.leaver, d), sum.y + psi * block.values.at(moves.leaver, d + 1),
                   sum.z + psi * block.values.at(moves.leaver, d + 2),
                   sum.w + psi * block.values.at(moves.leaver, d + 3)};
            if (d == 0) means.z[r] += psi;
        }
    }

    __device__ __forceinline__ bool leavesByPosition(int c) const {
        return block.positions[c] >= 0 && !mayStay(rules, block.positions[c], next);
    }

    // Absorbs what writeOutput has not: into means, which are rounded together, and tokens beyond the first. Several
    // leave at once only if the state was not produced step by step; the sum is the same.
    __device__ __forceinline__ void absorbRest(Moves const& moves) const {
        bool const any = rules.absorb && moves.leaver < C, several = moves.leavers > 1;
        if (any && (inMeans || several)) __syncthreads();  // other threads may still read means, or update H
        if (any && inMeans) {
            auto const leaves = [&](int c) { return c == moves.leaver || leavesByPosition(c); };
            absorbInMeans<Block::kWidth>(means, block.values, moves.leaver, several ? C : moves.leaver + 1, leaves,
                                         block.now);
        } else if (any && several) {
            for (int c = moves.leaver + 1; c < C; ++c) {
                if (!leavesByPosition(c)) continue;
                for (int x = tid; x < R * D; x += kThreads) {
                    h[x] += psis[static_cast<long>(c) * R + x / D] * block.values.at(c, x % D);
                }
                for (int r = tid; r < R; r += kThreads) means.z[r] += psis[static_cast<long>(c) * R + r];
            }
        }
    }

    // Frees the slots of the leavers and stores the new token.
    __device__ __forceinline__ void store(Moves const& moves) const {
        int const warp = tid / kWarpSize, target = moves.target;
        if (moves.leavers > 0) {
            for (int c = tid; c < C; c += kThreads) {
                if (c != target && leavesByPosition(c)) block.positions[c] = -1;
            }
        }
        if (tid == 0 && moves.victim < C && moves.victim != target) block.positions[moves.victim] = -1;
        if (target == C) return;  // policy full with more tokens than slots: the callers refuse this
        auto const newKey = block.elements(block.p.t.k, D), newValue = block.elements(block.p.t.v, D);
        auto const newPsi = block.elements(block.p.t.psiK, R);
        auto const centring = Centring<S>::of(block.p.t, static_cast<int>(blockIdx.y), D);
        if (warp == 0) block.keys.store(target, [&](int d) { return centring.centred(newKey[d], d); });
        if (warp == 1) block.values.store(target, [&](int d) { return newValue[d]; });
        if (inMeans) {
            if (warp == 2) storePsi(means.psiOf(target), [&](int r) { return newPsi[r]; }, R);
        } else {
            for (int r = tid; r < R; r += kThreads) psis.set(static_cast<long>(target) * R + r, newPsi[r]);
        }
        if (tid == 0) {
            float score = 0.f;
            if (keepsScores(rules)) {
                for (int g = 0; g < G; ++g) score += block.arrays().heads[g].newShare;
            }
            slotScores[target] = score;
            block.positions[target] = block.now;
        }
    }
};

}  // namespace less
