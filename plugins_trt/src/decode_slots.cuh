// Decode on tensor cores: tiles of slots in shared memory, and how a block's threads copy them there.
#pragma once

#include "decode_block.cuh"
#include "tensor_ops.cuh"

namespace less {

constexpr int kSlotTile = 32;
constexpr int kKeysPerWarp = kSlotTile / kWarps;

// A stage of the ring: keys with positions and scales, or values.
template <class S, int W>
struct alignas(16) SlotStage {
    static constexpr int kVector = 16 / sizeof(S), kVectors = W / kVector;
    static constexpr int kNumbers = kCoded<S> ? 3 : 1;  // of a slot: its position, and the scales of key and value
    S rows[kSlotTile * W];
    int numbers[kNumbers][kSlotTile];

    __device__ __forceinline__ int const& position(int row) const { return numbers[0][row]; }
    __device__ __forceinline__ float scale(int row) const { return asFloat(numbers[kNumbers > 1 ? 1 : 0][row]); }
    // Scales of two adjacent rows, the first of them even.
    __device__ __forceinline__ float2 scales(int row) const { return twoFloats(numbers[kNumbers > 1 ? 1 : 0][row]); }
    __device__ __forceinline__ float2 valueScales(int row) const {
        return twoFloats(numbers[kNumbers > 2 ? 2 : 0][row]);
    }
    // Where a vector of a row lies. Neither eight lanes that read eight rows nor eight that read four vectors of two
    // rows meet in a bank.
    __device__ __forceinline__ static int offset(int row, int vector) {
        return row * W + (vector ^ orderOf(row)) * kVector;
    }
    // The offset `rows` below and `vectors` to the right of another, if their sums with its row modulo 8 and its vector
    // have no carry.
    __device__ __forceinline__ static int movedTo(int offset, int rows, int vectors) {
        return (offset ^ ((vectors ^ orderOf(rows)) * kVector)) + rows * W;
    }
    // Eight columns of a row; the first is a multiple of eight.
    __device__ __forceinline__ Piece<S> piece(int row, int column) const {
        S const* const source = rows + offset(row, column / kVector) + column % kVector;
        return {*reinterpret_cast<Vec8<S> const*>(source), kCoded<S> ? scale(row) : 0.f};
    }
    __device__ __forceinline__ float at(int row, int d) const {
        float const element = toFloat(rows[offset(row, d / kVector) + d % kVector]);
        return kCoded<S> ? element * scale(row) : element;
    }

 private:
    __device__ __forceinline__ static float2 twoFloats(int const& bits) {
        return reinterpret_cast<float2 const&>(bits);
    }
    __device__ __forceinline__ static float asFloat(int const& bits) { return reinterpret_cast<float const&>(bits); }
    __device__ __forceinline__ static int orderOf(int row) {
        return ((row & 1) << 2 | (row >> 1 & 3)) & (kVectors - 1);
    }
};

// A thread's share of the copies of the slots of a block.
template <class Block>
struct SlotCopies {
    using S = typename Block::Slot;
    static constexpr int W = Block::kWidth;
    using Stage = SlotStage<S, W>;

    Block const& block;
    Stage* const ring;
    int const warp, lane;
    int const begin, end;      // slots of the block
    int const offset;          // in a stage, of what the thread copies first
    int const copyRow;         // its row; far away: there is nothing to copy
    S const *keys, *values;    // what it copies next
    int const* const numbers;  // the first that it copies

    __device__ __forceinline__ SlotCopies(Block const& of, Stage* stages)
        : block(of),
          ring(stages),
          warp(threadIdx.x / kWarpSize),
          lane(threadIdx.x % kWarpSize),
          begin(static_cast<int>(blockIdx.x) * of.p.splitsPerBlock * of.p.slotsPerSplit),
          end(min(of.C, begin + of.p.splitsPerBlock * of.p.slotsPerSplit)),
          offset(opaque(Stage::offset(firstRow(), column() / Stage::kVector) + column() % Stage::kVector)),
          copyRow(opaque(column() < of.D ? firstRow() : 1 << 30)),
          numbers(numbersOf()) {
        restart();
    }
    // Begins with the first tile again.
    __device__ __forceinline__ void restart() {
        long const first = static_cast<long>(begin + firstRow()) * block.D + column();
        keys = block.keys.x + first;
        values = block.values.x + first;
    }

    // A warp copies its own rows, a thread every kRowStep-th of them from the first on, eight columns of each.
    static constexpr int kPieces = W / 8, kRowStep = kPieces < kWarpSize ? kWarpSize / kPieces : 1;
    static constexpr int kCopies = kKeysPerWarp * kPieces / kWarpSize;
    __device__ __forceinline__ int firstRow() const { return warp * kKeysPerWarp + lane / kPieces; }
    __device__ __forceinline__ int column() const { return lane % kPieces * 8; }
    // Starts copying the rows of a tile that begins with the slot `base`.
    __device__ __forceinline__ void copyRows(S const*& source, Stage& stage, int base) const {
        int const left = end - base - copyRow, to = opaque(offset);
#pragma unroll
        for (int u = 0; u < kCopies; ++u) {
            copyAsync<8 * sizeof(S)>(stage.rows + Stage::movedTo(to, u * kRowStep, 0), source, u * kRowStep < left);
            source += kRowStep * block.D;
        }
        source += (kSlotTile - kKeysPerWarp) * block.D;
    }
    __device__ __forceinline__ void copyKeys(int tile, int stage) {
        int const base = begin + tile * kSlotTile;
        copyRows(keys, ring[stage], base);
        if (numbers != nullptr)
            copyAsync<4>(ring[stage].numbers[lane / kKeysPerWarp] + numberRow(), numbers + tile * kSlotTile,
                         numberRow() < end - base);
    }
    __device__ __forceinline__ void copyValues(int tile, int stage) {
        copyRows(values, ring[stage], begin + tile * kSlotTile);
    }
    // Of the rows of a warp, each lane copies one of the numbers, or none.
    __device__ __forceinline__ int numberRow() const { return warp * kKeysPerWarp + lane % kKeysPerWarp; }
    __device__ __forceinline__ int const* numbersOf() const {
        int const kind = lane / kKeysPerWarp;
        void const* from = block.positions;
        if (kind > 0) from = kind == 1 ? block.keys.scales : block.values.scales;
        return kind < Stage::kNumbers ? static_cast<int const*>(from) + begin + numberRow() : nullptr;
    }
    // Zeroes values of empty slots, which may hold anything, in what the thread has copied. Codes are always finite.
    __device__ __forceinline__ void clearEmpty(Stage const& keys, Stage& values) const {
        if constexpr (!kCoded<S>) {
            if (__ballot_sync(~0u, keys.position(numberRow()) < 0) == 0) return;
#pragma unroll 1
            for (int u = 0; u < kCopies; ++u) {
                int const rows = u * kRowStep;
                if (keys.position(firstRow() + rows) < 0)
                    *reinterpret_cast<uint4*>(values.rows + Stage::movedTo(offset, rows, 0)) = uint4{};
            }
        }
    }
};

}  // namespace less
