// What a block of the decode kernel works on: parameters, shared memory, its KV head, and how blocks wait for one
// another.
//
// The slots of a head are cut into splits, whose size depends on C alone, so that a row's result does not depend on the
// batch. A block reads one split or several, as many as leave enough blocks for the GPU, each with a softmax of its
// own.
#pragma once

#include "rotary.cuh"
#include "rules.cuh"
#include "state.cuh"

namespace less {

constexpr int kMaxSplits = kWarpSize;  // one lane for each when they are merged

// A softmax over a part of the keys: the largest logit, and the sum of exp(logit - peak).
struct Softmax {
    float peak, mass;
};

struct DecodeParams {
    AttentionRules rules;
    AttentionShape shape;
    AttentionTensors t;
    int splits, slotsPerSplit;  // splits * slotsPerSplit >= C
    int splitsPerBlock;
    int stages;          // of the ring, in kernels that have one
    float* logits;       // [B,Hk,G,C]; nullptr: they are in shared memory
    float* sums;         // [B,Hk,splits,G,D] of each split, exp(logit - peak) times value; nullptr: in shared memory
    float2* softmaxes;   // [B,Hk,splits,G] Softmax of each split
    uint32_t* counters;  // [B*Hk], used if several blocks share a head
};

// What a block determines about the slots of its head.
struct Choice {
    unsigned long long victim;  // (score, ~index) of the lowest score among those that compete
    int free;                   // first slot that is empty or whose token leaves by position
    int leaving;                // first slot whose token leaves by position
    int leavers;                // number of those
    int stayers;                // number of tokens that may stay
};

// What becomes of a query head's logits.
struct HeadWeights {
    float exactPeak;   // maximum logit over the slots and the new token
    float exactScale;  // 1 / sum of exp(logit - maximum) over those
    float oldWeight;   // weight of the slots' sums in the output
    float newWeight;   // weight of the new value in the output
    float newShare;    // score of the new token
};

// Shared memory of a block whose size is known at compile time. Parts is the number of softmaxes that make up that of a
// split; Scratch bytes are needed during attention alone.
template <int GT, int Parts, size_t Scratch>
struct DecodeShared {
    static constexpr int kParts = Parts;
    static constexpr size_t kScratch = Scratch;
    alignas(16) Choice choices[kWarps];
    Softmax softmaxes[Parts][GT];  // of the split, if it is the only one
    bool last;                     // whether this block is the last one of its head
};

// The rest of it. All but the logits lies where the scratch memory of attention was.
struct DecodeArrays {
    HeadWeights* heads;  // [G]
    float* factors;      // [G,splits] weight of a split's sums among those of all; one split has none
    float* lowWeights;   // [G,R] weights of H
    float* logits;       // [G,C] if they are in shared memory

    __host__ __device__ __forceinline__ static size_t offsetOfLogits(int G, int R, int splits, size_t scratch) {
        size_t const arrays = sizeof(HeadWeights) * G + sizeof(float) * G * (splits + R);
        return arrays > scratch ? arrays : scratch;
    }
    __device__ __forceinline__ static DecodeArrays at(unsigned char* memory, int G, int R, int splits, size_t scratch) {
        auto* const heads = reinterpret_cast<HeadWeights*>(memory);
        auto* const factors = reinterpret_cast<float*>(heads + G);
        float* const lowWeights = factors + G * splits;
        auto* const logits = reinterpret_cast<float*>(memory + offsetOfLogits(G, R, splits, scratch));
        return {heads, factors, lowWeights, logits};
    }
};

// S is the type of the slots, W is D rounded up, GT the query heads that are processed at a time.
template <class S, int W, int GT, class SharedMemory>
struct DecodeBlock {
    using Slot = S;
    using T = std::conditional_t<kCoded<S>, AnyType, S>;  // of the tensors that are not slots
    using Shared = SharedMemory;
    static constexpr int kWidth = W, kHeads = GT;

    DecodeParams const& p;
    Shared& shared;
    float* const onlySums;  // [GT,W] of the only split and the only tile of heads, in shared memory
    int const G, C, D, R, now;
    long const head;       // of the step
    long const stateHead;  // of the state, which has other rows than the step if the launch says so
    SlotRows<S> const keys, values;
    int* const positions;
    float* const logits;  // [G,C]

