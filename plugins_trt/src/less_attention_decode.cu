// Chooses the decode kernel, the number of blocks and the memory.
#include <algorithm>

#include "decode.cuh"
#include "steps.h"

namespace less {
namespace {

constexpr size_t kSharedLogitBytes = 16 * 1024;  // larger logits are stored in the workspace
constexpr int kSlotsPerSplit = 64;               // at least: fewer are not worth the merge

bool turns(AttentionRules const& rules) { return rules.maxDistance > 0; }

// Whether tensor cores multiply.
bool onTensorCores(AttentionShape const& s) { return s.dtype != DType::kFloat32; }

// Query heads that a kernel processes at a time. Fewer kernels rotate keys.
int tileOf(AttentionShape const& s, bool turning) {
    int const group = s.queryHeads / s.kvHeads;
    if (onTensorCores(s)) return group <= 8 ? 8 : 16;
    if (turning) return group <= 2 ? 2 : 4;
    return group <= 2 ? group : group <= 4 ? 4 : 8;
}

struct Plan {
    int splits, slotsPerSplit;  // of C slots, whatever the batch is
    int splitsPerBlock, blocks;
    int stages;  // of the ring
    bool logitsShared, direct;
    size_t logitBytes, sumBytes, softmaxBytes;  // in the workspace
};

int divided(long x, long by) { return static_cast<int>((x + by - 1) / by); }

Plan planOf(AttentionShape const& s, AttentionRules const& rules) {
    size_t const heads = static_cast<size_t>(s.batch) * s.kvHeads, group = s.queryHeads / s.kvHeads;
    Plan plan{};
    plan.slotsPerSplit = std::max(kSlotsPerSplit, divided(s.slots, kMaxSplits * kSlotTile) * kSlotTile);
    plan.splits = divided(s.slots, plan.slotsPerSplit);
    long const wanted = std::max(1L, blocksWanted() / static_cast<long>(heads));  // blocks per head
    plan.splitsPerBlock = divided(plan.splits, wanted);
    plan.blocks = divided(plan.splits, plan.splitsPerBlock);
    // Few blocks need tiles in flight, many leave that to one another, and their memory is better spent on more blocks.
    plan.stages = heads * plan.blocks < static_cast<size_t>(blocksWanted()) ? 4 : 2;
    size_t const logitBytes = keepsScores(rules) ? group * s.slots * sizeof(float) : 0;
    plan.logitsShared = plan.blocks == 1 && logitBytes <= kSharedLogitBytes;
    plan.direct = plan.splits == 1 && static_cast<int>(group) <= tileOf(s, turns(rules));
    plan.logitBytes = plan.logitsShared ? 0 : heads * logitBytes;
    size_t const softmaxes = plan.direct ? 0 : heads * plan.splits * group;
    plan.sumBytes = softmaxes * s.headDim * sizeof(float);
    plan.softmaxBytes = softmaxes * sizeof(float2);
    return plan;
}

// Shared memory of a kernel with blocks of type Block, besides what attention has.
template <class Block>
size_t bytesOf(DecodeParams const& params, Plan const& plan) {
    AttentionShape const& s = params.shape;
    int const group = s.queryHeads / s.kvHeads;
    size_t const logits = plan.logitsShared && keepsScores(params.rules) ? static_cast<size_t>(group) * s.slots : 0;
    using Shared = typename Block::Shared;
    return sizeof(Shared) + DecodeArrays::offsetOfLogits(group, s.rank, params.splits, Shared::kScratch) +
           logits * sizeof(float);
}

dim3 gridOf(DecodeParams const& params, Plan const& plan) {
    return dim3(plan.blocks, params.shape.kvHeads, params.shape.batch);
}

template <class S, int W, int GT, bool Turns>
cudaError_t runSplits(Mode mode, DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
    constexpr int kLanes = W / 8;
    size_t const bytes = sizeof(WarpSums<S, W, GT>) + bytesOf<SplitBlock<S, kLanes, GT>>(params, plan);
    return run(mode, decodeKernel<S, kLanes, GT, Turns>, gridOf(params, plan), bytes, params, stream);
}

template <class S, int W, int GT, bool Turns>
cudaError_t runTiles(Mode mode, DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
    size_t const bytes = plan.stages * sizeof(SlotStage<S, W>) + bytesOf<TileBlock<S, W, GT, Turns>>(params, plan);
    return run(mode, decodeTilesKernel<S, W, GT, Turns>, gridOf(params, plan), bytes, params, stream);
}

template <class S, int W, bool Turns>
cudaError_t withTile(Mode mode, DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
    int const tile = tileOf(params.shape, Turns);
    if (onTensorCores(params.shape)) {
        if constexpr (!std::is_same_v<S, float>) {
            if (tile == 8) return runTiles<S, W, 8, Turns>(mode, params, plan, stream);
            return runTiles<S, W, 16, Turns>(mode, params, plan, stream);
        }
    } else if constexpr (std::is_same_v<S, float> || kCoded<S>) {
        if (tile == 2) return runSplits<S, W, 2, Turns>(mode, params, plan, stream);
        if (tile == 4) return runSplits<S, W, 4, Turns>(mode, params, plan, stream);
        if constexpr (!Turns) {
            if (tile == 1) return runSplits<S, W, 1, Turns>(mode, params, plan, stream);
            return runSplits<S, W, 8, Turns>(mode, params, plan, stream);
        }
    }
    return cudaErrorNotSupported;
}

template <class S, int W>
cudaError_t withTurns(Mode mode, DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
    if (turns(params.rules)) return withTile<S, W, true>(mode, params, plan, stream);
    return withTile<S, W, false>(mode, params, plan, stream);
}

}  // namespace

size_t decodeWorkspaceBytes(AttentionShape const& shape, AttentionRules const& rules) {
    Plan const plan = planOf(shape, rules);
    return aligned(plan.logitBytes) + aligned(plan.sumBytes) + aligned(plan.softmaxBytes);
}

cudaError_t decode(Mode mode, AttentionShape const& shape, AttentionRules const& rules, AttentionTensors const& tensors,
                   void* workspace, uint32_t* counters, cudaStream_t stream) {
    Plan const plan = planOf(shape, rules);
    char* const memory = static_cast<char*>(workspace);
    DecodeParams params{rules,   shape,   tensors, plan.splits, plan.slotsPerSplit, plan.splitsPerBlock, plan.stages,
                        nullptr, nullptr, nullptr, counters};
    if (plan.logitBytes > 0) params.logits = reinterpret_cast<float*>(memory);
    if (!plan.direct) {
        params.sums = reinterpret_cast<float*>(memory + aligned(plan.logitBytes));
        params.softmaxes = reinterpret_cast<float2*>(memory + aligned(plan.logitBytes) + aligned(plan.sumBytes));
    }
    return withSlots(shape, [&](auto type) {
        using S = decltype(type);
        if (shape.headDim <= 64) return withTurns<S, 64>(mode, params, plan, stream);
#ifdef LESS_TRIAL
        return cudaErrorNotSupported;
#else
        if (shape.headDim <= 128) return withTurns<S, 128>(mode, params, plan, stream);
        return withTurns<S, 256>(mode, params, plan, stream);
#endif
    });
}

}  // namespace less
