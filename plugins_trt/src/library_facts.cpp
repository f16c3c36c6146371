#include "library_facts.h"

#include <cstdio>

#include "less_attention.h"

char const* lessWhyUnusable() noexcept {
    static char reason[200];
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return nullptr;
    if (driver / 1000 >= CUDART_VERSION / 1000) return nullptr;
    std::snprintf(
        reason, sizeof reason,
        "the driver supports CUDA up to %d.%d, and the kernels were built with CUDA %d.%d: update the driver, or "
        "build them with an older CUDA",
        driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    return reason;
}

char const* lessWhyUnsupported(int32_t dtype, int32_t queryHeads, int32_t kvHeads, int32_t headDim, int32_t slots,
                               int32_t rank, float scale, int32_t policy, int32_t heavy, int32_t recent, int32_t window,
                               int32_t absorb, float decay, int32_t slotBits, int32_t stateBits) noexcept {
    less::AttentionShape shape{less::DType{dtype},      1, queryHeads, kvHeads, 1, headDim, slots, rank,
                               less::SlotType{slotBits}};
    shape.stateType = less::StateType{stateBits};
    return less::whyUnsupported(shape, {scale, less::Policy{policy}, heavy, recent, window, absorb, decay});
}
