// Prefill (T > 1): attention.
//
// A block has 64 query rows of a head, 16 per warp, and iterates over tiles of the slots and of the chunk. With Turns,
// for layers with and without a largest distance.
//
// attendKernel: grid (ceil(T / 64), Hq, B).
#pragma once

#include "turn.cuh"

namespace less {

template <class T, int W>
struct AttendShared {
    using Tiles = Tiling<T, W>;
    typename Tiles::Tile keys[Tiles::kStages], values[Tiles::kStages];
    int positions[Tiles::kStages][Tiles::kRows];  // -1: not visible to any query
};

// What scoreKernel needs of attention: the softmax of each query.
struct KeptSoftmaxes {
    float *peaks, *scales;  // [T] of the head

    template <int N>
    __device__ __forceinline__ void keepLogits(float const (&)[N / 8][4], Source const&, int, int) const {}
    __device__ __forceinline__ void keepSoftmax(int query, float peak, float mass) const {
        peaks[query] = peak;
        scales[query] = 1.f / mass;
    }
};

// Attention of the queries [first, first + 64) of the block's head; called by all threads. What the scores need goes to
// `kept`.
template <class T, int W, bool Turns, class Kept>
__device__ __forceinline__ void attendQueries(PrefillParams const& p, AttendShared<T, W>& shared, int first,
                                              Kept const& kept) {
    using Tiles = Tiling<T, W>;
    constexpr int N = Tiles::kRows;
    AttentionRules const rules = p.rules;
    int const tid = threadIdx.x, warp = tid / kWarpSize, lane = tid % kWarpSize, g = lane / 4, t = lane % 4;
    int const Hk = p.shape.kvHeads, G = p.shape.queryHeads / Hk, C = p.shape.slots, D = p.shape.headDim,
              R = p.shape.rank, chunk = p.shape.chunk;
    int const batch = blockIdx.z, count = min(p.t.newLength[batch], chunk), past = p.t.pastLength[batch];
    long const queryHead = queryHeadOf(p), head = queryHead / G, stateHead = stateHeadOf(p.t, p.shape, head);
    int const low = first + warp * 16 + g;  // a thread has the rows low and low + 8
    T* const out = static_cast<T*>(p.t.out) + queryHead * chunk * D;
    if (first >= count) {  // padding only
        for (int x = tid; x < min(kTileRows, chunk - first) * D; x += kThreads) out[first * D + x] = fromFloat<T>(0.f);
        return;
    }
    auto const queryRow = [&](int part, int query) -> T const* {
        return query < count ? queriesOf<T>(p, part, queryHead) + query * D : nullptr;
    };
    WarpRows<T, W> queries;
    queries.load(queryRow(0, low), queryRow(0, low + 8), D, t);

    // Tiles that the window hides from all of these rows are skipped.
    bool const slotsHidden = rules.window > 0 && first >= rules.window;
    int const slotTiles = slotsHidden ? 0 : (C + N - 1) / N;
    int const hidden = rules.window > 0 ? max(0, first - rules.window + 1) / N : 0;
    int const tiles = slotTiles + (min(count, first + kTileRows) + N - 1) / N - hidden;
    // Tiles of codes and of keys to turn are converted as they come in, without the next one in flight, whose memory
    // the parts of keys take.
    bool const codes = coded(p), turning = Turns && turns(p);
    auto const partTile = [&](int part) {
        return part < 2 ? shared.keys[part].x : shared.values[Tiles::kStages - 1].x;
    };
    constexpr int kVectors = W / Tiles::kVector, kOwnRows = N / kWarps;  // a warp copies its own rows
    auto const placeOf = [&](int tile) {
        return sourceOf(tile < slotTiles ? tile : tile + hidden, slotTiles, N, C, chunk);
    };
    auto const fetch = [&](int tile, int stage) {
        Source const from = placeOf(tile);
        bool const decodes = codes && !from.chunk;
        T* parts[kParts<T>];
        for (int i = 0; i < kParts<T>; ++i) parts[i] = partTile(i);
        if (turning) readTurnedKeys<W, N>(p, from, head, count, past, Tiles::kStride, parts);
        if (decodes) {
            int const* const positions = p.t.presentPosition + stateHead * C;
            if (!turning) {
                Rows<int8_t> const keys = codedKeys(p, stateHead);
                readCodes<W, N>(keys.stored, &keys.centring, positions, from.base, C, Tiles::kStride, parts);
            }
            SlotRows<int8_t> const values(p.t.presentValue, p.t.presentValueScale, stateHead, C, D);
            T* const tile[] = {shared.values[0].x};
            readCodes<W, N>(values, nullptr, positions, from.base, C, Tiles::kStride, tile);
        }
        long const base = (from.chunk ? head : stateHead) * from.length * D;
        T const* const keys = static_cast<T const*>(from.chunk ? p.t.k : p.t.presentKey) + base;
        T const* const values = static_cast<T const*>(from.chunk ? p.t.v : p.t.presentValue) + base;
        if (lane < kOwnRows) {
            int const row = warp * kOwnRows + lane, index = from.base + row;
            int* const position = &shared.positions[stage][row];
            if (from.chunk) {
                *position = index < count ? past + index : -1;
            } else {
                copyAsync<4>(position, p.t.presentPosition + stateHead * C + index, index < C);
            }
        }
        if (decodes) return;
        for (int x = lane; x < kOwnRows * kVectors; x += kWarpSize) {
            int const row = warp * kOwnRows + x / kVectors, column = x % kVectors * Tiles::kVector;
            bool const wanted = from.base + row < (from.chunk ? count : C) && column < D;
            long const offset = wanted ? static_cast<long>(from.base + row) * D + column : 0;
            if (!turning) copyAsync(shared.keys[stage].x + row * Tiles::kStride + column, keys + offset, wanted);
            copyAsync(shared.values[stage].x + row * Tiles::kStride + column, values + offset, wanted);
        }
    };
    // Zeroes the values of empty slots, which may hold anything, in the rows that the warp has copied.
    auto const clearEmpty = [&](int tile, int stage) {
        Source const from = placeOf(tile);
        if (from.chunk) return;
        int const own = warp * kOwnRows + lane % kOwnRows;
        if (lane < kOwnRows && from.base + own >= C) shared.positions[stage][own] = -1;
        unsigned const empty = __ballot_sync(~0u, lane < kOwnRows && shared.positions[stage][own] < 0);
        if (empty == 0 || codes) return;
        for (int x = lane; x < kOwnRows * kVectors; x += kWarpSize) {
            T* const piece = shared.values[stage].x + (warp * kOwnRows + x / kVectors) * Tiles::kStride;
            if (empty >> (x / kVectors) & 1) *reinterpret_cast<uint4*>(piece + x % kVectors * Tiles::kVector) = uint4{};
        }
    };

    float o[W / 8][4], peak[2] = {-kInfinity, -kInfinity}, mass[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < W / 8; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    auto const attend = [&](int tile, int stage, bool converted) {
        float s[N / 8][4];
        queries.template multiply<N>(s, shared.keys[stage].x, Tiles::kStride, D, lane);
        if constexpr (kParts<T> > 1) {
            for (int part = 1; converted && part < kParts<T>; ++part)
                queries.template add<N>(s, partTile(part), Tiles::kStride, lane);
            // The other parts of queries; a product of two small parts is below float32's precision.
            for (int part = 1; turning && part < kParts<T>; ++part) {
                T const *const lowRow = queryRow(part, low), *const highRow = queryRow(part, low + 8);
                for (int k = 0; k < W / 16; ++k) {
                    uint32_t a[4];
                    WarpRows<T, W>::loadStep(a, lowRow, highRow, D, k, t);
                    for (int keyPart = 0; keyPart + part < kParts<T>; ++keyPart)
                        WarpRows<T, W>::template addStep<N>(s, a, partTile(keyPart), Tiles::kStride, k, lane);
                }
            }
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
        kept.template keepLogits<N>(s, placeOf(tile), low, t);
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
    };
    // Slots of codes are a run of tiles of their own.
    for (int from = 0, end = codes && slotTiles > 0 && !turning ? slotTiles : tiles; from < tiles;
         from = end, end = tiles) {
        bool const converted = turning || (codes && from < slotTiles);
        auto const copy = [&](int item, int stage) { fetch(from + item, stage); };
        if (from > 0) __syncthreads();  // the last tile of slots has been read
        Ring<1> ring(Tiles::kStages > 1 && !converted ? 2 : 1, end - from);
        if (Tiles::kStages > 1 && !converted) ring.start(copy);
        for (int tile = from; tile < end; ++tile)
            attend(tile, ring.next(copy, [&](int stage) { clearEmpty(tile, stage); }), converted);
    }

    // ---- low-rank term and output
    bool const inMeans = keepsMeans(p.shape);
    Means const means = Means::of(p.t, stateHead, p.shape);
    float const* const h = static_cast<float const*>(p.t.presentH) + stateHead * R * D;
    float const* const z = p.t.presentZ + stateHead * R;
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
                float const part = expDifference(logPhi[f] + __logf(z[f]), all);
                float const weight = inMeans ? part * means.scales[f] : part / z[f];
                total += part;
#pragma unroll
                for (int i = 0; i < W / 8; ++i) {
                    int const d = i * 8 + t * 2;
                    if (d >= D) continue;
                    float2 const x = inMeans ? means.codes(f, d) : *reinterpret_cast<float2 const*>(h + f * D + d);
                    o[i][2 * r] += weight * x.x;
                    o[i][2 * r + 1] += weight * x.y;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < W / 8; ++i) {
            int const d = i * 8 + t * 2;
            if (d < D) storePair(out + query * D + d, o[i][2 * r] / total, o[i][2 * r + 1] / total);
        }
        if (t == 0 && keepsScores(rules)) kept.keepSoftmax(query, peak[r], mass[r]);
    }
}

template <class T, int W, bool Turns>
__global__ void __launch_bounds__(kThreads) attendKernel(PrefillParams const p) {
    LESS_SHARED_MEMORY(raw);
    long const queries = queryHeadOf(p) * p.shape.chunk;
    // The last rows see the most keys, so they start first.
    int const first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kTileRows;
    attendQueries<T, W, Turns>(p, *reinterpret_cast<AttendShared<T, W>*>(raw), first,
                               KeptSoftmaxes{p.peaks + queries, p.scales + queries});
}

}  // namespace less
