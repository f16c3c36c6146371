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

#include "less_attention.h"

namespace less {

constexpr int kWarpSize = 32;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr float kInfinity = INFINITY;

// All shared memory is dynamic, so that the emulation can poison it and check its bounds.
#ifdef LESS_EMULATION
#define LESS_SHARED_MEMORY(name) unsigned char* const name = emu::machine().shared.get()
#else
#define LESS_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#endif

// ---- numbers

__device__ __forceinline__ float toFloat(float x) { return x; }
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

// ---- eight elements, loaded and stored 16 bytes at a time

template <class T>
struct alignas(16) Vec8 {
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
    for (int i = 0; i < static_cast<int>(sizeof(result) / 16); ++i) {
        reinterpret_cast<uint4*>(&result)[i] = __ldcs(reinterpret_cast<uint4 const*>(source) + i);
    }
    return result;
}

template <class T>
__device__ __forceinline__ void zero(Vec8<T>& vector) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(vector) / 16); ++i) {
        reinterpret_cast<uint4*>(&vector)[i] = uint4{0, 0, 0, 0};
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

// The same code path prepares a launch (loads the kernel and raises its shared memory limit) and performs it.
enum class Mode { kPrepare, kLaunch };

template <class Params>
cudaError_t run(Mode mode, void (*kernel)(Params), dim3 grid, size_t sharedBytes, Params const& params,
                cudaStream_t stream) {
#ifdef LESS_EMULATION
    (void)stream;
    return mode == Mode::kPrepare ? cudaSuccess : emu::launch(grid, kThreads, sharedBytes, [=] { kernel(params); });
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
    return cudaLaunchKernel(function, grid, dim3(kThreads), arguments, sharedBytes, stream);
#endif
}

// Calls f with a value of the type that `dtype` names. LESS_TRIAL restricts the build to float16 and head_dim up to 64,
// which takes seconds: for tests that modify the kernels.
template <class F>
cudaError_t withType(DType dtype, F&& f) {
#ifdef LESS_TRIAL
    return dtype == DType::kFloat16 ? f(__half{}) : cudaErrorNotSupported;
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

}  // namespace less
