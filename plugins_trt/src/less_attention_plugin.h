// LessAttention as a TensorRT plugin: handles names, dtypes and shapes, and calls less_attention.h.
//
// The class holds only the rules (the node's attributes); a copy that is attached to an execution context also owns the
// counters for its launches. No exception passes through TensorRT: errors are logged.
#pragma once

#include <NvInfer.h>

#include <string>

#include "less_attention_node.h"

namespace less {

inline constexpr char const* kPluginName = "LessAttention";
// A plan names the plugin version that it was built with, and runs with that one only. It stays 1 as long as every
// layer that an older library ran means the same: a library refuses fields that it does not know, so a new field that
// may be missing (`decay`, `slot_bits`, `rows_by_index`) needs no new version. Two creators of one name are no way out:
// TensorRT-RTX 1.7 forgets only one of them when it unloads the library, and then refuses to load it again.
inline constexpr char const* kPluginVersion = "1";
inline constexpr char const* kPluginNamespace = "";

class LessAttentionPlugin final : public nvinfer1::IPluginV3,
                                  public nvinfer1::IPluginV3OneCore,
                                  public nvinfer1::IPluginV3OneBuildV2,
                                  public nvinfer1::IPluginV3OneRuntime {
 public:
    explicit LessAttentionPlugin(Attributes const& attributes);
    LessAttentionPlugin(LessAttentionPlugin const&) = delete;
    LessAttentionPlugin& operator=(LessAttentionPlugin const&) = delete;
    ~LessAttentionPlugin() noexcept override;

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // IPluginV3OneBuild
    int32_t getNbOutputs() const noexcept override { return attributes_.outputs(); }
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t nbOutputs, nvinfer1::DataType const* inputs,
                               int32_t nbInputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
                            int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept override;
    int32_t getAliasedInput(int32_t output) noexcept override;
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                            nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                            nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) const noexcept override;
    char const* getTimingCacheID() noexcept override { return description_.c_str(); }
    char const* getMetadataString() noexcept override { return description_.c_str(); }

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
                          int32_t nbOutputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
    Attributes attributes_;
    int32_t rowsByIndex_;  // as a field
    std::string description_;
    nvinfer1::PluginField fields_[kFieldCount];
    nvinfer1::PluginFieldCollection collection_;
    // kCounterBytes of device memory; only in a copy that is attached to a context.
    uint32_t* counters_ = nullptr;
};

class LessAttentionCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
    LessAttentionCreator();
    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
    char const* getPluginName() const noexcept override { return kPluginName; }
    char const* getPluginVersion() const noexcept override { return kPluginVersion; }
    char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
    nvinfer1::PluginField fields_[kFieldCount];
    nvinfer1::PluginFieldCollection collection_;
};

}  // namespace less
