// Prefill (T > 1): decides which tokens keep a slot, and updates scores and positions.
//
// selectKernel: grid (Hk, B).
#pragma once

#include "prefill.cuh"

namespace less {

// What happens to a token of [slots, chunk]: the slot number for a new token that stays, or one of these.
constexpr int kRests = -1;   // nothing to do: the token stays in its slot, or there is no token
constexpr int kLeaves = -2;  // the token loses its slot, or gets none

constexpr int kBins = 256;

// The number of threads before this one in the block whose `mine` is true, and the number in the whole block.
struct Standing {
    int before, total;
};
__device__ __forceinline__ Standing blockStanding(bool mine, int* scratch) {
    int const tid = threadIdx.x, warp = tid / kWarpSize, lane = tid % kWarpSize;
    unsigned const votes = __ballot_sync(~0u, mine);
    __syncthreads();  // other threads may still read the scratch memory
    if (lane == 0) scratch[warp] = __popc(votes);
    __syncthreads();
    Standing standing{__popc(votes & ((1u << lane) - 1u)), 0};
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) standing.before += scratch[w];
        standing.total += scratch[w];
    }
    return standing;
}

// The tokens of one KV head, slots first.
struct Candidates {
    AttentionRules rules;
    int const* positions;  // [C]
    float const* scores;   // [C + T], final
    int slots, past, end;

    __device__ __forceinline__ int position(int n) const { return n < slots ? positions[n] : past + n - slots; }
    __device__ __forceinline__ bool stays(int n) const { return mayStay(rules, position(n), end); }
    __device__ __forceinline__ uint32_t rank(int n) const { return rankOf(rules, position(n), scores[n], end); }
};

// The rank of the `wanted`-th best of the tokens that may stay, and how many tokens of exactly that rank are among the
// best `wanted`.
struct Threshold {
    uint32_t rank;
    int ties;
};

constexpr int kSelectInts = kBins + 2;

// Radix selection, one byte at a time, most significant first. `scratch` has kSelectInts ints.
__device__ __forceinline__ Threshold thresholdOf(Candidates const& candidates, int count, int wanted, int* scratch) {
    int const tid = threadIdx.x;
    int* const bins = scratch;
    int* const selected = scratch + kBins;  // the bin, and how many tokens to take from it
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int b = tid; b < kBins; b += kThreads) bins[b] = 0;
        __syncthreads();
        for (int n = tid; n < count; n += kThreads) {
            if (!candidates.stays(n)) continue;
            uint32_t const rank = candidates.rank(n);
            if ((rank & mask) == prefix) atomicAdd(&bins[rank >> shift & 0xffu], 1);
        }
        __syncthreads();
        if (tid < kWarpSize) {  // lane i owns the i-th eight bins from the top
            constexpr int kPerLane = kBins / kWarpSize;
            int const top = kBins - 1 - tid * kPerLane;
            int own = 0;
            for (int b = 0; b < kPerLane; ++b) own += bins[top - b];
            int above = own;  // inclusive prefix sum over the lanes
            for (int offset = 1; offset < kWarpSize; offset *= 2) {
                int const other = __shfl_sync(~0u, above, max(tid - offset, 0));
                if (tid >= offset) above += other;
            }
            above -= own;
            if (above < wanted && above + own >= wanted) {
                int b = 0;
                for (; above + bins[top - b] < wanted; ++b) above += bins[top - b];
                selected[0] = top - b;
                selected[1] = wanted - above;
            }
        }
        __syncthreads();
        prefix |= static_cast<uint32_t>(selected[0]) << shift;
        mask |= 0xffu << shift;
        wanted = selected[1];
    }
    return {prefix, wanted};
}

