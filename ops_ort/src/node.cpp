#include "node.h"

#include <algorithm>
#include <atomic>
#include <string>

namespace less {

using ort::ElementType;
using ort::Functions;
using ort::Status;

Form Form::of(size_t inputs, ElementType key, ElementType psi) {
    Form form{key == ort::kInt8, psi == ort::kInt8, false};
    form.distance = inputs > form.constants() + (form.int8 ? 2 : 0);
    return form;
}

size_t Tensor::bytes() const {
    size_t size = type == ort::kInt8 ? 1 : type == ort::kHalf || type == ort::kBFloat16 ? 2 : 4;
    for (int64_t const n : shape) size *= n;
    return size;
}

void check(Status* status) {
    if (status) throw Failure{status};
}

void require(bool ok, char const* what) {
    if (!ok) throw std::invalid_argument(std::string("LessAttention: ") + what);
}

// -------------------------------------------------------------------------------------------------- attributes

namespace {

template <class T>
T attribute(Functions const& api, ort::KernelInfo const* info, char const* name) {
    T value;
    check(api.attribute(info, name, &value));
    return value;
}

// An attribute that not every node has.
template <class T>
T attribute(Functions const& api, ort::KernelInfo const* info, char const* name, T otherwise) {
    T value;
    Status* missing = api.attribute(info, name, &value);
    if (!missing) return value;
    api.release(missing);
    return otherwise;
}

int number(int64_t value) {
    require(value >= 0 && value < 1 << 30, "an attribute is out of range");
    return static_cast<int>(value);
}

}  // namespace

Attributes read_attributes(Functions const& api, ort::KernelInfo const* info) {
    auto const integer = [&](char const* name) { return attribute<int64_t>(api, info, name); };
    Attributes node;
    node.scale = attribute<float>(api, info, "scale");
    node.decay = attribute(api, info, "decay", 1.0f);  // version 1 of the operator has none
    int64_t const policy = integer("policy");
    require(policy >= 0 && policy <= 4, "unknown policy");
    node.policy = static_cast<int>(policy);
    node.heavy = number(integer("heavy")), node.recent = number(integer("recent"));
    node.window = number(integer("window"));
    node.absorb = integer("absorb") != 0;
    node.max_distance = number(attribute(api, info, "max_distance", int64_t{0}));
    return node;
}

// ----------------------------------------------------------------------------------------------------- tensors

namespace {

void* data_of(Functions const& api, ort::Value* value) {
    void* data;
    check(api.data(value, &data));
    return data;
}

void read(Functions const& api, ort::Value const* value, Tensor* tensor) {
    ort::TensorInfo* info;
    check(api.info(value, &info));
    size_t rank;
    Status* status = api.type(info, &tensor->type);
    if (!status) status = api.rank(info, &rank);
    if (!status) {
        tensor->shape.resize(rank);
        status = api.shape(info, tensor->shape.data(), rank);
    }
    api.release(info);
    check(status);
    tensor->data = static_cast<char*>(data_of(api, const_cast<ort::Value*>(value)));
}

}  // namespace

void read_inputs(Functions const& api, ort::KernelContext const* context, Attributes const& attributes,
                 std::vector<ElementType> const& numbers, Tensors* tensors) {
    size_t count, outputs;
    check(api.inputs(context, &count));
    check(api.outputs(context, &outputs));
    require(count >= kTokens + kPlain + 2 && count <= kMost, "wrong number of inputs");
    auto& x = tensors->inputs;
    for (size_t i = 0; i < count; ++i) {
        ort::Value const* value;
        check(api.input(context, i, &value));
        require(value != nullptr, "an input is missing");
        read(api, value, &x[i]);
    }
    Form const form = tensors->form = Form::of(count, x[kTokens + kKey].type, x[kTokens + kPsiSlots].type);
    require(count == form.inputs() && outputs == 1 + form.state(), "wrong number of inputs or outputs");
    require(x[kQ].shape.size() == 4 && x[kTokens + kKey].shape.size() == 4 && x[kPsi].shape.size() == 4, "wrong rank");

    int64_t const rows = x[kQ].shape[0], query_heads = x[kQ].shape[1], chunk = x[kQ].shape[2], width = x[kQ].shape[3];
    int64_t const heads = x[kTokens + kKey].shape[1], slots = x[kTokens + kKey].shape[2], rank = x[kPsi].shape[3];
    require(heads > 0 && query_heads % heads == 0 && chunk > 0 && width > 0 && rank > 0, "wrong sizes");
    for (int64_t const size : {query_heads, chunk, width, slots, rank, query_heads * chunk})
        require(size < 1 << 30, "a tensor is too large");
    require(slots == static_cast<int64_t>(attributes.heavy) + attributes.recent,
            "heavy + recent is not the number of slots");
    tensors->rows = rows, tensors->heads = heads, tensors->query_heads = query_heads, tensors->chunk = chunk;
    tensors->width = width, tensors->slots = slots, tensors->rank = rank;

    ElementType const number = x[kQ].type, real = ort::kFloat, slot = form.int8 ? ort::kInt8 : number,
                      psi = form.state16 ? ort::kInt8 : number, h = form.state16 ? ort::kInt8 : real;
    require(std::find(numbers.begin(), numbers.end(), number) != numbers.end(),
            "the operator does not compute in the dtype of q");
    auto const is = [&](size_t i, ElementType type, std::vector<int64_t> shape) {
        require(x[i].type == type, "an input has another dtype than goes with that of q");
        require(x[i].shape == shape, "an input has another shape");
    };
    is(kQ, number, {rows, query_heads, chunk, width});
    is(kK, number, {rows, heads, chunk, width});
    is(kV, number, {rows, heads, chunk, width});
    is(kLogPhi, real, {rows, query_heads, chunk, rank});
    is(kPsi, number, {rows, heads, chunk, rank});
    is(kTokens + kKey, slot, {rows, heads, slots, width});
    is(kTokens + kValue, slot, {rows, heads, slots, width});
    is(kTokens + kPsiSlots, psi, {rows, heads, slots, rank});
    is(kTokens + kScore, real, {rows, heads, slots});
    is(kTokens + kPosition, ort::kInt32, {rows, heads, slots});
    is(kTokens + kH, h, {rows, heads, rank, form.state16 ? 2 * width : width});
    is(kTokens + kZ, real, {rows, heads, rank});
    for (int i = 0; form.int8 && i < kScales; ++i) is(kTokens + kPlain + i, real, {rows, heads, slots});
    if (form.state16) is(kTokens + kPlain + kScales, real, {rows, heads, rank});
    for (int i = 0; i < 2; ++i) is(form.lengths() + i, ort::kInt32, {rows});
    for (int i = 0; form.int8 && i < 2; ++i) is(form.constants() + i, real, {heads, width});
    require(!form.state16 || form.int8, "a state of 16 bits goes with int8 slots");
    require(form.distance == (attributes.max_distance > 0), "a largest distance goes with a table of angles");
    if (form.distance) {
        Tensor const& table = x[form.inputs() - 1];
        require(table.type == real && table.shape.size() == 2 && table.shape[0] > attributes.max_distance &&
                    table.shape[0] >= chunk && table.shape[1] % 2 == 0 && table.shape[1] <= width,
                "the table of angles has another shape");
        tensors->distances = table.shape[0], tensors->rotated = table.shape[1];
    }
}

void open_outputs(Functions const& api, ort::KernelContext* context, Tensors* tensors) {
    for (size_t i = 0; i < 1 + tensors->form.state(); ++i) {
        Tensor& present = i ? tensors->state[i - 1] : tensors->out;
        present = tensors->inputs[i ? kTokens + i - 1 : size_t{kQ}];
        ort::Value* value;
        check(api.output(context, i, present.shape.data(), present.shape.size(), &value));
        present.data = static_cast<char*>(data_of(api, value));
    }
}

// ----------------------------------------------------------------------------------------------- ONNX Runtime

namespace {

std::atomic<Functions const*> functions;  // for shape inference, which is not told them

}  // namespace

Status* infer(ort::CustomOp const*, ort::ShapeInferContext* context) {
    Functions const& api = *functions;
    return guarded(api, [&] {
        size_t count;
        check(api.inferred_inputs(context, &count));
        auto const type_of = [&](size_t i) {
            ort::TensorInfo* info;
            ElementType type;
            check(api.inferred_input(context, i, &info));
            check(api.type(info, &type));
            return type;
        };
        require(count >= kTokens + kPlain + 2, "wrong number of inputs");
        Form const form = Form::of(count, type_of(kTokens + kKey), type_of(kTokens + kPsiSlots));
        for (size_t i = 0; i < 1 + form.state(); ++i) {
            ort::TensorInfo* info;
            check(api.inferred_input(context, i == 0 ? size_t{kQ} : kTokens + i - 1, &info));
            check(api.infer_output(context, i, info));
        }
    });
}

Status* enlist(ort::SessionOptions* options, ort::ApiBase const* base, ort::CustomOp const* op) {
    static ort::ApiBase const* const first = base;
    static ort::Api const* const table = base->get(ort::kVersion);
    if (!table) return Functions(base->get(1)).status(ort::kFail, "the operator needs ONNX Runtime 1.22 or newer");
    static Functions const api(table);
    if (first != base) return Functions(base->get(1)).status(ort::kFail, "another ONNX Runtime has the operator");
    functions = &api;
    static ort::CustomOpDomain* domain = nullptr;  // of the process, for all sessions
    static Status* const status = [&] {
        Status* failed = api.domain("less", &domain);
        return failed ? failed : api.add(domain, op);
    }();
    if (status || !domain) return api.status(ort::kFail, "the operator cannot be registered");
    return api.add(options, domain);
}

}  // namespace less
