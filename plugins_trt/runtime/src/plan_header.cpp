#include "plan_header.hpp"

#include <cstring>

namespace less {
namespace {

constexpr int64_t kFirstTensorRt = 50000;  // smaller versions are TensorRT-RTX

char const* flavour(bool rtx) { return rtx ? "TensorRT-RTX" : "TensorRT"; }

bool isRtx(int64_t version) { return version < kFirstTensorRt; }

std::string label(int64_t version) {
    return std::string(flavour(isRtx(version))) + " " + std::to_string(version / 10000) + "." +
           std::to_string(version / 100 % 100) + "." + std::to_string(version % 100);
}

}  // namespace

PlanHeader readHeader(std::filesystem::path const& plan, std::string_view bytes) {
    // Layout: magic, 12 other bytes, total bytes (u64), then major, minor, patch and build (a byte each).
    constexpr size_t kTotal = 16, kVersion = 24, kEnd = 28;
    std::string_view const magic = bytes.substr(0, 4);
    if ((magic != "ftrt" && magic != "vtrt") || bytes.size() < kEnd) {
        throw EngineError(plan.string() + " is not a TensorRT plan: build it again");
    }
    PlanHeader header{magic == "vtrt", ""};
    uint64_t total = 0;
    std::memcpy(&total, bytes.data() + kTotal, sizeof total);
    if (header.rtx && total != bytes.size()) {  // TensorRT may store something else there
        throw EngineError("the plan " + plan.string() + " has " + std::to_string(bytes.size()) + " bytes instead of " +
                          std::to_string(total) + ": build it again");
    }
    for (size_t i = kVersion; i < kEnd; ++i) {
        header.version += (i > kVersion ? "." : "") + std::to_string(static_cast<unsigned char>(bytes[i]));
    }
    return header;
}

void checkLibrary(int64_t headers, int64_t library) {
    bool const sameMajor = headers / 10000 == library / 10000;
    if (isRtx(headers) != isRtx(library) || !sameMajor || headers / 100 > library / 100) {
        throw EngineError("this program was compiled with the headers of " + label(headers) + " and runs with " +
                          label(library) + ": compile it with the headers of that library (TENSORRT_INCLUDE_DIR)");
    }
}

void checkFlavour(PlanHeader const& header, std::filesystem::path const& plan, int64_t library) {
    if (header.rtx != isRtx(library)) {
        throw EngineError(plan.string() + " was built by " + flavour(header.rtx) + " " + header.version +
                          ", and this program is linked with " + label(library) +
                          ": rebuild one of them to match the other");
    }
}

}  // namespace less
