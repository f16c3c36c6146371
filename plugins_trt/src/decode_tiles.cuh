// Decode of 16-bit models: attention over the slots of a block on tensor cores, for up to 16 query heads at a time.
//
// Tiles of 32 keys and of 32 values come alternately through a ring in shared memory, so that the slots are read once
// from memory for up to 16 heads. Each warp multiplies the queries with eight of the keys; the logits go through shared
// memory, and each warp multiplies the weights of all 32 slots with a quarter of the values' columns. The softmax runs
// along the tiles of a split.
//
// Eight heads are the 16 rows of a fragment, in two parts each, as in decode_logits.cuh: so a weight keeps twice the
// digits of a 16-bit number.
#pragma once

#include "decode_logits.cuh"

namespace less {

// What tensor cores multiply with weights.
template <class S>
using ValueFactor = std::conditional_t<kCoded<S>, __half, S>;

// Blocks on a multiprocessor for which there are registers: as many as leave enough for a thread's sums, and for what
// becomes of codes and of keys that are turned.
constexpr int tileBlocks(bool codes, int W, int GT, bool turning) {
    int const sums = W * GT / 64;
    if (sums > 32) return 2;
    if (sums > 16 || GT > 8) return codes || turning ? 3 : 4;
    return turning || codes ? 4 : 6;
}

template <class S, int W, int GT, bool Turns>
struct TileAttention {
    using Block = TileBlock<S, W, GT, Turns>;
    using Stage = SlotStage<S, W>;
    using Value = ValueFactor<S>;
    static constexpr int kOctets = GT / 8, kColumns = W / kWarps;  // columns of values of a warp
    static constexpr int kBias = 127;                              // of the exponent of a float

    Block const& block;
    Stage* const ring;
    SlotCopies<Block> copies;
    TileLogits<S, W, GT, Turns> const logits;
    TileScratch<S, W, GT, Turns>& scratch;
    int const warp, lane, g, t;
    int const valueOffset;  // in a stage, of what the thread reads first
    // The softmax so far of heads g of every eight, over the slots that the lanes of the same g have seen.
    float sums[kOctets][kColumns / 8][4], peak[kOctets], mass[kOctets];
    float exponent;  // of codes: mass and sums are 2^exponent times as large

    __device__ __forceinline__ TileAttention(Block const& of, Stage* stages)
        : block(of),
          ring(stages),
          copies(of, stages),
          logits(of, copies),
          scratch(logits.scratch),
          warp(copies.warp),
          lane(copies.lane),
          g(lane / 4),
          t(lane % 4),
          valueOffset(opaque(kCoded<S> ? Stage::offset(lane, warp * kColumns / Stage::kVector)
                                       : Stage::offset(lane % 16, warp * kColumns / Stage::kVector + lane / 16))) {}

    // ---- values

    __device__ __forceinline__ void clear() {
        exponent = kLargestExponent;
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
            peak[octet] = kLowest;
            mass[octet] = 0.f;
#pragma unroll
            for (int n = 0; n < kColumns / 8; ++n)
                sums[octet][n][0] = sums[octet][n][1] = sums[octet][n][2] = sums[octet][n][3] = 0.f;
        }
    }
    static constexpr float kLowest = -3.4028234e38f;  // finite, so that its difference to -inf is -inf
    static constexpr float kLog2E = 1.44269504f;
    static constexpr float kLargestExponent = 100.f;

