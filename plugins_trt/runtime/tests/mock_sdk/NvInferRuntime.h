// The part of TensorRT that trt_plan.cpp uses, on top of the host machine. Like TensorRT from 10.15 on, it can be asked
// for aliases.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

#define NV_TENSORRT_VERSION 101600

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT, kHALF, kINT8, kINT32, kBOOL, kUINT8, kFP8, kBF16, kINT64 };
enum class TensorIOMode : int32_t { kNONE, kINPUT, kOUTPUT };
enum class OptProfileSelector : int32_t { kMIN, kOPT, kMAX };
enum class ExecutionContextAllocationStrategy : int32_t { kSTATIC, kON_PROFILE_CHANGE, kUSER_MANAGED };

struct Dims {
    static constexpr int32_t MAX_DIMS = 8;
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};

class ILogger {
 public:
    enum class Severity : int32_t { kINTERNAL_ERROR, kERROR, kWARNING, kINFO, kVERBOSE };
    virtual ~ILogger() = default;
    virtual void log(Severity severity, char const* message) noexcept = 0;
};

class IExecutionContext {
 public:
    bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept;
    void setDeviceMemoryV2(void* memory, int64_t size) noexcept;
    bool setInputShape(char const* name, Dims const& dims) noexcept;
    Dims getTensorShape(char const* name) const noexcept;
    bool setTensorAddress(char const* name, void* memory) noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;

 private:
    int32_t place_ = -1;
};

class ICudaEngine {
 public:
    int32_t getNbOptimizationProfiles() const noexcept;
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept;
    int64_t getDeviceMemorySizeV2() const noexcept;
    int32_t getNbIOTensors() const noexcept;
    char const* getIOTensorName(int32_t index) const noexcept;
    TensorIOMode getTensorIOMode(char const* name) const noexcept;
    DataType getTensorDataType(char const* name) const noexcept;
    Dims getTensorShape(char const* name) const noexcept;
    Dims getProfileShape(char const* name, int32_t profile, OptProfileSelector selector) const noexcept;
    char const* getAliasedInputTensor(char const* name) const noexcept;
};

class IRuntime {
 public:
    void setEngineHostCodeAllowed(bool allowed) noexcept;
    ICudaEngine* deserializeCudaEngine(void const* data, size_t bytes) noexcept;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1
