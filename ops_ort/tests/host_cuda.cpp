// Stands in for the CUDA runtime of the operator for the CUDA provider: device memory is host memory, without a stream.
// tests/test_cuda_operator.py compiles it together with the emulated kernels.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

namespace {

std::mutex mutex;
std::set<void*> allocated;
bool capturing = false;
int allocations_left = -1;  // < 0: any number
int driver = 0;             // version; 0: none

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int host_allocated() { return static_cast<int>(allocated.size()); }
EXPORTED void host_capture(int on) { capturing = on; }
EXPORTED void host_limit(int allocations) { allocations_left = allocations; }
EXPORTED void host_driver(int version) { driver = version; }

extern "C" {
cudaError_t cudaMalloc(void** address, size_t bytes) {
    std::lock_guard<std::mutex> const lock(mutex);
    if (allocations_left == 0) return cudaErrorMemoryAllocation;
    if (allocations_left > 0) --allocations_left;
    if (capturing) return cudaErrorStreamCaptureUnsupported;
    *address = std::malloc(bytes);
    std::memset(*address, 0xff, bytes);  // NaN
    allocated.insert(*address);
    return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
    std::lock_guard<std::mutex> const lock(mutex);
    if (allocated.erase(address) != 1) std::abort();
    std::free(address);
    return cudaSuccess;
}
cudaError_t cudaMemset(void* address, int value, size_t bytes) {
    std::memset(address, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = driver;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
char const* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "failed";
}
}
