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

template <class S, int LPR, int GT>
struct Settling {
    using Block = DecodeBlock<S, LPR, GT>;
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

    // The score of a slot after this step.
    __device__ __forceinline__ float scoreOf(int c) const {
        float score = 0.f;  // of this step alone, so that adding it to the long-running sum rounds once
        for (int g = 0; g < G; ++g) {
            HeadWeights const& head = block.arrays().heads[g];
            score += expDifference(block.logit(g, c), head.exactPeak) * head.exactScale;
        }
        if (rules.policy == Policy::kH2O) score += slotScores[c] * rules.decay;
        return score;
    }

    // Updates the scores and chooses which token leaves.
    __device__ __forceinline__ Moves choose() const {
        bool const scores = keepsScores(rules);
        Choice choice{~0ull, C, C, 0, 0};
        for (int c = tid; c < C; c += kThreads) {
            int const position = block.positions[c];
            bool const stays = mayStay(rules, position, next);
            if (position < 0 || !stays) choice.free = min(choice.free, c);
            if (position >= 0 && !stays) {
                choice.leaving = min(choice.leaving, c);
                ++choice.leavers;
            }
            if (scores && position >= 0) {
                float const score = scoreOf(c);
                slotScores[c] = score;
                if (stays) {
                    unsigned long long const rank = rankOf(rules, position, score, next);
                    choice.victim = min(choice.victim, rank << 32 | (0xffffffffu - static_cast<unsigned>(c)));
                }
            }
            choice.stayers += stays;
        }
        choice = blockCombined(choice, block.shared.choices);
        // With the new token there is one too many: the lowest score leaves, of equal scores the higher index.
        bool const evict = scores && choice.stayers == C;
        int const victim = evict ? static_cast<int>(0xffffffffu - static_cast<unsigned>(choice.victim)) : C;
        return {min(choice.free, victim), victim, min(choice.leaving, victim), choice.leavers};
    }

    // The sums of the slots of a head, in column d.
    __device__ __forceinline__ float slotSum(int g, int tile, int d) const {
        if (block.direct()) return block.shared.sums[0][g][d];
        float sum = 0.f;
        for (int s = 0; s < block.p.splits; ++s) {
            sum += block.arrays().factors[(tile + g) * block.p.splits + s] * __ldcg(block.sumsOf(s, tile + g) + d);
        }
        return sum;
    }

    // Writes the output; the same pass absorbs the first leaver into sums H and z.
    __device__ __forceinline__ void writeOutput(Moves const& moves) const {
        bool const absorbs = rules.absorb && !inMeans && moves.leaver < C;
        auto const out = block.elements(block.p.t.out, static_cast<long>(G) * D);
        auto const newValue = block.elements(block.p.t.v, D);
        float *const leaverPsi = block.arrays().leaverPsi, *const z = means.z;
        for (int r = tid; r < R; r += kThreads)
            leaverPsi[r] = absorbs ? psis[static_cast<long>(moves.leaver) * R + r] : 0.f;
        __syncthreads();
        if (absorbs) {
            for (int r = tid; r < R; r += kThreads) z[r] += leaverPsi[r];
        }
        for (int tile = 0; tile < G; tile += GT) {
            bool const update = absorbs && tile + GT >= G;
            for (int d = tid; d < D; d += kThreads) {
                float result[GT];
                float const newElement = newValue[d];
                float const leaverValue = update ? block.values.at(moves.leaver, d) : 0.f;
#pragma unroll
                for (int g = 0; g < GT; ++g) {
                    result[g] = 0.f;
                    if (tile + g >= G) continue;
                    HeadWeights const& head = block.arrays().heads[tile + g];
                    result[g] = slotSum(g, tile, d) * head.oldWeight + newElement * head.newWeight;
                }
                auto const addFeatures = [&](auto const& element) {
#pragma unroll 8
                    for (int r = 0; r < R; ++r) {
                        float const x = element(r);
#pragma unroll
                        for (int g = 0; g < GT; ++g) {
                            if (tile + g < G) result[g] += block.arrays().lowWeights[(tile + g) * R + r] * x;
                        }
                    }
                };
                if (inMeans) {
                    addFeatures([&](int r) { return means.code(r, d); });
                } else if (rules.absorb) {
                    addFeatures([&](int r) {
                        float const sum = h[r * D + d];
                        if (update) h[r * D + d] = sum + leaverPsi[r] * leaverValue;
                        return sum;
                    });
                }
#pragma unroll
                for (int g = 0; g < GT; ++g) {
                    if (tile + g < G) out.set((tile + g) * D + d, result[g]);
                }
            }
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
    __device__ __forceinline__ void store(Moves const& moves, Centring<S> const& centring) const {
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
