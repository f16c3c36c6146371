#include "less_attention_plugin.h"

#include <cstdint>
#include <exception>
#include <memory>

#include "plugin_library.h"

namespace less {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

// Returns the result of `body`; if it throws, logs the exception and returns `failed`.
template <typename Result, typename Body>
Result guarded(Result failed, Body const& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        try {
            logError((std::string(kPluginName) + ": " + error.what()).c_str());
        } catch (...) {
            logError(error.what());
        }
    } catch (...) {
        logError("LessAttention: unknown error");
    }
    return failed;
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

void check(cudaError_t error, char const* operation) {
    if (error != cudaSuccess) refuse(std::string(operation) + " failed: " + cudaGetErrorString(error));
}

}  // namespace

// ---------------------------------------------------------------- the plugin

LessAttentionPlugin::LessAttentionPlugin(Attributes const& attributes)
    : attributes_(attributes), rowsByIndex_(attributes.rowsByIndex ? 1 : 0) {
    AttentionRules const& rules = attributes_.rules;
    description_ =
        "scale=" + std::to_string(rules.scale) + " policy=" + std::to_string(static_cast<int>(rules.policy)) +
        " heavy=" + std::to_string(rules.heavy) + " recent=" + std::to_string(rules.recent) +
        " window=" + std::to_string(rules.window) + " absorb=" + std::to_string(rules.absorb) +
        " decay=" + std::to_string(rules.decay) +
        " slot_bits=" + std::to_string(static_cast<int>(attributes_.slotType)) +
        " state_bits=" + std::to_string(static_cast<int>(attributes_.stateType)) +
        " max_distance=" + std::to_string(rules.maxDistance) + " rows_by_index=" + std::to_string(rowsByIndex_);
    void const* const values[] = {&rules.scale,           &rules.policy,      &rules.heavy, &rules.recent,
                                  &rules.window,          &rules.absorb,      &rules.decay, &attributes_.slotType,
                                  &attributes_.stateType, &rules.maxDistance, &rowsByIndex_};
    for (size_t i = 0; i < kFieldCount; ++i) fields_[i] = {fieldAt(i).name, values[i], fieldAt(i).type, 1};
    collection_ = {static_cast<int32_t>(kFieldCount), fields_};
}

LessAttentionPlugin::~LessAttentionPlugin() noexcept {
    if (counters_ != nullptr) cudaFree(counters_);
}

nvinfer1::IPluginCapability* LessAttentionPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* LessAttentionPlugin::clone() noexcept {
    return guarded<nvinfer1::IPluginV3*>(nullptr, [&] { return new LessAttentionPlugin(attributes_); });
}

int32_t LessAttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const* inputs,
                                                int32_t nbInputs) const noexcept {
    return guarded(-1, [&] {
        checkCounts(attributes_, nbInputs, nbOutputs);
        checkTypes(attributes_, [&](int32_t i) { return inputs[i]; });
        for (int32_t output = 0; output < nbOutputs; ++output)
            outputs[output] = inputs[output == kOut ? kQ : aliasedInput(output)];
        return 0;
    });
}

int32_t LessAttentionPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
                                             nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                             int32_t nbOutputs, nvinfer1::IExprBuilder&) noexcept {
    return guarded(-1, [&] {
        checkCounts(attributes_, nbInputs, nbOutputs);
        for (int32_t output = 0; output < nbOutputs; ++output)
            outputs[output] = inputs[output == kOut ? kQ : aliasedInput(output)];
        return 0;
    });
}

bool LessAttentionPlugin::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                                    int32_t nbOutputs) noexcept {
    return guarded(false, [&] {
        checkCounts(attributes_, nbInputs, nbOutputs);
        PluginTensorDesc const& tensor = inOut[pos].desc;
        int32_t const input = pos < nbInputs ? pos : pos == nbInputs + kOut ? kQ : aliasedInput(pos - nbInputs);
        if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (pos == kQ)
            return tensor.type == DataType::kHALF || tensor.type == DataType::kBF16 || tensor.type == DataType::kFLOAT;
        return tensor.type == expectedType(attributes_, input, inOut[kQ].desc.type);
    });
}

int32_t LessAttentionPlugin::getAliasedInput(int32_t output) noexcept {
    return output >= 0 && output < attributes_.outputs() ? aliasedInput(output) : -1;
}

