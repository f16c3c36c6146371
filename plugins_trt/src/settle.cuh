// Prefill (T > 1), second part: decides which tokens keep a slot and which are absorbed into H and z.
//
// selectKernel: grid (Hk, B), decides what happens to every token and updates scores and positions.
// absorbKernel: grid (ceil(R / 8), Hk, B), adds all tokens that leave to H and z.
// measureKernel: grid (ceil(T / 64), Hk, B), finds the scales of values that are absorbed, with int8 slots.
// psiKernel: grid (ceil(C / 64) + ceil(T / 64), Hk, B), rounds psi, with a state of 16 bits.
// placeKernel: grid (ceil(T / 64), Hk, B), stores new tokens that stay in their slots.
// S is the type of the slots.
#pragma once

#include "prefill.cuh"

namespace less {

// What happens to a token of [slots, chunk]: the slot number for a new token that stays, or one of these.
constexpr int kRests = -1;   // nothing to do: the token stays in its slot, or there is no token
constexpr int kLeaves = -2;  // the token loses its slot, or gets none

constexpr int kBins = 256;

// The number of threads before this one in the block whose `mine` is true, and the number in the whole block.
struct Standing {
    int before, total;
};
__device__ __forceinline__ Standing blockStanding(bool mine, int* scratch) {
    int const tid = threadIdx.x, warp = tid / kWarpSize, lane = tid % kWarpSize;
    unsigned const votes = __ballot_sync(~0u, mine);
    __syncthreads();  // other threads may still read the scratch memory
    if (lane == 0) scratch[warp] = __popc(votes);
    __syncthreads();
    Standing standing{__popc(votes & ((1u << lane) - 1u)), 0};
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) standing.before += scratch[w];
        standing.total += scratch[w];
    }
    return standing;
}

// The tokens of one KV head, slots first.
struct Candidates {
    AttentionRules rules;
    int const* positions;  // [C]
    float const* scores;   // [C + T], final
    int slots, past, end;

    __device__ __forceinline__ int position(int n) const { return n < slots ? positions[n] : past + n - slots; }
    __device__ __forceinline__ bool stays(int n) const { return mayStay(rules, position(n), end); }
    __device__ __forceinline__ uint32_t rank(int n) const { return rankOf(rules, position(n), scores[n], end); }
};

// The rank of the `wanted`-th best of the tokens that may stay, and how many tokens of exactly that rank are among the
// best `wanted`.
struct Threshold {
    uint32_t rank;
    int ties;
};

// Radix selection, one byte at a time, most significant first. `scratch` has kBins + 2 ints.
__device__ __forceinline__ Threshold thresholdOf(Candidates const& candidates, int count, int wanted, int* scratch) {
    int const tid = threadIdx.x;
    int* const bins = scratch;
    int* const selected = scratch + kBins;  // the bin, and how many tokens to take from it
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        for (int b = tid; b < kBins; b += kThreads) bins[b] = 0;
        __syncthreads();
        for (int n = tid; n < count; n += kThreads) {
            if (!candidates.stays(n)) continue;
            uint32_t const rank = candidates.rank(n);
            if ((rank & mask) == prefix) atomicAdd(&bins[rank >> shift & 0xffu], 1);
        }
        __syncthreads();
        if (tid < kWarpSize) {  // lane i owns the i-th eight bins from the top
            constexpr int kPerLane = kBins / kWarpSize;
            int const top = kBins - 1 - tid * kPerLane;
            int own = 0;
            for (int b = 0; b < kPerLane; ++b) own += bins[top - b];
            int above = own;  // inclusive prefix sum over the lanes
            for (int offset = 1; offset < kWarpSize; offset *= 2) {
                int const other = __shfl_sync(~0u, above, max(tid - offset, 0));
                if (tid >= offset) above += other;
            }
            above -= own;
            if (above < wanted && above + own >= wanted) {
                int b = 0;
                for (; above + bins[top - b] < wanted; ++b) above += bins[top - b];
                selected[0] = top - b;
                selected[1] = wanted - above;
            }
        }
        __syncthreads();
        prefix |= static_cast<uint32_t>(selected[0]) << shift;
        mask |= 0xffu << shift;
        wanted = selected[1];
    }
    return {prefix, wanted};
}

