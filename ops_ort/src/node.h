// A LessAttention node of an ONNX graph, independent of the provider: its attributes, its tensors, which are checked
// because what a graph states is not trusted, and what ONNX Runtime is told of the operator.
#pragma once

#include <array>
#include <exception>
#include <stdexcept>
#include <vector>

#include "abi.h"

namespace less {

// The inputs before the state, and what is in it (less_export.contract).
enum { kQ, kK, kV, kLogPhi, kPsi, kTokens };
enum { kKey, kValue, kPsiSlots, kScore, kPosition, kH, kZ, kPlain, kScales = 2 };
constexpr size_t kMost = 20;

// What the number of inputs and their dtypes say of a node.
struct Form {
    bool int8, state16, distance;

    static Form of(size_t inputs, ort::ElementType key, ort::ElementType psi);
    size_t state() const { return kPlain + (int8 ? kScales : 0) + (state16 ? 1 : 0); }
    size_t lengths() const { return kTokens + state(); }
    size_t constants() const { return lengths() + 2; }
    size_t inputs() const { return constants() + (int8 ? 2 : 0) + (distance ? 1 : 0); }
};

struct Attributes {
    float scale, decay;
    int policy;  // the codes of less_export.less.policies
    int heavy, recent, window;
    bool absorb;
    int max_distance;  // 0: q and k come rotated
};

struct Tensor {
    ort::ElementType type = ort::kUndefined;
    std::vector<int64_t> shape;
    char* data = nullptr;

    size_t bytes() const;
};

// Tensors and sizes of one call.
struct Tensors {
    Form form;
    std::array<Tensor, kMost> inputs, state;  // state: the present one
    Tensor out;
    int64_t rows, heads, query_heads, chunk, width, slots, rank;
    int64_t distances = 0, rotated = 0;  // of the table of angles

    template <class T>
    T* input(size_t i) const {
        return reinterpret_cast<T*>(inputs[i].data);
    }
};

// An error of ONNX Runtime's, on its way out of the operator.
struct Failure {
    ort::Status* status;
};

void check(ort::Status* status);
// Raises std::invalid_argument with the operator's name before `what`.
void require(bool ok, char const* what);

// Runs `body` and turns what it throws into a status.
template <class Body>
ort::Status* guarded(ort::Functions const& api, Body const& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (Failure const& failure) {
        return failure.status;
    } catch (std::invalid_argument const& error) {
        return api.status(ort::kInvalidArgument, error.what());
    } catch (std::exception const& error) {
        return api.status(ort::kFail, error.what());
    } catch (...) {
        return api.status(ort::kFail, "LessAttention: unknown error");
    }
}

Attributes read_attributes(ort::Functions const& api, ort::KernelInfo const* info);

// Reads the inputs, whose q has one of `numbers`, and checks dtypes and shapes of all of them.
void read_inputs(ort::Functions const& api, ort::KernelContext const* context, Attributes const& attributes,
                 std::vector<ort::ElementType> const& numbers, Tensors* tensors);
// Asks for the memory of the outputs.
void open_outputs(ort::Functions const& api, ort::KernelContext* context, Tensors* tensors);

ort::Status* infer(ort::CustomOp const* op, ort::ShapeInferContext* context);

// The operator with kernels of the class `Kernel`, for its provider `Kernel::kProvider`. It has one variadic input and
// output of any dtypes: a node has more of them with int8 slots, a state of 16 bits or angles.
template <class Kernel>
struct Attention : ort::CustomOp {
    using Op = ort::CustomOp;

    Attention() {
        name = [](Op const*) { return "LessAttention"; };
        provider = [](Op const*) -> char const* { return Kernel::kProvider; };
        input_type = output_type = [](Op const*, size_t) { return ort::kUndefined; };
        input_count = output_count = [](Op const*) -> size_t { return 1; };
        input_kind = output_kind = [](Op const*, size_t) { return ort::kVariadic; };
        input_memory = [](Op const*, size_t) { return 0; };  // the provider's own
        variadic_inputs = variadic_outputs = [](Op const*) { return 1; };
        inputs_alike = outputs_alike = [](Op const*) { return 0; };
        first_version = [](Op const*) { return 1; };
        last_version = [](Op const*) { return 2; };
        create_kernel2 = [](Op const*, ort::Api const* table, ort::KernelInfo const* info, void** kernel) {
            return guarded(ort::Functions(table), [&] { *kernel = new Kernel(table, info); });
        };
        compute2 = [](void* kernel, ort::KernelContext* context) {
            return static_cast<Kernel*>(kernel)->compute(context);
        };
        destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        Op::infer = less::infer;
    }
};

// Adds an operator, which lives as long as the library, to a session's options.
ort::Status* enlist(ort::SessionOptions* options, ort::ApiBase const* base, ort::CustomOp const* op);

}  // namespace less
