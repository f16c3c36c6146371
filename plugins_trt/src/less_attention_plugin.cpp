#include "less_attention_plugin.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <memory>
#include <stdexcept>

#include "plugin_library.h"

namespace less {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

// An input of the operator: its axes by letter (Q: query heads, H: KV heads) and its dtype ('T': that of q, 'f':
// float32, 'i': int32).
struct TensorRule {
    char const* name;
    char const* axes;
    char dtype;
};

constexpr TensorRule kRules[kInputs] = {
    {"q", "BQTD", 'T'},          {"k", "BHTD", 'T'},
    {"v", "BHTD", 'T'},          {"log_phi_q", "BQTR", 'f'},
    {"psi_k", "BHTR", 'T'},      {"past_key", "BHCD", 'T'},
    {"past_value", "BHCD", 'T'}, {"past_psi", "BHCR", 'T'},
    {"past_score", "BHC", 'f'},  {"past_position", "BHC", 'i'},
    {"past_h", "BHRD", 'f'},     {"past_z", "BHR", 'f'},
    {"past_length", "B", 'i'},   {"new_length", "B", 'i'},
};

constexpr struct {
    char const* name;
    PluginFieldType type;
} kFields[] = {
    {"scale", PluginFieldType::kFLOAT32}, {"policy", PluginFieldType::kINT32}, {"heavy", PluginFieldType::kINT32},
    {"recent", PluginFieldType::kINT32},  {"window", PluginFieldType::kINT32}, {"absorb", PluginFieldType::kINT32},
    {"decay", PluginFieldType::kFLOAT32},
};
constexpr size_t kRequired = 6;  // graphs of version 1 of the operator have no decay: their scores never fade

[[noreturn]] void refuse(std::string const& message) { throw std::invalid_argument(message); }

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

std::string text(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
            return "float32";
        case DataType::kHALF:
            return "float16";
        case DataType::kBF16:
            return "bfloat16";
        case DataType::kINT32:
            return "int32";
        case DataType::kINT64:
            return "int64";
        default:
            return "data type " + std::to_string(static_cast<int32_t>(type));
    }
}

std::string text(Dims const& dims) {
    std::string sizes;
    for (int32_t i = 0; i < dims.nbDims; ++i) sizes += (i ? "," : "") + std::to_string(dims.d[i]);
    return "[" + sizes + "]";
}

void checkCounts(int32_t nbInputs, int32_t nbOutputs) {
    if (nbInputs != kInputs || nbOutputs != kOutputs)
        refuse("takes " + std::to_string(kInputs) + " inputs and has " + std::to_string(kOutputs) + " outputs, not " +
               std::to_string(nbInputs) + " and " + std::to_string(nbOutputs));
}

DType computeDType(DataType type) {
    switch (type) {
        case DataType::kFLOAT:
            return DType::kFloat32;
        case DataType::kHALF:
            return DType::kFloat16;
        case DataType::kBF16:
            return DType::kBFloat16;
        default:
            refuse("q is " + text(type) + ", but must be float16, bfloat16 or float32");
    }
}

DataType expectedType(int32_t input, DataType q) {
    char const dtype = kRules[input].dtype;
    return dtype == 'f' ? DataType::kFLOAT : dtype == 'i' ? DataType::kINT32 : q;
}

void checkType(int32_t input, DataType type, DataType q) {
    if (type != expectedType(input, q))
        refuse(std::string(kRules[input].name) + " is " + text(type) + ", but must be " + text(expectedType(input, q)));
}

