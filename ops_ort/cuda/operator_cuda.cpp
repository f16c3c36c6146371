// less::LessAttention for ONNX Runtime's CUDA provider, in float32, float16 and bfloat16: the kernels of
// plugins_trt/include/less_attention.h.
//
// The host reads neither lengths nor state, and a step launches kernels only, so that CUDA graphs can capture it. Past
// and present state may share their memory; else the past one is copied first.
#include <cuda_runtime_api.h>

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "less_attention.h"
#include "memory.h"
#include "node.h"

namespace less {
namespace {

using ort::Status;

// Tests run the operator on host memory, for the CPU provider.
#ifdef LESS_ORT_PROVIDER
constexpr char const* kProviderName = LESS_ORT_PROVIDER;
#else
constexpr char const* kProviderName = "CUDAExecutionProvider";
#endif

int32_t size(int64_t n) {
    require(n <= INT32_MAX, "a size is out of range");
    return static_cast<int32_t>(n);
}

AttentionRules rules_of(Attributes const& node) {
    AttentionRules rules{
        node.scale, static_cast<Policy>(node.policy), node.heavy, node.recent, node.window, node.absorb, node.decay};
    rules.maxDistance = node.max_distance;
    return rules;
}

AttentionShape shape_of(Tensors const& x) {
    ort::ElementType const q = x.inputs[kQ].type;
    AttentionShape shape{};
    shape.dtype = q == ort::kFloat ? DType::kFloat32 : q == ort::kHalf ? DType::kFloat16 : DType::kBFloat16;
    shape.batch = size(x.rows), shape.queryHeads = size(x.query_heads), shape.kvHeads = size(x.heads);
    shape.chunk = size(x.chunk), shape.headDim = size(x.width), shape.slots = size(x.slots);
    shape.rank = size(x.rank);
    shape.slotType = x.form.int8 ? SlotType::kInt8 : SlotType::kModel;
    shape.stateType = x.form.state16 ? StateType::kMeans16 : StateType::kSums32;
    shape.distances = size(x.distances), shape.rotary = size(x.rotated);
    return shape;
}

AttentionTensors tensors_of(Tensors const& x) {
    Form const& form = x.form;
    AttentionTensors t{};
    t.q = x.inputs[kQ].data, t.k = x.inputs[kK].data, t.v = x.inputs[kV].data;
    t.logPhiQ = x.input<float>(kLogPhi), t.psiK = x.inputs[kPsi].data;
    auto const past = [&](size_t i) -> char* { return x.inputs[kTokens + i].data; };
    auto const present = [&](size_t i) -> char* { return x.state[i].data; };
    auto const real = [](char* data) { return reinterpret_cast<float*>(data); };
    t.pastKey = past(kKey), t.presentKey = present(kKey);
    t.pastValue = past(kValue), t.presentValue = present(kValue);
    t.pastPsi = past(kPsiSlots), t.presentPsi = present(kPsiSlots);
    t.pastScore = real(past(kScore)), t.presentScore = real(present(kScore));
    t.pastPosition = x.input<int32_t>(kTokens + kPosition);
    t.presentPosition = reinterpret_cast<int32_t*>(present(kPosition));
    t.pastH = past(kH), t.presentH = present(kH);
    t.pastZ = real(past(kZ)), t.presentZ = real(present(kZ));
    if (form.int8) {
        t.pastKeyScale = real(past(kPlain)), t.presentKeyScale = real(present(kPlain));
        t.pastValueScale = real(past(kPlain + 1)), t.presentValueScale = real(present(kPlain + 1));
        t.keyMean = x.input<float>(form.constants()), t.keyStd = x.input<float>(form.constants() + 1);
    }
    if (form.state16) {
        t.pastHScale = real(past(kPlain + kScales)), t.presentHScale = real(present(kPlain + kScales));
    }
    t.pastLength = x.input<int32_t>(form.lengths()), t.newLength = x.input<int32_t>(form.lengths() + 1);
    if (form.distance) t.rotary = x.input<float>(form.inputs() - 1);
    t.out = x.out.data;
    return t;
}

class Kernel {
 public:
    static constexpr char const* kProvider = kProviderName;

    Kernel(ort::Api const* table, ort::KernelInfo const* info)
        : api_(table), attributes_(read_attributes(api_, info)), rules_(rules_of(attributes_)) {}

    Status* compute(ort::KernelContext* context) noexcept {
        return guarded(api_, [&] { run(context); });
    }

 private:
    void run(ort::KernelContext* context) {
        Tensors tensors;
        read_inputs(api_, context, attributes_, {ort::kFloat, ort::kHalf, ort::kBFloat16}, &tensors);
        AttentionShape const shape = shape_of(tensors);
        if (char const* reason = whyUnsupported(shape, rules_)) require(false, reason);
        open_outputs(api_, context, &tensors);
        if (shape.batch == 0) return;
        void* handle;
        check(api_.stream(context, &handle));
        auto const stream = static_cast<cudaStream_t>(handle);
        require(stream != cudaStreamPerThread, "the stream of a thread is not one stream");
        load(shape);
        StreamMemory& memory = memories_.of(stream);
        std::lock_guard<std::mutex> const launching(memory.mutex());
        void* workspace = memory.workspace(workspaceBytes(shape, rules_), stream);
        check(enqueue(shape, rules_, tensors_of(tensors), workspace, memory.counters(), stream), "the launch");
    }

    // Loads the kernels of a shape, unless it is that of the last step of its kind.
    void load(AttentionShape const& shape) {
        std::lock_guard<std::mutex> const lock(mutex_);
        AttentionShape& last = loaded_[shape.chunk == 1];
        if (std::memcmp(&last, &shape, sizeof(shape)) == 0) return;
        check(prepare(shape, rules_), "loading the kernels");
        last = shape;
    }

    ort::Functions api_;
    Attributes attributes_;
    AttentionRules rules_;
    Memories memories_;
    std::mutex mutex_;
    AttentionShape loaded_[2]{};  // of a prefill step and of a decode step
};

}  // namespace
}  // namespace less

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 ort::ApiBase const* base) {
    static less::Attention<less::Kernel> const attention;
    return less::enlist(options, base, &attention);
}
