// Decode of float32 models: attention over the slots of a split, for all query heads of the group, GT at a time.
//
// Products are in float32 without tensor cores, whose tf32 keeps 10 bits of an element: too few for float32's
// tolerance. LPR lanes have a slot, eight columns each; a warp has 32 / LPR slots at a time.
#pragma once

#include "decode_block.cuh"

namespace less {

// A softmax so far, of GT heads: a thread's eight columns of the sums, over the slots that it has seen.
template <class S, int LPR, int GT>
struct Running {
    float sums[GT][8], peak[GT], mass[GT];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int g = 0; g < GT; ++g) {
            peak[g] = -kInfinity;
            mass[g] = 0.f;
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[g][i] = 0.f;
        }
    }
    // Adds Count slots.
    template <int Count>
    __device__ __forceinline__ void add(float const (&logit)[Count][GT], Piece<S> const (&value)[Count]) {
#pragma unroll
        for (int g = 0; g < GT; ++g) {
            float top = peak[g];
#pragma unroll
            for (int u = 0; u < Count; ++u) top = fmaxf(top, logit[u][g]);
            float const shrink = expDifference(peak[g], top);
            peak[g] = top;
            mass[g] *= shrink;
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[g][i] *= shrink;
#pragma unroll
            for (int u = 0; u < Count; ++u) {
                float const weight = expDifference(logit[u][g], top);
                float v[8];
                unpack(value[u].x, v);
                mass[g] += weight;
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[g][i] += value[u].share(weight) * v[i];
            }
        }
    }
    // Merges what the lanes of a warp have, which have seen different slots.
    __device__ __forceinline__ void mergeWarp() {
#pragma unroll
        for (int g = 0; g < GT; ++g) {
#pragma unroll
            for (int offset = LPR; offset < kWarpSize; offset *= 2) {
                float const theirs = __shfl_xor_sync(~0u, peak[g], offset);
                float const theirMass = __shfl_xor_sync(~0u, mass[g], offset);
                float const top = fmaxf(peak[g], theirs);
                float const mineFactor = expDifference(peak[g], top), theirFactor = expDifference(theirs, top);
                peak[g] = top;
                mass[g] = mass[g] * mineFactor + theirMass * theirFactor;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float const other = __shfl_xor_sync(~0u, sums[g][i], offset);
                    sums[g][i] = sums[g][i] * mineFactor + other * theirFactor;
                }
            }
        }
    }
};

// What the warps have of a tile of heads.
template <class S, int W, int GT>
struct WarpSums {
    float sums[kWarps][GT][W];
    alignas(16) float centring[kCoded<S> ? 2 * W : 4];
};

template <class S, int LPR, int GT>
using SplitBlock = DecodeBlock<S, LPR * 8, GT, DecodeShared<GT, kWarps, 0>>;

template <class S, int LPR, int GT, bool Turns>
struct SplitAttention {
    using Block = SplitBlock<S, LPR, GT>;
    using Sums = WarpSums<S, Block::kWidth, GT>;
    static constexpr int kRowsPerWarp = kWarpSize / LPR;
    static constexpr int kRows = kWarps * kRowsPerWarp;  // slots that a block processes at a time
    // Slots in flight per thread; the partners of keys take registers too.
    static constexpr int kUnroll = (GT > 4 || sizeof(S) == 4 ? 2 : 4) / (Turns ? 2 : 1);

    Block const& block;
    Sums& all;
    Centring<S> const centring;
    int const warp, row, column;
    bool const inRange;

    __device__ __forceinline__ SplitAttention(Block const& of, Sums& sums)
        : block(of),
          all(sums),
          centring(
              Centring<S>::of(of.p.t, static_cast<int>(blockIdx.y), of.D).copied(sums.centring, Block::kWidth, of.D)),
          warp(threadIdx.x / kWarpSize),
          row(threadIdx.x % kWarpSize / LPR),
          column(threadIdx.x % kWarpSize % LPR * 8),
          inRange(column < of.D) {}

    // A thread's slots on their way.
    struct Flight {
        Piece<S> key[kUnroll], value[kUnroll];
        int position[kUnroll];
    };

