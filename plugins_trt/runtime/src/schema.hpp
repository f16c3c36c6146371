// The form of a manifest: one table of its fields, the same as in less_export/bundle/schema.py.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#include "json.hpp"

namespace less {

constexpr size_t kMaxManifestBytes = 16 << 20;

// What a value must be. Throws JsonError, which names the `place`, for another value.
using Rule = std::function<void(Json const& value, std::string const& place)>;

// What is read before the hash is compared: a newer format may differ in the rest.
Rule const& headRule();
Rule const& manifestRule();

}  // namespace less
