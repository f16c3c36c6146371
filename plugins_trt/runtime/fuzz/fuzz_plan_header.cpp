// Headers of plans.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "plan_header.hpp"
#include "text.hpp"

using namespace less;

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size) {
    std::vector<char> const copy(data, data + size);  // of exactly this size
    std::string_view const plan(copy.data(), copy.size());
#ifdef LESS_FUZZ_PLANTED_FAULT
    if (plan.substr(0, 4) == "vtrt") {
        char volatile read = copy.data()[27];
        static_cast<void>(read);
    }
#endif
    try {
        PlanHeader const header = readHeader("x.plan", plan);
        if (!isPrintable(header.version)) std::abort();
        checkFlavour(header, "x.plan", 10701);
    } catch (EngineError const& error) {
        if (!isPrintable(error.what())) std::abort();
    }
    return 0;
}
