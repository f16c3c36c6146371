// TensorRT plans (either flavour) as Plan, and openSession.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <mutex>

#include "aliases.hpp"
#include "cuda_device.hpp"
#include "files.hpp"
#include "plan_header.hpp"
#include "plan_runner.hpp"
#include "sha256.hpp"
#include "text.hpp"
#include "trust.hpp"

extern "C" int32_t getInferLibVersion() noexcept;

namespace less {
namespace {

namespace trt = nvinfer1;

// TensorRT's logger, one per process as TensorRT requires. Keeps the errors since reset() and prints if verbose.
class Log : public trt::ILogger {
 public:
    void log(Severity severity, char const* message) noexcept override {
        try {
            std::lock_guard const lock(mutex_);
            if (verbose_) std::fprintf(stderr, "%s\n", printable(message).c_str());
            if (severity <= Severity::kERROR) errors_.emplace_back(message);
        } catch (...) {  // out of memory: drop the message, because nothing may be thrown through TensorRT
        }
    }

    void reset(bool verbose) {
        std::lock_guard const lock(mutex_);
        verbose_ |= verbose;
        errors_.clear();
    }

    // The first error that does not merely repeat another, in one line.
    std::string reason() {
        std::lock_guard const lock(mutex_);
        for (std::string text : errors_) {
            if (text.find("catchCudaError") != std::string::npos) continue;
            return text.size() > 300 ? text.substr(0, 297) + "..." : text;
        }
        return "no reason given (its log may have details)";
    }