    __device__ __forceinline__ DecodeBlock(DecodeParams const& params, void* memory, void* sums)
        : p(params),
          shared(*static_cast<Shared*>(memory)),
          onlySums(static_cast<float*>(sums)),
          G(p.shape.queryHeads / p.shape.kvHeads),
          C(p.shape.slots),
          D(p.shape.headDim),
          R(p.shape.rank),
          now(p.t.pastLength[blockIdx.z]),
          head(static_cast<long>(blockIdx.z) * p.shape.kvHeads + blockIdx.y),
          stateHead(stateHeadOf(p.t, p.shape, head)),
          keys(p.t.presentKey, p.t.presentKeyScale, stateHead, C, D),
          values(p.t.presentValue, p.t.presentValueScale, stateHead, C, D),
          positions(p.t.presentPosition + stateHead * C),
          logits(p.logits != nullptr ? p.logits + head * G * C : arrays().logits) {}

    // Computed anew where it is used, for the sake of registers.
    __device__ __forceinline__ DecodeArrays arrays() const {
        auto* const memory = reinterpret_cast<unsigned char*>(&shared) + sizeof(Shared);
        return DecodeArrays::at(memory, G, R, p.splits, Shared::kScratch);
    }
    // A tensor of the step in the compute dtype, with `perHead` elements for each KV head.
    __device__ __forceinline__ Elements<T> elements(void const* tensor, long perHead) const {
        return Elements<T>(tensor, p.shape.dtype, head * perHead);
    }
    __device__ __forceinline__ Elements<T> slotPsi() const {
        return Elements<T>(p.t.presentPsi, p.shape.dtype, stateHead * C * R);
    }
    // Whether the sums of the only split and the only tile of heads stay in shared memory.
    __device__ __forceinline__ bool direct() const { return p.sums == nullptr; }
    __device__ __forceinline__ float* sumsOf(int split, int g) const {
        return p.sums + ((head * p.splits + split) * G + g) * D;
    }
    __device__ __forceinline__ float2* softmaxOf(int split, int g) const {
        return p.softmaxes + (head * p.splits + split) * G + g;
    }
    __device__ __forceinline__ void keepLogit(int g, int slot, float logit) const {
        publish(logits + g * C + slot, logit);
    }
    __device__ __forceinline__ float logit(int g, int slot) const {
        float const* const source = logits + g * C + slot;
        return p.logits != nullptr ? __ldcg(source) : *source;
    }
};

// Asks for what the last block of a head reads beside the slots, so that it comes while they are attended; called by
// all threads. One block of a head does it for all.
template <class Block>
__device__ __forceinline__ void prefetchRest(Block const& block) {
    if (blockIdx.x != 0) return;
    AttentionShape const& s = block.p.shape;
    AttentionTensors const& t = block.p.t;
    size_t const item = s.dtype == DType::kFloat32 ? sizeof(float) : sizeof(__half), R = s.rank, D = s.headDim;
    auto const ask = [&](void const* tensor, long head, size_t bytes) {
        prefetch(static_cast<char const*>(tensor) + head * bytes, bytes);
    };
    ask(t.k, block.head, D * item);
    ask(t.v, block.head, D * item);
    ask(t.psiK, block.head, R * item);
    if (block.p.rules.absorb == 0) return;
    ask(t.logPhiQ, block.head, block.G * R * sizeof(float));
    ask(t.presentZ, block.stateHead, R * sizeof(float));
    if (keepsMeans<typename Block::Slot>(s)) {
        ask(t.presentH, block.stateHead, R * 2 * D);
        ask(t.presentHScale, block.stateHead, R * sizeof(float));
    } else {
        ask(t.presentH, block.stateHead, R * D * sizeof(float));
    }
}

// Whether this block is the last of `blocks` that get here; called by all threads. What any thread of the others wrote
// before is then visible to all threads of the last one: the barrier orders a block's writes before the fence of its
// first thread, which makes them visible, whoever wrote them, before the addition (release); in the last block the
// second fence comes after its addition, which has seen all others, and before what its threads read (acquire).
// The counter is zero again for the next launch: no other block touches it any more.
__device__ __forceinline__ bool lastToArrive(uint32_t* counter, uint32_t blocks, bool& last) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // release
        last = atomicAdd(counter, 1u) == blocks - 1;
        if (last) atomicExch(counter, 0u);
        __threadfence();  // acquire
    }
    __syncthreads();
    return last;
}

}  // namespace less
