// Which TensorRT wrote a plan, which one is linked, and whether the two match.
#pragma once

#include <filesystem>
#include <string_view>

#include "less_runtime.hpp"

namespace less {

// Reads the header of a plan. Throws EngineError if it is not a plan, or truncated.
PlanHeader readHeader(std::filesystem::path const& plan, std::string_view bytes);

// Compares the headers that the program was compiled with and the library that it runs with. Versions are TensorRT's:
// major * 10000 + minor * 100 + patch; TensorRT-RTX has major version 1. The two have different ABIs, so a program may
// call a library only if its headers are of the same kind and major version, and not newer. Throws EngineError
// otherwise.
void checkLibrary(int64_t headers, int64_t library);

// Throws EngineError if the other flavour wrote the plan.
void checkFlavour(PlanHeader const& header, std::filesystem::path const& plan, int64_t library);

}  // namespace less
