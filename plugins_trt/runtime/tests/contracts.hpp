// Contracts for tests.
#pragma once

#include "less_runtime.hpp"

namespace less::testing {

// One h2o layer with a low-rank state, whose slots may be int8, and one sliding layer.
inline Contract twoLayers(ElementType dtype = ElementType::kFloat16, SlotDtype slots = SlotDtype::kModel,
                          int64_t stateBits = 32) {
    Contract c{};
    c.layers = {{4, 2, 8, 0.35, EvictionPolicy::kH2O, 3, 3, 0, true, 6, 4},
                {4, 1, 8, 0.35, EvictionPolicy::kWindow, 0, 5, 5, false, 5, 1}};
    c.layers[0].slotDtype = slots;
    c.layers[0].stateBits = stateBits;
    c.vocabSize = 50;
    c.dtype = dtype;
    c.chunk = 4;
    c.maxBatch = 3;
    return c;
}

}  // namespace less::testing
