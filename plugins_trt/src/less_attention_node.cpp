#include "less_attention_node.h"

#include <cmath>
#include <cstring>
#include <iterator>
#include <stdexcept>

namespace less {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

// An input of the operator: its axes by letter (N: rows of the state, Q: query heads, H: KV heads, P: distances,
// E: rotated channels) and its dtype ('T': that of q, 'S': that of the slots, 'P' and 'H': those of psi in slots and of
// past_h, 'f': float32, 'i': int32).
struct TensorRule {
    char const* name;
    char const* axes;
    char dtype;
};

constexpr TensorRule kRules[kInputs] = {
    {"q", "BQTD", 'T'},
    {"k", "BHTD", 'T'},
    {"v", "BHTD", 'T'},
    {"log_phi_q", "BQTR", 'f'},
    {"psi_k", "BHTR", 'T'},
    {"past_key", "NHCD", 'S'},
    {"past_value", "NHCD", 'S'},
    {"past_psi", "NHCR", 'P'},
    {"past_score", "NHC", 'f'},
    {"past_position", "NHC", 'i'},
    {"past_h", "NHRD", 'H'},
    {"past_z", "NHR", 'f'},
    {"past_key_scale", "NHC", 'f'},
    {"past_value_scale", "NHC", 'f'},
    {"past_h_scale", "NHR", 'f'},
    {"past_length", "B", 'i'},
    {"new_length", "B", 'i'},
    {"key_mean", "HD", 'f'},
    {"key_std", "HD", 'f'},
    {"rotary", "PE", 'f'},
    {"rows", "B", 'i'},
};

constexpr Field kFields[] = {
    {"scale", PluginFieldType::kFLOAT32},       {"policy", PluginFieldType::kINT32},
    {"heavy", PluginFieldType::kINT32},         {"recent", PluginFieldType::kINT32},
    {"window", PluginFieldType::kINT32},        {"absorb", PluginFieldType::kINT32},
    {"decay", PluginFieldType::kFLOAT32},       {"slot_bits", PluginFieldType::kINT32},
    {"state_bits", PluginFieldType::kINT32},    {"max_distance", PluginFieldType::kINT32},
    {"rows_by_index", PluginFieldType::kINT32},
};
// Graphs of version 1 of the operator have no decay: their scores never fade. Without slot_bits, slots are not int8;
// without state_bits, H has float32 sums; without max_distance, q and k come rotated; without rows_by_index, row b of a
// step is row b of the state.
constexpr size_t kRequired = 6;
static_assert(std::size(kFields) == kFieldCount, "as many as the header says");

TensorRule const& ruleOf(Attributes const& node, int32_t index) { return kRules[node.input(index)]; }

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
        case DataType::kINT8:
            return "int8";
        default:
            return "data type " + std::to_string(static_cast<int32_t>(type));
    }
}

