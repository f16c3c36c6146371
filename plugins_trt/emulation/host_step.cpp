// C interface to one step of the emulated kernels, for tests. Scratch memory has the exact size and is poisoned.
#include <cstring>
#include <memory>

#include "less_attention.h"

extern "C" char const* less_why_unsupported(less::AttentionShape const* shape, less::AttentionRules const* rules) {
    return less::whyUnsupported(*shape, *rules);
}

extern "C" void less_host_set_order(int order) { emu::order() = order; }
extern "C" void less_host_set_blocks(int wanted) { emu::blocksWanted() = wanted; }
extern "C" void less_host_set_short_chunk(int tokens) { emu::longestShortChunk() = tokens; }
// How often the last launch prefetched the line of an address.
extern "C" int less_host_prefetches(void const* address) {
    auto const found = emu::prefetches().find(reinterpret_cast<uintptr_t>(address) / 128);
    return found == emu::prefetches().end() ? 0 : found->second;
}
extern "C" int less_host_launches() { return emu::launches(); }

// Returns a cudaError_t, or -1 if the counters are not zero afterwards.
extern "C" int less_host_step(less::AttentionShape const* shape, less::AttentionRules const* rules,
                              less::AttentionTensors const* tensors) {
    size_t const bytes = less::workspaceBytes(*shape, *rules);
    std::unique_ptr<unsigned char[]> const workspace(new unsigned char[bytes]);
    std::memset(workspace.get(), 0xff, bytes);
    std::unique_ptr<uint32_t[]> const counters(new uint32_t[less::kCounterBytes / sizeof(uint32_t)]());
    if (cudaError_t const status = less::prepare(*shape, *rules)) return status;
    cudaError_t const status = less::enqueue(*shape, *rules, *tensors, workspace.get(), counters.get(), nullptr);
    for (size_t i = 0; i < less::kCounterBytes / sizeof(uint32_t); ++i) {
        if (counters[i] != 0) return -1;
    }
    return status;
}
