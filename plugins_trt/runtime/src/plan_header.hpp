// Which TensorRT wrote a plan, which one is linked, and whether they go together.
#pragma once

#include <filesystem>
#include <string_view>

#include "less_runtime.hpp"

namespace less {

// Reads the first bytes of a plan. Throws EngineError where it is no plan, or cut short.
PlanHeader readHeader(std::filesystem::path const& plan, std::string_view bytes);

// Versions as TensorRT counts them: major * 10000 + minor * 100 + patch; TensorRT-RTX has major 1. The interfaces of
// the two differ in binary form, so a program calls into a library only if its headers are of that kind, of the same
// major version and not newer. Throws EngineError otherwise.
void checkLibrary(int64_t headers, int64_t library);

// Throws EngineError where the other flavour wrote the plan.
void checkFlavour(PlanHeader const& header, std::filesystem::path const& plan, int64_t library);

}  // namespace less