std::string text(Dims const& dims) {
    std::string sizes;
    for (int32_t i = 0; i < dims.nbDims; ++i) sizes += (i ? "," : "") + std::to_string(dims.d[i]);
    return "[" + sizes + "]";
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

void refuse(std::string const& message) { throw std::invalid_argument(message); }

Field const& fieldAt(size_t index) { return kFields[index]; }

bool Attributes::has(Input input) const {
    switch (input) {
        case kPastKeyScale:
        case kPastValueScale:
        case kKeyMean:
        case kKeyStd:
            return int8();
        case kPastHScale:
            return means16();
        case kRotary:
            return turns();
        case kRows:
            return rowsByIndex;
        default:
            return true;
    }
}

int32_t Attributes::index(Input input) const {
    int32_t before = 0;
    for (int32_t i = 0; i < input; ++i) before += has(Input(i));
    return before;
}

int32_t Attributes::input(int32_t index) const {
    int32_t place = 0;
    for (int32_t left = index;; ++place) {
        if (has(Input(place)) && left-- == 0) return place;
    }
}

char const* nameOf(Attributes const& node, int32_t input) { return ruleOf(node, input).name; }

Attributes attributesOf(nvinfer1::PluginFieldCollection const& fields) {
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
                         attributes[6] == nullptr ? 1.f : number(*attributes[6]),
                         attributes[9] == nullptr ? 0 : integer(*attributes[9])};
    if (rules.policy > Policy::kFull) refuse("attribute policy must be 0 to 4");
    if (rules.absorb > 1) refuse("attribute absorb must be 0 or 1");
    if (rules.recent < 1) refuse("attribute recent must be at least 1");
    if (!(rules.decay > 0.f && rules.decay <= 1.f)) refuse("attribute decay must be above 0 and at most 1");
    int32_t const bits = attributes[7] == nullptr ? 0 : integer(*attributes[7]);
    if (bits != 0 && bits != 8) refuse("attribute slot_bits must be 0 or 8");
    int32_t const state = attributes[8] == nullptr ? 0 : integer(*attributes[8]);
    if (state != 0 && state != 16 && state != 32) refuse("attribute state_bits must be 16 or 32");
    StateType const stateType = state == 16 ? StateType::kMeans16 : StateType::kSums32;
    if (stateType == StateType::kMeans16 && (bits != 8 || rules.absorb == 0))
        refuse("attribute state_bits is 16, which needs slot_bits 8 and absorb 1");
    int32_t const byIndex = attributes[10] == nullptr ? 0 : integer(*attributes[10]);
    if (byIndex > 1) refuse("attribute rows_by_index must be 0 or 1");
    return {rules, SlotType{bits}, stateType, byIndex == 1};
}

void checkCounts(Attributes const& node, int32_t nbInputs, int32_t nbOutputs) {
    if (nbInputs != node.inputs() || nbOutputs != node.outputs())
        refuse("takes " + std::to_string(node.inputs()) + " inputs and has " + std::to_string(node.outputs()) +
               " outputs, not " + std::to_string(nbInputs) + " and " + std::to_string(nbOutputs));
}

DataType expectedType(Attributes const& node, int32_t input, DataType q) {
    char const dtype = ruleOf(node, input).dtype;
    if (dtype == 'S' && node.int8()) return DataType::kINT8;
    if ((dtype == 'P' || dtype == 'H') && node.means16()) return DataType::kINT8;
    return dtype == 'f' || dtype == 'H' ? DataType::kFLOAT : dtype == 'i' ? DataType::kINT32 : q;
}

void checkTypes(Attributes const& node, TypeOf const& typeOf) {
    computeDType(typeOf(kQ));
    for (int32_t input = 0; input < node.inputs(); ++input) {
        DataType const type = typeOf(input), expected = expectedType(node, input, typeOf(kQ));
        if (type != expected)
            refuse(std::string(nameOf(node, input)) + " is " + text(type) + ", but must be " + text(expected));
    }
}

AttentionShape agreedShape(Attributes const& node, DataType q, DimsOf const& dimsOf) {
    constexpr char kAxes[] = "BNQHTDCRPE";
    int64_t sizes[sizeof(kAxes)] = {};
    for (int32_t input = 0; input < node.inputs(); ++input) {
        TensorRule const& rule = ruleOf(node, input);
        Dims const dims = dimsOf(input);
        if (dims.nbDims != static_cast<int32_t>(std::strlen(rule.axes)))
            refuse(std::string(rule.name) + " has shape " + text(dims) + ", but must have " +
                   std::to_string(std::strlen(rule.axes)) + " dimensions");
        for (int32_t i = 0; i < dims.nbDims; ++i) {
            char const axis = rule.axes[i] == 'N' && !node.rowsByIndex ? 'B' : rule.axes[i];
            int64_t& size = sizes[std::strchr(kAxes, axis) - kAxes];
            int64_t const planes = rule.dtype == 'H' && rule.axes[i] == 'D' && node.means16() ? 2 : 1;
            if (dims.d[i] == -1) continue;
            if (dims.d[i] <= 0 || dims.d[i] > INT32_MAX || dims.d[i] % planes != 0 ||
                (size != 0 && planes * size != dims.d[i]))
                refuse(std::string(rule.name) + " has shape " + text(dims) + ", but dimension " + std::to_string(i) +
                       (size != 0 ? " must be " + std::to_string(planes * size) : " is out of range"));
            size = dims.d[i] / planes;
        }
    }
    auto const at = [&](char axis) { return static_cast<int32_t>(sizes[std::strchr(kAxes, axis) - kAxes]); };
    if (at('H') != 0 && at('Q') % at('H') != 0)
        refuse("q has " + std::to_string(at('Q')) + " heads, not a multiple of the " + std::to_string(at('H')) +
               " KV heads");
    return {computeDType(q), at('B'),       at('Q'), at('H'), at('T'),        at('D'), at('C'),
            at('R'),         node.slotType, at('P'), at('E'), node.stateType, at('N')};
}

