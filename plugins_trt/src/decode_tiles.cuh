// Decode of 16-bit models: attention over the slots of a block on tensor cores, for up to 16 query heads at a time.
//
// Tiles of 32 keys and of 32 values come alternately through a ring in shared memory, so that the slots are read once
// from memory for up to 16 heads. Each warp multiplies the queries with eight of the keys; the logits go through shared
// memory, and each warp multiplies the weights of all 32 slots with a quarter of the values' columns. The softmax runs
// along the tiles of a split.
//
// Eight heads are the 16 rows of a fragment (tensor_ops.cuh), in two parts each: row g is the larger part of head g,
// row g + 8 the rest. So a weight keeps twice the digits of a 16-bit number, and an element of a query that is folded
// with the constants of int8 slots too. In the product with keys, the columns of the head may come in any order: a lane
// takes those of one vector of 16 bytes as its elements of several steps (columnOf).
#pragma once

#include "decode_slots.cuh"
#include "tiles.cuh"

namespace less {

// What tensor cores multiply: codes are halves; keys that are turned come in parts, those of codes as bfloat16, which
// has the range of every model.
template <class S, bool Turns>
using KeyFactor = std::conditional_t<kCoded<S>, std::conditional_t<Turns, __nv_bfloat16, __half>, S>;
template <class S>
using ValueFactor = std::conditional_t<kCoded<S>, __half, S>;

template <class S, int W, int GT, bool Turns>
struct alignas(16) TileScratch {
    using Key = KeyFactor<S, Turns>;
    static constexpr int kParts = kCoded<S> ? 2 : 1;
    static constexpr int kQueryStride = W + 8, kLogitStride = kSlotTile + 8;  // eight rows are in different banks
    Key queries[GT / 8][kParts][8 * kQueryStride];
    Key none[kCoded<S> ? 8 : kQueryStride];  // zeros, which stand for the parts of queries that do not exist
    float logits[GT][kLogitStride];
    // With codes: the logit of a key is unit * scale of the key * product with query * factor, and shift.
    float factors[GT], units[GT], shifts[GT];
    float scales[kCoded<S> ? kSlotTile : 4];  // of the values that are seen, of others 0
    float centring[kCoded<S> && Turns ? 2 * W : 4];
};

template <class S, int W, int GT, bool Turns>
using TileBlock = DecodeBlock<S, W, GT, DecodeShared<GT, 1, sizeof(TileScratch<S, W, GT, Turns>)>>;

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
    using Scratch = TileScratch<S, W, GT, Turns>;
    using Key = KeyFactor<S, Turns>;
    using Value = ValueFactor<S>;
    static constexpr int kOctets = GT / 8, kColumns = W / kWarps;  // columns of values of a warp
    static constexpr bool kFolded = kCoded<S> && !Turns;           // queries contain the constants of the keys
    // Queries and weights of codes are up to kUnits: far above the smallest halves.
    static constexpr float kUnits = 1024.f;
    static constexpr int kBias = 127;  // of the exponent of a float

    Block const& block;
    Stage* const ring;
    Scratch& scratch;
    SlotCopies<Block> copies;
    int const warp, lane, g, t;
    int const keyOffset, valueOffset;  // in a stage, of what the thread reads first
    // The softmax so far of heads g of every eight, over the slots that the lanes of the same g have seen.
    float sums[kOctets][kColumns / 8][4], peak[kOctets], mass[kOctets];
    float exponent;  // of codes: mass and sums are 2^exponent times as large

    __device__ __forceinline__ TileAttention(Block const& of, Stage* stages)
        : block(of),
          ring(stages),
          scratch(*reinterpret_cast<Scratch*>(reinterpret_cast<unsigned char*>(&of.shared) +
                                              sizeof(typename Block::Shared))),
          copies(of, stages),
          warp(copies.warp),
          lane(copies.lane),
          g(lane / 4),
          t(lane % 4),
          keyOffset(opaque(Stage::offset(warp * kKeysPerWarp + g, t))),
          valueOffset(opaque(kCoded<S> ? Stage::offset(lane, warp * kColumns / Stage::kVector)
                                       : Stage::offset(lane % 16, warp * kColumns / Stage::kVector + lane / 16))) {}

    // The first of four columns that a lane has in the step k.
    __device__ __forceinline__ static int columnOf(int k, int t) {
        constexpr int kSteps = Stage::kVector / 4;  // of a vector
        return (k / kSteps * 4 + t) * Stage::kVector + k % kSteps * 4;
    }

