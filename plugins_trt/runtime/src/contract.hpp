// Contracts out of manifests.
#pragma once

#include "json.hpp"
#include "less_runtime.hpp"

namespace less {

// Throws JsonError or UsageError where the manifest's contract is damaged or impossible.
Contract parseContract(Json const& data);

}  // namespace less
