// Prefill of a short chunk, of at most one tile of queries: two kernels instead of up to eight, because there is little
// work for each.
//
// shortAttendKernel: grid (1, Hq, B), turns the queries, attends, and sums the scores. It keeps the logits of attention
// for that. For longer chunks, scoreKernel multiplies again: a logit takes 2 D operations, but 8 bytes to write and
// read. With D = 128 and nominal figures of the GPUs (computed, not measured), that is 0.26 ps against 2.4 ps on an
// H100 (989 TFLOP/s, 3.35 TB/s) and 3.6 ps against 8.5 ps on an RTX 3090 (71 TFLOP/s with sums in float32, 936 GB/s).
// The logits of a short chunk stay in the L2 cache, which kMostKeptBytes sees to, and keys in int8 or to be turned are
// converted only once.
// shortSettleKernel: grid (Hk, B), everything after that.
#pragma once

#include <algorithm>

#include "attend.cuh"
#include "settle.cuh"

namespace less {

// ---- attention and scores

// The logits that make up the scores: of all queries of a head or, with tova, of the last one.
// [B,Hq,queries,width] in the workspace, the slots in columns of their own up to a multiple of 64, then the chunk.
struct KeptLogits {
    __host__ __device__ __forceinline__ static int queriesOf(AttentionShape const& s, AttentionRules const& rules) {
        return rules.policy == Policy::kTova ? 1 : s.chunk;
    }
    __host__ __device__ __forceinline__ static int widthOf(AttentionShape const& s) {
        return (tilesOf(s.slots) + tilesOf(s.chunk)) * kTileRows;
    }
    __device__ __forceinline__ static int columnOf(AttentionShape const& s, bool ofChunk, int index) {
        return ofChunk ? tilesOf(s.slots) * kTileRows + index : index;
    }
    static size_t bytesOfRow(AttentionShape const& s, AttentionRules const& rules) {
        if (!keepsScores(rules)) return 0;
        return static_cast<size_t>(s.queryHeads) * queriesOf(s, rules) * widthOf(s) * sizeof(float);
    }
    // The first query of the chunk whose logits are kept.
    __device__ __forceinline__ static int firstOf(AttentionRules const& rules, int count) {
        return rules.policy == Policy::kTova ? count - 1 : 0;
    }
    __device__ __forceinline__ static float* row(PrefillParams const& p, int query, int count) {
        long const above = queryHeadOf(p) * queriesOf(p.shape, p.rules) + query - firstOf(p.rules, count);
        return p.logits + above * widthOf(p.shape);
    }
};

// Most bytes of logits that a row keeps, in the workspace.
constexpr size_t kMostKeptBytes = size_t{4} << 20;

// T and the layer decide, not how many tokens of a row are valid, which the host does not know, nor the batch.
inline bool isShort(AttentionShape const& s, AttentionRules const& rules) {
    return s.chunk <= std::min(kTileRows, longestShortChunk()) && KeptLogits::bytesOfRow(s, rules) <= kMostKeptBytes;
}

// What a query adds to the score of a key: share * exp(logit - peak).
struct QueryShare {
    float peak, share;
};

// What the scores need of attention.
struct KeptScores {
    PrefillParams const& p;
    int count;           // valid tokens of the chunk
    QueryShare* shares;  // [64] of the queries

    // Computes the addresses anew each time, for the sake of registers.
    template <int N>
    __device__ __forceinline__ void keepLogits(float const (&s)[N / 8][4], Source const& from, int low, int t) const {
        if (!keepsScores(p.rules)) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int const query = opaque(low) + r * 8;
            if (query < KeptLogits::firstOf(p.rules, count) || query >= count) continue;
            float* const row =
                KeptLogits::row(p, query, count) + KeptLogits::columnOf(p.shape, from.chunk, from.base) + t * 2;
#pragma unroll
            for (int i = 0; i < N / 8; ++i)
                *reinterpret_cast<float2*>(row + i * 8) = make_float2(s[i][2 * r], s[i][2 * r + 1]);
        }
    }
    __device__ __forceinline__ void keepSoftmax(int query, float peak, float mass) const {
        shares[query] = {peak, fadedBy(p.rules, count - 1 - query) / mass};
    }
    // Sums the scores of all keys over the queries, in their order; called by all threads.
    __device__ __forceinline__ void sum() const {
        int const C = p.shape.slots, first = KeptLogits::firstOf(p.rules, count), width = KeptLogits::widthOf(p.shape);
        float* const gained = p.gained + queryHeadOf(p) * (C + p.shape.chunk);
        float const* const logits = KeptLogits::row(p, first, count);
        for (int n = threadIdx.x; n < C + count; n += kThreads) {
            float const* const column = logits + KeptLogits::columnOf(p.shape, n >= C, n < C ? n : n - C);
            float sum = 0.f;
#pragma unroll 8
            for (int query = first; query < count; ++query) {
                float const logit = column[static_cast<long>(query - first) * width];
                sum += expDifference(logit, shares[query].peak) * shares[query].share;
            }
            gained[n] = sum;
        }
    }
};

template <class T, int W>
struct ShortShared {
    AttendShared<T, W> tiles;
    QueryShare shares[kTileRows];
};

template <class T, int W, bool Turns>
__global__ void __launch_bounds__(kThreads) shortAttendKernel(PrefillParams const p) {
    LESS_SHARED_MEMORY(raw);
    auto& shared = *reinterpret_cast<ShortShared<T, W>*>(raw);
    int const batch = blockIdx.z, count = min(p.t.newLength[batch], p.shape.chunk);
    if (Turns && turns(p)) {
        turnQueries<T>(p, 0);
        __syncthreads();
    }
    KeptScores const kept{p, count, shared.shares};
    attendQueries<T, W, Turns>(p, shared.tiles, 0, kept);
    if (!keepsScores(p.rules) || count <= 0) return;
    __syncthreads();
    kept.sum();
}

// ---- the rest

inline size_t shortSettleBytes(int D) {
    size_t const select = kSelectInts * sizeof(int), absorb = absorbBytes(D);
    return select > absorb ? select : absorb;
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 2) shortSettleKernel(PrefillParams const p) {
    LESS_SHARED_MEMORY(raw);
    ChunkHead const h = ChunkHead::of(p, blockIdx.x, blockIdx.y);
    if (h.count <= 0) return;  // parked
    selectTokens(p, h, reinterpret_cast<int*>(raw));
    __syncthreads();  // all fates are known
    if (p.rules.absorb) {
        if constexpr (kCoded<S>) {
            measureTile<T>(p, h, 0);
            if (keepsMeans(p.shape)) {
                for (int tile = 0; tile <= tilesOf(p.shape.slots); ++tile) roundPsiTile(p, h, tile);
            }
            __syncthreads();
        }
        for (int first = 0; first < p.shape.rank; first += kFeatures)
            absorbInto<T, S>(p, h, first, reinterpret_cast<float*>(raw));
    }
    // The values of tokens that leave have been read: absorbInto has barriers behind that.
    placeTile<T, S>(p, h, 0);
}

}  // namespace less
