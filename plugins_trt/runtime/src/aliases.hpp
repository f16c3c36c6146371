// Which input shares an output's memory, according to an engine.
#pragma once

#include <string>

namespace less {

// The input that the engine says `output` is aliased to, or "". Engines need not report what a plugin does, and cannot
// with headers before TensorRT 10.15.
template <class Engine>
auto aliasOf(Engine const& engine, std::string const& output, int)
    -> decltype(engine.getAliasedInputTensor(output.c_str()), std::string()) {
    char const* input = engine.getAliasedInputTensor(output.c_str());
    return input ? input : "";
}
template <class Engine>
std::string aliasOf(Engine const&, std::string const&, long) {
    return "";
}

}  // namespace less