    // The weights of the slots of a tile for eight heads, as A fragments of two steps of 16 slots: with codes, times
    // the scale of the lane's i-th slot. The lane's slots are 2t and 2t + 1 of every eight. rescale is what the
    // exponent has changed.
    __device__ __forceinline__ void weightsOf(int octet, float const (&scale)[8], float rescale, uint32_t (&a)[2][4]) {
        float weight[8], top = peak[octet];
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            float2 const pair = *reinterpret_cast<float2 const*>(&scratch.logits[octet * 8 + g][i * 4 + 2 * t]);
            weight[i] = pair.x;
            weight[i + 1] = pair.y;
            top = fmaxf(top, fmaxf(pair.x, pair.y));
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        float const shrink = powerOfTwo((peak[octet] - top) * kLog2E) * rescale;
        peak[octet] = top;
        mass[octet] *= shrink;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[octet][n][e] *= shrink;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            weight[i] = powerOfTwo((weight[i] - top) * kLog2E + (kCoded<S> ? exponent : 0.f));
            mass[octet] += weight[i];
            if constexpr (kCoded<S>) weight[i] *= scale[i];
        }
#pragma unroll
        for (int half = 0; half < 4; ++half) {
            float &low = weight[2 * half], &high = weight[2 * half + 1];
            a[half / 2][half % 2 * 2] = packedParts<Value>(low, high);
            a[half / 2][half % 2 * 2 + 1] = packed<Value>(low, high);
        }
    }
    // sums += weights * values in the columns of the warp
    __device__ __forceinline__ void multiplyValues(Stage const& values, uint32_t const (&a)[kOctets][2][4]) {
#pragma unroll
        for (int i = 0; i < kColumns / 16; ++i) {
            uint32_t b[2][4];  // of each step: eight columns, and the next eight
            if constexpr (kCoded<S>) {
                // Two codes count as one element of the matrices: of columns 2c and 2c + 1 of the 16.
                uint32_t pairs[4];
                loadMatrices<true>(pairs, values.rows + Stage::movedTo(valueOffset, 0, i));
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    b[m / 2][m % 2] = halvesOf<0, 2>(pairs[m]);
                    b[m / 2][m % 2 + 2] = halvesOf<1, 3>(pairs[m]);
                }
            } else {
#pragma unroll
                for (int k = 0; k < 2; ++k)
                    loadMatrices<true>(b[k], values.rows + Stage::movedTo(valueOffset, k * 16, i * 2));
            }
#pragma unroll
            for (int k = 0; k < 2; ++k) {
#pragma unroll
                for (int octet = 0; octet < kOctets; ++octet) {
                    multiplyAdd<Value>(sums[octet][2 * i], a[octet][k], b[k]);
                    multiplyAdd<Value>(sums[octet][2 * i + 1], a[octet][k], b[k] + 2);
                }
            }
        }
    }
    __device__ __forceinline__ void addValues(Stage const& values) {
        uint32_t a[kOctets][2][4];
        float scale[8] = {}, rescale = 1.f;
        if constexpr (kCoded<S>) {
            // The largest scale so far makes the largest weight kUnits / 2 to kUnits. Floats that are not negative sort
            // like their bits.
            unsigned const largest = __reduce_max_sync(~0u, __float_as_uint(scratch.scales[lane]));
            int const power = static_cast<int>(largest >> 23) - kBias;
            float const before = exponent;
            exponent = fminf(exponent, static_cast<float>(9 - power));
            rescale = powerOfTwo(exponent - before);
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                float2 const pair = *reinterpret_cast<float2 const*>(&scratch.scales[i * 4 + 2 * t]);
                scale[i] = pair.x;
                scale[i + 1] = pair.y;
            }
        }
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) weightsOf(octet, scale, rescale, a[octet]);
        multiplyValues(values, a);
    }

    // Writes the softmax of a split, to the memory of splits or to shared memory.
    __device__ __forceinline__ void write(int split, int heads) {
        if (block.direct()) __syncthreads();  // the ring has been read: the sums take its memory
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
            int const h = octet * 8 + g;
            bool const wanted = block.direct() || heads + h < block.G;
            float* const to = block.direct() ? block.onlySums + h * W : block.sumsOf(split, heads + h);
            int const columns = block.direct() ? W : block.D;
            float const unit = kCoded<S> ? powerOfTwo(-exponent) : 1.f;
            mass[octet] *= unit;
            mass[octet] += __shfl_xor_sync(~0u, mass[octet], 1);
            mass[octet] += __shfl_xor_sync(~0u, mass[octet], 2);
#pragma unroll
            for (int n = 0; n < kColumns / 8; n += kCoded<S> ? 2 : 1) {
                // The pairs of adjacent columns that the lane has.

#pragma unroll
                for (int e = 0; e < (kCoded<S> ? 2 : 1); ++e) {
                    int const other = kCoded<S> ? n + 1 : n, next = kCoded<S> ? e : 1;
                    int const d = warp * kColumns + n * 8 + (kCoded<S> ? 4 * t + 2 * e : 2 * t);
                    float const first = sums[octet][n][e] + sums[octet][n][2 + e];
                    float const second = sums[octet][other][next] + sums[octet][other][2 + next];
                    if (wanted && d < columns) publishPair(to + d, first * unit, second * unit);
                }
            }
            if (warp == 0 && t == 0 && wanted) {
                float const top = mass[octet] > 0.f ? peak[octet] : -kInfinity;
                if (block.direct()) {
                    block.shared.softmaxes[0][h] = {top, mass[octet]};
                } else {
                    publish(block.softmaxOf(split, heads + h), make_float2(top, mass[octet]));
                }
            }
        }
    }

    // The slots of the block, for all heads of the group.
    __device__ __forceinline__ void attend() {
        int const tiles = (copies.end - copies.begin + kSlotTile - 1) / kSlotTile,
                  perSplit = block.p.slotsPerSplit / kSlotTile;
        auto const moreKeys = [&](int item, int stage) { copies.copyKeys(item / 2, stage); };
        auto const moreValues = [&](int item, int stage) { copies.copyValues(item / 2, stage); };
        for (int heads = 0; heads < block.G; heads += GT) {
            if (heads > 0) __syncthreads();  // the last values have been read
            copies.restart();
            Ring<2> items(block.p.stages, 2 * tiles);  // keys and values in turn
            items.start(moreKeys);
            if (block.p.stages == 4) {
                items.start(moreValues);
                items.start(moreKeys);
            }
            if constexpr (kCoded<S> && Turns) {
                Centring<S>::of(block.p.t, static_cast<int>(blockIdx.y), block.D).copied(scratch.centring, W, block.D);
            }
            logits.loadQueries(heads);
            int split = static_cast<int>(blockIdx.x) * block.p.splitsPerBlock;
            for (int tile = 0; tile < tiles; ++split) {
                clear();
                for (int const stop = min(tiles, tile + perSplit); tile < stop; ++tile) {
                    int const keyStage = items.next(moreValues, [](int) {});
                    logits.find(ring[keyStage], copies.begin + tile * kSlotTile, heads);
                    int const valueStage =
                        items.next(moreKeys, [&](int stage) { copies.clearEmpty(ring[keyStage], ring[stage]); });
                    addValues(ring[valueStage]);
                }
                write(split, heads);
            }
        }
    }
};

}  // namespace less
