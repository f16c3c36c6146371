#include "mock_sdk.hpp"

#include <NvInferRuntime.h>

using less::Shape;
using less::testing::bug;
using less::testing::mockSdk;

struct Stream {};
struct GraphWork {
    std::vector<std::function<void()>> work;
    int references = 1;
};

namespace less::testing {

static std::unique_ptr<MockSdk> sdk;

MockSdk& mockSdk() { return *sdk; }

void resetMockSdk(Contract const& contract) {
    if (sdk && (sdk->streams || sdk->graphs)) bug("a stream or a graph was not destroyed");
    sdk.reset();
    sdk = std::make_unique<MockSdk>();
    sdk->plan = std::make_unique<HostPlan>(contract, sdk->machine);
}

}  // namespace less::testing

// ------------------------------------------------------------------ CUDA

static GraphWork* capturing = nullptr;

static cudaError_t statusOf(std::function<void()> const& action) {
    try {
        action();
        return cudaSuccess;
    } catch (less::BackendError const&) {
        return cudaErrorMemoryAllocation;
    }
}

static void release(GraphWork* graph) {
    if (--graph->references == 0) delete graph;
    --mockSdk().graphs;
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = mockSdk().devices;
    return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = mockSdk().driver;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = mockSdk().runtime;
    return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
char const* cudaGetErrorString(cudaError_t error) { return error == cudaErrorNoDevice ? "no device" : "out of memory"; }
cudaError_t cudaSetDevice(int device) {
    mockSdk().current = device;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new Stream;
    ++mockSdk().streams;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    --mockSdk().streams;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    if (capturing) bug("wait for a stream that is being captured");
    mockSdk().device->wait();
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
    return statusOf([&] { *memory = mockSdk().device->allocate(bytes); });
}
cudaError_t cudaMallocHost(void** memory, size_t bytes) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFree(void* memory) {
    mockSdk().device->release(memory);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    mockSdk().device->copy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyBatchAsync(void* const* to, void const* const* from, size_t const* bytes, size_t count,
                                 cudaMemcpyAttributes* attributes, size_t* begins, size_t kinds, cudaStream_t) {
    if (count == 0 || kinds != 1 || *begins != 0) bug("not one kind of copies, from the first on");
    if (attributes->srcAccessOrder != cudaMemcpySrcAccessOrderStream) bug("copies out of the order of the stream");
    ++mockSdk().batches;
    return statusOf([&] {
        for (size_t i = count; i-- > 0;) mockSdk().device->copy(to[i], from[i], bytes[i]);
    });
}
cudaError_t cudaMemsetAsync(void* at, int byte, size_t bytes, cudaStream_t) {
    mockSdk().device->fill(at, byte, bytes);
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    if (capturing) bug("the stream is already being captured");
    capturing = new GraphWork;
    ++mockSdk().graphs;
    mockSdk().machine.sink = &capturing->work;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    mockSdk().machine.sink = &mockSdk().machine.stream;
    *graph = std::exchange(capturing, nullptr);
    if (mockSdk().captures) return cudaSuccess;
    release(std::exchange(*graph, nullptr));
    return cudaErrorCapture;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    *executable = graph;
    ++graph->references;
    ++mockSdk().graphs;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    release(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    release(executable);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
    ++mockSdk().machine.launches;
    auto& stream = mockSdk().machine.stream;
    stream.insert(stream.end(), executable->work.begin(), executable->work.end());
    return cudaSuccess;
}

// ------------------------------------------------------------------ TensorRT

static nvinfer1::ILogger* logger = nullptr;

extern "C" int32_t getInferLibVersion() noexcept { return mockSdk().library; }

namespace nvinfer1 {

static void logError(char const* message) {
    logger->log(ILogger::Severity::kERROR, "[checkMacros.cpp::catchCudaError::250] a repeated error");
    logger->log(ILogger::Severity::kINFO, "not an error");
    logger->log(ILogger::Severity::kERROR, message);
}

static Dims dimsOf(Shape const& shape) {
    Dims dims{static_cast<int32_t>(shape.size()), {}};
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

static less::PlanTensor const& tensor(char const* name) {
    for (less::PlanTensor const& t : mockSdk().plan->io) {
        if (t.name == name) return t;
    }
    bug("no such tensor");
}

bool IExecutionContext::setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept {
    place_ = mockSdk().prepared.insert(profile).second ? profile : mockSdk().plan->addContext(profile);
    return stream != nullptr && place_ >= 0;
}
void IExecutionContext::setDeviceMemoryV2(void* memory, int64_t size) noexcept {
    mockSdk().plan->useMemory(place_, memory, static_cast<size_t>(size));
}
bool IExecutionContext::setInputShape(char const* name, Dims const& dims) noexcept {
    return mockSdk().plan->setShape(place_, name, Shape(dims.d, dims.d + dims.nbDims));
}
Dims IExecutionContext::getTensorShape(char const* name) const noexcept {
    return dimsOf(mockSdk().plan->shape(place_, name));
}
bool IExecutionContext::setTensorAddress(char const* name, void* memory) noexcept {
    mockSdk().plan->bind(place_, name, memory);
    return true;
}
bool IExecutionContext::enqueueV3(cudaStream_t) noexcept {
    if (!mockSdk().machine.runs) logError("a kernel\nis missing");
    return statusOf([&] { mockSdk().plan->enqueue(place_); }) == cudaSuccess;
}
int32_t ICudaEngine::getNbOptimizationProfiles() const noexcept { return mockSdk().plan->profiles(); }
int64_t ICudaEngine::getDeviceMemorySizeV2() const noexcept {
    return static_cast<int64_t>(mockSdk().plan->activationBytes());
}
IExecutionContext* ICudaEngine::createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept {
    if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) bug("contexts with memory of their own");
    if (!mockSdk().prepares) logError("out of memory");
    return mockSdk().prepares ? new IExecutionContext : nullptr;
}
int32_t ICudaEngine::getNbIOTensors() const noexcept { return static_cast<int32_t>(mockSdk().plan->io.size()); }
char const* ICudaEngine::getIOTensorName(int32_t index) const noexcept {
    return mockSdk().plan->io[static_cast<size_t>(index)].name.c_str();
}
TensorIOMode ICudaEngine::getTensorIOMode(char const* name) const noexcept {
    return tensor(name).input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
}
DataType ICudaEngine::getTensorDataType(char const* name) const noexcept {
    static std::map<std::string, DataType> const kTypes = {{"float32", DataType::kFLOAT}, {"float16", DataType::kHALF},
                                                           {"bfloat16", DataType::kBF16}, {"int32", DataType::kINT32},
                                                           {"int64", DataType::kINT64},   {"int8", DataType::kINT8},
                                                           {"fp8", DataType::kFP8}};
    return kTypes.at(tensor(name).dtype);
}
Dims ICudaEngine::getTensorShape(char const* name) const noexcept { return dimsOf(tensor(name).shape); }
Dims ICudaEngine::getProfileShape(char const* name, int32_t profile, OptProfileSelector selector) const noexcept {
    auto const [minimum, maximum] = mockSdk().plan->range(name, profile);
    return dimsOf(selector == OptProfileSelector::kMIN ? minimum : maximum);
}
char const* ICudaEngine::getAliasedInputTensor(char const* name) const noexcept {
    static std::string input;
    input = mockSdk().plan->aliasedInput(name);
    return input.empty() ? nullptr : input.c_str();
}
void IRuntime::setEngineHostCodeAllowed(bool allowed) noexcept { mockSdk().hostCode = allowed; }
ICudaEngine* IRuntime::deserializeCudaEngine(void const* data, size_t bytes) noexcept {
    if (bytes == 0 || data == nullptr) bug("an empty plan");
    mockSdk().prepared.clear();
    if (!mockSdk().loads) logError("The engine plan file is generated on an incompatible device");
    return mockSdk().loads ? new ICudaEngine : nullptr;
}
IRuntime* createInferRuntime(ILogger& to) noexcept {
    logger = &to;
    if (!mockSdk().starts) logError("CUDA initialization failure");
    return mockSdk().starts ? new IRuntime : nullptr;
}

}  // namespace nvinfer1