    // ---- queries

    // Writes the queries of a tile of heads to shared memory; called by all threads.
    __device__ __forceinline__ void loadQueries(int heads) {
        auto const q = block.elements(block.p.t.q, static_cast<long>(block.G) * block.D);
        auto const centring = Centring<S>::of(block.p.t, static_cast<int>(blockIdx.y), block.D);
        if constexpr (kFolded) {
            for (int h = warp; h < GT; h += kWarps) {
                float top = 0.f, shift = 0.f;
                for (int d = lane; d < block.D && heads + h < block.G; d += kWarpSize) {
                    float const element = q[(heads + h) * block.D + d];
                    top = fmaxf(top, fabsf(element * centring.std[d]));
                    shift += element * centring.mean[d];
                }
                top = warpMax(top);
                shift = warpSum(shift);
                if (lane == 0) {
                    scratch.factors[h] = top > 0.f ? kUnits / top : 0.f;
                    scratch.units[h] = top / kUnits * block.p.rules.scale;
                    scratch.shifts[h] = shift * block.p.rules.scale;
                }
            }
            __syncthreads();
        }
#pragma unroll 1
        for (int x = threadIdx.x; x < kOctets * (W / 16) * kWarpSize; x += kThreads) {
            int const octet = x / kWarpSize / (W / 16), k = x / kWarpSize % (W / 16);
            int const h = octet * 8 + g, column = columnOf(k, t);
            float element[4] = {};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (heads + h >= block.G || column >= block.D) continue;
                element[e] = q[(heads + h) * block.D + column + e];
                if constexpr (kFolded) element[e] *= centring.std[column + e] * scratch.factors[h];
            }
#pragma unroll
            for (int part = 0; part < Scratch::kParts; ++part) {
                Key* const to = scratch.queries[octet][part] + g * Scratch::kQueryStride + k * 16 + 2 * t;
                *reinterpret_cast<uint32_t*>(to) = packedParts<Key>(element[0], element[1]);
                *reinterpret_cast<uint32_t*>(to + 8) = packedParts<Key>(element[2], element[3]);
            }
        }
        if (!kCoded<S>) {
            for (int x = threadIdx.x; x < W; x += kThreads) scratch.none[x] = fromFloat<Key>(0.f);
        }
    }

    // ---- keys

    // Eight columns of a key as the queries see them.
    __device__ __forceinline__ void readTurned(Stage const& keys, int row, int column, float (&k)[8]) const {
        Centring<S> const centring{scratch.centring, scratch.centring + W};
        Rotary const rotary = Rotary::of(block.p.shape, block.p.rules, block.p.t);
        Turn const turn = rotary.back(keys.position(row), block.now);
        if (rotary.inEights()) {
            centring.read(keys.piece(row, column), column, k);
            if (!rotary.rotates(column)) return;
            float partners[8];
            int const other = rotary.partner(column);
            centring.read(keys.piece(row, other), other, partners);
            rotary.turnEight(turn, column, k, partners);
        } else {
            Eight const turned = turnedOneByOne(rotary, StagedRows{&keys, centring}, row, turn, column);
#pragma unroll
            for (int i = 0; i < 8; ++i) k[i] = turned.x[i];
        }
    }
    struct StagedRows {
        Stage const* keys;
        Centring<S> centring;
        __device__ __forceinline__ float at(int row, int d) const { return centring.restored(keys->at(row, d), d); }
    };

    // A lane's row of the matrices of queries in a step, see loadMatrices: of the larger parts, or of the rest.
    __device__ __forceinline__ Key const* queryRow(int octet) const {
        int const part = lane / 8 % 2, inRow = lane % 8 * Scratch::kQueryStride;
        Key const* const row =
            kCoded<S> || part == 0 ? scratch.queries[octet][part % Scratch::kParts] + inRow : scratch.none;
        return row + lane / 16 * 8;
    }
    // s += queries * keys^T for the keys of the warp and the elements b of the step k
    __device__ __forceinline__ void multiply(float (&s)[kOctets][4], int k, uint32_t const* b) const {
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
            uint32_t a[4];
            loadMatrices<false>(a, queryRow(octet) + k * 16);
            multiplyAdd<Key>(s[octet], a, b);
        }
    }
    __device__ __forceinline__ void multiplyTurned(Stage const& keys, float (&s)[kOctets][4]) const {
#pragma unroll
        for (int k = 0; k < W / 16; k += 2) {
            float element[8];
            readTurned(keys, warp * kKeysPerWarp + g, columnOf(k, t), element);
#pragma unroll
            for (int i = 0; i < 8; ++i) element[i] *= kReduction<Key>;
#pragma unroll
            for (int part = 0; part < kParts<Key>; ++part) {
                uint32_t b[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) b[i] = packedParts<Key>(element[2 * i], element[2 * i + 1]);
                multiply(s, k, b);
                multiply(s, k + 1, b + 2);
            }
        }
    }
    __device__ __forceinline__ void multiplyStored(Stage const& keys, float (&s)[kOctets][4]) const {
        int const offset = opaque(keyOffset);
#pragma unroll
        for (int v = 0; v < Stage::kVectors / 4; ++v) {
            uint4 const vector = *reinterpret_cast<uint4 const*>(keys.rows + Stage::movedTo(offset, 0, v * 4));
            uint32_t const x[4] = {vector.x, vector.y, vector.z, vector.w};
            if constexpr (kCoded<S>) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    uint32_t const b[2] = {halvesOf<0, 1>(x[i]), halvesOf<2, 3>(x[i])};
                    multiply(s, v * 4 + i, b);
                }
            } else {
                multiply(s, v * 2, x);
                multiply(s, v * 2 + 1, x + 2);
            }
        }
    }

    // The logits of the keys of a warp, for a tile of heads.
    __device__ __forceinline__ void findLogits(Stage const& stage, int base, int heads) const {
        float s[kOctets][4];
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) s[octet][0] = s[octet][1] = s[octet][2] = s[octet][3] = 0.f;
        if constexpr (Turns) {
            multiplyTurned(stage, s);
        } else {
            multiplyStored(stage, s);
        }
        int const row = warp * kKeysPerWarp + 2 * t;
        int2 const position = *reinterpret_cast<int2 const*>(&stage.position(row));
        bool const inside[] = {row < copies.end - base, row + 1 < copies.end - base};
        bool const seen[] = {inside[0] && visible(block.p.rules, position.x, block.now),
                             inside[1] && visible(block.p.rules, position.y, block.now)};
        bool const kept = keepsScores(block.p.rules);
        if (kCoded<S> && g == 0) {
            float2 const scales = stage.valueScales(row);
            *reinterpret_cast<float2*>(&scratch.scales[row]) =
                make_float2(seen[0] ? scales.x : 0.f, seen[1] ? scales.y : 0.f);
        }
        float2 const pair = kFolded ? stage.scales(row) : float2{};
        float const scales[] = {pair.x, pair.y};
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
            int const h = octet * 8 + g;
            float logit[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                logit[e] = kCoded<S> ? s[octet][e] + s[octet][2 + e] : s[octet][e];
                if constexpr (kFolded) {
                    logit[e] = logit[e] * (scratch.units[h] * scales[e]) + scratch.shifts[h];
                } else {
                    logit[e] *= block.p.rules.scale / kReduction<std::conditional_t<Turns, Key, float>>;
                }
                if (!seen[e]) logit[e] = -kInfinity;
            }
            *reinterpret_cast<float2*>(&scratch.logits[h][row]) = make_float2(logit[0], logit[1]);
            if (kept && heads + h < block.G) {
                float* const target = block.logits + (heads + h) * block.C + base + row;
                if (inside[0]) publish(target, logit[0]);
                if (inside[1]) publish(target + 1, logit[1]);
            }
        }
    }

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
    // The column of element e of a lane's sums in the n-th eight columns of its warp.
    __device__ __forceinline__ int columnOfSum(int n, int e) const {
        int const inOrder = n * 8 + 2 * t + e, inPairs = n / 2 * 16 + (2 * t + e) * 2 + n % 2;
        return warp * kColumns + (kCoded<S> ? inPairs : inOrder);
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
            loadQueries(heads);
            int split = static_cast<int>(blockIdx.x) * block.p.splitsPerBlock;
            for (int tile = 0; tile < tiles; ++split) {
                clear();
                for (int const stop = min(tiles, tile + perSplit); tile < stop; ++tile) {
                    int const keyStage = items.next(moreValues, [](int) {});
                    findLogits(ring[keyStage], copies.begin + tile * kSlotTile, heads);
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
