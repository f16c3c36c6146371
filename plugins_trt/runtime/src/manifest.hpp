// The manifest of a bundle: verified, and what a runtime needs of it.
#pragma once

#include <string>
#include <string_view>

#include "json.hpp"
#include "less_runtime.hpp"

namespace less {

// The oldest and the newest `format_version` that this runtime opens.
constexpr int64_t kOldestFormat = 1;
constexpr int64_t kNewestFormat = 2;

// The manifest in a file's contents, verified by its hash and its form; `where` names the file in messages. Throws
// BundleError.
Json readManifest(std::string_view text, std::string const& where);

// A manifest of the right form as a Bundle with the plan's name in place of its path. Throws BundleError if the
// contract is impossible, BackendError if there is no plan.
Bundle describe(Json const& manifest, std::string const& where);

}  // namespace less
