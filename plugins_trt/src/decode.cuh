// One decode step (T = 1) of a layer in one launch: grid (blocks per head, Hk, B).
//
// Each block reads its splits of a KV head's slots once, for all query heads of the group, while H and z are on their
// way to the L2 cache. The block that finishes last merges the splits in order, adds the new token and the low-rank
// term, updates the scores, chooses which token leaves, absorbs it into H and z while reading H for the output (means
// of 16 bits: afterwards, as they are rounded together), and stores the new token. S is the type of the slots. With
// Turns, for a layer with a largest distance, the slots' keys are rotated as they are read; the new token and its
// queries are at distance 0, which leaves them as they are.
//
// Models of 16 bits have decodeTilesKernel, which multiplies on tensor cores, those of float32 decodeKernel.
#pragma once

#include "decode_attend.cuh"
#include "decode_merge.cuh"
#include "decode_settle.cuh"
#include "decode_tiles.cuh"

namespace less {

// Whether a row is parked: then its outputs become zero, and the state does not change.
template <class Block>
__device__ __forceinline__ bool parked(Block const& block) {
    if (block.p.t.newLength[blockIdx.z] > 0) return false;
    auto const out = block.elements(block.p.t.out, static_cast<long>(block.G) * block.D);
    for (int x = threadIdx.x; blockIdx.x == 0 && x < block.G * block.D; x += kThreads) out.set(x, 0.f);
    return true;
}

// What is left when the slots have been attended, for the last block of a head.
template <class Block>
__device__ __forceinline__ void finish(Block const& block) {
    if (gridDim.x > 1) {
        if (!lastToArrive(block.p.counters + block.head, gridDim.x, block.shared.last)) return;
    } else {
        __syncthreads();
    }
    weigh(block);
    __syncthreads();
    Settling<Block> const settling(block);
    Moves const moves = settling.choose();
    settling.writeOutput(moves);
    settling.absorbRest(moves);
    __syncthreads();
    settling.store(moves);
}

template <class S, int LPR, int GT, bool Turns>
__global__ void __launch_bounds__(kThreads, GT > 2 || Turns ? 2 : 4) decodeKernel(DecodeParams const p) {
    using Attention = SplitAttention<S, LPR, GT, Turns>;
    LESS_SHARED_MEMORY(raw);
    auto& sums = *reinterpret_cast<typename Attention::Sums*>(raw);
    SplitBlock<S, LPR, GT> const block(p, raw + sizeof sums, sums.sums);
    if (parked(block)) return;
    prefetchRest(block);
    Attention const attention(block, sums);
    int const first = static_cast<int>(blockIdx.x) * p.splitsPerBlock;
    for (int split = first; split < min(p.splits, first + p.splitsPerBlock); ++split) attention.attend(split);
    finish(block);
}

template <class S, int W, int GT, bool Turns>
__global__ void __launch_bounds__(kThreads, tileBlocks(kCoded<S>, W, GT, Turns))
    decodeTilesKernel(DecodeParams const p) {
    using Attention = TileAttention<S, W, GT, Turns>;
    LESS_SHARED_MEMORY(raw);
    auto* const ring = reinterpret_cast<typename Attention::Stage*>(raw);
    TileBlock<S, W, GT, Turns> const block(p, ring + p.stages, ring);
    if (parked(block)) return;
    prefetchRest(block);
    Attention attention(block, ring);
    attention.attend();
    finish(block);
}

}  // namespace less
