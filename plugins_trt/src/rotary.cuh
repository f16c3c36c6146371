// Rotary embedding by distance: keys and queries come unrotated, and the kernels rotate them in float32, by a row of
// the table (less_attention.h). A slot's key is rotated back by its age, tokens of the chunk ahead by their offset in
// it, so that a query sees the distance between the two, and nothing depends on how long the text is.
#pragma once

#include "slots.cuh"

namespace less {

// One rotation: the cosines and sines of a row of the table, and the direction.
struct Turn {
    float const* row;  // [2 * half]; nullptr: there is no token
    float sign;

    __device__ __forceinline__ static Turn none() { return {nullptr, 0.f}; }
};

// Channel i < half of a key or query forms a pair with channel i + half; those from 2 * half on are not rotated.
struct Rotary {
    float const* table;  // [P, 2 * half]
    int half, farthest;

    __device__ __forceinline__ static Rotary of(AttentionShape const& shape, AttentionRules const& rules,
                                                AttentionTensors const& t) {
        return {t.rotary, shape.rotary / 2, rules.maxDistance};
    }

    __device__ __forceinline__ Turn ahead(int offset) const { return {table + rowOf(offset), 1.f}; }
    // For a slot's key. Unsigned, so that every position, also of an empty slot, gives a row of the table.
    __device__ __forceinline__ Turn back(int position, int past) const {
        unsigned const age = static_cast<unsigned>(past) - static_cast<unsigned>(position);
        return {table + rowOf(min(age, static_cast<unsigned>(farthest))), -1.f};
    }

    __device__ __forceinline__ bool rotates(int d) const { return d < 2 * half; }
    __device__ __forceinline__ int partner(int d) const { return d < half ? d + half : d - half; }
    // Whether the partners of eight columns are eight columns that a vector load can read.
    __device__ __forceinline__ bool inEights() const { return half % 8 == 0; }

    // Element d after the turn; element(d) is that before it.
    template <class X>
    __device__ __forceinline__ float turned(Turn const& turn, int d, X const& element) const {
        float const x = element(d);
        return rotates(d) ? turnedOne(turn, d, x, element(partner(d))) : x;
    }

    // The columns [column, column + 8) after the turn, from those and their partners before it; in eights only.
    __device__ __forceinline__ void turnEight(Turn const& turn, int column, float (&x)[8],
                                              float const (&partners)[8]) const {
        if (!rotates(column)) return;
        float const* const cosines = turn.row + (column < half ? column : column - half);
        float const sign = column < half ? -turn.sign : turn.sign;
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float4 const c = *reinterpret_cast<float4 const*>(cosines + i);
            float4 const s = *reinterpret_cast<float4 const*>(cosines + half + i);
            x[i] = x[i] * c.x + sign * s.x * partners[i];
            x[i + 1] = x[i + 1] * c.y + sign * s.y * partners[i + 1];
            x[i + 2] = x[i + 2] * c.z + sign * s.z * partners[i + 2];
            x[i + 3] = x[i + 3] * c.w + sign * s.w * partners[i + 3];
        }
    }

 private:
    __device__ __forceinline__ long rowOf(unsigned distance) const { return static_cast<long>(distance) * 2 * half; }
    __device__ __forceinline__ float turnedOne(Turn const& turn, int d, float x, float other) const {
        int const pair = d < half ? d : d - half;
        float const sign = d < half ? -turn.sign : turn.sign;
        return x * turn.row[pair] + sign * turn.row[half + pair] * other;
    }
};

// Rows of keys or queries before a turn.
template <class S>
struct Rows {
    SlotRows<S> stored;
    Centring<S> centring;

    __device__ __forceinline__ float at(int row, int d) const { return centring.restored(stored.at(row, d), d); }
    __device__ __forceinline__ void eight(int row, int column, float (&x)[8]) const {
        centring.read(stored.load(row, column), column, x);
    }
};

struct Eight {
    float x[8];
};

// Turned elements are this much smaller where tensor cores see them: a float16 element of any size stays finite when
// it is turned. The scale of the logits makes up for it.
template <class T>
constexpr float kReduction = std::is_same_v<T, __half> ? 0.5f : 1.f;

// The columns [column, column + 8) of a row after the turn, where they do not come in eights. A function of its own, so
// that the usual case keeps the registers.
template <class AnyRows>
__device__ __noinline__ Eight turnedOneByOne(Rotary rotary, AnyRows rows, int row, Turn turn, int column) {
    Eight result;
#pragma unroll
    for (int i = 0; i < 8; ++i) result.x[i] = rotary.turned(turn, column + i, [&](int d) { return rows.at(row, d); });
    return result;
}

}  // namespace less
