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
    const Api* (*get)(uint32_t version);
    const char* (*version)();
};

enum ElementType : int { kUndefined = 0, kFloat = 1, kInt8 = 3, kInt32 = 6 };
constexpr int kFail = 1, kInvalidArgument = 2;  // OrtErrorCode
constexpr int kVariadic = 2;                    // OrtCustomOpInputOutputCharacteristic

// Functions of the table, by their place.
class Functions {
   public:
    explicit Functions(const Api* table) : table_(table) {}

    Status* status(int code, const char* text) const { return call<Status*>(0, code, text); }
    void release(Status* status) const { call<void>(93, status); }
    Status* domain(const char* name, CustomOpDomain** out) const { return call<Status*>(26, name, out); }
    Status* add(CustomOpDomain* domain, const struct CustomOp* op) const { return call<Status*>(27, domain, op); }
    Status* add(SessionOptions* options, CustomOpDomain* domain) const { return call<Status*>(28, options, domain); }

    Status* data(Value* value, void** out) const { return call<Status*>(51, value, out); }
    Status* type(const TensorInfo* info, ElementType* out) const { return call<Status*>(60, info, out); }
    Status* rank(const TensorInfo* info, size_t* out) const { return call<Status*>(61, info, out); }
    Status* shape(const TensorInfo* info, int64_t* out, size_t n) const { return call<Status*>(62, info, out, n); }
    Status* info(const Value* value, TensorInfo** out) const { return call<Status*>(65, value, out); }
    void release(TensorInfo* info) const { call<void>(99, info); }

    Status* attribute(const KernelInfo* info, const char* name, float* out) const {
        return call<Status*>(85, info, name, out);
    }
    Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
        return call<Status*>(86, info, name, out);
    }

    Status* inputs(const KernelContext* context, size_t* out) const { return call<Status*>(88, context, out); }
    Status* outputs(const KernelContext* context, size_t* out) const { return call<Status*>(89, context, out); }
    Status* input(const KernelContext* context, size_t i, const Value** out) const {
        return call<Status*>(90, context, i, out);
    }
    Status* output(KernelContext* context, size_t i, const int64_t* shape, size_t rank, Value** out) const {
        return call<Status*>(91, context, i, shape, rank, out);
    }
    // Calls `run(data, i)` for i < total, on the session's threads.
    Status* parallel(const KernelContext* context, void (*run)(void*, size_t), size_t total, void* data) const {
        return call<Status*>(274, context, run, total, size_t{0}, data);
    }

    Status* inferred_inputs(const ShapeInferContext* context, size_t* out) const {
        return call<Status*>(267, context, out);
    }
    Status* inferred_input(const ShapeInferContext* context, size_t i, TensorInfo** out) const {
        return call<Status*>(268, context, i, out);
    }
    Status* infer_output(const ShapeInferContext* context, size_t i, const TensorInfo* info) const {
        return call<Status*>(270, context, i, info);
    }

   private:
    template <class Result, class... Arguments>
    Result call(int place, Arguments... arguments) const {
        return reinterpret_cast<Result (*)(Arguments...)>(table_[place])(arguments...);
    }

    const Api* table_;
};

// What describes an operator; members that stay null are not used.
struct CustomOp {
    uint32_t version = kVersion;
    void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*) = nullptr;
    const char* (*name)(const CustomOp*) = nullptr;
    const char* (*provider)(const CustomOp*) = nullptr;
    ElementType (*input_type)(const CustomOp*, size_t) = nullptr;
    size_t (*input_count)(const CustomOp*) = nullptr;
    ElementType (*output_type)(const CustomOp*, size_t) = nullptr;
    size_t (*output_count)(const CustomOp*) = nullptr;
    void (*compute)(void*, KernelContext*) = nullptr;
    void (*destroy)(void*) = nullptr;
    int (*input_kind)(const CustomOp*, size_t) = nullptr;
    int (*output_kind)(const CustomOp*, size_t) = nullptr;
    int (*input_memory)(const CustomOp*, size_t) = nullptr;
    int (*variadic_inputs)(const CustomOp*) = nullptr;
    int (*inputs_alike)(const CustomOp*) = nullptr;
    int (*variadic_outputs)(const CustomOp*) = nullptr;
    int (*outputs_alike)(const CustomOp*) = nullptr;
    Status* (*create_kernel2)(const CustomOp*, const Api*, const KernelInfo*, void**) = nullptr;
    Status* (*compute2)(void*, KernelContext*) = nullptr;
    Status* (*infer)(const CustomOp*, ShapeInferContext*) = nullptr;
    int (*first_version)(const CustomOp*) = nullptr;
    int (*last_version)(const CustomOp*) = nullptr;
    size_t (*may_inplace)(int**, int**) = nullptr;
    void (*release_inplace)(int*, int*) = nullptr;
    size_t (*aliases)(int**, int**) = nullptr;
    void (*release_aliases)(int*, int*) = nullptr;
};

}  // namespace ort
