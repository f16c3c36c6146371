// What a session needs: a device with stream-ordered memory, and an engine. CUDA and TensorRT implement both, as does
// the host in tests.
#pragma once

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "less_runtime.hpp"

namespace less {

// Recorded work that can be launched repeatedly.
class Graph {
 public:
    virtual ~Graph() = default;
    virtual void launch() = 0;
};

// A copy within a device.
struct Copy {
    void* to;
    void const* from;
    size_t bytes;
};

// The memory and the single stream of a device. Operations run in order and are complete after wait(). Failures throw
// BackendError.
class Device {
 public:
    virtual ~Device() = default;
    // Makes this the current device of the calling thread.
    virtual void activate() = 0;
    // Uninitialised memory, aligned to 256 bytes, on the device or pinned on the host.
    virtual void* allocate(size_t bytes) = 0;
    virtual void* allocateHost(size_t bytes) = 0;
    virtual void release(void* memory) noexcept = 0;
    virtual void releaseHost(void* memory) noexcept = 0;
    // Copies host to device, device to host, or within the device. Host memory must stay valid until wait().
    virtual void copy(void* to, void const* from, size_t bytes) = 0;
    // Copies within the device that do not overlap, in one call if it can do that.
    virtual void copies(std::vector<Copy> const& all) {
        for (Copy const& one : all) copy(one.to, one.from, one.bytes);
    }
    virtual void fill(void* at, int byte, size_t bytes) = 0;
    virtual void wait() = 0;
    // Records the operations of `work` instead of running them; nullptr if they cannot be recorded.
    virtual std::unique_ptr<Graph> capture(std::function<void()> const& work) = 0;
};

// An input or output of an engine; -1 in the shape is a dynamic axis.
struct PlanTensor {
    std::string name;
    bool input;
    std::string dtype;  // as the contract names it
    Shape shape;
};

// A deserialised plan with execution contexts, on the stream of a device. The first ones have the profile of their
// place.
class Plan {
 public:
    virtual ~Plan() = default;
    virtual std::vector<PlanTensor> tensors() const = 0;
    virtual int profiles() const = 0;
    // Minimum and maximum of an input's shape in a profile.
    virtual std::pair<Shape, Shape> range(std::string const& input, int profile) const = 0;
    // The input whose memory an output shares if the engine says so, or "".
    virtual std::string aliasedInput(std::string const& output) const = 0;
    // The place of one more context of a profile, or -1 if it cannot be created.
    virtual int addContext(int profile) = 0;
    // Device memory that a step needs for activations, in whichever context, and what a context uses for it. Contexts
    // may share it, as their steps run one after the other.
    virtual size_t activationBytes() const = 0;
    virtual void useMemory(int context, void* memory, size_t bytes) = 0;
    virtual bool setShape(int context, std::string const& input, Shape const& shape) = 0;
    virtual Shape shape(int context, std::string const& tensor) const = 0;
    virtual void bind(int context, std::string const& tensor, void* memory) = 0;
    virtual void enqueue(int context) = 0;
    // Writes to the log that SessionOptions::verbose prints.
    virtual void note(std::string const&) {}
};

// Owns memory of a device.
class Memory {
 public:
    Memory() = default;
    Memory(Device& device, size_t bytes, bool host = false)
        : device_(&device), host_(host), at_(host ? device.allocateHost(bytes) : device.allocate(bytes)) {}
    Memory(Memory&& other) noexcept { *this = std::move(other); }
    Memory& operator=(Memory&& other) noexcept {
        std::swap(device_, other.device_);
        std::swap(host_, other.host_);
        std::swap(at_, other.at_);
        return *this;
    }
    ~Memory() {
        if (at_ && host_) device_->releaseHost(at_);
        if (at_ && !host_) device_->release(at_);
    }
    std::byte* get() const { return static_cast<std::byte*>(at_); }

 private:
    Device* device_ = nullptr;
    bool host_ = false;
    void* at_ = nullptr;
};

}  // namespace less
