// Device memory of launches: the workspace and the counters of less_attention.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace less {

// Raises std::runtime_error with CUDA's text after `what`.
void check(cudaError_t status, char const* what);

// Launches of a stream follow one another, so all layers that launch on it share one memory.
class StreamMemory {
 public:
    StreamMemory();
    StreamMemory(StreamMemory const&) = delete;
    ~StreamMemory();

    // Held for a launch, whose kernels follow one another without those of another one in between.
    std::mutex& mutex() { return mutex_; }
    // At least `bytes`, with any contents. Grows by allocating, which a stream that is being captured does not allow.
    void* workspace(size_t bytes, cudaStream_t stream);
    // kCounterBytes, zero between launches.
    uint32_t* counters() const { return counters_; }

 private:
    std::mutex mutex_;
    uint32_t* counters_ = nullptr;
    // The last one is in use. Graphs that were captured earlier hold addresses of the others; each is at least twice as
    // large as the one before, so together they take less than the last one does.
    std::vector<void*> blocks_;
    size_t bytes_ = 0;  // of the last one
};

// What a kernel holds: the memory of each stream that it has launched on, which is freed with the last kernel that did.
class Memories {
 public:
    StreamMemory& of(cudaStream_t stream);

 private:
    struct Held {
        int device;
        cudaStream_t stream;
        std::shared_ptr<StreamMemory> memory;
    };
    std::mutex mutex_;
    std::vector<Held> held_;
};

}  // namespace less
