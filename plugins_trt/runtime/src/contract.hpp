// Parses the contracts in manifests.
#pragma once

#include "json.hpp"
#include "less_runtime.hpp"

namespace less {

// Throws JsonError or UsageError if the manifest's contract is damaged or impossible.
Contract parseContract(Json const& data);

}  // namespace less
