// Tiles of keys, values and queries that stream through shared memory, and a warp's products with them.
//
// A warp owns 16 rows of one operand. For every dtype, the results are C fragments of mma.m16n8k16 (tensor_ops.cuh): a
// thread holds rows g and g + 8, columns 2t and 2t + 1 of every eight, with g = lane / 4 and t = lane % 4.
#pragma once

#include "tensor_ops.cuh"

namespace less {

constexpr int kTileRows = 64;  // rows that a block owns, 16 per warp
__host__ __device__ __forceinline__ int tilesOf(int rows) { return (rows + kTileRows - 1) / kTileRows; }

// Tiles that stream through a ring of stages in shared memory: some are on their way while one is in use. Decode and
// prefill have the same ring. Its methods are called by all threads. Items come in order; copy(item, stage) starts a
// thread's copies of one.
template <int MinStages>
class Ring {
 public:
    // A ring of 1, 2 or 4 stages for the items [0, items).
    __device__ __forceinline__ Ring(int stages, int items) : stages_(stages), items_(items) {}

    // Starts the next item that has not started; to be called for stages - 1 items before the first is needed. Without
    // an item there is an empty group of copies, so that groups count items.
    template <class Copy>
    __device__ __forceinline__ void start(Copy const& copy) {
        if (started_ < items_) copy(started_, target_);
        commitCopies();
        ++started_;
        target_ = after(target_);
    }
    // The stage of the next item, when the copies of all threads have arrived. The item before must not be read any
    // more: one that follows is started in its stage. With one stage, the next item itself is only started now.
    // arrived(stage) is called when the thread's own copies have arrived.
    template <class Copy, class Arrived>
    __device__ __forceinline__ int next(Copy const& copy, Arrived const& arrived) {
        bool const single = MinStages == 1 && stages_ == 1;
        if (single) {
            __syncthreads();
            start(copy);
        }
        if (stages_ == 4) {
            awaitCopies<2>();
        } else {
            awaitCopies<0>();
        }
        int const stage = stage_;
        arrived(stage);
        __syncthreads();
        if (!single) start(copy);
        stage_ = after(stage);
        return stage;
    }

 private:
    __device__ __forceinline__ int after(int stage) const { return stage + 1 < stages_ ? stage + 1 : 0; }

