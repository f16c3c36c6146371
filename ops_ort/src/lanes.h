// Vectors of the widest registers that the compiler targets, in the vector extensions of GCC and Clang.
#pragma once

#include <cstdint>
#include <cstring>

namespace less {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
// Vectors of a row that a product holds in registers at a time.
constexpr int kVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kVectors = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// The least multiple of kLanes that is not less than `n`.
constexpr int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class V, class T>
inline V load(T const* from) {
    V v;
    static_assert(sizeof(V) == kLanes * sizeof(T));
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class T>
inline void store(T* to, V v) {
    static_assert(sizeof(V) == kLanes * sizeof(T));
    std::memcpy(to, &v, sizeof v);
}

inline Floats all(float x) { return Floats{} + x; }

inline float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

inline float largest(Floats v) {
    float peak = v[0];
    for (int i = 1; i < kLanes; ++i) peak = v[i] > peak ? v[i] : peak;
    return peak;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// exp(x) for x <= 0, to 2 units in the last place; 0 below the logarithm of the smallest normal number.
inline Floats exponential(Floats x) {
    Floats const floor = all(-87.33654f);
    Ints const vanishes = x < floor;
    x = larger(floor, x);  // NaN stays
    // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds n to an integer.
    Floats const magic = all(12582912.0f);
    Floats const n = (x * 1.44269504f + magic) - magic;
    Floats const r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);  // Cephes' polynomial of (exp(r) - 1 - r) / r^2
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    Floats const y = p * r * r + r + 1.0f;
    Ints const power = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats scale;
    std::memcpy(&scale, &power, sizeof scale);
    return vanishes ? all(0.0f) : y * scale;
}

}  // namespace less
