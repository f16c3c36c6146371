// The launcher: supported layers, workspace size, and one step.
#include <algorithm>
#include <cmath>

#include "less_attention.h"
#include "steps.h"

namespace less {
namespace {

constexpr int kMaxHeadDim = 256;
constexpr int kMaxRank = 64;
constexpr int kMaxGroup = 128;

// The kernels update the state in place. If present* is not past*, the state is copied there first.
cudaError_t copyState(AttentionShape const& s, AttentionTensors const& t, cudaStream_t stream) {
    size_t const heads = static_cast<size_t>(t.rows != nullptr ? s.stateRows : s.batch) * s.kvHeads;
    size_t const item = s.dtype == DType::kFloat32 ? 4 : 2;
    size_t const code = s.slotType == SlotType::kInt8 ? 1 : item, scales = heads * s.slots * sizeof(float);
    bool const means = s.stateType == StateType::kMeans16;
    struct {
        void const* past;
        void* present;
        size_t bytes;
    } const state[] = {
        {t.pastKey, t.presentKey, heads * s.slots * s.headDim * code},
        {t.pastValue, t.presentValue, heads * s.slots * s.headDim * code},
        {t.pastPsi, t.presentPsi, heads * s.slots * s.rank * (means ? 1 : item)},
        {t.pastScore, t.presentScore, heads * s.slots * sizeof(float)},
        {t.pastPosition, t.presentPosition, heads * s.slots * sizeof(int32_t)},
        {t.pastH, t.presentH, heads * s.rank * s.headDim * (means ? 2 : sizeof(float))},
        {t.pastZ, t.presentZ, heads * s.rank * sizeof(float)},
        {t.pastKeyScale, t.presentKeyScale, scales},  // without int8 slots, these are nullptr
        {t.pastValueScale, t.presentValueScale, scales},
        {t.pastHScale, t.presentHScale, heads * s.rank * sizeof(float)},  // the same without means
    };
    for (auto const& tensor : state) {
        if (tensor.past == tensor.present) continue;
        cudaError_t const status =
            cudaMemcpyAsync(tensor.present, tensor.past, tensor.bytes, cudaMemcpyDeviceToDevice, stream);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

}  // namespace

char const* whyUnsupported(AttentionShape const& s, AttentionRules const& r) noexcept {
    int const policy = static_cast<int>(r.policy);
    if (s.kvHeads < 1 || s.queryHeads < 1 || s.queryHeads % s.kvHeads != 0) {
        return "query heads must be a multiple of KV heads";
    }
    if (s.queryHeads / s.kvHeads > kMaxGroup) return "more than 128 query heads share a KV head";
    if (s.headDim < 8 || s.headDim > kMaxHeadDim || s.headDim % 8 != 0) {
        return "head_dim must be a multiple of 8 up to 256";
    }
    if (s.rank < 1 || s.rank > kMaxRank) return "the rank must be 1 to 64";
    if (s.slotType != SlotType::kModel && s.slotType != SlotType::kInt8)
        return "slots have 8 bits, or those of the model";
    if (s.stateType != StateType::kMeans16 && s.stateType != StateType::kSums32) return "a state has 16 or 32 bits";
    if (s.stateType == StateType::kMeans16 && (s.slotType != SlotType::kInt8 || r.absorb == 0))
        return "a state of 16 bits goes with int8 slots and layers that absorb";
    if (s.slots < 1) return "a layer needs at least one slot";
    if (policy < 0 || policy > static_cast<int>(Policy::kFull)) return "unknown policy";
    if (r.heavy < 0 || r.recent < 1 || r.window < 0) return "heavy and window must be at least 0, recent at least 1";
    if (static_cast<int64_t>(r.heavy) + r.recent != s.slots) return "heavy + recent must equal the number of slots";
    if (r.policy == Policy::kWindow && r.window != r.recent) return "policy window needs recent equal to window";
    if (r.policy != Policy::kWindow && r.window == 1) return "a compressed sliding layer needs a window of at least 2";
    if (r.absorb != 0 && r.absorb != 1) return "absorb must be 0 or 1";
    if (!std::isfinite(r.scale)) return "the scale must be finite";
    if (!(r.decay > 0.f && r.decay <= 1.f)) return "decay must be above 0 and at most 1";
    if (r.policy != Policy::kH2O && r.decay != 1.f) return "only the scores of h2o fade";
    if (r.maxDistance < 0) return "the largest distance must be at least 0";
    if (r.maxDistance > 0) {
        if (s.rotary < 2 || s.rotary > s.headDim || s.rotary % 2 != 0)
            return "rotary must have 2 to head_dim columns, an even number";
        if (s.distances <= r.maxDistance) return "rotary must have more rows than the largest distance";
    }
    return nullptr;
}

size_t workspaceBytes(AttentionShape const& shape, AttentionRules const& rules) noexcept {
    // Smaller batches split their slots over more blocks, and a chunk may be a single token.
    size_t bytes = shape.chunk > 1 ? prefillWorkspaceBytes(shape, rules) : 0;
    AttentionShape smaller = shape;
    for (smaller.batch = 1; smaller.batch <= shape.batch; ++smaller.batch) {
        bytes = std::max(bytes, decodeWorkspaceBytes(smaller, rules));
    }
    return bytes;
}

cudaError_t prepare(AttentionShape const& shape, AttentionRules const& rules) noexcept {
    if (whyUnsupported(shape, rules) != nullptr) return cudaErrorInvalidValue;
    AttentionTensors const none{};
    return shape.chunk == 1 ? decode(Mode::kPrepare, shape, rules, none, nullptr, nullptr, nullptr)
                            : prefill(Mode::kPrepare, shape, rules, none, nullptr, nullptr);
}

cudaError_t enqueue(AttentionShape const& shape, AttentionRules const& rules, AttentionTensors const& tensors,
                    void* workspace, uint32_t* counters, cudaStream_t stream) noexcept {
    if (whyUnsupported(shape, rules) != nullptr) return cudaErrorInvalidValue;
    if (rules.maxDistance > 0 && shape.chunk > shape.distances) return cudaErrorInvalidValue;
    if (tensors.rows != nullptr && shape.stateRows < 1) return cudaErrorInvalidValue;
    if (shape.batch < 1 || shape.chunk < 1) return cudaSuccess;
    cudaError_t const status = copyState(shape, tensors, stream);
    if (status != cudaSuccess) return status;
    return shape.chunk == 1 ? decode(Mode::kLaunch, shape, rules, tensors, workspace, counters, stream)
                            : prefill(Mode::kLaunch, shape, rules, tensors, workspace, stream);
}

}  // namespace less
