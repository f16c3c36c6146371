// Which input shares an output's memory, asked of an engine.
#pragma once

#include <string>

namespace less {

// Headers before TensorRT 10.15 cannot ask: there what the manifest states holds, because only the plugin works in
// place. "" is none.
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