// Decides for the tokens of a head; called by all threads. `scratch` has kSelectInts ints.
__device__ __forceinline__ void selectTokens(PrefillParams const& p, ChunkHead const& h, int* scratch) {
    int const tid = threadIdx.x, C = p.shape.slots, chunk = p.shape.chunk, count = h.count, past = h.past;
    if (count <= 0) return;  // parked: the state does not change
    int* const positions = p.t.presentPosition + h.stateHead * C;
    float* const slotScores = p.t.presentScore + h.stateHead * C;
    int const G = p.shape.queryHeads / p.shape.kvHeads;
    float* const scores = p.gained + h.head * G * (C + chunk);  // of the group's first head, later of the whole group
    int* const fates = h.fates;
    int* const freed = p.freed + h.head * C;
    Candidates const candidates{p.rules, positions, scores, C, past, past + count};
    bool const scored = keepsScores(p.rules);
    float const left = fadedBy(p.rules, count);

    // Final scores, and the number of tokens whose position allows them to stay.
    int staying = 0;
    for (int n = tid; n < C + count; n += kThreads) {
        bool const held = candidates.position(n) >= 0;
        if (scored && held) {
            for (int g = 1; g < G; ++g) scores[n] += scores[g * (C + chunk) + n];
            if (n < C && p.rules.policy == Policy::kH2O) scores[n] += slotScores[n] * left;
            if (n < C) slotScores[n] = scores[n];
        }
        staying += candidates.stays(n);
    }
    staying = warpSum(staying);
    if (tid % kWarpSize == 0) scratch[tid / kWarpSize] = staying;
    __syncthreads();
    staying = 0;
    for (int w = 0; w < kWarps; ++w) staying += scratch[w];

    bool const crowded = scored && staying > C;
    Threshold threshold{0, 0};
    if (crowded) threshold = thresholdOf(candidates, C + count, C, scratch);

    int ties = 0, free = 0, arrived = 0;
    for (int base = 0; base < C; base += kThreads) {
        int const n = base + tid;
        bool const stays = n < C && candidates.stays(n), held = n < C && positions[n] >= 0;
        uint32_t const rank = crowded && stays ? candidates.rank(n) : 0;
        Standing const equal = blockStanding(crowded && stays && rank == threshold.rank, scratch);
        bool const keepsSlot = stays && (!crowded || rank > threshold.rank ||
                                         (rank == threshold.rank && ties + equal.before < threshold.ties));
        ties += equal.total;
        Standing const open = blockStanding(n < C && !keepsSlot, scratch);
        if (n < C) {
            fates[n] = held && !keepsSlot ? kLeaves : kRests;
            if (!keepsSlot) {
                freed[free + open.before] = n;
                positions[n] = -1;
            }
        }
        free += open.total;
    }
    for (int base = 0; base < count; base += kThreads) {
        int const i = base + tid, n = C + i;
        bool const stays = i < count && candidates.stays(n);
        uint32_t const rank = crowded && stays ? candidates.rank(n) : 0;
        Standing const equal = blockStanding(crowded && stays && rank == threshold.rank, scratch);
        bool const keepsSlot = stays && (!crowded || rank > threshold.rank ||
                                         (rank == threshold.rank && ties + equal.before < threshold.ties));
        ties += equal.total;
        Standing const arrival = blockStanding(keepsSlot, scratch);
        if (i < count) {
            int const turn = arrived + arrival.before;
            // The callers refuse policy full with more tokens than slots.
            fates[n] = !keepsSlot ? kLeaves : turn < free ? freed[turn] : kRests;
            if (fates[n] >= 0) {
                positions[fates[n]] = past + i;
                slotScores[fates[n]] = scored ? scores[n] : 0.f;
            }
        }
        arrived += arrival.total;
    }
}

static __global__ void __launch_bounds__(kThreads) selectKernel(PrefillParams const p) {
    LESS_SHARED_MEMORY(raw);
    selectTokens(p, ChunkHead::of(p, blockIdx.x, blockIdx.y), reinterpret_cast<int*>(raw));
}

}  // namespace less