 private:
    std::mutex mutex_;
    bool verbose_ = false;
    std::vector<std::string> errors_;
};

Log& sharedLog() {
    static Log* log = new Log;  // never destroyed: TensorRT may log until the process ends
    return *log;
}

Shape shapeOf(trt::Dims const& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

std::string typeName(trt::DataType type) {
    switch (type) {
        case trt::DataType::kFLOAT:
            return nameOf(ElementType::kFloat32);
        case trt::DataType::kHALF:
            return nameOf(ElementType::kFloat16);
        case trt::DataType::kBF16:
            return nameOf(ElementType::kBFloat16);
        case trt::DataType::kINT8:
            return nameOf(ElementType::kInt8);
        case trt::DataType::kINT32:
            return nameOf(ElementType::kInt32);
        case trt::DataType::kINT64:
            return nameOf(ElementType::kInt64);
        default:
            return "TensorRT type " + std::to_string(static_cast<int>(type));
    }
}

class TrtPlan : public Plan {
 public:
    TrtPlan(Bundle const& bundle, cudaStream_t stream) : stream_(stream) {
        runtime_.reset(trt::createInferRuntime(sharedLog()));
        if (!runtime_) throw EngineError("TensorRT cannot start: " + sharedLog().reason());
        MappedFile const file(bundle.plan);
        if (bundle.plugin && bundle.plugin->inside) {  // a plugin inside the plan is host code
            if (!bundle.trustCode) refuseUnknownPlan(bundle.plan, sha256(file.view()));
            runtime_->setEngineHostCodeAllowed(true);
        }
        engine_.reset(runtime_->deserializeCudaEngine(file.view().data(), file.view().size()));
        if (!engine_) {
            throw EngineError("TensorRT cannot load " + bundle.plan.string() + " (built by version " +
                              bundle.header.version + "): " + sharedLog().reason() +
                              ": build it again with this version, for this GPU");
        }
        for (int profile = 0; profile < profiles(); ++profile) {
            if (addContext(profile) < 0) {
                throw EngineError("TensorRT cannot prepare profile " + std::to_string(profile) + ": " +
                                  sharedLog().reason());
            }
        }
    }

    std::vector<PlanTensor> tensors() const override {
        std::vector<PlanTensor> result;
        for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
            char const* name = engine_->getIOTensorName(i);
            bool const input = engine_->getTensorIOMode(name) == trt::TensorIOMode::kINPUT;
            result.push_back(
                {name, input, typeName(engine_->getTensorDataType(name)), shapeOf(engine_->getTensorShape(name))});
        }
        return result;
    }

    int profiles() const override { return engine_->getNbOptimizationProfiles(); }

    std::pair<Shape, Shape> range(std::string const& input, int profile) const override {
        auto const shape = [&](trt::OptProfileSelector selector) {
            return shapeOf(engine_->getProfileShape(input.c_str(), profile, selector));
        };
        return {shape(trt::OptProfileSelector::kMIN), shape(trt::OptProfileSelector::kMAX)};
    }

    std::string aliasedInput(std::string const& output) const override { return aliasOf(*engine_, output, 0); }

    void note(std::string const& what) override { sharedLog().log(trt::ILogger::Severity::kWARNING, what.c_str()); }

    int addContext(int profile) override {
        auto const strategy = trt::ExecutionContextAllocationStrategy::kUSER_MANAGED;
        std::unique_ptr<trt::IExecutionContext> context(engine_->createExecutionContext(strategy));
        if (!context || !context->setOptimizationProfileAsync(profile, stream_)) return -1;
        contexts_.push_back(std::move(context));
        return static_cast<int>(contexts_.size()) - 1;
    }

    size_t activationBytes() const override { return static_cast<size_t>(engine_->getDeviceMemorySizeV2()); }

    void useMemory(int context, void* memory, size_t bytes) override {
        contexts_[context]->setDeviceMemoryV2(memory, static_cast<int64_t>(bytes));
    }

    bool setShape(int context, std::string const& input, Shape const& shape) override {
        trt::Dims dims{};
        if (shape.size() > trt::Dims::MAX_DIMS) return false;
        dims.nbDims = static_cast<int32_t>(shape.size());
        std::copy(shape.begin(), shape.end(), dims.d);
        return contexts_[context]->setInputShape(input.c_str(), dims);
    }

    Shape shape(int context, std::string const& tensor) const override {
        return shapeOf(contexts_[context]->getTensorShape(tensor.c_str()));
    }

    void bind(int context, std::string const& tensor, void* memory) override {
        if (!contexts_[context]->setTensorAddress(tensor.c_str(), memory)) fail();
    }

    void enqueue(int context) override {
        sharedLog().reset(false);
        if (!contexts_[context]->enqueueV3(stream_)) fail();
    }

 private:
    [[noreturn]] static void fail() { throw BackendError("TensorRT cannot run this step: " + sharedLog().reason()); }

    cudaStream_t stream_;
    std::unique_ptr<trt::IRuntime> runtime_;    // must outlive the engine
    std::unique_ptr<trt::ICudaEngine> engine_;  // must outlive its contexts
    std::vector<std::unique_ptr<trt::IExecutionContext>> contexts_;
};

// The library registers the plugin when it is loaded. It is never closed, because engines may use it until the end.
void loadPlugin(Bundle const& bundle) {
    if (!bundle.plugin || bundle.plugin->inside) return;
    std::string const path = bundle.plugin->library.string();
    void* const library = ::dlopen(findPlugin(*bundle.plugin, bundle.trustCode).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        char const* why = ::dlerror();
        throw EngineError("cannot load the plugin " + path + ": " + (why ? why : "no reason given"));
    }
    // Libraries of older versions do not say whether the driver is too old for them.
    auto* const whyUnusable = reinterpret_cast<char const* (*)()>(::dlsym(library, "lessWhyUnusable"));
    char const* const reason = whyUnusable ? whyUnusable() : nullptr;
    if (reason) throw EngineError("cannot use the plugin " + path + ": " + reason);
}

// The kernel of the library that the options name; once it is used, it is never closed.
SampleKernel loadSampler(std::filesystem::path const& path, cudaStream_t stream) {
    if (path.empty()) return {};
    void* const library = ::dlopen(std::filesystem::absolute(path).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        char const* why = ::dlerror();
        throw EngineError("cannot load the sampler " + path.string() + ": " + (why ? why : "no reason given"));
    }
    auto* const interface = reinterpret_cast<decltype(&lessSampleInterface)>(::dlsym(library, "lessSampleInterface"));
    auto* const why = reinterpret_cast<decltype(&lessSampleWhyUnusable)>(::dlsym(library, "lessSampleWhyUnusable"));
    auto* const sample = reinterpret_cast<decltype(&lessSample)>(::dlsym(library, "lessSample"));
    if (!interface || !why || !sample || interface() != kLessSampleInterface) {
        ::dlclose(library);
        throw EngineError("cannot use the sampler " + path.string() + ": it is of another version: build it again");
    }
    if (char const* const reason = why()) throw EngineError("cannot use the sampler " + path.string() + ": " + reason);
    return [sample, stream](float const* logits, int64_t vocab, LessSampleRow const* rows, int32_t count,
                            uint32_t* histories, int32_t* picks) {
        int32_t const error = sample(logits, vocab, rows, count, histories, picks, stream);
        if (error) {
            throw BackendError(std::string("the sampler cannot be launched on the GPU: ") +
                               cudaGetErrorString(static_cast<cudaError_t>(error)));
        }
    };
}

}  // namespace

Session openSession(Bundle const& bundle, SessionOptions const& options) {
    // First, because this reports a missing driver most clearly.
    auto device = std::make_unique<CudaDevice>(options.device);
    checkLibrary(NV_TENSORRT_VERSION, getInferLibVersion());
    checkFlavour(bundle.header, bundle.plan, getInferLibVersion());
    sharedLog().reset(options.verbose);
    loadPlugin(bundle);
    SampleKernel sample = loadSampler(options.sampler, device->stream());
    auto plan = std::make_unique<TrtPlan>(bundle, device->stream());
    bool const rowsByIndex = bundle.plugin && bundle.plugin->rowsByIndex;
    auto runner =
        std::make_unique<PlanRunner>(bundle.contract, std::move(device), std::move(plan), bundle.plugin.has_value(),
                                     options.cudaGraphs, rowsByIndex, std::move(sample));
    return Session(bundle.contract, bundle.identity, std::move(runner));
}

}  // namespace less
