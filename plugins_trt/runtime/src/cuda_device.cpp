#include "cuda_device.hpp"

namespace less {
namespace {

void check(cudaError_t error, char const* operation) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, so that the next call does not report it again
    throw BackendError(std::string(operation) + " failed on the GPU: " + cudaGetErrorString(error));
}

// The first CUDA that takes a batch of copies in one call.
constexpr int kBatchesFrom = 12080;

#if CUDART_VERSION >= 12080
// The copies of a batch may run in any order, after what is in the stream.
void copyBatch(std::vector<Copy> const& all, cudaStream_t stream) {
    std::vector<void*> targets, sources;
    std::vector<size_t> sizes;
    for (Copy const& one : all) {
        targets.push_back(one.to);
        sources.push_back(const_cast<void*>(one.from));
        sizes.push_back(one.bytes);
    }
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    size_t from = 0;  // the first copy with these attributes
#if CUDART_VERSION >= 13000
    check(cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), all.size(), &attributes, &from, 1, stream),
          "cudaMemcpyBatchAsync");
#else
    size_t failed = 0;
    check(cudaMemcpyBatchAsync(targets.data(), sources.data(), sizes.data(), all.size(), &attributes, &from, 1, &failed,
                               stream),
          "cudaMemcpyBatchAsync");
#endif
}
#endif

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

[[noreturn]] void refuse(cudaError_t error) {
    int driver = 0, needed = 0;
    cudaDriverGetVersion(&driver);  // 0 without a driver
    cudaRuntimeGetVersion(&needed);
    if (driver == 0) throw BackendError("no CUDA driver: run this where nvidia-smi lists a GPU");
    if (driver / 1000 < needed / 1000) {
        throw BackendError("the driver supports CUDA up to " + version(driver) + ", this program needs " +
                           version(needed) + ": update the driver");
    }
    throw BackendError(std::string("no CUDA GPU (") + cudaGetErrorString(error) +
                       "): run nvidia-smi, and check CUDA_VISIBLE_DEVICES");
}

class CudaGraph : public Graph {
 public:
    CudaGraph(cudaGraphExec_t graph, cudaStream_t stream) : graph_(graph), stream_(stream) {}
    ~CudaGraph() override { cudaGraphExecDestroy(graph_); }
    CudaGraph(CudaGraph const&) = delete;
    CudaGraph& operator=(CudaGraph const&) = delete;

    void launch() override { check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch"); }

 private:
    cudaGraphExec_t graph_;
    cudaStream_t stream_;
};

}  // namespace

CudaDevice::CudaDevice(int index) : index_(index) {
    int count = 0;
    cudaError_t const error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) refuse(error);
    if (index < 0 || index >= count) {
        throw BackendError("there is no GPU " + std::to_string(index) + ": choose one of 0.." +
                           std::to_string(count - 1));
    }
    activate();
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    int driver = 0;
    cudaDriverGetVersion(&driver);
    batches_ = driver >= kBatchesFrom;
}

CudaDevice::~CudaDevice() { cudaStreamDestroy(stream_); }

void CudaDevice::activate() { check(cudaSetDevice(index_), "cudaSetDevice"); }

void* CudaDevice::allocate(size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "cudaMalloc");
    return memory;
}

void* CudaDevice::allocateHost(size_t bytes) {
    void* memory = nullptr;
    check(cudaMallocHost(&memory, bytes), "cudaMallocHost");
    return memory;
}

void CudaDevice::release(void* memory) noexcept { cudaFree(memory); }

void CudaDevice::releaseHost(void* memory) noexcept { cudaFreeHost(memory); }

void CudaDevice::copy(void* to, void const* from, size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "cudaMemcpyAsync");
}

void CudaDevice::copies(std::vector<Copy> const& all) {
#if CUDART_VERSION >= 12080
    if (batches_ && !all.empty()) return copyBatch(all, stream_);
#endif
    Device::copies(all);
}

void CudaDevice::fill(void* at, int byte, size_t bytes) {
    check(cudaMemsetAsync(at, byte, bytes, stream_), "cudaMemsetAsync");
}

void CudaDevice::wait() { check(cudaStreamSynchronize(stream_), "the step"); }

std::unique_ptr<Graph> CudaDevice::capture(std::function<void()> const& work) {
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    bool recorded = true;
    try {
        work();
    } catch (BackendError const&) {
        recorded = false;  // nothing has run; a real fault will show when the step runs
    }
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    recorded &= cudaStreamEndCapture(stream_, &graph) == cudaSuccess;
    recorded = recorded && cudaGraphInstantiateWithFlags(&executable, graph, 0) == cudaSuccess;
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    return recorded ? std::make_unique<CudaGraph>(executable, stream_) : nullptr;
}

}  // namespace less
