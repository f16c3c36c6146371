// Prefill (T > 1): absorbs the tokens that leave into H and z, and stores those that stay.
//
// measureKernel: grid (ceil(T / 64), Hk, B), finds the scales of values that are absorbed, with int8 slots.
// psiKernel: grid (ceil(C / 64) + ceil(T / 64), Hk, B), rounds psi, with a state of 16 bits.
// absorbKernel: grid (ceil(R / 8), Hk, B), adds all tokens that leave to H and z.
// placeKernel: grid (ceil(T / 64), Hk, B), stores new tokens that stay in their slots.
// T is the compute dtype, S the type of the slots. The functions behind them are called by all threads of a block.
#pragma once

#include "select.cuh"

namespace less {

constexpr int kFeatures = 8;  // features of H that a block updates at a time

// Tokens that a block absorbs at a time, eight columns a thread, and the shared memory that their sums take.
__host__ __device__ __forceinline__ int absorbLanes(int D) { return kThreads / (D / 8); }
__host__ __device__ __forceinline__ size_t absorbBytes(int D) { return absorbLanes(D) * (D + 1) * sizeof(float); }

// Finds the scales of the values in a tile of the chunk whose tokens leave.
template <class T>
__device__ __forceinline__ void measureTile(PrefillParams const& p, ChunkHead const& h, int tile) {
    int const warp = threadIdx.x / kWarpSize, C = p.shape.slots, D = p.shape.headDim, chunk = p.shape.chunk;
    for (int i = tile * kTileRows + warp; i < min(h.count, (tile + 1) * kTileRows); i += kWarps) {
        if (h.fates[C + i] != kLeaves) continue;
        T const* const value = static_cast<T const*>(p.t.v) + (h.head * chunk + i) * D;
        float const scale = warpScale([&](int d) { return toFloat(value[d]); }, D);
        if (threadIdx.x % kWarpSize == 0) p.rounding[h.head * chunk + i] = scale;
    }
}

// Rounds psi of a tile of the chunk, or sums the codes of those in a tile of the slots that leave.
__device__ __forceinline__ void roundPsiTile(PrefillParams const& p, ChunkHead const& h, int tile) {
    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    int const C = p.shape.slots, R = p.shape.rank, chunk = p.shape.chunk;
    Source const from = sourceOf(tile, tilesOf(C), kTileRows, C, max(h.count, 0));
    Elements<AnyType> const psi(p.t.psiK, p.shape.dtype, h.head * chunk * R);
    int8_t* const held = static_cast<int8_t*>(p.t.presentPsi) + h.stateHead * C * R;
    int8_t* const fresh = p.psis + h.head * chunk * R;
    int const end = h.count > 0 ? min(from.length, from.base + kTileRows) : 0;
    for (int i = from.base + warp; i < end; i += kWarps) {
        long const n = (from.chunk ? C : 0) + i, row = static_cast<long>(i) * R;
        if (from.chunk) {
            storePsi(fresh + row, [&](int r) { return psi[row + r]; }, R);
        } else if (h.fates[n] != kLeaves) {
            continue;
        }
        float const sum = warpCodeSum((from.chunk ? fresh : held) + row, R);
        if (lane == 0) p.psiSums[h.head * (C + chunk) + n] = sum;
    }
}

// Eight columns of the value of a token of [slots, chunk] as the state absorbs them, zeros unless it leaves.
template <class T, class S>
__device__ __forceinline__ void leavingValue(PrefillParams const& p, ChunkHead const& h, int n, int column, bool leaves,
                                             float (&out)[8]) {
    int const C = p.shape.slots, D = p.shape.headDim;
    SlotRows<S> const slots(p.t.presentValue, p.t.presentValueScale, h.stateHead, C, D);
    long const token = h.head * p.shape.chunk + (n - C);
    T const* const fresh = static_cast<T const*>(p.t.v) + token * D;
    if constexpr (!kCoded<S>) {
        Vec8<T> value;
        zero(value);
        T const* const row = n < C ? slots.x + static_cast<long>(n) * D : fresh;
        if (leaves) value = *reinterpret_cast<Vec8<T> const*>(row + column);
        unpack(value, out);
    } else if (n < C) {
        Piece<S> value;
        zero(value);
        if (leaves) value = slots.load(n, column);
        unpack(value.x, out);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] *= value.scale;
    } else {
        Vec8<T> value;
        zero(value);
        if (leaves) value = *reinterpret_cast<Vec8<T> const*>(fresh + column);
        unpack(value, out);
        float const scale = leaves ? p.rounding[token] : 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = codeOf(out[i], scale) * scale;
    }
}

