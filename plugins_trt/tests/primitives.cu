// The tensor-core primitives in isolation, run on the host by tests/test_cuda_primitives.py, on a GPU by gpu_check.
//
// One warp takes a [16 x 16], keys [16 x 16] and values [16 x 16], and writes scores = a keys^T and products = a
// values, both [16 x 16] f32. Rows of keys and values that are not `valid` must not be read and count as zero.
#include "tensor_ops.cuh"

namespace less {
namespace {

constexpr int kSize = 16;
constexpr int kStride = kSize + 8;

struct PrimitiveParams {
    void const *a, *keys, *values;
    int const* valid;
    float *scores, *products;
};

template <class T>
struct PrimitiveShared {
    T keys[kSize * kStride], values[kSize * kStride];
};

__device__ void store(float* target, float const (&c)[4], int firstColumn, int lane) {
    for (int e = 0; e < 4; ++e) {
        target[(lane / 4 + (e >> 1) * 8) * kSize + firstColumn + lane % 4 * 2 + (e & 1)] = c[e];
    }
}

template <class T>
__global__ void primitiveKernel(PrimitiveParams const p) {
    LESS_SHARED_MEMORY(raw);
    auto& shared = *reinterpret_cast<PrimitiveShared<T>*>(raw);
    int const tid = threadIdx.x, lane = tid % kWarpSize;
    if (tid < kSize) {
        for (int column = 0; column < kSize; column += 8) {
            T const* const keys = static_cast<T const*>(p.keys) + (p.valid[tid] ? tid * kSize + column : 0);
            T const* const values = static_cast<T const*>(p.values) + (p.valid[tid] ? tid * kSize + column : 0);
            copyAsync(shared.keys + tid * kStride + column, keys, p.valid[tid]);
            commitCopies();
            copyAsync(shared.values + tid * kStride + column, values, p.valid[tid]);
            commitCopies();
        }
        awaitCopies<1>();
        awaitCopies<0>();
    }
    __syncthreads();
    if (tid >= kWarpSize) return;
    uint32_t a[4], b[4];
    for (int i = 0; i < 4; ++i) {
        T const* const element =
            static_cast<T const*>(p.a) + (lane / 4 + (i & 1) * 8) * kSize + (i >> 1) * 8 + lane % 4 * 2;
        a[i] = *reinterpret_cast<uint32_t const*>(element);
    }
    float low[4] = {}, high[4] = {};
    loadMatrices<false>(b, shared.keys + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8);
    multiplyAdd<T>(low, a, b);
    multiplyAdd<T>(high, a, b + 2);
    store(p.scores, low, 0, lane);
    store(p.scores, high, 8, lane);
    for (int e = 0; e < 4; ++e) low[e] = high[e] = 1.f;  // the product is added to this
    loadMatrices<true>(b, shared.values + lane % 16 * kStride + lane / 16 * 8);
    multiplyAdd<T>(low, a, b);
    multiplyAdd<T>(high, a, b + 2);
    store(p.products, low, 0, lane);
    store(p.products, high, 8, lane);
}

}  // namespace
}  // namespace less

// Pointers are to device memory, or to host memory when emulated. Returns a cudaError_t.
extern "C" int less_primitives(int bfloat16, void const* a, void const* keys, void const* values, int const* valid,
                               float* scores, float* products) {
    using namespace less;
    PrimitiveParams const params{a, keys, values, valid, scores, products};
    if (bfloat16) {
        size_t const bytes = sizeof(PrimitiveShared<__nv_bfloat16>);
        return run(Mode::kLaunch, primitiveKernel<__nv_bfloat16>, dim3(1), bytes, params, nullptr);
    }
    return run(Mode::kLaunch, primitiveKernel<__half>, dim3(1), sizeof(PrimitiveShared<__half>), params, nullptr);
}