// The sizes of the axes, on which all inputs must agree. -1 is a size that TensorRT does not know yet; if no input has
// a size for an axis, the result is 0.
template <typename DimsOf>
AttentionShape agreedShape(DType dtype, DimsOf const& dimsOf) {
    constexpr char kAxes[] = "BQHTDCR";
    int64_t sizes[sizeof(kAxes)] = {};
    for (int32_t input = 0; input < kInputs; ++input) {
        TensorRule const& rule = kRules[input];
        Dims const dims = dimsOf(input);
        if (dims.nbDims != static_cast<int32_t>(std::strlen(rule.axes)))
            refuse(std::string(rule.name) + " has shape " + text(dims) + ", but must have " +
                   std::to_string(std::strlen(rule.axes)) + " dimensions");
        for (int32_t i = 0; i < dims.nbDims; ++i) {
            int64_t& size = sizes[std::strchr(kAxes, rule.axes[i]) - kAxes];
            if (dims.d[i] == -1) continue;
            if (dims.d[i] <= 0 || dims.d[i] > INT32_MAX || (size != 0 && size != dims.d[i]))
                refuse(std::string(rule.name) + " has shape " + text(dims) + ", but dimension " + std::to_string(i) +
                       (size != 0 ? " must be " + std::to_string(size) : " is out of range"));
            size = dims.d[i];
        }
    }
    auto const at = [&](char axis) { return static_cast<int32_t>(sizes[std::strchr(kAxes, axis) - kAxes]); };
    if (at('H') != 0 && at('Q') % at('H') != 0)
        refuse("q has " + std::to_string(at('Q')) + " heads, not a multiple of the " + std::to_string(at('H')) +
               " KV heads");
    return {dtype, at('B'), at('Q'), at('H'), at('T'), at('D'), at('C'), at('R')};
}

// Checks dtypes, shapes and rules together.
template <typename TypeOf, typename DimsOf>
AttentionShape checkedShape(AttentionRules const& rules, TypeOf const& typeOf, DimsOf const& dimsOf) {
    DType const dtype = computeDType(typeOf(kQ));
    for (int32_t input = 0; input < kInputs; ++input) checkType(input, typeOf(input), typeOf(kQ));
    AttentionShape const shape = agreedShape(dtype, dimsOf);
    if (char const* why = whyUnsupported(shape, rules)) refuse(why);
    return shape;
}

AttentionShape shapeOf(PluginTensorDesc const* in) {
    Dims const &q = in[kQ].dims, &slots = in[kPastKey].dims;
    auto const n = [](int64_t size) { return static_cast<int32_t>(size); };
    return {computeDType(in[kQ].type), n(q.d[0]), n(q.d[1]), n(slots.d[1]), n(q.d[2]), n(q.d[3]), n(slots.d[2]),
            n(in[kPastZ].dims.d[2])};
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

void check(cudaError_t error, char const* operation) {
    if (error != cudaSuccess) refuse(std::string(operation) + " failed: " + cudaGetErrorString(error));
}

int32_t integer(PluginField const& field) {
    int64_t value = 0;
    if (field.type == PluginFieldType::kINT32)
        value = *static_cast<int32_t const*>(field.data);
    else if (field.type == PluginFieldType::kINT64)
        value = *static_cast<int64_t const*>(field.data);
    else
        refuse(std::string("attribute ") + field.name + " is not an integer");
    if (value < 0 || value > INT32_MAX)
        refuse(std::string("attribute ") + field.name + " is " + std::to_string(value) + ", out of range");
    return static_cast<int32_t>(value);
}

float number(PluginField const& field) {
    double value = NAN;
    if (field.type == PluginFieldType::kFLOAT32)
        value = *static_cast<float const*>(field.data);
    else if (field.type == PluginFieldType::kFLOAT64)
        value = *static_cast<double const*>(field.data);
    if (!std::isfinite(value)) refuse(std::string("attribute ") + field.name + " is not a finite float");
    return static_cast<float>(value);
}

}  // namespace

