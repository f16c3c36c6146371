// Prefill (T > 1), first part: attention, and the scores that result from it.
//
// Tensor cores multiply 16-bit numbers; keys in int8 slots are sums of two or three of those (kParts).
//
// attendKernel: grid (ceil(T / 64), Hq, B), 16 query rows per warp; iterates over tiles of the slots and of the chunk.
// scoreKernel: grid (ceil(C / 64) + ceil(T / 64), Hq, B), 16 keys per warp; iterates over tiles of the head's queries
// and sums the attention probabilities over them, which needs every query's final maximum and sum.
#pragma once

#include "rules.cuh"
#include "slots.cuh"
#include "tiles.cuh"

namespace less {

struct PrefillParams {
    AttentionRules rules;
    AttentionShape shape;
    AttentionTensors t;
    float* peaks;     // [B,Hq,T] maximum logit of each query over slots and chunk
    float* scales;    // [B,Hq,T] 1 / sum of exp(logit - maximum) over those
    float* gained;    // [B,Hq,C+T] score from this chunk
    int* fates;       // [B,Hk,C+T] what happens to each token, see settle.cuh
    int* freed;       // [B,Hk,C] slots to fill
    float* rounding;  // [B,Hk,T] scales of values of the chunk that are absorbed as int8 slots would hold them
};

__host__ __device__ __forceinline__ bool coded(PrefillParams const& p) { return p.shape.slotType == SlotType::kInt8; }

// Position of a tile within [slots, chunk]. No tile spans both.
struct Source {
    bool chunk;
    int base, length;
};
__device__ __forceinline__ Source sourceOf(int tile, int slotTiles, int rows, int slots, int chunk) {
    return tile < slotTiles ? Source{false, tile * rows, slots} : Source{true, (tile - slotTiles) * rows, chunk};
}

template <class T, int W>
struct AttendShared {
    using Tiles = Tiling<T, W>;
    typename Tiles::Tile keys[Tiles::kStages], values[Tiles::kStages];
    int positions[Tiles::kStages][Tiles::kRows];  // -1: not visible to any query
};

template <class T, int W>
__global__ void __launch_bounds__(kThreads) attendKernel(PrefillParams const p) {
    using Tiles = Tiling<T, W>;
    constexpr int N = Tiles::kRows;
    LESS_SHARED_MEMORY(raw);
    auto& shared = *reinterpret_cast<AttendShared<T, W>*>(raw);
    AttentionRules const rules = p.rules;
    int const tid = threadIdx.x, warp = tid / kWarpSize, lane = tid % kWarpSize, g = lane / 4, t = lane % 4;
    int const Hk = p.shape.kvHeads, G = p.shape.queryHeads / Hk, C = p.shape.slots, D = p.shape.headDim,
              R = p.shape.rank, chunk = p.shape.chunk;
    int const batch = blockIdx.z, count = min(p.t.newLength[batch], chunk), past = p.t.pastLength[batch];
    long const queryHead = static_cast<long>(batch) * p.shape.queryHeads + blockIdx.y, head = queryHead / G;
    // The last rows see the most keys, so they start first. A thread has the rows low and low + 8.
    int const first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kTileRows, low = first + warp * 16 + g;
    T* const out = static_cast<T*>(p.t.out) + queryHead * chunk * D;
    if (first >= count) {  // padding only
        for (int x = tid; x < min(kTileRows, chunk - first) * D; x += kThreads) out[first * D + x] = fromFloat<T>(0.f);
        return;
    }
    T const* const q = static_cast<T const*>(p.t.q) + queryHead * chunk * D;
    WarpRows<T, W> queries;
    queries.load(low < count ? q + low * D : nullptr, low + 8 < count ? q + (low + 8) * D : nullptr, D, t);

    // Tiles that the window hides from all of these rows are skipped.
    bool const slotsHidden = rules.window > 0 && first >= rules.window;
    int const slotTiles = slotsHidden ? 0 : (C + N - 1) / N;
    int const hidden = rules.window > 0 ? max(0, first - rules.window + 1) / N : 0;
    int const tiles = slotTiles + (min(count, first + kTileRows) + N - 1) / N - hidden;
    // Tiles of codes are converted as they come in, without the next one in flight, whose memory the parts of
    // keys take.
    bool const codes = coded(p);
    auto const partTile = [&](int part) {
        return part < 2 ? shared.keys[part].x : shared.values[Tiles::kStages - 1].x;
    };
    auto const fetch = [&](int tile, int stage) {
        Source const from = sourceOf(tile < slotTiles ? tile : tile + hidden, slotTiles, N, C, chunk);
        bool const converts = codes && !from.chunk;
        if (converts) {
            SlotRows<int8_t> const keys(p.t.presentKey, p.t.presentKeyScale, head, C, D),
                values(p.t.presentValue, p.t.presentValueScale, head, C, D);
            auto const centring = Centring<int8_t>::of(p.t, static_cast<int>(head % Hk), D);
            int const* const positions = p.t.presentPosition + head * C;
            T* parts[kParts<T>];
            for (int i = 0; i < kParts<T>; ++i) parts[i] = partTile(i);
            readCodes<W, N>(keys, &centring, positions, from.base, C, Tiles::kStride, parts);
            T* const tile[] = {shared.values[0].x};
            readCodes<W, N>(values, nullptr, positions, from.base, C, Tiles::kStride, tile);
        }
        T const* const keys = static_cast<T const*>(from.chunk ? p.t.k : p.t.presentKey) + head * from.length * D;
        T const* const values = static_cast<T const*>(from.chunk ? p.t.v : p.t.presentValue) + head * from.length * D;
        constexpr int kVectors = W / Tiles::kVector;
        for (int x = tid; x < N * kVectors; x += kThreads) {
            int const row = x / kVectors, column = x % kVectors * Tiles::kVector, index = from.base + row;
            int position = -1;
            if (from.chunk) {
                if (index < count) position = past + index;
            } else if (index < C) {
                position = p.t.presentPosition[head * C + index];
            }
            if (column == 0) shared.positions[stage][row] = position;
            if (converts) continue;
            bool const wanted = position >= 0 && column < D;
            long const offset = wanted ? static_cast<long>(index) * D + column : 0;
            copyAsync(shared.keys[stage].x + row * Tiles::kStride + column, keys + offset, wanted);
            copyAsync(shared.values[stage].x + row * Tiles::kStride + column, values + offset, wanted);
        }
        commitCopies();
    };

    float o[W / 8][4], peak[2] = {-kInfinity, -kInfinity}, mass[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < W / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    bool ahead = false;  // the next tile is being copied
    for (int tile = 0; tile < tiles; ++tile) {
        bool const converted = codes && tile < slotTiles;
        int const stage = Tiles::kStages > 1 && !converted ? tile % 2 : 0;
        if (!ahead) fetch(tile, stage);
        ahead = Tiles::kStages > 1 && !converted && tile + 1 < tiles;
        if (ahead) fetch(tile + 1, stage ^ 1);
        if (ahead) {
            awaitCopies<1>();
        } else {
            awaitCopies<0>();
        }
        __syncthreads();
        float s[N / 8][4];
        queries.template multiply<N>(s, shared.keys[stage].x, Tiles::kStride, D, lane);
        if constexpr (kParts<T> > 1) {
            for (int part = 1; converted && part < kParts<T>; ++part)
                queries.template add<N>(s, partTile(part), Tiles::kStride, lane);
        }
        float top[2] = {peak[0], peak[1]};
#pragma unroll
        for (int i = 0; i < N / 8; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int const position = shared.positions[stage][i * 8 + t * 2 + (e & 1)];
                bool const seen = visible(rules, position, past + low + (e >> 1) * 8);
                s[i][e] = seen ? s[i][e] * rules.scale : -kInfinity;
                top[e >> 1] = fmaxf(top[e >> 1], s[i][e]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
            float const shrink = expDifference(peak[r], top[r]);
            peak[r] = top[r];
            mass[r] *= shrink;
#pragma unroll
            for (int i = 0; i < W / 8; ++i) {
                o[i][2 * r] *= shrink;
                o[i][2 * r + 1] *= shrink;
            }
#pragma unroll
            for (int i = 0; i < N / 8; ++i) {
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) {
                    s[i][e] = expDifference(s[i][e], top[r]);
                    mass[r] += s[i][e];
                }
            }
        }
        accumulate<T, W, N>(o, s, shared.values[stage].x, Tiles::kStride, lane);
        __syncthreads();
    }

    // ---- low-rank term and output
    float const* const h = p.t.presentH + head * R * D;
    float const* const z = p.t.presentZ + head * R;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        mass[r] += __shfl_xor_sync(~0u, mass[r], 1);
        mass[r] += __shfl_xor_sync(~0u, mass[r], 2);
        int const query = low + r * 8;
        if (query >= chunk) continue;
        if (query >= count) {
#pragma unroll
            for (int i = 0; i < W / 8; ++i) {
                int const d = i * 8 + t * 2;
                if (d < D) storePair(out + query * D + d, 0.f, 0.f);
            }
            continue;
        }
        float const* const logPhi = p.t.logPhiQ + (queryHead * chunk + query) * R;
        float all = peak[r];
        if (rules.absorb) {
            for (int f = 0; f < R; ++f) {
                if (z[f] > 0.f) all = fmaxf(all, logPhi[f] + __logf(z[f]));
            }
        }
        float const shrink = __expf(peak[r] - all);
        float total = mass[r] * shrink;
#pragma unroll
        for (int i = 0; i < W / 8; ++i) {
            o[i][2 * r] *= shrink;
            o[i][2 * r + 1] *= shrink;
        }
        if (rules.absorb) {
            for (int f = 0; f < R; ++f) {
                if (!(z[f] > 0.f)) continue;
                float const part = expDifference(logPhi[f] + __logf(z[f]), all), weight = part / z[f];
                total += part;
#pragma unroll
                for (int i = 0; i < W / 8; ++i) {
                    int const d = i * 8 + t * 2;
                    if (d >= D) continue;
                    float2 const mean = *reinterpret_cast<float2 const*>(h + f * D + d);
                    o[i][2 * r] += weight * mean.x;
                    o[i][2 * r + 1] += weight * mean.y;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < W / 8; ++i) {
            int const d = i * 8 + t * 2;
            if (d < D) storePair(out + query * D + d, o[i][2 * r] / total, o[i][2 * r + 1] / total);
        }
        if (t == 0 && keepsScores(rules)) {
            p.peaks[queryHead * chunk + query] = peak[r];
            p.scales[queryHead * chunk + query] = 1.f / mass[r];
        }
    }
}

// Keys in int8 slots of the rows that the warps own: all parts but the first, as fragments, for the thread alone.
template <class T, int W>
struct KeyParts {
    uint4 fragments[kParts<T> - 1][W / 16][kThreads];

    __device__ __forceinline__ void load(WarpRows<T, W>& first, SlotRows<int8_t> const& keys,
                                         Centring<int8_t> const& centring, int const (&slots)[2], int t) {
#pragma unroll
        for (int k = 0; k < W / 16; ++k) {
            uint32_t parts[kParts<T>][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int const slot = slots[i & 1], column = k * 16 + (i >> 1) * 8 + t * 2;
                float pair[2] = {0.f, 0.f};
                if (slot >= 0 && column < keys.D) {
                    for (int e = 0; e < 2; ++e) pair[e] = centring.restored(keys.at(slot, column + e), column + e);
                }
#pragma unroll
                for (int part = 0; part < kParts<T>; ++part) {
                    T const both[2] = {partOf<T>(pair[0]), partOf<T>(pair[1])};
                    memcpy(&parts[part][i], both, sizeof both);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) first.fragments[k][i] = parts[0][i];
            for (int part = 1; part < kParts<T>; ++part) {
                uint32_t const(&x)[4] = parts[part];
                fragments[part - 1][k][threadIdx.x] = uint4{x[0], x[1], x[2], x[3]};
            }
        }
    }
    // s += these parts * tile^T
    template <int N>
    __device__ __forceinline__ void add(float (&s)[N / 8][4], T const* tile, int stride, int lane) const {
        for (int part = 1; part < kParts<T>; ++part) {
#pragma unroll
            for (int k = 0; k < W / 16; ++k) {
                uint4 const x = fragments[part - 1][k][threadIdx.x];
                uint32_t const a[4] = {x.x, x.y, x.z, x.w};
                WarpRows<T, W>::template addStep<N>(s, a, tile, stride, k, lane);
            }
        }
    }
};

// In f32, one part is the whole key.
template <int W>
struct KeyParts<float, W> {
    alignas(16) float rows[kTileRows * Tiling<float, W>::kStride];
};

template <class T, int W>
struct ScoreShared {
    using Tiles = Tiling<T, W>;
    typename Tiles::Tile queries[Tiles::kStages];
    float peaks[Tiles::kStages][Tiles::kRows], scales[Tiles::kStages][Tiles::kRows];
    KeyParts<T, W> keys;
    static size_t bytes(bool codes) { return sizeof(ScoreShared) - (codes ? 0 : sizeof(KeyParts<T, W>)); }
};

template <class T, int W>
__global__ void __launch_bounds__(kThreads) scoreKernel(PrefillParams const p) {
    using Tiles = Tiling<T, W>;
    constexpr int N = Tiles::kRows;
    LESS_SHARED_MEMORY(raw);
    auto& shared = *reinterpret_cast<ScoreShared<T, W>*>(raw);
    AttentionRules const rules = p.rules;
    int const tid = threadIdx.x, warp = tid / kWarpSize, lane = tid % kWarpSize, g = lane / 4, t = lane % 4;
    int const Hk = p.shape.kvHeads, G = p.shape.queryHeads / Hk, C = p.shape.slots, D = p.shape.headDim,
              chunk = p.shape.chunk;
    int const batch = blockIdx.z, count = min(p.t.newLength[batch], chunk), past = p.t.pastLength[batch];
    long const queryHead = static_cast<long>(batch) * p.shape.queryHeads + blockIdx.y, head = queryHead / G;
    if (count <= 0) return;
    Source const from = sourceOf(blockIdx.x, (C + kTileRows - 1) / kTileRows, kTileRows, C, chunk);
    if (from.chunk && from.base >= count) return;
    T const* const keys = static_cast<T const*>(from.chunk ? p.t.k : p.t.presentKey) + head * from.length * D;
    int position[2];
    T const* rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int const index = from.base + warp * 16 + g + r * 8;
        position[r] = -1;
        if (from.chunk) {
            if (index < count) position[r] = past + index;
        } else if (index < C) {
            position[r] = p.t.presentPosition[head * C + index];
        }
        rows[r] = position[r] >= 0 ? keys + static_cast<long>(index) * D : nullptr;
    }
    WarpRows<T, W> warpKeys;
    bool const converted = coded(p) && !from.chunk;
    if (converted) {
        SlotRows<int8_t> const codes(p.t.presentKey, p.t.presentKeyScale, head, C, D);
        auto const centring = Centring<int8_t>::of(p.t, static_cast<int>(head % Hk), D);
        if constexpr (kParts<T> > 1) {
            int const low = from.base + warp * 16 + g;
            int const slots[2] = {position[0] >= 0 ? low : -1, position[1] >= 0 ? low + 8 : -1};
            shared.keys.load(warpKeys, codes, centring, slots, t);
        } else {
            T* const tile[] = {shared.keys.rows};  // which is read behind the barrier of the first tile of queries
            readCodes<W, kTileRows>(codes, &centring, p.t.presentPosition + head * C, from.base, C, Tiles::kStride,
                                    tile);
            for (int r = 0; r < 2; ++r) rows[r] = tile[0] + (warp * 16 + g + r * 8) * Tiles::kStride;
        }
    }
    if (kParts<T> == 1 || !converted) warpKeys.load(rows[0], rows[1], D, t);

    // Queries that contribute: all, or only the last one. Queries before a key of the chunk do not.
    int const start = rules.policy == Policy::kTova ? count - 1 : 0;
    int const skipped = (from.chunk ? max(start, from.base) : start) / N;
    int const tiles = (count + N - 1) / N - skipped;
    T const* const q = static_cast<T const*>(p.t.q) + queryHead * chunk * D;
    auto const fetch = [&](int tile, int stage) {
        int const base = (skipped + tile) * N;
        constexpr int kVectors = W / Tiles::kVector;
        for (int x = tid; x < N * kVectors; x += kThreads) {
            int const row = x / kVectors, column = x % kVectors * Tiles::kVector, query = base + row;
            bool const wanted = query >= start && query < count && column < D;
            copyAsync(shared.queries[stage].x + row * Tiles::kStride + column,
                      q + (wanted ? static_cast<long>(query) * D + column : 0), wanted);
            if (column == 0) {  // a query that does not contribute has scale 0
                shared.peaks[stage][row] = wanted ? p.peaks[queryHead * chunk + query] : 0.f;
                shared.scales[stage][row] =
                    wanted ? p.scales[queryHead * chunk + query] * fadedBy(rules, count - 1 - query) : 0.f;
            }
        }
        commitCopies();
    };

    float gained[2] = {0.f, 0.f};
    if (Tiles::kStages > 1) fetch(0, 0);
    for (int tile = 0; tile < tiles; ++tile) {
        int const stage = Tiles::kStages > 1 ? tile % 2 : 0;
        bool const ahead = Tiles::kStages > 1 && tile + 1 < tiles;
        if (Tiles::kStages == 1) fetch(tile, 0);
        if (ahead) fetch(tile + 1, stage ^ 1);
        if (ahead) {
            awaitCopies<1>();
        } else {
            awaitCopies<0>();
        }
        __syncthreads();
        float s[N / 8][4];
        warpKeys.template multiply<N>(s, shared.queries[stage].x, Tiles::kStride, D, lane);
        if constexpr (kParts<T> > 1) {
            if (converted) shared.keys.template add<N>(s, shared.queries[stage].x, Tiles::kStride, lane);
        }
        int const now = past + (skipped + tile) * N + t * 2;
#pragma unroll
        for (int i = 0; i < N / 8; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int const column = i * 8 + t * 2 + (e & 1);
                if (visible(rules, position[e >> 1], now + i * 8 + (e & 1)) && shared.scales[stage][column] > 0.f) {
                    gained[e >> 1] +=
                        __expf(s[i][e] * rules.scale - shared.peaks[stage][column]) * shared.scales[stage][column];
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        gained[r] += __shfl_xor_sync(~0u, gained[r], 1);
        gained[r] += __shfl_xor_sync(~0u, gained[r], 2);
        int const index = from.base + warp * 16 + g + r * 8;
        if (t == 0 && position[r] >= 0) p.gained[queryHead * (C + chunk) + (from.chunk ? C : 0) + index] = gained[r];
    }
}

}  // namespace less
