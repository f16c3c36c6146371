// C interface to the plugin class, for tests/plugin_host.py. All calls go through TensorRT's own interfaces, from the
// creator to enqueue. Stands in for TensorRT and for the CUDA runtime (device memory is host memory).
#include <NvInfer.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept;
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

namespace {

using namespace nvinfer1;

std::set<void*> allocated;
bool driver = true;
[[maybe_unused]] int driverVersion = 0;

struct Log final : ILogger, ILoggerFinder {
    void log(Severity, AsciiChar const* message) noexcept override { messages += std::string(message) + "\n"; }
    ILogger* findLogger() override { return this; }
    std::string messages, returned;
} logger;

}  // namespace

// ---- CUDA runtime calls of the plugin class; on a device, CUDA's own are used

#ifndef LESS_HARNESS_ON_DEVICE
extern "C" {
cudaError_t cudaMalloc(void** address, size_t bytes) {
    if (!driver) return cudaErrorInsufficientDriver;
    *address = std::malloc(bytes);
    std::memset(*address, 0xa5, bytes);
    allocated.insert(*address);
    return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
    if (allocated.erase(address) != 1) std::abort();
    std::free(address);
    return cudaSuccess;
}
cudaError_t cudaMemset(void* address, int value, size_t bytes) {
    std::memset(address, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
    return cudaMemset(address, value, bytes);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
    *version = driverVersion;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
char const* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInvalidValue ? "invalid" : "failed"; }
}
#endif

// ---- functions for the tests

namespace {

IPluginCreatorV3One* creator() {
    int32_t count = 0;
    IPluginCreatorInterface* const* all = getCreators(count);
    if (count != 1 || std::strcmp(all[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) return nullptr;
    return static_cast<IPluginCreatorV3One*>(all[0]);
}

template <typename Interface>
Interface* capability(IPluginV3* plugin, PluginCapabilityType type) {
    return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}
IPluginV3OneBuildV2* build(IPluginV3* plugin) {
    return capability<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

}  // namespace

extern "C" {

struct Tensor {
    int32_t type, format, nbDims;
    int64_t dims[5];
};

void harness_start() { setLoggerFinder(&logger); }
void harness_driver(int32_t present) { driver = present != 0; }
void harness_driver_version(int32_t version) { driverVersion = version; }
int32_t harness_allocations() { return static_cast<int32_t>(allocated.size()); }
char const* harness_log() {
    logger.returned.swap(logger.messages);
    logger.messages.clear();
    return logger.returned.c_str();
}

IPluginV3* plugin_create(PluginField const* fields, int32_t count, int32_t runtimePhase) {
    PluginFieldCollection const collection{count, fields};
    return creator()->createPlugin("a layer", fields == nullptr ? nullptr : &collection,
                                   runtimePhase ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD);
}
void plugin_destroy(IPluginV3* plugin) { delete plugin; }

// By index: name, version, namespace and metadata of the plugin, then the names of the creator's fields.
char const* plugin_text(IPluginV3* plugin, int32_t index) {
    auto* const core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    PluginFieldCollection const* const fields = creator()->getFieldNames();
    char const* const texts[] = {core->getPluginName(), core->getPluginVersion(), core->getPluginNamespace(),
                                 build(plugin)->getMetadataString()};
    if (index < 4) return texts[index];
    return index - 4 < fields->nbFields ? fields->fields[index - 4].name : nullptr;
}
int32_t creator_matches(IPluginV3* plugin) {
    auto* const core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    return std::strcmp(core->getPluginName(), creator()->getPluginName()) == 0 &&
           std::strcmp(core->getPluginVersion(), creator()->getPluginVersion()) == 0 &&
           std::strcmp(core->getPluginNamespace(), creator()->getPluginNamespace()) == 0;
}

// A plugin created from the serialised fields of another one, copied as in a plan.
IPluginV3* plugin_round_trip(IPluginV3* plugin) {
    PluginFieldCollection const* const written = runtime(plugin)->getFieldsToSerialize();
    std::vector<PluginField> fields(written->fields, written->fields + written->nbFields);
    std::vector<int64_t> values(fields.size());
    for (size_t i = 0; i < fields.size(); ++i) {
        std::memcpy(&values[i], fields[i].data, 4);
        fields[i].data = &values[i];
    }
    return plugin_create(fields.data(), static_cast<int32_t>(fields.size()), 1);
}
IPluginV3* plugin_clone(IPluginV3* plugin) { return plugin->clone(); }
IPluginV3* plugin_attach(IPluginV3* plugin) { return runtime(plugin)->attachToContext(nullptr); }

int32_t plugin_outputs(IPluginV3* plugin) { return build(plugin)->getNbOutputs(); }
int32_t plugin_alias(IPluginV3* plugin, int32_t output) { return build(plugin)->getAliasedInput(output); }
int32_t plugin_output_types(IPluginV3* plugin, int32_t const* in, int32_t nbIn, int32_t* out, int32_t nbOut) {
    return build(plugin)->getOutputDataTypes(reinterpret_cast<DataType*>(out), nbOut,
                                             reinterpret_cast<DataType const*>(in), nbIn);
}

// Only TensorRT can create dimension expressions. The plugin passes them on, so any distinct pointers will do.
int32_t plugin_output_shapes(IPluginV3* plugin, Tensor const* in, int32_t nbIn, Tensor* out, int32_t nbOut) {
    std::vector<DimsExprs> from(static_cast<size_t>(nbIn)), to(static_cast<size_t>(nbOut));
    for (int32_t i = 0; i < nbIn; ++i) {
        from[i].nbDims = in[i].nbDims;
        for (int32_t d = 0; d < in[i].nbDims; ++d)
            from[i].d[d] = reinterpret_cast<IDimensionExpr const*>(static_cast<uintptr_t>(in[i].dims[d]));
    }
    alignas(16) char none[sizeof(IExprBuilder)]{};
    auto& expressions = *reinterpret_cast<IExprBuilder*>(none);
    int32_t const status = build(plugin)->getOutputShapes(from.data(), nbIn, nullptr, 0, to.data(), nbOut, expressions);
    for (int32_t i = 0; status == 0 && i < nbOut; ++i) {
        out[i].nbDims = to[i].nbDims;
        for (int32_t d = 0; d < to[i].nbDims; ++d) out[i].dims[d] = reinterpret_cast<intptr_t>(to[i].d[d]);
    }
    return status;
}

static PluginTensorDesc descriptor(Tensor const& tensor) {
    PluginTensorDesc desc{};
    desc.type = static_cast<DataType>(tensor.type);
    desc.format = static_cast<TensorFormat>(tensor.format);
    desc.dims.nbDims = tensor.nbDims;
    std::memcpy(desc.dims.d, tensor.dims, sizeof(tensor.dims));
    return desc;
}
static std::vector<PluginTensorDesc> descriptors(Tensor const* tensors, int32_t count) {
    std::vector<PluginTensorDesc> all;
    for (int32_t i = 0; i < count; ++i) all.push_back(descriptor(tensors[i]));
    return all;
}
// The batch is dynamic (-1); the maximum sizes of the profile are those of `tensors`.
static std::vector<DynamicPluginTensorDesc> ranges(Tensor const* tensors, int32_t count) {
    std::vector<DynamicPluginTensorDesc> all;
    for (int32_t i = 0; i < count; ++i) {
        DynamicPluginTensorDesc range{};
        range.desc = descriptor(tensors[i]);
        range.min = range.opt = range.max = range.desc.dims;
        range.min.d[0] = 1;
        range.desc.dims.d[0] = -1;
        all.push_back(range);
    }
    return all;
}

int32_t plugin_supports(IPluginV3* plugin, int32_t pos, Tensor const* tensors, int32_t nbIn, int32_t nbOut) {
    return build(plugin)->supportsFormatCombination(pos, ranges(tensors, nbIn + nbOut).data(), nbIn, nbOut);
}
int32_t plugin_configure(IPluginV3* plugin, Tensor const* tensors, int32_t nbIn, int32_t nbOut) {
    auto const all = ranges(tensors, nbIn + nbOut);
    return build(plugin)->configurePlugin(all.data(), nbIn, all.data() + nbIn, nbOut);
}
int64_t plugin_workspace(IPluginV3* plugin, Tensor const* tensors, int32_t nbIn, int32_t nbOut) {
    auto const all = ranges(tensors, nbIn + nbOut);
    return static_cast<int64_t>(build(plugin)->getWorkspaceSize(all.data(), nbIn, all.data() + nbIn, nbOut));
}
int32_t plugin_shape_change(IPluginV3* plugin, Tensor const* tensors, int32_t nbIn, int32_t nbOut) {
    auto const all = descriptors(tensors, nbIn + nbOut);
    return runtime(plugin)->onShapeChange(all.data(), nbIn, all.data() + nbIn, nbOut);
}
int32_t plugin_enqueue(IPluginV3* plugin, Tensor const* tensors, int32_t nbIn, int32_t nbOut, void const* const* inputs,
                       void* const* outputs, void* workspace, cudaStream_t stream) {
    auto const all = descriptors(tensors, nbIn + nbOut);
    return runtime(plugin)->enqueue(all.data(), all.data() + nbIn, inputs, outputs, workspace, stream);
}
}
