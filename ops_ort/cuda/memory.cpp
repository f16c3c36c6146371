#include "memory.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "less_attention.h"

namespace less {

void check(cudaError_t status, char const* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears the error
    throw std::runtime_error(std::string("LessAttention: ") + what + ": " + cudaGetErrorString(status));
}

namespace {

bool captured(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream, &status), "asking the stream for captures");
    return status != cudaStreamCaptureStatusNone;
}

void refuse_capture(cudaStream_t stream) {
    if (captured(stream))
        throw std::runtime_error(
            "LessAttention: a graph is captured before a step of this size has run: run one first");
}

void* allocate(size_t bytes) {
    void* memory;
    check(cudaMalloc(&memory, bytes), "allocating a workspace");
    return memory;
}

}  // namespace

StreamMemory::StreamMemory() : counters_(static_cast<uint32_t*>(allocate(kCounterBytes))) {
    try {
        check(cudaMemset(counters_, 0, kCounterBytes), "cudaMemset");
        check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");  // other streams do not wait for this one
    } catch (...) {
        cudaFree(counters_);
        throw;
    }
}

StreamMemory::~StreamMemory() {
    cudaFree(counters_);
    for (void* block : blocks_) cudaFree(block);
}

void* StreamMemory::workspace(size_t bytes, cudaStream_t stream) {
    if (bytes > bytes_) {
        refuse_capture(stream);
        size_t const grown = std::max(bytes, 2 * bytes_);
        blocks_.reserve(blocks_.size() + 1);
        blocks_.push_back(allocate(grown));
        bytes_ = grown;
    }
    return blocks_.empty() ? nullptr : blocks_.back();
}

StreamMemory& Memories::of(cudaStream_t stream) {
    // Of all kernels, by device and stream.
    static std::mutex all;
    static std::map<std::pair<int, cudaStream_t>, std::weak_ptr<StreamMemory>> memories;

    int device;
    check(cudaGetDevice(&device), "cudaGetDevice");
    std::lock_guard<std::mutex> const lock(mutex_);
    for (Held const& held : held_)
        if (held.device == device && held.stream == stream) return *held.memory;
    std::lock_guard<std::mutex> const lock_all(all);
    auto& shared = memories[{device, stream}];
    std::shared_ptr<StreamMemory> memory = shared.lock();
    if (!memory) {
        refuse_capture(stream);
        shared = memory = std::make_shared<StreamMemory>();
    }
    held_.push_back({device, stream, memory});
    return *memory;
}

}  // namespace less
