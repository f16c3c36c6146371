// Manifests: JSON and its canonical text, the table of fields, the contract, and what a runtime reads.
#include <cstdlib>

#include "manifest.hpp"
#include "schema.hpp"
#include "text.hpp"

namespace {

using namespace less;

void expect(bool ok) {
    if (!ok) std::abort();
}

// Sums and names of a contract that was accepted.
void useContract(Contract const& contract) {
    int64_t const row = contract.stateBytes();
    expect(row > 0 && row < (int64_t{1} << 60) / contract.maxBatch);
    size_t tensors = 0;
    for (LayerSpec const& layer : contract.layers) {
        tensors += 7 + (layer.slotDtype == SlotDtype::kInt8 ? 2 : 0) + (layer.stateBits == 16 ? 1 : 0);
    }
    expect(contract.inputs().size() == 3 + tensors);
    for (TensorSpec const& spec : contract.outputs()) expect(spec.bytes(contract.maxBatch, contract.chunk) > 0);
    expect(contract.tokenLimit().value_or(1) > 0);
}

void useBundle(Bundle const& bundle) {
    useContract(bundle.contract);
    expect(isPrintable(bundle.plan.string()) && bundle.plan.filename() == bundle.plan);
#ifdef LESS_FUZZ_PLANTED_FAULT
    std::vector<int64_t> const table(3);  // the corpus has at most two of them
    int64_t volatile read = table.data()[bundle.eosIds.size()];
    static_cast<void>(read);
#endif
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size) {
    std::string_view const text(reinterpret_cast<char const*>(data), size);
    try {
        readManifest(text, "a manifest");
    } catch (Error const& error) {
        expect(isPrintable(error.what()));
    }
    try {  // without the hash, which no mutation gets right
        Json const json = Json::parse(text);
        std::string const canonical = json.canonical();
        expect(Json::parse(canonical).canonical() == canonical);
        manifestRule()(json, "");
        useBundle(describe(json, "a manifest"));
    } catch (JsonError const&) {
    } catch (Error const& error) {
        expect(isPrintable(error.what()));
    }
    return 0;
}
