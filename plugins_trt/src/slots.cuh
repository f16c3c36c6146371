// How slots hold keys and values: in the compute dtype, or in int8, as codes with a scale per token and head. The rule
// of rounding is that of less_export/less/int8.py, in float32 with IEEE rounding of every operation, so that codes and
// scales have the same bits in every implementation.
#pragma once

#include "device.cuh"

namespace less {

template <class S>
constexpr bool kCoded = std::is_same_v<S, int8_t>;

// ---- rounding

constexpr float kLargestCode = 127.f;
constexpr float kSmallestScale = 0x1p-126f;  // the smallest normal number: smaller ones count as zero

// The scale of a token whose largest element has this magnitude.
__device__ __forceinline__ float scaleOf(float largest) {
    float const scale = __fdiv_rn(largest, kLargestCode);
    return scale < kSmallestScale ? 0.f : scale;
}

__device__ __forceinline__ float codeOf(float x, float scale) {
    if (scale == 0.f) return 0.f;
    return fminf(fmaxf(rintf(__fdiv_rn(x, scale)), -kLargestCode), kLargestCode);  // rintf rounds half to even
}

// The scale of a token with the elements x(0) to x(D - 1), found by the lanes of a warp.
template <class X>
__device__ __forceinline__ float warpScale(X const& x, int D) {
    float largest = 0.f;
    for (int d = threadIdx.x % kWarpSize; d < D; d += kWarpSize) largest = fmaxf(largest, fabsf(x(d)));
    return scaleOf(warpMax(largest));
}

// ---- reading

// Eight columns of the key or value in a slot.
template <class S>
struct Piece {
    Vec8<S> x;
    float scale;  // of codes

    // A weight for x.
    __device__ __forceinline__ float share(float weight) const { return kCoded<S> ? weight * scale : weight; }
};

// The piece of another lane.
template <class S>
__device__ __forceinline__ Piece<S> shuffled(Piece<S> const& piece, int lane) {
    Piece<S> result = piece;
    constexpr int kRegisters = sizeof(piece.x) / sizeof(uint32_t);
    uint32_t registers[kRegisters];
    memcpy(registers, &piece.x, sizeof piece.x);
#pragma unroll
    for (int i = 0; i < kRegisters; ++i) registers[i] = __shfl_sync(~0u, registers[i], lane);
    memcpy(&result.x, registers, sizeof piece.x);  // the lanes have the same slot, so the scale is the same
    return result;
}

template <class S>
__device__ __forceinline__ void zero(Piece<S>& piece) {
    zero(piece.x);
    piece.scale = 0.f;
}

// The keys or the values in the slots of a KV head.
template <class S>
struct SlotRows {
    S* x;           // [C,D]
    float* scales;  // [C], of codes
    int D;

    __device__ __forceinline__ SlotRows(void* all, float* allScales, long head, int C, int width)
        : x(static_cast<S*>(all) + head * C * width), scales(kCoded<S> ? allScales + head * C : nullptr), D(width) {}

    __device__ __forceinline__ Piece<S> load(int slot, int column) const {
        S const* const source = x + static_cast<long>(slot) * D + column;
        return {*reinterpret_cast<Vec8<S> const*>(source), kCoded<S> ? scales[slot] : 0.f};
    }
    // The same for what will not be read again.
    __device__ __forceinline__ Piece<S> loadOnce(int slot, int column) const {
        return {less::loadOnce(x + static_cast<long>(slot) * D + column), kCoded<S> ? scales[slot] : 0.f};
    }
    // An element as it is stored, but for the centring of keys.
    __device__ __forceinline__ float at(int slot, int d) const {
        float const element = toFloat(x[static_cast<long>(slot) * D + d]);
        return kCoded<S> ? element * scales[slot] : element;
    }
    // Stores a token with the elements token(0) to token(D - 1); called by all lanes of a warp.
    template <class X>
    __device__ __forceinline__ void store(int slot, X const& token) const {
        S* const row = x + static_cast<long>(slot) * D;
        int const lane = threadIdx.x % kWarpSize;
        float const scale = kCoded<S> ? warpScale(token, D) : 1.f;
        for (int d = lane; d < D; d += kWarpSize) {
            if constexpr (kCoded<S>) {
                row[d] = static_cast<S>(codeOf(token(d), scale));
            } else {
                row[d] = fromFloat<S>(token(d));
            }
        }
        if (kCoded<S> && lane == 0) scales[slot] = scale;
    }
};

// The constants that centre a KV head's keys in int8 slots; in the compute dtype, keys are stored as they are.
template <class S>
struct Centring {
    float const *mean, *std;  // [D]

