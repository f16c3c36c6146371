// Which input shares an output's memory, according to an engine.
#pragma once

#include <string>

namespace less {

// The input that `output` is aliased to, or "". Engines of headers before TensorRT 10.15 cannot report it; there the
// manifest decides (`stated`), because only the plugin works in place.
template <class Engine>
auto aliasOf(Engine const& engine, std::string const& output, std::string const&, int)
    -> decltype(engine.getAliasedInputTensor(output.c_str()), std::string()) {
    char const* input = engine.getAliasedInputTensor(output.c_str());
    return input ? input : "";
}
template <class Engine>
std::string aliasOf(Engine const&, std::string const&, std::string const& stated, long) {
    return stated;
}

}  // namespace less
