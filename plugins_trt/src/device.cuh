// Shared by all kernels: number types, vectorised loads, warp reductions, launching.
//
// The kernels also compile for the host, with emulation/cuda_emu.h; only this file and tensor_ops.cuh contain code
// specific to that.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "less_attention.h"

namespace less {

constexpr int kWarpSize = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr float kInfinity = INFINITY;

// All shared memory is dynamic, so that the emulation can poison it and check its bounds.
#ifdef LESS_EMULATION
#define LESS_SHARED_MEMORY(name) unsigned char* const name = emu::here().shared.get()
#else
#define LESS_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#endif

// ---- numbers

__device__ __forceinline__ float toFloat(float x) { return x; }
__device__ __forceinline__ float toFloat(int8_t x) { return static_cast<float>(x); }
__device__ __forceinline__ float toFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float toFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T fromFloat(float x);
template <>
__device__ __forceinline__ float fromFloat<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half fromFloat<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 fromFloat<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// exp(a - b), but 0 for a = -inf whatever b is (also -inf).
__device__ __forceinline__ float expDifference(float a, float b) { return a == -kInfinity ? 0.f : __expf(a - b); }

// ---- eight elements, loaded and stored up to 16 bytes at a time

template <class T>
struct alignas(sizeof(T) == 1 ? 8 : 16) Vec8 {
    using Word = std::conditional_t<sizeof(T) == 1, uint2, uint4>;
    static constexpr int kWords = 8 * sizeof(T) / sizeof(Word);
    T x[8];
};

template <class T>
__device__ __forceinline__ void unpack(Vec8<T> const& vector, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = toFloat(vector.x[i]);
}

// Loads data that will not be read again (streaming cache hint).
template <class T>
__device__ __forceinline__ Vec8<T> loadOnce(T const* source) {
    Vec8<T> result;
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords; ++i) {
        using Word = typename Vec8<T>::Word;
        reinterpret_cast<Word*>(&result)[i] = __ldcs(reinterpret_cast<Word const*>(source) + i);
    }
    return result;
}

template <class T>
__device__ __forceinline__ void zero(Vec8<T>& vector) {
#pragma unroll
    for (int i = 0; i < Vec8<T>::kWords; ++i) {
        using Word = typename Vec8<T>::Word;
        reinterpret_cast<Word*>(&vector)[i] = Word{};
    }
}

// Stores two adjacent elements; the first must have an even index.
template <class T>
__device__ __forceinline__ void storePair(T* target, float first, float second) {
    struct alignas(2 * sizeof(T)) Pair {
        T first, second;
    };
    *reinterpret_cast<Pair*>(target) = {fromFloat<T>(first), fromFloat<T>(second)};
}

// Stores what other blocks may read, with __ldcg, after fences. The emulation has to know which memory that is.
template <class T>
__device__ __forceinline__ void publish(T* target, T value) {
#ifdef LESS_EMULATION
    emu::publish(target, value);
#else
    *target = value;
#endif
}

// The same for two adjacent elements; the first is aligned to their size.
__device__ __forceinline__ void publishPair(float* target, float first, float second) {
#ifdef LESS_EMULATION
    emu::publish(target, first);
    emu::publish(target + 1, second);
#else
    *reinterpret_cast<float2*>(target) = make_float2(first, second);
#endif
}

// Four adjacent elements that another block published; the first is aligned to all four.
__device__ __forceinline__ float4 loadPublished(float const* source) {
#ifdef LESS_EMULATION
    return make_float4(__ldcg(source), __ldcg(source + 1), __ldcg(source + 2), __ldcg(source + 3));
#else
    return __ldcg(reinterpret_cast<float4 const*>(source));
#endif
}

// Asks for memory that will be read later, without waiting for it: each line of 128 bytes once, by the threads of a
// block.
__device__ __forceinline__ void prefetch(void const* start, size_t bytes) {
    constexpr size_t kLine = 128;
    auto const* const first = static_cast<char const*>(start);
    size_t const ahead = reinterpret_cast<size_t>(start) % kLine;  // bytes of the first line before the start
#pragma unroll 1
    for (size_t x = threadIdx.x * kLine; x < ahead + bytes; x += kThreads * kLine) {
        char const* const line = first + (x > ahead ? x - ahead : 0);
#ifdef LESS_EMULATION
        emu::prefetch(line);
#else
        asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#endif
    }
}

// ---- tensors of the compute dtype

template <class T>
class Elements {
 public:
    __device__ __forceinline__ Elements(void const* tensor, DType, long offset)
        : x_(static_cast<T*>(const_cast<void*>(tensor)) + offset) {}
    __device__ __forceinline__ float operator[](long i) const { return toFloat(x_[i]); }
    __device__ __forceinline__ void set(long i, float value) const { x_[i] = fromFloat<T>(value); }
    // Eight elements, or zeros if they are not `wanted`; the index of the first is a multiple of eight.
    __device__ __forceinline__ void load8(long i, bool wanted, float (&out)[8]) const {
        Vec8<T> vector;
        zero(vector);
        if (wanted) vector = *reinterpret_cast<Vec8<T> const*>(x_ + i);
        unpack(vector, out);
    }

