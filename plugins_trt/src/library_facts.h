// What callers outside of C++ ask of a library with the kernels: the TensorRT plugin, or the operator for ONNX Runtime.
#pragma once

#include <cstdint>

extern "C" {
#pragma GCC visibility push(default)

// Why the kernels cannot run with this machine's driver: the reason, or nullptr, also without a driver (engines are
// built there). A driver runs what is built with its major version of CUDA or an older one.
char const* lessWhyUnusable() noexcept;

// less::whyUnsupported for callers outside of C++: the reason, or nullptr. A largest distance is no reason; its table
// is checked with the node.
char const* lessWhyUnsupported(int32_t dtype, int32_t queryHeads, int32_t kvHeads, int32_t headDim, int32_t slots,
                               int32_t rank, float scale, int32_t policy, int32_t heavy, int32_t recent, int32_t window,
                               int32_t absorb, float decay, int32_t slotBits, int32_t stateBits) noexcept;

#pragma GCC visibility pop
}
