// Prefill (T > 1): what its kernels share.
#pragma once

#include "rotary.cuh"
#include "rules.cuh"
#include "state.cuh"
#include "tiles.cuh"

namespace less {

struct PrefillParams {
    AttentionRules rules;
    AttentionShape shape;
    AttentionTensors t;
    float* peaks;     // [B,Hq,T] maximum logit of each query over slots and chunk
    float* scales;    // [B,Hq,T] 1 / sum of exp(logit - maximum) over those
    float* logits;    // of a short chunk instead of these: see short_chunk.cuh
    float* gained;    // [B,Hq,C+T] score from this chunk
    int* fates;       // [B,Hk,C+T] what happens to each token, see settle.cuh
    int* freed;       // [B,Hk,C] slots to fill
    float* rounding;  // [B,Hk,T] scales of values of the chunk that are absorbed as int8 slots would hold them
    int8_t* psis;     // [B,Hk,T,R] codes of psi of the chunk, with a state of 16 bits
    float* psiSums;   // [B,Hk,C+T] their sums, and those of tokens that leave their slots
    void* turned;     // T [kParts,B,Hq,T,D] rotated queries in parts, with a largest distance
};

__host__ __device__ __forceinline__ bool coded(PrefillParams const& p) { return p.shape.slotType == SlotType::kInt8; }

__host__ __device__ __forceinline__ bool turns(PrefillParams const& p) { return p.rules.maxDistance > 0; }

// The queries of a head that tensor cores multiply, [T,D]: as they are given, or a part of what turnKernel made of
// them.
template <class T>
__device__ __forceinline__ T* queriesOf(PrefillParams const& p, int part, long queryHead) {
    AttentionShape const& s = p.shape;
    long const rows = static_cast<long>(s.batch) * s.queryHeads * part + queryHead;
    void* const all = turns(p) ? p.turned : const_cast<void*>(p.t.q);
    return static_cast<T*>(all) + rows * s.chunk * s.headDim;
}

// Rows of the compute dtype of a head: tokens, or keys in slots.
template <class T>
__device__ __forceinline__ Rows<T> plainRows(PrefillParams const& p, void const* tensor, long head, int count) {
    return {SlotRows<T>(const_cast<void*>(tensor), nullptr, head, count, p.shape.headDim), {nullptr, nullptr}};
}

// The keys in the int8 slots of a KV head of the state.
__device__ __forceinline__ Rows<int8_t> codedKeys(PrefillParams const& p, long head) {
    int const D = p.shape.headDim;
    return {SlotRows<int8_t>(p.t.presentKey, p.t.presentKeyScale, head, p.shape.slots, D),
            Centring<int8_t>::of(p.t, static_cast<int>(head % p.shape.kvHeads), D)};
}

// The query head of a block in a grid (any, Hq, B).
__device__ __forceinline__ long queryHeadOf(PrefillParams const& p) {
    return static_cast<long>(blockIdx.z) * p.shape.queryHeads + blockIdx.y;
}

// A KV head of the step, and what a kernel that settles the chunk knows of it.
struct ChunkHead {
    int kvHead, past, count;  // count: valid tokens of the chunk
    long head, stateHead;     // of the step, and of the state, which may have other rows
    int* fates;               // [C+T]

    __device__ __forceinline__ static ChunkHead of(PrefillParams const& p, int kvHead, int batch) {
        long const head = static_cast<long>(batch) * p.shape.kvHeads + kvHead;
        return {kvHead, p.t.pastLength[batch],           min(p.t.newLength[batch], p.shape.chunk),
                head,   stateHeadOf(p.t, p.shape, head), p.fates + head * (p.shape.slots + p.shape.chunk)};
    }
};

// Position of a tile within [slots, chunk]. No tile spans both.
struct Source {
    bool chunk;
    int base, length;
};
__device__ __forceinline__ Source sourceOf(int tile, int slotTiles, int rows, int slots, int chunk) {
    return tile < slotTiles ? Source{false, tile * rows, slots} : Source{true, (tile - slotTiles) * rows, chunk};
}

}  // namespace less