AttentionShape checkedShape(Attributes const& node, TypeOf const& typeOf, DimsOf const& dimsOf) {
    checkTypes(node, typeOf);
    AttentionShape const shape = agreedShape(node, typeOf(kQ), dimsOf);
    if (char const* why = whyUnsupported(shape, node.rules)) refuse(why);
    if (node.turns() && shape.distances < shape.chunk)
        refuse("rotary has " + std::to_string(shape.distances) + " rows, but the chunk " + std::to_string(shape.chunk) +
               " tokens");
    if (node.rowsByIndex && shape.batch > shape.stateRows)
        refuse("a step has " + std::to_string(shape.batch) + " rows, but the state " + std::to_string(shape.stateRows));
    return shape;
}

AttentionShape shapeOf(Attributes const& node, PluginTensorDesc const* in) {
    Dims const &q = in[kQ].dims, &slots = in[kPastKey].dims;
    auto const n = [](int64_t size) { return static_cast<int32_t>(size); };
    AttentionShape shape{
        computeDType(in[kQ].type), n(q.d[0]),    n(q.d[1]), n(slots.d[1]), n(q.d[2]), n(q.d[3]), n(slots.d[2]),
        n(in[kPastZ].dims.d[2]),   node.slotType};
    shape.stateType = node.stateType;
    if (node.rowsByIndex) shape.stateRows = n(slots.d[0]);
    if (node.turns()) {
        Dims const& table = in[node.index(kRotary)].dims;
        shape.distances = n(table.d[0]);
        shape.rotary = n(table.d[1]);
    }
    return shape;
}

AttentionTensors tensorsOf(Attributes const& node, void const* const* inputs, void* const* outputs) {
    void const* in[kInputs] = {};
    void* out[kOutputs] = {};
    for (int32_t i = 0; i < node.inputs(); ++i) in[node.input(i)] = inputs[i];
    for (int32_t i = 0; i < node.outputs(); ++i) out[i] = outputs[i];
    auto const floats = [&](Input i) { return static_cast<float const*>(in[i]); };
    auto const ints = [&](Input i) { return static_cast<int32_t const*>(in[i]); };
    auto const results = [&](Output i) { return static_cast<float*>(out[i]); };
    return {in[kQ],
            in[kK],
            in[kV],
            floats(kLogPhiQ),
            in[kPsiK],
            in[kPastKey],
            in[kPastValue],
            in[kPastPsi],
            floats(kPastScore),
            ints(kPastPosition),
            in[kPastH],
            floats(kPastZ),
            floats(kPastKeyScale),
            floats(kPastValueScale),
            floats(kPastHScale),
            ints(kPastLength),
            ints(kNewLength),
            floats(kKeyMean),
            floats(kKeyStd),
            floats(kRotary),
            ints(kRows),
            out[kOut],
            out[kPresentKey],
            out[kPresentValue],
            out[kPresentPsi],
            results(kPresentScore),
            static_cast<int32_t*>(out[kPresentPosition]),
            out[kPresentH],
            results(kPresentZ),
            results(kPresentKeyScale),
            results(kPresentValueScale),
            results(kPresentHScale)};
}

}  // namespace less
