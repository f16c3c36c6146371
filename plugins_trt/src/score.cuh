// Prefill (T > 1): the scores that result from attention.
//
// scoreKernel: grid (ceil(C / 64) + ceil(T / 64), Hq, B), 16 keys per warp; iterates over tiles of the head's queries
// and sums the attention probabilities over them, which needs every query's final maximum and sum.
#pragma once

#include "turn.cuh"

namespace less {

// Keys in parts, of the rows that the warps own: all parts but the first, as fragments, for the thread alone.
template <class T, int W>
struct KeyParts {
    uint4 fragments[kParts<T> - 1][W / 16][kThreads];

    // element(r, d) is an element of the thread's row g + 8r, 0 where there is none.
    template <class Element>
    __device__ __forceinline__ void load(WarpRows<T, W>& first, Element const& element, int t) {
#pragma unroll
        for (int k = 0; k < W / 16; ++k) {
            uint32_t parts[kParts<T>][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int const column = k * 16 + (i >> 1) * 8 + t * 2;
                float pair[2] = {element(i & 1, column), element(i & 1, column + 1)};
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
    // s += these parts * tile^T, without the last `left` ones
    template <int N>
    __device__ __forceinline__ void add(float (&s)[N / 8][4], T const* tile, int stride, int lane, int left) const {
        for (int part = 1; part < kParts<T> - left; ++part) {
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
    static size_t bytes(bool converts) { return sizeof(ScoreShared) - (converts ? 0 : sizeof(KeyParts<T, W>)); }
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
    long const queryHead = queryHeadOf(p), head = queryHead / G, stateHead = stateHeadOf(p.t, p.shape, head);
    if (count <= 0) return;
    Source const from = sourceOf(blockIdx.x, (C + kTileRows - 1) / kTileRows, kTileRows, C, chunk);
    if (from.chunk && from.base >= count) return;
    T const* const keys = from.chunk ? static_cast<T const*>(p.t.k) + head * chunk * D
                                     : static_cast<T const*>(p.t.presentKey) + stateHead * C * D;
    bool const decodes = coded(p) && !from.chunk, turning = turns(p), converted = turning || decodes;
    int position[2];
    T const* rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int const index = from.base + warp * 16 + g + r * 8;
        position[r] = -1;
        if (from.chunk) {
            if (index < count) position[r] = past + index;
        } else if (index < C) {
            position[r] = p.t.presentPosition[stateHead * C + index];
        }
        rows[r] = position[r] >= 0 ? keys + static_cast<long>(index) * D : nullptr;
    }
    WarpRows<T, W> warpKeys;
    if (converted) {
        if constexpr (kParts<T> > 1) {
            Rotary const rotary = Rotary::of(p.shape, rules, p.t);
            int const low = from.base + warp * 16 + g;
            auto const element = [&](int r, int d) {
                if (position[r] < 0 || d >= D) return 0.f;
                auto const given = [&](int c) {
                    return decodes ? codedKeys(p, stateHead).at(low + r * 8, c) : toFloat(rows[r][c]);
                };
                if (!turning) return given(d);
                Turn const turn = from.chunk ? rotary.ahead(low + r * 8) : rotary.back(position[r], past);
                return rotary.turned(turn, d, given) * kReduction<T>;
            };
            shared.keys.load(warpKeys, element, t);
        } else {
            T* const tile[] = {shared.keys.rows};  // which is read behind the barrier of the first tile of queries
            if (turning) {
                readTurnedKeys<W, kTileRows>(p, from, head, count, past, Tiles::kStride, tile);
            } else {
                Rows<int8_t> const codes = codedKeys(p, stateHead);
                readCodes<W, kTileRows>(codes.stored, &codes.centring, p.t.presentPosition + stateHead * C, from.base,
                                        C, Tiles::kStride, tile);
            }
            for (int r = 0; r < 2; ++r) rows[r] = tile[0] + (warp * 16 + g + r * 8) * Tiles::kStride;
        }
    }
    if (kParts<T> == 1 || !converted) warpKeys.load(rows[0], rows[1], D, t);

    // Queries that contribute: all, or only the last one. Queries before a key of the chunk do not.
    int const start = rules.policy == Policy::kTova ? count - 1 : 0;
    int const skipped = (from.chunk ? max(start, from.base) : start) / N;
    int const tiles = (count + N - 1) / N - skipped;
    auto const fetch = [&](int tile, int stage, int part) {
        T const* const q = queriesOf<T>(p, part, queryHead);
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
    };

    float gained[2] = {0.f, 0.f};
    auto const copy = [&](int tile, int stage) { fetch(tile, stage, 0); };
    Ring<Tiles::kStages> ring(Tiles::kStages, tiles);
    if (Tiles::kStages > 1) ring.start(copy);
    for (int tile = 0; tile < tiles; ++tile) {
        int const stage = ring.next(copy, [](int) {});
        float s[N / 8][4];
        warpKeys.template multiply<N>(s, shared.queries[stage].x, Tiles::kStride, D, lane);
        if constexpr (kParts<T> > 1) {
            if (converted) shared.keys.template add<N>(s, shared.queries[stage].x, Tiles::kStride, lane, 0);
            for (int part = 1; turning && part < kParts<T>; ++part) {  // the other parts of queries, as in attention
                __syncthreads();
                fetch(tile, stage, part);
                commitCopies();
                awaitCopies<0>();
                __syncthreads();
                warpKeys.template add<N>(s, shared.queries[stage].x, Tiles::kStride, lane);
                shared.keys.template add<N>(s, shared.queries[stage].x, Tiles::kStride, lane, part);
            }
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
