// Chooses the decode kernel, the number of blocks and the memory.
#include <algorithm>

#include "decode.cuh"
#include "steps.h"

namespace less {
namespace {

constexpr size_t kSharedLogitBytes = 16 * 1024;  // larger logits are stored in the workspace
constexpr int kMinSlotsPerBlock = 32;            // fewer are not worth the merge

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

// Blocks per KV head.
int splitsOf(AttentionShape const& s) {
    long const heads = static_cast<long>(s.batch) * s.kvHeads;
    long const wanted = blocksWanted() / heads, useful = (s.slots + kMinSlotsPerBlock - 1) / kMinSlotsPerBlock;
    return static_cast<int>(std::max(1L, std::min(wanted, useful)));
}

struct Plan {
    int splits;
    bool logitsShared, direct;
    size_t logitBytes, partialBytes;  // in the workspace
};

Plan planOf(AttentionShape const& s, AttentionRules const& rules) {
    size_t const heads = static_cast<size_t>(s.batch) * s.kvHeads, group = s.queryHeads / s.kvHeads;
    Plan plan{};
    plan.splits = splitsOf(s);
    size_t const logitBytes = keepsScores(rules) ? group * s.slots * sizeof(float) : 0;
    plan.logitsShared = plan.splits == 1 && logitBytes <= kSharedLogitBytes;
    plan.direct = plan.splits == 1 && static_cast<int>(group) <= tileOf(static_cast<int>(group), turns(rules));
    plan.logitBytes = plan.logitsShared ? 0 : heads * logitBytes;
    plan.partialBytes = plan.direct ? 0 : heads * plan.splits * group * (s.headDim + 2) * sizeof(float);
    return plan;
}

template <class S, int LPR, int GT, bool Turns>
cudaError_t runDecode(Mode mode, DecodeParams const& params, bool logitsShared, cudaStream_t stream) {
    AttentionShape const& s = params.shape;
    int const group = s.queryHeads / s.kvHeads;
    int const sharedLogits = logitsShared && keepsScores(params.rules) ? s.slots : 0;
    size_t const bytes = sizeof(float) * DecodeLayout<S, LPR, GT>::floats(group, s.rank, sharedLogits);
    dim3 const grid(params.splits, s.kvHeads, s.batch);
    return run(mode, decodeKernel<S, LPR, GT, Turns>, grid, bytes, params, stream);
}

template <class S, int LPR>
cudaError_t withTile(Mode mode, DecodeParams const& params, bool logitsShared, cudaStream_t stream) {
    bool const turning = turns(params.rules);
    switch (tileOf(params.shape.queryHeads / params.shape.kvHeads, turning)) {
        case 2:
            if (turning) return runDecode<S, LPR, 2, true>(mode, params, logitsShared, stream);
            return runDecode<S, LPR, 2, false>(mode, params, logitsShared, stream);
#ifndef LESS_TRIAL
        case 1:
            return runDecode<S, LPR, 1, false>(mode, params, logitsShared, stream);
        case 4:
            if (turning) return runDecode<S, LPR, 4, true>(mode, params, logitsShared, stream);
            return runDecode<S, LPR, 4, false>(mode, params, logitsShared, stream);
        case 8:
            return runDecode<S, LPR, 8, false>(mode, params, logitsShared, stream);
#endif
        default:
            return cudaErrorNotSupported;
    }
}

}  // namespace

size_t decodeWorkspaceBytes(AttentionShape const& shape, AttentionRules const& rules) {
    Plan const plan = planOf(shape, rules);
    return aligned(plan.logitBytes) + aligned(plan.partialBytes);
}

cudaError_t decode(Mode mode, AttentionShape const& shape, AttentionRules const& rules, AttentionTensors const& tensors,
                   void* workspace, uint32_t* counters, cudaStream_t stream) {
    Plan const plan = planOf(shape, rules);
    char* const memory = static_cast<char*>(workspace);
    DecodeParams params{rules, shape, tensors, plan.splits, nullptr, nullptr, counters};
    if (plan.logitBytes > 0) params.logits = reinterpret_cast<float*>(memory);
    if (!plan.direct) params.partials = reinterpret_cast<float*>(memory + aligned(plan.logitBytes));
    return withSlots(shape, [&](auto type) {
        using S = decltype(type);
        if (shape.headDim <= 64) return withTile<S, 8>(mode, params, plan.logitsShared, stream);
#ifdef LESS_TRIAL
        return cudaErrorNotSupported;
#else
        if (shape.headDim <= 128) return withTile<S, 16>(mode, params, plan.logitsShared, stream);
        return withTile<S, 32>(mode, params, plan.logitsShared, stream);
#endif
    });
}

}  // namespace less
