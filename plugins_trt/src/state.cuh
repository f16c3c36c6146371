// How the low-rank state holds what features absorbed: as sums in float32, or as means in 16 bits beside psi in 8 bits.
// The rule of rounding is that of less_export/less/state16.py, in float32 with IEEE rounding of every operation.
#pragma once

#include "slots.cuh"

namespace less {

// ---- psi of a token in 8 bits: codes, which stand for their shares of their sum

__device__ __forceinline__ float shareOf(int8_t code, float sum) { return __fdiv_rn(toFloat(code), fmaxf(sum, 1.f)); }

// The sum of a token's codes, found by the lanes of a warp.
__device__ __forceinline__ float warpCodeSum(int8_t const* codes, int R) {
    float sum = 0.f;
    for (int r = threadIdx.x % kWarpSize; r < R; r += kWarpSize) sum += toFloat(codes[r]);
    return warpSum(sum);
}

// Rounds the psi of a token, psi(0) to psi(R - 1); called by all lanes of a warp.
template <class X>
__device__ __forceinline__ void storePsi(int8_t* codes, X const& psi, int R) {
    float const scale = warpScale(psi, R);
    for (int r = threadIdx.x % kWarpSize; r < R; r += kWarpSize) codes[r] = static_cast<int8_t>(codeOf(psi(r), scale));
}

// ---- rows of the state

// The KV head of the state tensors that belongs to a KV head of the step: the same one, or with `rows` that of another
// row (less_attention.h).
__device__ __forceinline__ long stateHeadOf(AttentionTensors const& t, AttentionShape const& s, long head) {
    if (t.rows == nullptr) return head;
    int const row = static_cast<int>(head) / s.kvHeads, kvHead = static_cast<int>(head) % s.kvHeads;
    unsigned const index = min(static_cast<unsigned>(t.rows[row]), static_cast<unsigned>(s.stateRows - 1));
    return static_cast<long>(index) * s.kvHeads + kvHead;
}

// ---- means in 16 bits

constexpr float kLargestMean = 127 * 256 + 127;  // code = 256 high + low

// The fraction of a code that is added before rounding down, in a step that begins at position `past`.
__device__ __forceinline__ float ditherOf(int past, int feature, int channel) {
    constexpr int kPeriod = 1 << 14, kStep = 40503, kFeatureStep = 37345, kChannelStep = 49471, kUnit = 1 << 16;
    int const walk = past % kPeriod * kStep + feature * kFeatureStep + channel * kChannelStep;
    return static_cast<float>(walk % kUnit) / kUnit;
}

__host__ __device__ __forceinline__ bool keepsMeans(AttentionShape const& shape) {
    return shape.stateType == StateType::kMeans16;
}

// The same for slots of type S: only beside int8 slots does it take code.
template <class S>
__device__ __forceinline__ bool keepsMeans(AttentionShape const& shape) {
    return kCoded<S> && keepsMeans(shape);
}

// The means of a KV head.
struct Means {
    int8_t* planes;  // [R,2D], of each feature D high bytes, then D low ones
    float* scales;   // [R]
    float* z;        // [R] mass of each feature; without any, its mean is not read
    int8_t* psi;     // [C,R] psi in the slots
    int R, D;

    __device__ __forceinline__ static Means of(AttentionTensors const& t, long head, AttentionShape const& s) {
        long const features = head * s.rank;
        return {static_cast<int8_t*>(t.presentH) + features * 2 * s.headDim,
                keepsMeans(s) ? t.presentHScale + features : nullptr,
                t.presentZ + features,
                static_cast<int8_t*>(t.presentPsi) + features * s.slots,
                s.rank,
                s.headDim};
    }
    __device__ __forceinline__ int8_t* psiOf(int slot) const { return psi + static_cast<long>(slot) * R; }
    __device__ __forceinline__ float code(int r, int d) const {
        int8_t const* const high = planes + static_cast<long>(r) * 2 * D + d;
        return static_cast<float>(256 * high[0] + high[D]);
    }
    // Two adjacent codes; d is even.
    __device__ __forceinline__ float2 codes(int r, int d) const {
        int8_t const* const row = planes + static_cast<long>(r) * 2 * D + d;
        char2 const high = *reinterpret_cast<char2 const*>(row), low = *reinterpret_cast<char2 const*>(row + D);
        return make_float2(static_cast<float>(256 * high.x + low.x), static_cast<float>(256 * high.y + low.y));
    }

    // Moves the mean of feature r, and its mass, to that after a step which began at `past`; called by all lanes of a
    // warp. `mass` is the sum of psi over what leaves, totals(i) that of psi times value in channel lane + 32 i < D <=
    // W.
    template <int W, class X>
    __device__ __forceinline__ void absorb(int r, float mass, X const& totals, int past) const {
        if (!(mass > 0.f)) return;  // the codes and their scale keep every bit
        constexpr int kPerLane = W / kWarpSize;
        int const lane = threadIdx.x % kWarpSize;
        float const before = z[r], after = __fadd_rn(before, mass), unit = before > 0.f ? scales[r] : 0.f;
        float mean[kPerLane], largest = 0.f;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            int const d = lane + i * kWarpSize;
            if (d >= D) break;
            float const old = __fmul_rn(code(r, d), unit);
            mean[i] = __fadd_rn(old, __fdiv_rn(__fsub_rn(totals(i), __fmul_rn(mass, old)), after));
            largest = fmaxf(largest, fabsf(mean[i]));
        }
        float scale = __fdiv_rn(warpMax(largest), kLargestMean);
        if (scale < kSmallestScale) scale = 0.f;
        int8_t* const high = planes + static_cast<long>(r) * 2 * D;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            int const d = lane + i * kWarpSize;
            if (d >= D) break;
            float const whole = floorf(__fadd_rn(__fdiv_rn(mean[i], scale), ditherOf(past, r, d)));
            int const rounded = scale == 0.f ? 0 : static_cast<int>(fminf(fmaxf(whole, -kLargestMean), kLargestMean));
            int const upper = (rounded + 128) >> 8;  // floor((rounded + 128) / 256)
            high[d] = static_cast<int8_t>(upper);
            high[D + d] = static_cast<int8_t>(rounded - 256 * upper);
        }
        if (lane == 0) {
            scales[r] = scale;
            z[r] = after;
        }
    }
};

}  // namespace less
