// Chooses the decode kernel, the number of blocks and the memory.
#include <algorithm>

#include "decode.cuh"
#include "steps.h"

namespace less {
namespace {

constexpr size_t kSharedLogitBytes = 16 * 1024;  // larger logits are stored in the workspace
constexpr int kSlotsPerSplit = 64;               // at least: fewer are not worth the merge

bool turns(AttentionRules const& rules) { return rules.maxDistance > 0; }

// Query heads that a kernel processes at a time. Fewer kernels rotate keys, with tiles of 2 and 4 heads.
int tileOf(int group, bool turning) {
#ifdef LESS_TRIAL
    return group > 0 || turning ? 2 : 0;
#else
    if (turning) return group <= 2 ? 2 : 4;
    return group <= 2 ? group : group <= 4 ? 4 : 8;
#endif
}

struct Plan {
    int splits, slotsPerSplit;  // of C slots, whatever the batch is
    int splitsPerBlock, blocks;
    bool logitsShared, direct;
    size_t logitBytes, sumBytes, softmaxBytes;  // in the workspace
};

int divided(long x, long by) { return static_cast<int>((x + by - 1) / by); }

Plan planOf(AttentionShape const& s, AttentionRules const& rules) {
    size_t const heads = static_cast<size_t>(s.batch) * s.kvHeads, group = s.queryHeads / s.kvHeads;
    Plan plan{};
    plan.slotsPerSplit = std::max(kSlotsPerSplit, divided(s.slots, kMaxSplits));
    plan.splits = divided(s.slots, plan.slotsPerSplit);
    long const wanted = std::max(1L, blocksWanted() / static_cast<long>(heads));  // blocks per head
    plan.splitsPerBlock = divided(plan.splits, wanted);
    plan.blocks = divided(plan.splits, plan.splitsPerBlock);
    size_t const logitBytes = keepsScores(rules) ? group * s.slots * sizeof(float) : 0;
    plan.logitsShared = plan.blocks == 1 && logitBytes <= kSharedLogitBytes;
    plan.direct = plan.splits == 1 && static_cast<int>(group) <= tileOf(static_cast<int>(group), turns(rules));
    plan.logitBytes = plan.logitsShared ? 0 : heads * logitBytes;
    size_t const softmaxes = plan.direct ? 0 : heads * plan.splits * group;
    plan.sumBytes = softmaxes * s.headDim * sizeof(float);
    plan.softmaxBytes = softmaxes * sizeof(float2);
    return plan;
}

template <class S, int LPR, int GT, bool Turns>
cudaError_t runDecode(Mode mode, DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
    AttentionShape const& s = params.shape;
    int const group = s.queryHeads / s.kvHeads;
    int const sharedLogits = plan.logitsShared && keepsScores(params.rules) ? s.slots : 0;
    size_t const bytes = sizeof(typename DecodeBlock<S, LPR, GT>::Shared) +
                         DecodeArrays::bytes(group, s.rank, params.splits, sharedLogits);
    dim3 const grid(plan.blocks, s.kvHeads, s.batch);
    return run(mode, decodeKernel<S, LPR, GT, Turns>, grid, bytes, params, stream);
}

template <class S, int LPR>
cudaError_t withTile(Mode mode, DecodeParams const& params, Plan const& plan, cudaStream_t stream) {
    bool const turning = turns(params.rules);
    switch (tileOf(params.shape.queryHeads / params.shape.kvHeads, turning)) {
        case 2:
            if (turning) return runDecode<S, LPR, 2, true>(mode, params, plan, stream);
            return runDecode<S, LPR, 2, false>(mode, params, plan, stream);
#ifndef LESS_TRIAL
        case 1:
            return runDecode<S, LPR, 1, false>(mode, params, plan, stream);
        case 4:
            if (turning) return runDecode<S, LPR, 4, true>(mode, params, plan, stream);
            return runDecode<S, LPR, 4, false>(mode, params, plan, stream);
        case 8:
            return runDecode<S, LPR, 8, false>(mode, params, plan, stream);
#endif
        default:
            return cudaErrorNotSupported;
    }
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
    DecodeParams params{rules,   shape,   tensors, plan.splits, plan.slotsPerSplit, plan.splitsPerBlock,
                        nullptr, nullptr, nullptr, counters};
    if (plan.logitBytes > 0) params.logits = reinterpret_cast<float*>(memory);
    if (!plan.direct) {
        params.sums = reinterpret_cast<float*>(memory + aligned(plan.logitBytes));
        params.softmaxes = reinterpret_cast<float2*>(memory + aligned(plan.logitBytes) + aligned(plan.sumBytes));
    }
    return withSlots(shape, [&](auto type) {
        using S = decltype(type);
        if (shape.headDim <= 64) return withTile<S, 8>(mode, params, plan, stream);
#ifdef LESS_TRIAL
        return cudaErrorNotSupported;
#else
        if (shape.headDim <= 128) return withTile<S, 16>(mode, params, plan, stream);
        return withTile<S, 32>(mode, params, plan, stream);
#endif
    });
}

}  // namespace less
