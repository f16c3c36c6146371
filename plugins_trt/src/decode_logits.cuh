// Decode of 16-bit models: the queries of a tile of heads, and their logits with a tile of keys.
//
// Eight heads are the 16 rows of a fragment (tensor_ops.cuh), in two parts each: row g is the larger part of head g,
// row g + 8 the rest. So an element of a query that is folded with the constants of int8 slots keeps twice the digits
// of a 16-bit number. The columns of the head may come in any order in the product: a lane takes those of one vector of
// 16 bytes as its elements of several steps (columnOf).
#pragma once

#include "decode_slots.cuh"
#include "tiles.cuh"

namespace less {

// What tensor cores multiply with queries: codes are halves; keys that are turned come in parts, those of codes as
// bfloat16, which has the range of every model.
template <class S, bool Turns>
using KeyFactor = std::conditional_t<kCoded<S>, std::conditional_t<Turns, __nv_bfloat16, __half>, S>;

// Queries of codes, and weights of codes, are up to kUnits: far above the smallest halves.
constexpr float kUnits = 1024.f;

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

template <class S, int W, int GT, bool Turns>
struct TileLogits {
    using Block = TileBlock<S, W, GT, Turns>;
    using Stage = SlotStage<S, W>;
    using Scratch = TileScratch<S, W, GT, Turns>;
    using Key = KeyFactor<S, Turns>;
    static constexpr int kOctets = GT / 8;
    static constexpr bool kFolded = kCoded<S> && !Turns;  // queries contain the constants of the keys

    Block const& block;
    Scratch& scratch;
    int const warp, lane, g, t;
    int const end;        // of the block's slots
    int const keyOffset;  // in a stage, of what the thread reads first

    __device__ __forceinline__ TileLogits(Block const& of, SlotCopies<Block> const& copies)
        : block(of),
          scratch(*reinterpret_cast<Scratch*>(reinterpret_cast<unsigned char*>(&of.shared) +
                                              sizeof(typename Block::Shared))),
          warp(copies.warp),
          lane(copies.lane),
          g(lane / 4),
          t(lane % 4),
          end(copies.end),
          keyOffset(opaque(Stage::offset(warp * kKeysPerWarp + g, t))) {}

    // The first of four columns that a lane has in the step k.
    __device__ __forceinline__ static int columnOf(int k, int t) {
        constexpr int kSteps = Stage::kVector / 4;  // of a vector
        return (k / kSteps * 4 + t) * Stage::kVector + k % kSteps * 4;
    }

    // ---- queries

    // Writes the queries of a tile of heads to shared memory; called by all threads.
    __device__ __forceinline__ void loadQueries(int heads) const {
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
    __device__ __forceinline__ void find(Stage const& stage, int base, int heads) const {
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
        bool const inside[] = {row < end - base, row + 1 < end - base};
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
};

}  // namespace less