static __global__ void __launch_bounds__(kThreads) selectKernel(PrefillParams const p) {
    LESS_SHARED_MEMORY(raw);
    int* const scratch = reinterpret_cast<int*>(raw);
    int const tid = threadIdx.x, batch = blockIdx.y, C = p.shape.slots, chunk = p.shape.chunk;
    int const count = min(p.t.newLength[batch], chunk), past = p.t.pastLength[batch];
    long const head = static_cast<long>(batch) * p.shape.kvHeads + blockIdx.x;
    if (count <= 0) return;  // parked: the state does not change
    long const stateHead = stateHeadOf(p.t, p.shape, head);
    int* const positions = p.t.presentPosition + stateHead * C;
    float* const slotScores = p.t.presentScore + stateHead * C;
    int const G = p.shape.queryHeads / p.shape.kvHeads;
    float* const scores = p.gained + head * G * (C + chunk);  // of the group's first head, later of the whole group
    int* const fates = p.fates + head * (C + chunk);
    int* const freed = p.freed + head * C;
    Candidates const candidates{p.rules, positions, scores, C, past, past + count};
    bool const scored = keepsScores(p.rules);
    float const left = fadedBy(p.rules, count);

    // Final scores, and the number of tokens whose position allows them to stay.
    int staying = 0;
    for (int n = tid; n < C + count; n += kThreads) {
        bool const held = candidates.position(n) >= 0;
        if (scored && held) {
            for (int g = 1; g < G; ++g) scores[n] += scores[g * (C + chunk) + n];
            if (n < C && p.rules.policy == Policy::kH2O) scores[n] += slotScores[n] * left;
            if (n < C) slotScores[n] = scores[n];
        }
        staying += candidates.stays(n);
    }
    staying = warpSum(staying);
    if (tid % kWarpSize == 0) scratch[tid / kWarpSize] = staying;
    __syncthreads();
    staying = 0;
    for (int w = 0; w < kWarps; ++w) staying += scratch[w];

    bool const crowded = scored && staying > C;
    Threshold threshold{0, 0};
    if (crowded) threshold = thresholdOf(candidates, C + count, C, scratch);

    int ties = 0, free = 0, arrived = 0;
    for (int base = 0; base < C; base += kThreads) {
        int const n = base + tid;
        bool const stays = n < C && candidates.stays(n), held = n < C && positions[n] >= 0;
        uint32_t const rank = crowded && stays ? candidates.rank(n) : 0;
        Standing const equal = blockStanding(crowded && stays && rank == threshold.rank, scratch);
        bool const keepsSlot = stays && (!crowded || rank > threshold.rank ||
                                         (rank == threshold.rank && ties + equal.before < threshold.ties));
        ties += equal.total;
        Standing const open = blockStanding(n < C && !keepsSlot, scratch);
        if (n < C) {
            fates[n] = held && !keepsSlot ? kLeaves : kRests;
            if (!keepsSlot) {
                freed[free + open.before] = n;
                positions[n] = -1;
            }
        }
        free += open.total;
    }
    for (int base = 0; base < count; base += kThreads) {
        int const i = base + tid, n = C + i;
        bool const stays = i < count && candidates.stays(n);
        uint32_t const rank = crowded && stays ? candidates.rank(n) : 0;
        Standing const equal = blockStanding(crowded && stays && rank == threshold.rank, scratch);
        bool const keepsSlot = stays && (!crowded || rank > threshold.rank ||
                                         (rank == threshold.rank && ties + equal.before < threshold.ties));
        ties += equal.total;
        Standing const arrival = blockStanding(keepsSlot, scratch);
        if (i < count) {
            int const turn = arrived + arrival.before;
            // The callers refuse policy full with more tokens than slots.
            fates[n] = !keepsSlot ? kLeaves : turn < free ? freed[turn] : kRests;
            if (fates[n] >= 0) {
                positions[fates[n]] = past + i;
                slotScores[fates[n]] = scored ? scores[n] : 0.f;
            }
        }
        arrived += arrival.total;
    }
}

constexpr int kFeatures = 8;  // features of H that a block updates

template <class T>
__global__ void __launch_bounds__(kThreads) measureKernel(PrefillParams const p) {
    int const warp = threadIdx.x / kWarpSize, batch = blockIdx.z;
    int const C = p.shape.slots, D = p.shape.headDim, chunk = p.shape.chunk;
    int const count = min(p.t.newLength[batch], chunk), first = static_cast<int>(blockIdx.x) * kTileRows;
    long const head = static_cast<long>(batch) * p.shape.kvHeads + blockIdx.y;
    for (int i = first + warp; i < min(count, first + kTileRows); i += kWarps) {
        if (p.fates[head * (C + chunk) + C + i] != kLeaves) continue;
        T const* const value = static_cast<T const*>(p.t.v) + (head * chunk + i) * D;
        float const scale = warpScale([&](int d) { return toFloat(value[d]); }, D);
        if (threadIdx.x % kWarpSize == 0) p.rounding[head * chunk + i] = scale;
    }
}

