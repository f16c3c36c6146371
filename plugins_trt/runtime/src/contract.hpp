// Parses the contracts in manifests.
#pragma once

#include "json.hpp"
#include "less_runtime.hpp"

namespace less {

// The contract of a manifest that has the right form (manifestRule). Throws UsageError if it is impossible.
Contract parseContract(Json const& data);

}  // namespace less
