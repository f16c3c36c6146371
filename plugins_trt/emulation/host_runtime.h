// Calls of the CUDA runtime that the launcher and the plugin make, on host memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

namespace emu {
inline cudaError_t copy(void* target, void const* source, size_t bytes) {
    std::memcpy(target, source, bytes);
    return cudaSuccess;
}
template <class T>
cudaError_t allocate(T** address, size_t bytes) {
    *address = static_cast<T*>(std::malloc(bytes));
    return *address != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
}  // namespace emu
#define cudaMemcpyAsync(target, source, bytes, kind, stream) \
    ((void)(kind), (void)(stream), emu::copy(target, source, bytes))
#define cudaMemset(target, value, bytes) (std::memset(target, value, bytes), cudaSuccess)
#define cudaMalloc(address, bytes) emu::allocate(address, bytes)
#define cudaFree(address) (std::free(address), cudaSuccess)