 private:
    T* x_;
};

// A compute dtype that is known at run time only: one kernel for all, where they do not matter to the inner loop.
struct AnyType {};

template <>
class Elements<AnyType> {
 public:
    __device__ __forceinline__ Elements(void const* tensor, DType dtype, long offset)
        : tensor_(tensor), dtype_(dtype), offset_(offset) {}
    __device__ __forceinline__ float operator[](long i) const {
        float element = 0.f;
        visit([&](auto const& typed) { element = typed[i]; });
        return element;
    }
    __device__ __forceinline__ void set(long i, float value) const {
        visit([&](auto const& typed) { typed.set(i, value); });
    }
    __device__ __forceinline__ void load8(long i, bool wanted, float (&out)[8]) const {
        visit([&](auto const& typed) { typed.load8(i, wanted, out); });
    }

 private:
    template <class F>
    __device__ __forceinline__ void visit(F const& f) const {
        if (dtype_ == DType::kFloat16) {
            f(Elements<__half>(tensor_, dtype_, offset_));
        } else if (dtype_ == DType::kBFloat16) {
            f(Elements<__nv_bfloat16>(tensor_, dtype_, offset_));
        } else {
            f(Elements<float>(tensor_, dtype_, offset_));
        }
    }

    void const* tensor_;
    DType dtype_;
    long offset_;
};

// ---- reductions over lanes

template <class T>
__device__ __forceinline__ T warpSum(T value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

__device__ __forceinline__ float warpMax(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
    return value;
}

template <class T>
__device__ __forceinline__ T warpMin(T value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value = min(value, __shfl_xor_sync(~0u, value, offset));
    return value;
}

// ---- launching

// Enough blocks to saturate the memory of the largest GPUs. Fixed, so that results do not depend on the GPU.
#ifdef LESS_EMULATION
inline int blocksWanted() { return emu::blocksWanted(); }
#else
inline int blocksWanted() { return 512; }
#endif

// Chunks of up to so many tokens are short (short_chunk.cuh), if they are one tile of queries.
#ifdef LESS_EMULATION
inline int longestShortChunk() { return emu::longestShortChunk(); }
#else
inline int longestShortChunk() { return 64; }
#endif

// The same code path prepares a launch (loads the kernel and raises its shared memory limit) and performs it.
enum class Mode { kPrepare, kLaunch };

template <class Params>
cudaError_t run(Mode mode, void (*kernel)(Params), dim3 grid, size_t sharedBytes, Params const& params,
                cudaStream_t stream, int threads = kThreads) {
#ifdef LESS_EMULATION
    (void)stream;
    return mode == Mode::kPrepare ? cudaSuccess : emu::launch(grid, threads, sharedBytes, [=] { kernel(params); });
#else
    void const* const function = reinterpret_cast<void const*>(kernel);
    if (mode == Mode::kPrepare) {
        cudaFuncAttributes attributes;
        cudaError_t const status = cudaFuncGetAttributes(&attributes, function);
        if (status != cudaSuccess) return status;
        if (static_cast<size_t>(attributes.maxDynamicSharedSizeBytes) >= sharedBytes) return cudaSuccess;
        // The limit is only ever raised, because other layers share the kernel.
        return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(sharedBytes));
    }
    void* arguments[] = {const_cast<Params*>(&params)};
    return cudaLaunchKernel(function, grid, dim3(threads), arguments, sharedBytes, stream);
#endif
}

// Calls f with a value of the type that `dtype` names. LESS_TRIAL is the only type of a build, with head_dim up to 64,
// which takes seconds: for tests that modify the kernels.
template <class F>
cudaError_t withType(DType dtype, F&& f) {
#ifdef LESS_TRIAL
    bool const wide = sizeof(LESS_TRIAL) == sizeof(float);
    return dtype == (wide ? DType::kFloat32 : DType::kFloat16) ? f(LESS_TRIAL{}) : cudaErrorNotSupported;
#else
    switch (dtype) {
        case DType::kFloat32:
            return f(float{});
        case DType::kFloat16:
            return f(__half{});
        case DType::kBFloat16:
            return f(__nv_bfloat16{});
    }
    return cudaErrorInvalidValue;
#endif
}

// Calls f with a value of the type of the slots.
template <class F>
cudaError_t withSlots(AttentionShape const& shape, F&& f) {
    return shape.slotType == SlotType::kInt8 ? f(int8_t{}) : withType(shape.dtype, f);
}

}  // namespace less