AttentionRules rulesOf(nvinfer1::PluginFieldCollection const& fields) {
    PluginField const* attributes[std::size(kFields)] = {};
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        PluginField const& field = fields.fields[i];
        size_t index = 0;
        while (index < std::size(kFields) && std::strcmp(field.name, kFields[index].name) != 0) ++index;
        if (index == std::size(kFields)) refuse(std::string("unknown attribute ") + field.name);
        if (attributes[index] != nullptr) refuse(std::string("attribute ") + field.name + " is given twice");
        if (field.data == nullptr || field.length != 1)
            refuse(std::string("attribute ") + field.name + " must have one value, not " +
                   std::to_string(field.data == nullptr ? 0 : field.length));
        attributes[index] = &field;
    }
    for (size_t i = 0; i < kRequired; ++i)
        if (attributes[i] == nullptr) refuse(std::string("attribute ") + kFields[i].name + " is missing");
    AttentionRules rules{number(*attributes[0]),
                         Policy{integer(*attributes[1])},
                         integer(*attributes[2]),
                         integer(*attributes[3]),
                         integer(*attributes[4]),
                         integer(*attributes[5]),
                         attributes[6] == nullptr ? 1.f : number(*attributes[6])};
    if (rules.policy > Policy::kFull) refuse("attribute policy must be 0 to 4");
    if (rules.absorb > 1) refuse("attribute absorb must be 0 or 1");
    if (rules.recent < 1) refuse("attribute recent must be at least 1");
    if (!(rules.decay > 0.f && rules.decay <= 1.f)) refuse("attribute decay must be above 0 and at most 1");
    return rules;
}

// ---------------------------------------------------------------- the plugin

LessAttentionPlugin::LessAttentionPlugin(AttentionRules const& rules) : rules_(rules) {
    description_ = "scale=" + std::to_string(rules_.scale) +
                   " policy=" + std::to_string(static_cast<int>(rules_.policy)) +
                   " heavy=" + std::to_string(rules_.heavy) + " recent=" + std::to_string(rules_.recent) +
                   " window=" + std::to_string(rules_.window) + " absorb=" + std::to_string(rules_.absorb) +
                   " decay=" + std::to_string(rules_.decay);
    void const* const values[] = {&rules_.scale,  &rules_.policy, &rules_.heavy, &rules_.recent,
                                  &rules_.window, &rules_.absorb, &rules_.decay};
    for (size_t i = 0; i < std::size(kFields); ++i) fields_[i] = {kFields[i].name, values[i], kFields[i].type, 1};
    collection_ = {static_cast<int32_t>(std::size(kFields)), fields_};
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
    return guarded<nvinfer1::IPluginV3*>(nullptr, [&] { return new LessAttentionPlugin(rules_); });
}

int32_t LessAttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const* inputs,
                                                int32_t nbInputs) const noexcept {
    return guarded(-1, [&] {
        checkCounts(nbInputs, nbOutputs);
        computeDType(inputs[kQ]);
        for (int32_t input = 0; input < kInputs; ++input) checkType(input, inputs[input], inputs[kQ]);
        for (int32_t output = 0; output < kOutputs; ++output)
            outputs[output] = inputs[output == kOut ? kQ : aliasedInput(output)];
        return 0;
    });
}

int32_t LessAttentionPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
                                             nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs,
                                             int32_t nbOutputs, nvinfer1::IExprBuilder&) noexcept {
    return guarded(-1, [&] {
        checkCounts(nbInputs, nbOutputs);
        for (int32_t output = 0; output < kOutputs; ++output)
            outputs[output] = inputs[output == kOut ? kQ : aliasedInput(output)];
        return 0;
    });
}

bool LessAttentionPlugin::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                                    int32_t nbOutputs) noexcept {
    return guarded(false, [&] {
        checkCounts(nbInputs, nbOutputs);
        PluginTensorDesc const& tensor = inOut[pos].desc;
        int32_t const input = pos < kInputs ? pos : pos == kInputs + kOut ? kQ : aliasedInput(pos - kInputs);
        if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
        if (pos == kQ)
            return tensor.type == DataType::kHALF || tensor.type == DataType::kBF16 || tensor.type == DataType::kFLOAT;
        return tensor.type == expectedType(input, inOut[kQ].desc.type);
    });
}

int32_t LessAttentionPlugin::getAliasedInput(int32_t output) noexcept {
    return output >= 0 && output < kOutputs ? aliasedInput(output) : -1;
}

int32_t LessAttentionPlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                             DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept {
    return guarded(-1, [&] {
        checkCounts(nbInputs, nbOutputs);
        checkedShape(rules_, [&](int32_t i) { return in[i].desc.type; }, [&](int32_t i) { return in[i].max; });
        return 0;
    });
}