    __device__ __forceinline__ static Centring of(AttentionTensors const& t, int kvHead, int D) {
        if constexpr (!kCoded<S>) return {nullptr, nullptr};
        return {t.keyMean + kvHead * D, t.keyStd + kvHead * D};
    }
    // The same in shared memory, with zeros from D to `width`; called by all threads.
    __device__ __forceinline__ Centring copied(float* target, int width, int D) const {
        if constexpr (!kCoded<S>) return *this;
        for (int x = threadIdx.x; x < 2 * width; x += kThreads) {
            int const d = x % width;
            target[x] = d < D ? (x < width ? mean[d] : std[d]) : 0.f;
        }
        __syncthreads();
        return {target, target + width};
    }

    // What is stored of an element of a key.
    __device__ __forceinline__ float centred(float key, int d) const {
        return kCoded<S> ? __fdiv_rn(__fsub_rn(key, mean[d]), std[d]) : key;
    }
    // An element of a key from what is stored.
    __device__ __forceinline__ float restored(float stored, int d) const {
        return kCoded<S> ? fmaf(stored, std[d], mean[d]) : stored;
    }
    __device__ __forceinline__ void read(Piece<S> const& piece, int column, float (&key)[8]) const {
        unpack(piece.x, key);
        if constexpr (kCoded<S>) {
            auto const eight = [&](float const* constants, float (&out)[8]) {
                *reinterpret_cast<float4*>(out) = *reinterpret_cast<float4 const*>(constants + column);
                *reinterpret_cast<float4*>(out + 4) = *reinterpret_cast<float4 const*>(constants + column + 4);
            };
            alignas(16) float means[8], stds[8];
            eight(mean, means);
            eight(std, stds);
#pragma unroll
            for (int i = 0; i < 8; ++i) key[i] = fmaf(key[i] * piece.scale, stds[i], means[i]);
        }
    }
};

// Numbers of a type that add up to a float of the magnitude of keys, to float32's precision: the nearest one, then what
// is left, and so on.
template <class T>
constexpr int kParts = sizeof(T) == 4              ? 1
                       : std::is_same_v<T, __half> ? 2
                                                   : 3;

// The next of these parts, which is taken off x.
template <class T>
__device__ __forceinline__ T partOf(float& x) {
    T const part = fromFloat<T>(x);
    x -= toFloat(part);
    return part;
}

// Stores eight elements as parts, one to each target.
template <class T, int Parts>
__device__ __forceinline__ void storeParts(float (&element)[8], T* const (&targets)[Parts]) {
#pragma unroll
    for (int p = 0; p < Parts; ++p) {
        Vec8<T> part;
#pragma unroll
        for (int i = 0; i < 8; ++i) part.x[i] = partOf<T>(element[i]);
        *reinterpret_cast<Vec8<T>*>(targets[p]) = part;
    }
}

// Reads the int8 slots [base, base + Rows) into one tile for each part of an element that is wanted, with zeros where a
// slot is empty and in columns beyond D; called by all threads. Keys have a centring, values have none.
template <int W, int Rows, class T, int Parts>
__device__ __forceinline__ void readCodes(SlotRows<int8_t> const& from, Centring<int8_t> const* centring,
                                          int const* positions, int base, int slots, int stride,
                                          T* const (&tiles)[Parts]) {
    for (int x = threadIdx.x; x < Rows * (W / 8); x += kThreads) {
        int const row = x / (W / 8), column = x % (W / 8) * 8, slot = base + row;
        float element[8] = {};
        if (slot < slots && column < from.D && positions[slot] >= 0) {
            Piece<int8_t> const piece = from.load(slot, column);
            if (centring != nullptr) {
                centring->read(piece, column, element);
            } else {
                unpack(piece.x, element);
#pragma unroll
                for (int i = 0; i < 8; ++i) element[i] *= piece.scale;
            }
        }
        T* targets[Parts];
        for (int p = 0; p < Parts; ++p) targets[p] = tiles[p] + row * stride + column;
        storeParts(element, targets);
    }
}

}  // namespace less
