// One decode step (T = 1) of a layer in one launch: grid (blocks per head, Hk, B).
//
// Each block reads its splits of a KV head's slots once, for all query heads of the group. The block that finishes last
// merges the splits in order, adds the new token and the low-rank term, updates the scores, chooses which token leaves,
// absorbs it into H and z while reading H for the output (means of 16 bits: afterwards, as they are rounded together),
// and stores the new token. S is the type of the slots. With Turns, for a layer with a largest distance, the slots'
// keys are rotated as they are read; the new token and its queries are at distance 0, which leaves them as they are.
#pragma once

#include "decode_attend.cuh"
#include "decode_merge.cuh"
#include "decode_settle.cuh"

namespace less {

template <class S, int LPR, int GT, bool Turns>
__global__ void __launch_bounds__(kThreads, GT > 4 ? 2 : 4) decodeKernel(DecodeParams const p) {
    using Block = DecodeBlock<S, LPR, GT>;
    LESS_SHARED_MEMORY(raw);
    Block const block(p, raw);
    int const D = block.D;
    if (p.t.newLength[blockIdx.z] <= 0) {  // parked: the state does not change
        auto const out = block.elements(p.t.out, static_cast<long>(block.G) * D);
        for (int x = threadIdx.x; blockIdx.x == 0 && x < block.G * D; x += kThreads) out.set(x, 0.f);
        return;
    }
    auto const centring =
        Centring<S>::of(p.t, static_cast<int>(blockIdx.y), D).copied(block.shared.centring, Block::kWidth, D);
    SplitAttention<S, LPR, GT, Turns> const attention(block, centring);
    int const first = static_cast<int>(blockIdx.x) * p.splitsPerBlock;
    for (int split = first; split < min(p.splits, first + p.splitsPerBlock); ++split) attention.attend(split);
    if (gridDim.x > 1) {
        if (!lastToArrive(p.counters + block.head, gridDim.x, block.shared.last)) return;
    } else if (!block.direct()) {
        __syncthreads();
    }
    weigh(block);
    __syncthreads();
    Settling<S, LPR, GT> const settling(block);
    Moves const moves = settling.choose();
    settling.writeOutput(moves);
    settling.absorbRest(moves);
    __syncthreads();
    settling.store(moves, centring);
}

}  // namespace less