    int const stages_, items_;
    int started_ = 0, target_ = 0, stage_ = 0;
};

// Geometry of the streamed tiles of prefill. W is D rounded up. Two stages of keys and values take less than half of
// the 100 KB that a multiprocessor has on many GPUs.
template <class T, int W>
struct Tiling {
    static constexpr int kRows = W > 128 ? 16 : W > 64 ? 32 : 64;
    static constexpr int kStride = W + 16 / sizeof(T);  // padded: the rows of a matrix load are in different banks
    static constexpr int kStages = sizeof(T) == 2 ? 2 : 1;
    static constexpr int kVector = 16 / sizeof(T);  // elements per copy
    struct Tile {
        T x[kRows * kStride];
    };
};

// The rows of one operand that a warp owns; a thread has rows g and g + 8 of the 16. 16-bit elements are held in
// registers as A fragments, f32 stays in global memory.
template <class T, int W>
struct WarpRows {
    uint32_t fragments[W / 16][4];
    __device__ __forceinline__ void load(T const* low, T const* high, int D, int t) {
#pragma unroll
        for (int k = 0; k < W / 16; ++k) loadStep(fragments[k], low, high, D, k, t);
    }
    // The fragment of columns 16k to 16k + 15.
    __device__ __forceinline__ static void loadStep(uint32_t (&a)[4], T const* low, T const* high, int D, int k,
                                                    int t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            T const* const row = i & 1 ? high : low;
            int const column = k * 16 + (i >> 1) * 8 + t * 2;
            a[i] = row != nullptr && column < D ? *reinterpret_cast<uint32_t const*>(row + column) : 0u;
        }
    }
    // s = rows * tile^T
    template <int N>
    __device__ __forceinline__ void multiply(float (&s)[N / 8][4], T const* tile, int stride, int D, int lane) const {
        (void)D;
#pragma unroll
        for (int i = 0; i < N / 8; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.f;
        add<N>(s, tile, stride, lane);
    }
    // s += rows * tile^T
    template <int N>
    __device__ __forceinline__ void add(float (&s)[N / 8][4], T const* tile, int stride, int lane) const {
#pragma unroll
        for (int k = 0; k < W / 16; ++k) addStep<N>(s, fragments[k], tile, stride, k, lane);
    }
    // The share of columns 16k to 16k + 15 in that.
    template <int N>
    __device__ __forceinline__ static void addStep(float (&s)[N / 8][4], uint32_t const (&a)[4], T const* tile,
                                                   int stride, int k, int lane) {
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {
            uint32_t b[4];
            loadMatrices<false>(b, tile + (i * 16 + lane / 16 * 8 + lane % 8) * stride + k * 16 + lane / 8 % 2 * 8);
            multiplyAdd<T>(s[2 * i], a, b);
            multiplyAdd<T>(s[2 * i + 1], a, b + 2);
        }
    }
};

template <int W>
struct WarpRows<float, W> {
    float const* rows[2];
    __device__ __forceinline__ void load(float const* low, float const* high, int, int) {
        rows[0] = low;
        rows[1] = high;
    }
    template <int N>
    __device__ __forceinline__ void multiply(float (&s)[N / 8][4], float const* tile, int stride, int D,
                                             int lane) const {
#pragma unroll
        for (int i = 0; i < N / 8; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.f;
        for (int d = 0; d < D; d += 4) {
            float4 own[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                own[r] = rows[r] != nullptr ? *reinterpret_cast<float4 const*>(rows[r] + d) : float4{0, 0, 0, 0};
            }
#pragma unroll
            for (int i = 0; i < N / 8; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float const* const other = tile + (i * 8 + lane % 4 * 2 + (e & 1)) * stride + d;
                    float4 const x = own[e >> 1], y = *reinterpret_cast<float4 const*>(other);
                    s[i][e] += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
                }
            }
        }
    }
};

// o += p * tile for the probabilities p [16 x N] of a warp.
template <class T, int W, int N>
__device__ __forceinline__ void accumulate(float (&o)[W / 8][4], float const (&p)[N / 8][4], T const* tile, int stride,
                                           int lane) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int k = 0; k < N / 16; ++k) {
            uint32_t const a[4] = {packed<T>(p[2 * k][0], p[2 * k][1]), packed<T>(p[2 * k][2], p[2 * k][3]),
                                   packed<T>(p[2 * k + 1][0], p[2 * k + 1][1]),
                                   packed<T>(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
            for (int i = 0; i < W / 16; ++i) {
                uint32_t b[4];
                loadMatrices<true>(b, tile + (k * 16 + lane % 16) * stride + i * 16 + lane / 16 * 8);
                multiplyAdd<T>(o[2 * i], a, b);
                multiplyAdd<T>(o[2 * i + 1], a, b + 2);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < N / 8; ++i) {
            for (int owner = 0; owner < 4; ++owner) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float const low = __shfl_sync(~0u, p[i][e], lane / 4 * 4 + owner);
                    float const high = __shfl_sync(~0u, p[i][2 + e], lane / 4 * 4 + owner);
                    float const* const row = tile + (i * 8 + owner * 2 + e) * stride + lane % 4 * 2;
#pragma unroll
                    for (int n = 0; n < W / 8; ++n) {
                        o[n][0] += low * row[n * 8];
                        o[n][1] += low * row[n * 8 + 1];
                        o[n][2] += high * row[n * 8];
                        o[n][3] += high * row[n * 8 + 1];
                    }
                }
            }
        }
    }
}

}  // namespace less