int32_t LessAttentionPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                             DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept {
    return guarded(-1, [&] {
        checkCounts(attributes_, nbInputs, nbOutputs);
        checkedShape(attributes_, [&](int32_t i) { return in[i].desc.type; }, [&](int32_t i) { return in[i].max; });
        return 0;
    });
}

size_t LessAttentionPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                             DynamicPluginTensorDesc const*, int32_t nbOutputs) const noexcept {
    return guarded(size_t{0}, [&] {
        checkCounts(attributes_, nbInputs, nbOutputs);
        AttentionShape const shape = agreedShape(attributes_, in[kQ].desc.type, [&](int32_t i) { return in[i].max; });
        return aligned(workspaceBytes(shape, attributes_.rules)) + kCounterBytes;
    });
}

// ---------------------------------------------------------------- at run time

nvinfer1::IPluginV3* LessAttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    return guarded<nvinfer1::IPluginV3*>(nullptr, [&] {
        auto copy = std::make_unique<LessAttentionPlugin>(attributes_);
        // TensorRT-RTX also attaches while it builds, possibly without a driver, and crashes if this fails. A copy
        // without counters of its own uses the workspace of each launch for them.
        void* memory = nullptr;
        if (cudaMalloc(&memory, kCounterBytes) == cudaSuccess) {
            copy->counters_ = static_cast<uint32_t*>(memory);
            check(cudaMemset(memory, 0, kCounterBytes), "cudaMemset");
            check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");  // other streams do not wait for this one
        } else {
            cudaGetLastError();  // clears the error
        }
        return copy.release();
    });
}

int32_t LessAttentionPlugin::onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*,
                                           int32_t nbOutputs) noexcept {
    return guarded(-1, [&] {
        checkCounts(attributes_, nbInputs, nbOutputs);
        AttentionShape const shape =
            checkedShape(attributes_, [&](int32_t i) { return in[i].type; }, [&](int32_t i) { return in[i].dims; });
        // TensorRT also calls this while it builds, possibly without a GPU.
        cudaError_t const status = prepare(shape, attributes_.rules);
        if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice) {
            cudaGetLastError();  // clears the error
        } else {
            check(status, "loading the kernels");
        }
        return 0;
    });
}

int32_t LessAttentionPlugin::enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                                     void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    return guarded(-1, [&] {
        if (in == nullptr || inputs == nullptr || outputs == nullptr) refuse("enqueue without tensors");
        for (int32_t i = 0; i < attributes_.inputs(); ++i)
            if (inputs[i] == nullptr) refuse(std::string(nameOf(attributes_, i)) + " has no memory");
        for (int32_t i = 0; i < attributes_.outputs(); ++i)
            if (outputs[i] == nullptr) refuse("output " + std::to_string(i) + " has no memory");
        AttentionShape const shape = shapeOf(attributes_, in);
        AttentionTensors const tensors = tensorsOf(attributes_, inputs, outputs);
        uint32_t* counters = counters_;
        if (counters == nullptr) {  // see attachToContext
            if (workspace == nullptr) refuse("enqueue without workspace");
            size_t const offset = aligned(workspaceBytes(shape, attributes_.rules));
            counters = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + offset);
            check(cudaMemsetAsync(counters, 0, kCounterBytes, stream), "cudaMemsetAsync");
        }
        check(less::enqueue(shape, attributes_.rules, tensors, workspace, counters, stream), "the launch");
        return 0;
    });
}

nvinfer1::PluginFieldCollection const* LessAttentionPlugin::getFieldsToSerialize() noexcept { return &collection_; }

// ---------------------------------------------------------------- the creator

LessAttentionCreator::LessAttentionCreator() {
    for (size_t i = 0; i < kFieldCount; ++i) fields_[i] = {fieldAt(i).name, nullptr, fieldAt(i).type, 1};
    collection_ = {static_cast<int32_t>(kFieldCount), fields_};
}

nvinfer1::IPluginV3* LessAttentionCreator::createPlugin(char const*, nvinfer1::PluginFieldCollection const* fields,
                                                        nvinfer1::TensorRTPhase) noexcept {
    return guarded<nvinfer1::IPluginV3*>(nullptr, [&] {
        if (fields == nullptr) refuse("no attributes");
        return new LessAttentionPlugin(attributesOf(*fields));
    });
}

}  // namespace less
