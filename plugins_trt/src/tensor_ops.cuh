// Tensor-core products, matrix loads from shared memory and asynchronous copies: all of the inline PTX, each function
// with an equivalent for the host.
//
// Fragments are those of mma.m16n8k16 in the PTX ISA. With g = lane / 4 and t = lane % 4, a thread holds of
//   A [16 x 16]  rows g and g + 8, columns 2t, 2t + 1 and 2t + 8, 2t + 9, two per register
//   B [16 x 8]   rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g
//   C [16 x 8]   rows g and g + 8, columns 2t, 2t + 1, in f32
#pragma once

#include "device.cuh"

namespace less {

#ifndef LESS_EMULATION

// c += a * b
template <class T>
__device__ __forceinline__ void multiplyAdd(float (&c)[4], uint32_t const (&a)[4], uint32_t const* b);
template <>
__device__ __forceinline__ void multiplyAdd<__half>(float (&c)[4], uint32_t const (&a)[4], uint32_t const* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiplyAdd<__nv_bfloat16>(float (&c)[4], uint32_t const (&a)[4], uint32_t const* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8 x 8 matrices of 16-bit elements; lane i passes the address of row i % 8 of matrix i / 8.
template <bool Transposed>
__device__ __forceinline__ void loadMatrices(uint32_t (&r)[4], void const* rowInShared) {
    uint32_t const address = static_cast<uint32_t>(__cvta_generic_to_shared(rowInShared));
    if (Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    }
}

// Starts copying 4, 8 or 16 bytes, aligned to as many, into shared memory; if not `valid`, zeroes them without reading
// the source.
template <int Bytes = 16>
__device__ __forceinline__ void copyAsync(void* inShared, void const* source, bool valid) {
    uint32_t const target = static_cast<uint32_t>(__cvta_generic_to_shared(inShared));
    if constexpr (Bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0],[%1],%2,%3;" ::"r"(target), "l"(source), "n"(Bytes),
                     "r"(valid ? Bytes : 0)
                     : "memory");
    }
}
__device__ __forceinline__ void commitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Left` groups of this thread's copies are pending.
template <int Left>
__device__ __forceinline__ void awaitCopies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// x, whose origin the compiler does not see: it computes neither x again, which takes instructions, nor what follows
// from it before a loop, which takes registers.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// 2^x; what is below the normal numbers becomes 0.
__device__ __forceinline__ float powerOfTwo(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(result) : "f"(x));
    return result;
}

// The int8 codes in the bytes First and Second of a register, as two halves. A byte that is 128 larger than its code
// is the mantissa of a half between 1024 and 1280.
template <int First, int Second>
__device__ __forceinline__ uint32_t halvesOf(uint32_t codes) {
    uint32_t const bits = __byte_perm(codes ^ 0x80808080u, 0x64646464u, 0x4040 | First | Second << 8);
    __half2 const halves = __hsub2(reinterpret_cast<__half2 const&>(bits), __float2half2_rn(1152.f));
    return reinterpret_cast<uint32_t const&>(halves);
}

#else

namespace host {
struct Fragments {
    float a[2][4];  // [row g or g + 8][columns 2t, 2t + 1, 2t + 8, 2t + 9]
    float b[4];     // rows 2t, 2t + 1, 2t + 8, 2t + 9 of column g
};
template <class T>
float half(uint32_t reg, int index) {
    uint16_t const bits = static_cast<uint16_t>(reg >> (16 * index));
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, sizeof bits);
    return toFloat(value);
}
}  // namespace host

template <class T>
void multiplyAdd(float (&c)[4], uint32_t const (&a)[4], uint32_t const* b) {
    host::Fragments mine;
    for (int i = 0; i < 4; ++i) {
        for (int e = 0; e < 2; ++e) mine.a[i & 1][(i >> 1) * 2 + e] = host::half<T>(a[i], e);
    }
    for (int i = 0; i < 2; ++i) {
        for (int e = 0; e < 2; ++e) mine.b[i * 2 + e] = host::half<T>(b[i], e);
    }
    auto const* const lane0 = reinterpret_cast<unsigned char const*>(&emu::exchanged(mine, 0));
    auto const of = [&](int lane) -> host::Fragments const& {
        return *reinterpret_cast<host::Fragments const*>(lane0 + lane * sizeof(emu::Exchange::bytes[0][0]));
    };
    int const g = emu::lane() / 4, t = emu::lane() % 4;
    for (int row = 0; row < 2; ++row) {
        for (int n = 0; n < 2; ++n) {
            float sum = 0.f;
            for (int s = 0; s < 4; ++s) {
                for (int k = 0; k < 4; ++k) sum += of(g * 4 + s).a[row][k] * of((2 * t + n) * 4 + s).b[k];
            }
            c[row * 2 + n] += sum;
        }
    }
}

template <bool Transposed>
void loadMatrices(uint32_t (&r)[4], void const* rowInShared) {
    int const g = emu::lane() / 4, t = emu::lane() % 4;
    auto const* const lane0 = reinterpret_cast<unsigned char const*>(&emu::exchanged(rowInShared, 0));
    for (int m = 0; m < 4; ++m) {
        r[m] = 0;
        for (int e = 0; e < 2; ++e) {
            int const row = Transposed ? 2 * t + e : g, column = Transposed ? g : 2 * t + e;
            void const* start;
            std::memcpy(&start, lane0 + (m * 8 + row) * sizeof(emu::Exchange::bytes[0][0]), sizeof start);
            uint16_t bits;
            std::memcpy(&bits, static_cast<uint16_t const*>(start) + column, sizeof bits);
            r[m] |= static_cast<uint32_t>(bits) << (16 * e);
        }
    }
}

// Copies are performed as late as the hardware may perform them, so that a missing wait is detected.
template <int Bytes = 16>
void copyAsync(void* inShared, void const* source, bool valid) {
    std::memset(inShared, 0xff, Bytes);
    emu::self().open.push_back([=] {
        if (valid) {
            std::memcpy(inShared, source, Bytes);
        } else {
            std::memset(inShared, 0, Bytes);
        }
    });
}
inline void commitCopies() {
    emu::self().groups.push_back(std::move(emu::self().open));
    emu::self().open.clear();
}
template <int Left>
void awaitCopies() {
    auto& groups = emu::self().groups;
    while (static_cast<int>(groups.size()) > Left) {
        for (auto& copy : groups.front()) copy();
        groups.erase(groups.begin());
    }
}

inline int opaque(int x) { return x; }
inline float powerOfTwo(float x) { return std::exp2(x); }

template <int First, int Second>
uint32_t halvesOf(uint32_t codes) {
    auto const half = [&](int byte) {
        __half const x = __float2half_rn(static_cast<float>(static_cast<int8_t>(codes >> (8 * byte))));
        uint16_t bits;
        std::memcpy(&bits, static_cast<void const*>(&x), sizeof bits);
        return static_cast<uint32_t>(bits);
    };
    return half(First) | half(Second) << 16;
}

#endif

// Two f32 converted and packed into one register.
template <class T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
    uint32_t bits;
    if constexpr (std::is_same_v<T, __half>) {
        __half2 const pair = __floats2half2_rn(low, high);
        memcpy(&bits, &pair, sizeof bits);
    } else {
        __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
        memcpy(&bits, &pair, sizeof bits);
    }
    return bits;
}

// The same for the next of the parts that add up to two f32 (kParts): each is taken off them.
template <class T>
__device__ __forceinline__ uint32_t packedParts(float& low, float& high) {
    uint32_t const bits = packed<T>(low, high);
    T pair[2];
    memcpy(static_cast<void*>(pair), &bits, sizeof bits);
    low -= toFloat(pair[0]);
    high -= toFloat(pair[1]);
    return bits;
}

}  // namespace less