    // Loads unconditionally; invisible slots are dropped in logitsOf.
    __device__ __forceinline__ void load(Flight& flight, int first, int end) const {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            int const slot = min(first + row + u * kRows, end - 1);
            flight.position[u] = block.positions[slot];
            zero(flight.key[u]);
            zero(flight.value[u]);
            if (inRange) {
                flight.key[u] = block.keys.loadOnce(slot, column);
                flight.value[u] = block.values.loadOnce(slot, column);
            }
        }
    }

    // Eight columns of a key as the query sees them.
    __device__ __forceinline__ void readKey(Piece<S> const& piece, int position, int slot, float (&k)[8]) const {
        centring.read(piece, column, k);
        if constexpr (Turns) {
            Rotary const rotary = Rotary::of(block.p.shape, block.p.rules, block.p.t);
            Turn const turn = rotary.back(position, block.now);
            if (rotary.inEights()) {
                int const partners = rotary.rotates(column) ? rotary.partner(column) : column;
                float others[8];
                centring.read(shuffled(piece, row * LPR + partners / 8), partners, others);
                rotary.turnEight(turn, column, k, others);
            } else if (inRange) {
                Eight const turned = turnedOneByOne(rotary, Rows<S>{block.keys, centring}, slot, turn, column);
#pragma unroll
                for (int i = 0; i < 8; ++i) k[i] = turned.x[i];
            }
        }
    }

    // Logits of the slots in flight; the values of those that are not visible become zero.
    __device__ __forceinline__ void logitsOf(Flight& flight, float const (&query)[GT][8], int tile, int first, int end,
                                             float (&logit)[kUnroll][GT]) const {
        bool const scores = keepsScores(block.p.rules);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            int const slot = first + row + u * kRows;
            bool const seen = slot < end && visible(block.p.rules, flight.position[u], block.now);
            if (!seen) zero(flight.value[u]);
            float k[8];
            readKey(flight.key[u], flight.position[u], min(slot, end - 1), k);
#pragma unroll
            for (int g = 0; g < GT; ++g) {
                float dot = 0.f;
#pragma unroll
                for (int i = 0; i < 8; ++i) dot += query[g][i] * k[i];
#pragma unroll
                for (int offset = LPR / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
                logit[u][g] = seen ? dot : -kInfinity;
                if (scores && column == 0 && slot < end && tile + g < block.G)
                    block.keepLogit(tile + g, slot, logit[u][g]);
            }
        }
    }

    // Merges what the warps have of a tile of heads, to shared memory or to the memory of splits.
    __device__ __forceinline__ void mergeWarps(Running<S, LPR, GT> const& running, int split, int tile) const {
        constexpr int kWidth = Block::kWidth;
        auto& shared = block.shared;
        __syncthreads();  // the previous tile has been read
        if (row == 0) {
#pragma unroll
            for (int g = 0; g < GT; ++g) {
#pragma unroll
                for (int i = 0; i < 8; ++i) all.sums[warp][g][column + i] = running.sums[g][i];
                if (column == 0) shared.softmaxes[warp][g] = {running.peak[g], running.mass[g]};
            }
        }
        __syncthreads();
        for (int x = threadIdx.x; x < GT * kWidth; x += kThreads) {
            int const g = x / kWidth, d = x % kWidth;
            float top = -kInfinity, sum = 0.f, total = 0.f;
            for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.softmaxes[w][g].peak);
            for (int w = 0; w < kWarps; ++w) {
                float const factor = expDifference(shared.softmaxes[w][g].peak, top);
                sum += factor * all.sums[w][g][d];
                total += factor * shared.softmaxes[w][g].mass;
            }
            if (block.direct()) {
                all.sums[0][g][d] = sum;  // no other thread reads this element of warp 0
            } else if (tile + g < block.G && d < block.D) {
                publish(block.sumsOf(split, tile + g) + d, sum);
                if (d == 0) publish(block.softmaxOf(split, tile + g), make_float2(top, total));
            }
        }
    }

    // The slots of a split, for all heads of the group.
    __device__ __forceinline__ void attend(int split) const {
        auto const q = block.elements(block.p.t.q, static_cast<long>(block.G) * block.D);
        int const begin = split * block.p.slotsPerSplit, end = min(block.C, begin + block.p.slotsPerSplit);
        for (int tile = 0; tile < block.G; tile += GT) {
            float query[GT][8];
            Running<S, LPR, GT> running;
            running.clear();
#pragma unroll
            for (int g = 0; g < GT; ++g) {
                q.load8((tile + g) * block.D + column, inRange && tile + g < block.G, query[g]);
#pragma unroll
                for (int i = 0; i < 8; ++i) query[g][i] *= block.p.rules.scale;
            }
            for (int first = begin + warp * kRowsPerWarp; first < end; first += kRows * kUnroll) {
                Flight flight;
                load(flight, first, end);
                float logit[kUnroll][GT];
                logitsOf(flight, query, tile, first, end, logit);
                running.add(logit, flight.value);
            }
            running.mergeWarp();
            mergeWarps(running, split, tile);
        }
    }
};

}  // namespace less
