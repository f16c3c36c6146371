// The part of ONNX Runtime's C interface that a custom operator needs.
//
// No package that pip installs has onnxruntime_c_api.h, so what it fixes for binary compatibility is written down here:
// the place of each function in the table OrtApi, to which versions only append, and the layout of OrtCustomOp
// (ONNX Runtime's include/onnxruntime/core/session/onnxruntime_c_api.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

// Version of the interface that the library asks for: all of it is in ONNX Runtime 1.22 and later.
constexpr uint32_t kVersion = 22;

struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct Status;
struct TensorInfo;
struct Value;
using Api = void (*const)();  // the first entry of the table

struct ApiBase {
    Api const* (*get)(uint32_t version);
    char const* (*version)();
};

enum ElementType : int { kUndefined = 0, kFloat = 1, kInt8 = 3, kInt32 = 6, kHalf = 10, kBFloat16 = 16 };
constexpr int kFail = 1, kInvalidArgument = 2;  // OrtErrorCode
constexpr int kVariadic = 2;                    // OrtCustomOpInputOutputCharacteristic

// Functions of the table, by their place.
class Functions {
 public:
    explicit Functions(Api const* table) : table_(table) {}

    Status* status(int code, char const* text) const { return call<Status*>(0, code, text); }
    void release(Status* status) const { call<void>(93, status); }
    Status* domain(char const* name, CustomOpDomain** out) const { return call<Status*>(26, name, out); }
    Status* add(CustomOpDomain* domain, const struct CustomOp* op) const { return call<Status*>(27, domain, op); }
    Status* add(SessionOptions* options, CustomOpDomain* domain) const { return call<Status*>(28, options, domain); }

    Status* data(Value* value, void** out) const { return call<Status*>(51, value, out); }
    Status* type(TensorInfo const* info, ElementType* out) const { return call<Status*>(60, info, out); }
    Status* rank(TensorInfo const* info, size_t* out) const { return call<Status*>(61, info, out); }
    Status* shape(TensorInfo const* info, int64_t* out, size_t n) const { return call<Status*>(62, info, out, n); }
    Status* info(Value const* value, TensorInfo** out) const { return call<Status*>(65, value, out); }
    void release(TensorInfo* info) const { call<void>(99, info); }

    Status* attribute(KernelInfo const* info, char const* name, float* out) const {
        return call<Status*>(85, info, name, out);
    }
    Status* attribute(KernelInfo const* info, char const* name, int64_t* out) const {
        return call<Status*>(86, info, name, out);
    }

    Status* inputs(KernelContext const* context, size_t* out) const { return call<Status*>(88, context, out); }
    Status* outputs(KernelContext const* context, size_t* out) const { return call<Status*>(89, context, out); }
    Status* input(KernelContext const* context, size_t i, Value const** out) const {
        return call<Status*>(90, context, i, out);
    }
    Status* output(KernelContext* context, size_t i, int64_t const* shape, size_t rank, Value** out) const {
        return call<Status*>(91, context, i, shape, rank, out);
    }
    // The provider's stream; null where it has none.
    Status* stream(KernelContext const* context, void** out) const { return call<Status*>(193, context, out); }
    // Calls `run(data, i)` for i < total, on the session's threads.
    Status* parallel(KernelContext const* context, void (*run)(void*, size_t), size_t total, void* data) const {
        return call<Status*>(274, context, run, total, size_t{0}, data);
    }

    Status* inferred_inputs(ShapeInferContext const* context, size_t* out) const {
        return call<Status*>(267, context, out);
    }
    Status* inferred_input(ShapeInferContext const* context, size_t i, TensorInfo** out) const {
        return call<Status*>(268, context, i, out);
    }
    Status* infer_output(ShapeInferContext const* context, size_t i, TensorInfo const* info) const {
        return call<Status*>(270, context, i, info);
    }

 private:
    template <class Result, class... Arguments>
    Result call(int place, Arguments... arguments) const {
        return reinterpret_cast<Result (*)(Arguments...)>(table_[place])(arguments...);
    }

    Api const* table_;
};

// What describes an operator; members that stay null are not used.
struct CustomOp {
    uint32_t version = kVersion;
    void* (*create_kernel)(CustomOp const*, Api const*, KernelInfo const*) = nullptr;
    char const* (*name)(CustomOp const*) = nullptr;
    char const* (*provider)(CustomOp const*) = nullptr;
    ElementType (*input_type)(CustomOp const*, size_t) = nullptr;
    size_t (*input_count)(CustomOp const*) = nullptr;
    ElementType (*output_type)(CustomOp const*, size_t) = nullptr;
    size_t (*output_count)(CustomOp const*) = nullptr;
    void (*compute)(void*, KernelContext*) = nullptr;
    void (*destroy)(void*) = nullptr;
    int (*input_kind)(CustomOp const*, size_t) = nullptr;
    int (*output_kind)(CustomOp const*, size_t) = nullptr;
    int (*input_memory)(CustomOp const*, size_t) = nullptr;
    int (*variadic_inputs)(CustomOp const*) = nullptr;
    int (*inputs_alike)(CustomOp const*) = nullptr;
    int (*variadic_outputs)(CustomOp const*) = nullptr;
    int (*outputs_alike)(CustomOp const*) = nullptr;
    Status* (*create_kernel2)(CustomOp const*, Api const*, KernelInfo const*, void**) = nullptr;
    Status* (*compute2)(void*, KernelContext*) = nullptr;
    Status* (*infer)(CustomOp const*, ShapeInferContext*) = nullptr;
    int (*first_version)(CustomOp const*) = nullptr;
    int (*last_version)(CustomOp const*) = nullptr;
    size_t (*may_inplace)(int**, int**) = nullptr;
    void (*release_inplace)(int*, int*) = nullptr;
    size_t (*aliases)(int**, int**) = nullptr;
    void (*release_aliases)(int*, int*) = nullptr;
};

}  // namespace ort
