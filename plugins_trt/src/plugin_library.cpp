// The library's entry points, and its registration when it is merely opened (Polygraphy's --plugins).
#include "plugin_library.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "less_attention_plugin.h"
#include "library_facts.h"

#define LESS_EXPORT extern "C" __attribute__((visibility("default")))

namespace less {

// The plugin registry of TensorRT-RTX 1: that of TensorRT without the functions for IPluginCreator, which no longer
// exists there. Its headers are available only in NVIDIA's SDK; TensorRT's headers would call the wrong virtual
// functions. (This class is not in the anonymous namespace, because the compiler would assume that nothing implements
// it.)
class RtxRegistry {
 protected:
    virtual ~RtxRegistry() noexcept = default;

 public:
    virtual void setErrorRecorder(nvinfer1::IErrorRecorder* recorder) noexcept = 0;
    virtual nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept = 0;
    virtual bool isParentSearchEnabled() const = 0;
    virtual void setParentSearchEnabled(bool enabled) = 0;
    virtual void* loadLibrary(char const* path) noexcept = 0;
    virtual void deregisterLibrary(void* handle) noexcept = 0;
    virtual bool registerCreator(nvinfer1::IPluginCreatorInterface& creator, char const* space) noexcept = 0;
    virtual nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept = 0;
    virtual nvinfer1::IPluginCreatorInterface* getCreator(char const* name, char const* version,
                                                          char const* space) noexcept = 0;
    virtual bool deregisterCreator(nvinfer1::IPluginCreatorInterface const& creator) noexcept = 0;
};

namespace {

void (*errorSink)(char const*) = nullptr;
nvinfer1::ILoggerFinder* loggerFinder = nullptr;

LessAttentionCreator& creator() {
    static LessAttentionCreator instance;
    return instance;
}

// Prefixes of the file names of TensorRT libraries that have a plugin registry.
constexpr char const* kRtx = "libtensorrt_rtx.so";
constexpr char const* kRtxSoname = "libtensorrt_rtx.so.1";
constexpr char const* kTensorRT[] = {"libnvinfer.so", "libnvinfer_lean.so", "libnvinfer_dispatch.so", kRtx};

char const* baseName(char const* path) {
    char const* slash = std::strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

// Paths of the TensorRT libraries in this process. This library is linked with none of them, so that it can be opened
// without TensorRT and works with both TensorRT and TensorRT-RTX.
std::vector<std::string> loadedTensorRT() {
    std::vector<std::string> paths;
    auto const collect = [](dl_phdr_info* info, size_t, void* data) {
        for (char const* name : kTensorRT)
            if (std::strncmp(baseName(info->dlpi_name), name, std::strlen(name)) == 0)
                static_cast<std::vector<std::string>*>(data)->push_back(info->dlpi_name);
        return 0;
    };
    dl_iterate_phdr(collect, &paths);
    return paths;
}

// A function of a library that is already open; nullptr if it is not.
template <typename Function>
Function* symbolOf(std::string const& path, char const* name) {
    void* const library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    auto* const symbol = reinterpret_cast<Function*>(dlsym(library, name));
    dlclose(library);
    return symbol;
}

// Registers the creator with every TensorRT in the process when the library is opened.
class Registration {
 public:
    Registration() noexcept {
        if (char const* reason = lessWhyUnusable()) logError((std::string("LessAttention: ") + reason).c_str());
        try {
            for (std::string const& path : loadedTensorRT()) {
                char const* const name = baseName(path.c_str());
                bool const rtx = std::strncmp(name, kRtx, std::strlen(kRtx)) == 0;
                if (rtx && std::strcmp(name, kRtxSoname) != 0) continue;  // a version with an unknown interface
                if (rtx) provideUnversionedName(name);
                auto* const get = symbolOf<void*()>(path, "getPluginRegistry");
                void* const registry = get == nullptr ? nullptr : get();
                if (rtx)
                    add(static_cast<RtxRegistry*>(registry), rtx_);
                else
                    add(static_cast<nvinfer1::IPluginRegistry*>(registry), full_);
            }
        } catch (...) {
            logError("LessAttention: cannot register with TensorRT");
        }
    }

    // Deregisters the creator: a registry that loads the library itself refuses names that are registered already.
    void undo() noexcept {
        if (rtx_ != nullptr) rtx_->deregisterCreator(creator());
        if (full_ != nullptr) full_->deregisterCreator(creator());
        rtx_ = nullptr;
        full_ = nullptr;
    }

 private:
    // Registers the creator, and remembers the registry if it accepted it (no plugin of that name was registered).
    template <typename Registry>
    static void add(Registry* registry, Registry*& registered) noexcept {
        if (registry != nullptr && registry->registerCreator(creator(), kPluginNamespace)) registered = registry;
    }

    RtxRegistry* rtx_ = nullptr;
    nvinfer1::IPluginRegistry* full_ = nullptr;
};

Registration registration;

}  // namespace

void logError(char const* message) noexcept {
    if (errorSink != nullptr) return errorSink(message);
    try {
        // TensorRT provides a logger only during some calls, and none while a network is being defined.
        if (nvinfer1::ILogger* logger = loggerFinder == nullptr ? nullptr : loggerFinder->findLogger()) {
            return logger->log(nvinfer1::ILogger::Severity::kERROR, message);
        }
    } catch (...) {
    }
    std::fprintf(stderr, "%s\n", message);
}

}  // namespace less

// TensorRT calls these two functions when it loads the library as a plugin library (IPluginRegistry::loadLibrary, or
// from a plan), and then registers the creators itself.
LESS_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { less::loggerFinder = finder; }

LESS_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
    static nvinfer1::IPluginCreatorInterface* const all[] = {&less::creator()};
    less::registration.undo();
    count = 1;
    return all;
}

// Redirects errors to `sink` instead of TensorRT's logger or stderr; nullptr restores these.
LESS_EXPORT void lessOnError(void (*sink)(char const*)) noexcept { less::errorSink = sink; }
