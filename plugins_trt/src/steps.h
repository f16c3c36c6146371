// The two kinds of step of less::enqueue, each implemented in its own file.
#pragma once

#include "device.cuh"

namespace less {

constexpr size_t kAlignment = 256;
inline size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

size_t decodeWorkspaceBytes(AttentionShape const& shape, AttentionRules const& rules);
size_t prefillWorkspaceBytes(AttentionShape const& shape, AttentionRules const& rules);

// Both work on present*, which contain the past state by then. With Mode::kPrepare, no pointer is dereferenced.
cudaError_t decode(Mode mode, AttentionShape const& shape, AttentionRules const& rules, AttentionTensors const& tensors,
                   void* workspace, uint32_t* counters, cudaStream_t stream);
cudaError_t prefill(Mode mode, AttentionShape const& shape, AttentionRules const& rules,
                    AttentionTensors const& tensors, void* workspace, cudaStream_t stream);

}  // namespace less
