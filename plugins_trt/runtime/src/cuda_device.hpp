// A CUDA GPU as a Device: one stream, pinned host memory, graphs.
#pragma once

#include <cuda_runtime_api.h>

#include "engine.hpp"

namespace less {

class CudaDevice : public Device {
 public:
    // Throws BackendError without a driver, a GPU, or memory for a stream.
    explicit CudaDevice(int index);
    ~CudaDevice() override;
    CudaDevice(CudaDevice const&) = delete;
    CudaDevice& operator=(CudaDevice const&) = delete;

    cudaStream_t stream() const { return stream_; }

    void activate() override;
    void* allocate(size_t bytes) override;
    void* allocateHost(size_t bytes) override;
    void release(void* memory) noexcept override;
    void releaseHost(void* memory) noexcept override;
    void copy(void* to, void const* from, size_t bytes) override;
    void copies(std::vector<Copy> const& all) override;
    void fill(void* at, int byte, size_t bytes) override;
    void wait() override;
    std::unique_ptr<Graph> capture(std::function<void()> const& work) override;

 private:
    int index_;
    bool batches_ = false;  // whether the driver takes a batch of copies in one call
    cudaStream_t stream_ = nullptr;
};

}  // namespace less
