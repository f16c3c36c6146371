// The library's entry points, and its registration where it is merely opened (Polygraphy's --plugins).
#include "plugin_library.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "less_attention_plugin.h"

#define LESS_EXPORT extern "C" __attribute__((visibility("default")))

namespace less {
namespace {

using nvinfer1::IPluginRegistry;

nvinfer1::ILoggerFinder* loggerFinder = nullptr;

LessAttentionCreator& creator() {
    static LessAttentionCreator it;
    return it;
}

// TensorRT libraries that own a plugin registry, by the start of their file name.
constexpr char const* kTensorRT[] = {"libnvinfer.so", "libnvinfer_lean.so", "libnvinfer_dispatch.so",
                                     "libtensorrt_rtx.so"};

char const* baseName(char const* path) {
    char const* slash = std::strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

// Paths of the TensorRT libraries in this process. The library is linked with none: it may be opened without
// TensorRT, and serves TensorRT and TensorRT-RTX alike.
std::vector<std::string> loadedTensorRT() {
    std::vector<std::string> found;
    auto const take = [](dl_phdr_info* info, size_t, void* data) {
        for (char const* name : kTensorRT)
            if (std::strncmp(baseName(info->dlpi_name), name, std::strlen(name)) == 0)
                static_cast<std::vector<std::string>*>(data)->push_back(info->dlpi_name);
        return 0;
    };
    dl_iterate_phdr(take, &found);
    return found;
}

// Registers the creator where the library is opened, with every TensorRT that is there by then.
class Registration {
   public:
    Registration() noexcept {
        try {
            for (std::string const& path : loadedTensorRT()) {
                if (std::strncmp(baseName(path.c_str()), "libtensorrt_rtx.so.", 19) == 0)
                    provideUnversionedName(baseName(path.c_str()));
                enter(path);
            }
        } catch (...) {
            logError("LessAttention: cannot register with TensorRT");
        }
    }

    // Takes the creator out again: a registry that loads the library itself refuses names that it has.
    void undo() noexcept {
        for (IPluginRegistry* registry : registries_) registry->deregisterCreator(creator());
        registries_.clear();
    }

   private:
    void enter(std::string const& path) {
        void* const library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        if (library == nullptr) return;
        auto const get = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"));
        IPluginRegistry* const registry = get == nullptr ? nullptr : get();
        if (registry != nullptr && !holds(*registry) && registry->registerCreator(creator(), kPluginNamespace))
            registries_.push_back(registry);
        dlclose(library);  // the reference of this dlopen
    }

    static bool holds(IPluginRegistry const& registry) {
        int32_t count = 0;
        nvinfer1::IPluginCreatorInterface* const* all = registry.getAllCreators(&count);
        for (int32_t i = 0; i < count; ++i) {
            if (std::strcmp(all[i]->getInterfaceInfo().kind, creator().getInterfaceInfo().kind) != 0) continue;
            auto const& other = *static_cast<nvinfer1::IPluginCreatorV3One const*>(all[i]);
            if (std::strcmp(other.getPluginName(), kPluginName) == 0 &&
                std::strcmp(other.getPluginVersion(), kPluginVersion) == 0)
                return true;
        }
        return false;
    }

    std::vector<IPluginRegistry*> registries_;
};

Registration registration;

}  // namespace

void logError(char const* message) noexcept {
    try {
        if (nvinfer1::ILogger* logger = loggerFinder == nullptr ? nullptr : loggerFinder->findLogger()) {
            logger->log(nvinfer1::ILogger::Severity::kERROR, message);
            return;
        }
    } catch (...) {
    }
    std::fprintf(stderr, "%s\n", message);
}

}  // namespace less

// TensorRT calls these two when it loads the library as one of plugins (IPluginRegistry::loadLibrary, or out of a
// plan), and then registers the creators itself.
LESS_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { less::loggerFinder = finder; }

LESS_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
    static nvinfer1::IPluginCreatorInterface* const all[] = {&less::creator()};
    less::registration.undo();
    count = 1;
    return all;
}

// less::whyUnsupported for callers that are not C++: nullptr, or the reason in words.
LESS_EXPORT char const* lessWhyUnsupported(int32_t dtype, int32_t queryHeads, int32_t kvHeads, int32_t headDim,
                                           int32_t slots, int32_t rank, float scale, int32_t policy, int32_t heavy,
                                           int32_t recent, int32_t window, int32_t absorb) noexcept {
    less::AttentionShape const shape{less::DType{dtype}, 1, queryHeads, kvHeads, 1, headDim, slots, rank};
    return less::whyUnsupported(shape, {scale, less::Policy{policy}, heavy, recent, window, absorb});
}
