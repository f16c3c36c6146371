// Native code that bundles need: whether it may be loaded, and loading exactly the bytes that were checked. The same
// rules as in less_export/tensorrt/trust.py and cache.py.
#pragma once

#include <filesystem>
#include <string>

#include "less_runtime.hpp"

namespace less {

// The folder in which Python keeps what this machine built.
std::filesystem::path cacheFolder();

// Whether this machine built the code with this hash. Throws EngineError if others could have written the answer.
bool isKnown(std::string const& digest);

// The library that a plan was built with, or the one that LESS_EXPORT_PLUGIN names: a sealed copy in memory, whose path
// it returns. Its bytes are those that were hashed, whatever happens to the file. Throws EngineError if it is missing,
// has been replaced by another one, or may not be loaded.
std::filesystem::path findPlugin(PluginFacts const& facts, bool trustCode);

// Throws EngineError if this machine did not build the plan with this hash, which has code inside.
void refuseUnknownPlan(std::filesystem::path const& plan, std::string const& digest);

// Throws EngineError unless the code that a bundle needs may be loaded; loads nothing.
void checkTrust(Bundle const& bundle);

}  // namespace less