size_t LessAttentionPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                             DynamicPluginTensorDesc const*, int32_t nbOutputs) const noexcept {
    return guarded(size_t{0}, [&] {
        checkCounts(nbInputs, nbOutputs);
        DType const dtype = computeDType(in[kQ].desc.type);
        AttentionShape const shape = agreedShape(dtype, [&](int32_t i) { return in[i].max; });
        return aligned(workspaceBytes(shape, rules_)) + kCounterBytes;
    });
}

// ---------------------------------------------------------------- at run time

nvinfer1::IPluginV3* LessAttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    return guarded<nvinfer1::IPluginV3*>(nullptr, [&] {
        auto copy = std::make_unique<LessAttentionPlugin>(rules_);
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
        checkCounts(nbInputs, nbOutputs);
        AttentionShape const shape =
            checkedShape(rules_, [&](int32_t i) { return in[i].type; }, [&](int32_t i) { return in[i].dims; });
        // TensorRT also calls this while it builds, possibly without a GPU.
        cudaError_t const status = prepare(shape, rules_);
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
        for (int32_t i = 0; i < kInputs; ++i)
            if (inputs[i] == nullptr) refuse(std::string(kRules[i].name) + " has no memory");
        for (int32_t i = 0; i < kOutputs; ++i)
            if (outputs[i] == nullptr) refuse("output " + std::to_string(i) + " has no memory");
        AttentionShape const shape = shapeOf(in);
        auto const floats = [&](int32_t i) { return static_cast<float const*>(inputs[i]); };
        auto const ints = [&](int32_t i) { return static_cast<int32_t const*>(inputs[i]); };
        AttentionTensors const tensors{inputs[kQ],
                                       inputs[kK],
                                       inputs[kV],
                                       floats(kLogPhiQ),
                                       inputs[kPsiK],
                                       inputs[kPastKey],
                                       inputs[kPastValue],
                                       inputs[kPastPsi],
                                       floats(kPastScore),
                                       ints(kPastPosition),
                                       floats(kPastH),
                                       floats(kPastZ),
                                       ints(kPastLength),
                                       ints(kNewLength),
                                       outputs[kOut],
                                       outputs[kPresentKey],
                                       outputs[kPresentValue],
                                       outputs[kPresentPsi],
                                       static_cast<float*>(outputs[kPresentScore]),
                                       static_cast<int32_t*>(outputs[kPresentPosition]),
                                       static_cast<float*>(outputs[kPresentH]),
                                       static_cast<float*>(outputs[kPresentZ])};
        uint32_t* counters = counters_;
        if (counters == nullptr) {  // see attachToContext
            if (workspace == nullptr) refuse("enqueue without workspace");
            size_t const offset = aligned(workspaceBytes(shape, rules_));
            counters = reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + offset);
            check(cudaMemsetAsync(counters, 0, kCounterBytes, stream), "cudaMemsetAsync");
        }
        check(less::enqueue(shape, rules_, tensors, workspace, counters, stream), "the launch");
        return 0;
    });
}

nvinfer1::PluginFieldCollection const* LessAttentionPlugin::getFieldsToSerialize() noexcept { return &collection_; }

// ---------------------------------------------------------------- the creator

LessAttentionCreator::LessAttentionCreator() {
    for (size_t i = 0; i < std::size(kFields); ++i) fields_[i] = {kFields[i].name, nullptr, kFields[i].type, 1};
    collection_ = {static_cast<int32_t>(std::size(kFields)), fields_};
}

nvinfer1::IPluginV3* LessAttentionCreator::createPlugin(char const*, nvinfer1::PluginFieldCollection const* fields,
                                                        nvinfer1::TensorRTPhase) noexcept {
    return guarded<nvinfer1::IPluginV3*>(nullptr, [&] {
        if (fields == nullptr) refuse("no attributes");
        return new LessAttentionPlugin(rulesOf(*fields));
    });
}

}  // namespace less