// Adds the tokens that leave to the features [first, first + kFeatures) of H and z. `sums` has absorbBytes(D).
template <class T, class S>
__device__ __forceinline__ void absorbInto(PrefillParams const& p, ChunkHead const& h, int first, float* sums) {
    int const tid = threadIdx.x, C = p.shape.slots, D = p.shape.headDim, R = p.shape.rank, chunk = p.shape.chunk,
              count = h.count;
    if (count <= 0) return;
    bool const inMeans = keepsMeans<S>(p.shape);
    int const vectors = D / 8, lanes = absorbLanes(D);
    int const column = tid % vectors * 8, lane = tid / vectors;
    float acc[kFeatures][8], mass[kFeatures];
#pragma unroll
    for (int r = 0; r < kFeatures; ++r) {
        mass[r] = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[r][i] = 0.f;
    }
    constexpr int kAhead = 4;  // tokens in flight per thread
    for (int base = lane; lane < lanes && base < C + count; base += kAhead * lanes) {
        float values[kAhead][8], features[kAhead][kFeatures];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
            int const n = base + u * lanes;
            bool const leaves = n < C + count && h.fates[n] == kLeaves;
            long const row = n < C ? h.stateHead * C + n : h.head * chunk + (n - C);
            T const* const psi = static_cast<T const*>(n < C ? p.t.presentPsi : p.t.psiK) + row * R + first;
            int8_t const* const codes = (n < C ? static_cast<int8_t const*>(p.t.presentPsi) : p.psis) + row * R + first;
            float const sum = inMeans && leaves ? p.psiSums[h.head * (C + chunk) + n] : 0.f;
            leavingValue<T, S>(p, h, n, column, leaves, values[u]);
#pragma unroll
            for (int r = 0; r < kFeatures; ++r) {
                features[u][r] = 0.f;
                if (leaves && first + r < R) features[u][r] = inMeans ? shareOf(codes[r], sum) : toFloat(psi[r]);
            }
        }
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
#pragma unroll
            for (int r = 0; r < kFeatures; ++r) {
                mass[r] += features[u][r];
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[r][i] += features[u][r] * values[u][i];
            }
        }
    }
    float* const masses = sums + lanes * D;  // [lanes], behind the sums [lanes][D]
    for (int r = 0; r < kFeatures && first + r < R; ++r) {
        __syncthreads();
        if (lane < lanes) {
#pragma unroll
            for (int f = 0; f < kFeatures; ++f) {
                if (f != r) continue;
                for (int i = 0; i < 8; ++i) sums[lane * D + column + i] = acc[f][i];
                if (column == 0) masses[lane] = mass[f];
            }
        }
        __syncthreads();
        auto const total = [&](int d) {
            float sum = 0.f;
            for (int l = 0; l < lanes; ++l) sum += sums[l * D + d];
            return sum;
        };
        auto const totalMass = [&] {
            float sum = 0.f;
            for (int l = 0; l < lanes; ++l) sum += masses[l];
            return sum;
        };
        if (inMeans) {
            auto const mine = [&](int i) { return total(tid + i * kWarpSize); };
            Means const means = Means::of(p.t, h.stateHead, p.shape);
            if (tid < kWarpSize) means.absorb<256>(first + r, totalMass(), mine, h.past);
            continue;
        }
        long const feature = h.stateHead * R + first + r;
        float* const row = static_cast<float*>(p.t.presentH) + feature * D;
        for (int d = tid; d < D; d += kThreads) row[d] += total(d);
        if (tid == 0) p.t.presentZ[feature] += totalMass();
    }
}

// Stores the tokens of a tile of the chunk that stay.
template <class T, class S>
__device__ __forceinline__ void placeTile(PrefillParams const& p, ChunkHead const& h, int tile) {
    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    int const C = p.shape.slots, D = p.shape.headDim, R = p.shape.rank, chunk = p.shape.chunk;
    SlotRows<S> const keys(p.t.presentKey, p.t.presentKeyScale, h.stateHead, C, D);
    SlotRows<S> const values(p.t.presentValue, p.t.presentValueScale, h.stateHead, C, D);
    auto const centring = Centring<S>::of(p.t, h.kvHead, D);
    for (int i = tile * kTileRows + warp; i < min(h.count, (tile + 1) * kTileRows); i += kWarps) {
        int const slot = h.fates[C + i];
        if (slot < 0) continue;
        long const from = h.head * chunk + i, to = h.stateHead * C + slot;
        T const *const key = static_cast<T const*>(p.t.k) + from * D, *const value =
                                                                          static_cast<T const*>(p.t.v) + from * D;
        keys.store(slot, [&](int d) { return centring.centred(toFloat(key[d]), d); });
        values.store(slot, [&](int d) { return toFloat(value[d]); });
        auto const move = [&](auto* target, auto const* source) {
            for (int r = lane; r < R; r += kWarpSize) target[to * R + r] = source[from * R + r];
        };
        if (keepsMeans<S>(p.shape)) {
            move(static_cast<int8_t*>(p.t.presentPsi), p.psis);
        } else {
            move(static_cast<T*>(p.t.presentPsi), static_cast<T const*>(p.t.psiK));
        }
    }
}

// ---- the kernels of long chunks

template <class T>
__global__ void __launch_bounds__(kThreads) measureKernel(PrefillParams const p) {
    measureTile<T>(p, ChunkHead::of(p, blockIdx.y, blockIdx.z), blockIdx.x);
}

static __global__ void __launch_bounds__(kThreads) psiKernel(PrefillParams const p) {
    roundPsiTile(p, ChunkHead::of(p, blockIdx.y, blockIdx.z), blockIdx.x);
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads) absorbKernel(PrefillParams const p) {
    LESS_SHARED_MEMORY(raw);
    absorbInto<T, S>(p, ChunkHead::of(p, blockIdx.y, blockIdx.z), blockIdx.x * kFeatures,
                     reinterpret_cast<float*>(raw));
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads) placeKernel(PrefillParams const p) {
    placeTile<T, S>(p, ChunkHead::of(p, blockIdx.y, blockIdx.z), blockIdx.x);
}

}  // namespace less
