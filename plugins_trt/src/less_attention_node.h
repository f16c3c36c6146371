// A LessAttention node of a TensorRT network: its attributes, and the names, dtypes and shapes of its tensors. What is
// wrong with them is a std::invalid_argument.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <functional>
#include <string>

#include "less_attention.h"

namespace less {

// Inputs and outputs in the operator's order. Nodes without int8 slots lack their scales, key_mean and key_std, those
// without a state of 16 bits lack its scales, those without a largest distance lack rotary, those whose steps have the
// rows of the state in order lack rows.
enum Input : int32_t {
    kQ,
    kK,
    kV,
    kLogPhiQ,
    kPsiK,
    kPastKey,
    kPastValue,
    kPastPsi,
    kPastScore,
    kPastPosition,
    kPastH,
    kPastZ,
    kPastKeyScale,
    kPastValueScale,
    kPastHScale,
    kPastLength,
    kNewLength,
    kKeyMean,
    kKeyStd,
    kRotary,
    kRows,
    kInputs
};
enum Output : int32_t {
    kOut,
    kPresentKey,
    kPresentValue,
    kPresentPsi,
    kPresentScore,
    kPresentPosition,
    kPresentH,
    kPresentZ,
    kPresentKeyScale,
    kPresentValueScale,
    kPresentHScale,
    kOutputs
};

// The attributes of a node.
struct Attributes {
    AttentionRules rules;
    SlotType slotType;
    StateType stateType;
    bool rowsByIndex;

    bool int8() const { return slotType == SlotType::kInt8; }
    bool turns() const { return rules.maxDistance > 0; }
    bool means16() const { return stateType == StateType::kMeans16; }
    bool has(Input input) const;
    // The number of the node's inputs before this one.
    int32_t index(Input input) const;
    int32_t inputs() const { return index(kInputs); }
    int32_t outputs() const { return kOutputs - (means16() ? 0 : 1) - (int8() ? 0 : 2); }
    // The place of a node's input in Input.
    int32_t input(int32_t index) const;
};

// The node's input whose memory an output is written into, -1 for `out`.
constexpr int32_t aliasedInput(int32_t output) { return output == kOut ? -1 : kPastKey + output - kPresentKey; }

// A plugin field: an attribute of the node.
struct Field {
    char const* name;
    nvinfer1::PluginFieldType type;
};
inline constexpr size_t kFieldCount = 11;
Field const& fieldAt(size_t index);

[[noreturn]] void refuse(std::string const& message);

// The node's attributes from plugin fields; the message names the field.
Attributes attributesOf(nvinfer1::PluginFieldCollection const& fields);

// Below, `input` is the index of a node's input.
using TypeOf = std::function<nvinfer1::DataType(int32_t input)>;
using DimsOf = std::function<nvinfer1::Dims(int32_t input)>;

char const* nameOf(Attributes const& node, int32_t input);
nvinfer1::DataType expectedType(Attributes const& node, int32_t input, nvinfer1::DataType q);
void checkCounts(Attributes const& node, int32_t nbInputs, int32_t nbOutputs);
void checkTypes(Attributes const& node, TypeOf const& typeOf);

// The sizes of the axes, on which all inputs must agree. -1 is a size that TensorRT does not know yet; if no input has
// a size for an axis, the result is 0.
AttentionShape agreedShape(Attributes const& node, nvinfer1::DataType q, DimsOf const& dimsOf);

// Checks dtypes, shapes and rules together.
AttentionShape checkedShape(Attributes const& node, TypeOf const& typeOf, DimsOf const& dimsOf);

// The shape of a launch whose tensors have been checked.
AttentionShape shapeOf(Attributes const& node, nvinfer1::PluginTensorDesc const* in);

// The tensors of a node by name; those that it lacks are nullptr.
AttentionTensors tensorsOf(Attributes const& node, void const* const* inputs, void* const* outputs);

}  // namespace less
