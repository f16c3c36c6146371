// Files of row states, for small contracts.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "json.hpp"
#include "row_state.hpp"
#include "text.hpp"

namespace {

using namespace less;

Contract contractOf(ElementType dtype, bool int8, bool means) {
    Contract c{};
    c.layers = {{2, 1, 2, 0.5, EvictionPolicy::kH2O, 1, 1, 0, true, 2, 2},
                {2, 1, 2, 0.5, EvictionPolicy::kWindow, 0, 2, 2, false, 2, 1}};
    if (int8) c.layers[0].slotDtype = SlotDtype::kInt8;
    if (int8 && means) c.layers[0].stateBits = 16;
    c.vocabSize = 9;
    c.dtype = dtype;
    c.chunk = c.maxBatch = 1;
    return c;
}

void use(std::string_view file, Contract const& contract) {
    try {
        RowState const state = readState(file, contract);
        RowState const again = readState(writeState(state, contract), contract);
        bool const same = again.data == state.data && again.length == state.length && again.identity == state.identity;
        if (!same || !invalidValues(state, contract).empty()) std::abort();
#ifdef LESS_FUZZ_PLANTED_FAULT
        std::vector<char> const table(10);  // the lengths of the corpus are smaller
        char volatile read = table.data()[std::min<int64_t>(state.length, 10)];
        static_cast<void>(read);
#endif
    } catch (JsonError const&) {
    } catch (BackendError const& error) {
        if (!isPrintable(error.what())) std::abort();
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size) {
    std::vector<char> file(data, data + size);  // of exactly this size
    std::string_view const text(file.data(), file.size());
    bool const bfloat16 = text.find("U16") != std::string_view::npos;
    bool const int8 = text.find("I8") != std::string_view::npos;
    bool const means = text.find("h_scale") != std::string_view::npos;
    Contract const contract = contractOf(bfloat16 ? ElementType::kBFloat16 : ElementType::kFloat16, int8, means);
    use(text, contract);
    // Again with the size of the header set right, so that the header may grow and shrink.
    auto const body = static_cast<size_t>(contract.stateBytes());
    if (size < 8 + body) return 0;
    uint64_t const header = size - 8 - body;
    if (std::memcmp(file.data(), &header, sizeof header) == 0) return 0;
    std::memcpy(file.data(), &header, sizeof header);
    use(text, contract);
    return 0;
}