static __global__ void __launch_bounds__(kThreads) psiKernel(PrefillParams const p) {
    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, batch = blockIdx.z;
    int const C = p.shape.slots, R = p.shape.rank, chunk = p.shape.chunk, count = min(p.t.newLength[batch], chunk);
    long const head = static_cast<long>(batch) * p.shape.kvHeads + blockIdx.y;
    Source const from =
        sourceOf(static_cast<int>(blockIdx.x), (C + kTileRows - 1) / kTileRows, kTileRows, C, max(count, 0));
    Elements<AnyType> const psi(p.t.psiK, p.shape.dtype, head * chunk * R);
    long const stateHead = stateHeadOf(p.t, p.shape, head);
    int8_t* const held = static_cast<int8_t*>(p.t.presentPsi) + stateHead * C * R;
    int8_t* const fresh = p.psis + head * chunk * R;
    int const end = count > 0 ? min(from.length, from.base + kTileRows) : 0;
    for (int i = from.base + warp; i < end; i += kWarps) {
        long const n = head * (C + chunk) + (from.chunk ? C : 0) + i, row = static_cast<long>(i) * R;
        if (from.chunk) {
            storePsi(fresh + row, [&](int r) { return psi[row + r]; }, R);
        } else if (p.fates[n] != kLeaves) {
            continue;
        }
        float const sum = warpCodeSum((from.chunk ? fresh : held) + row, R);
        if (lane == 0) p.psiSums[n] = sum;
    }
}

// Eight columns of the value of a token of [slots, chunk] as the state absorbs them, zeros unless it leaves.
template <class T, class S>
__device__ __forceinline__ void leavingValue(PrefillParams const& p, long head, long stateHead, int n, int column,
                                             bool leaves, float (&out)[8]) {
    int const C = p.shape.slots, D = p.shape.headDim;
    SlotRows<S> const slots(p.t.presentValue, p.t.presentValueScale, stateHead, C, D);
    long const token = head * p.shape.chunk + (n - C);
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

template <class T, class S>
__global__ void __launch_bounds__(kThreads) absorbKernel(PrefillParams const p) {
    LESS_SHARED_MEMORY(raw);
    int const tid = threadIdx.x, batch = blockIdx.z, C = p.shape.slots, D = p.shape.headDim, R = p.shape.rank,
              chunk = p.shape.chunk;
    int const count = min(p.t.newLength[batch], chunk), first = static_cast<int>(blockIdx.x) * kFeatures;
    long const head = static_cast<long>(batch) * p.shape.kvHeads + blockIdx.y;
    if (count <= 0) return;
    long const stateHead = stateHeadOf(p.t, p.shape, head);
    int const* const fates = p.fates + head * (C + chunk);
    bool const inMeans = keepsMeans<S>(p.shape);
    int const vectors = D / 8, lanes = kThreads / vectors;  // tokens that the block processes at a time
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
            bool const leaves = n < C + count && fates[n] == kLeaves;
            long const row = n < C ? stateHead * C + n : head * chunk + (n - C);
            T const* const psi = static_cast<T const*>(n < C ? p.t.presentPsi : p.t.psiK) + row * R + first;
            int8_t const* const codes = (n < C ? static_cast<int8_t const*>(p.t.presentPsi) : p.psis) + row * R + first;
            float const sum = inMeans && leaves ? p.psiSums[head * (C + chunk) + n] : 0.f;
            leavingValue<T, S>(p, head, stateHead, n, column, leaves, values[u]);
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
    float* const sums = reinterpret_cast<float*>(raw);  // [lanes][D]
    float* const masses = sums + lanes * D;             // [lanes]
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
            Means const means = Means::of(p.t, stateHead, p.shape);
            if (tid < kWarpSize) means.absorb<256>(first + r, totalMass(), mine, p.t.pastLength[batch]);
            continue;
        }
        float* const h = static_cast<float*>(p.t.presentH) + (stateHead * R + first + r) * D;
        for (int d = tid; d < D; d += kThreads) h[d] += total(d);
        if (tid == 0) p.t.presentZ[stateHead * R + first + r] += totalMass();
    }
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads) placeKernel(PrefillParams const p) {
    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, batch = blockIdx.z;
    int const C = p.shape.slots, D = p.shape.headDim, R = p.shape.rank, chunk = p.shape.chunk;
    int const count = min(p.t.newLength[batch], chunk), first = static_cast<int>(blockIdx.x) * kTileRows;
    long const head = static_cast<long>(batch) * p.shape.kvHeads + blockIdx.y;
    long const stateHead = stateHeadOf(p.t, p.shape, head);
    SlotRows<S> const keys(p.t.presentKey, p.t.presentKeyScale, stateHead, C, D);
    SlotRows<S> const values(p.t.presentValue, p.t.presentValueScale, stateHead, C, D);
    auto const centring = Centring<S>::of(p.t, static_cast<int>(blockIdx.y), D);
    for (int i = first + warp; i < min(count, first + kTileRows); i += kWarps) {
        int const slot = p.fates[head * (C + chunk) + C + i];
        if (slot < 0) continue;
        long const from = head * chunk + i, to = stateHead * C + slot;
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

}  // namespace less
