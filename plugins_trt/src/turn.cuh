// Prefill (T > 1) of layers with a largest distance: rotated keys and queries as sums of numbers that tensor cores
// multiply (kParts). One such number would lose what the reference keeps: the rotation is in float32.
#pragma once

#include "prefill.cuh"

namespace less {

// Eight columns of a row after the turn.
template <class S>
__device__ __forceinline__ void readTurned(Rotary const& rotary, Rows<S> const& rows, int row, Turn const& turn,
                                           int column, float (&x)[8]) {
    if (rotary.inEights()) {
        rows.eight(row, column, x);
        if (!rotary.rotates(column)) return;
        float partners[8];
        rows.eight(row, rotary.partner(column), partners);
        rotary.turnEight(turn, column, x, partners);
    } else {
        Eight const turned = turnedOneByOne(rotary, rows, row, turn, column);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = turned.x[i];
    }
}

// Eight turned elements as parts, one to each target.
template <class T>
__device__ __forceinline__ void storeTurned(float (&element)[8], T* const (&targets)[kParts<T>]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) element[i] *= kReduction<T>;
    storeParts(element, targets);
}

// Reads the rows [base, base + Count) into one tile for each part of an element, with zeros in rows without a turn and
// in columns beyond D; called by all threads. turnOf(row) gives a row's turn.
template <int W, int Count, class T, class S, class TurnOf>
__device__ __forceinline__ void readTurnedRows(Rotary const& rotary, Rows<S> const& rows, TurnOf const& turnOf,
                                               int base, int stride, T* const (&tiles)[kParts<T>]) {
    for (int x = threadIdx.x; x < Count * (W / 8); x += kThreads) {
        int const row = x / (W / 8), column = x % (W / 8) * 8;
        Turn const turn = turnOf(base + row);
        float element[8] = {};
        if (turn.row != nullptr && column < rows.stored.D) readTurned(rotary, rows, base + row, turn, column, element);
        T* targets[kParts<T>];
        for (int part = 0; part < kParts<T>; ++part) targets[part] = tiles[part] + row * stride + column;
        storeTurned(element, targets);
    }
}

// The same for a tile of keys of the chunk or of the slots.
template <int W, int Count, class T>
__device__ __forceinline__ void readTurnedKeys(PrefillParams const& p, Source const& from, long head, int tokens,
                                               int past, int stride, T* const (&tiles)[kParts<T>]) {
    Rotary const rotary = Rotary::of(p.shape, p.rules, p.t);
    long const stateHead = stateHeadOf(p.t, p.shape, head);
    int const* const positions = p.t.presentPosition + stateHead * p.shape.slots;
    auto const turnOf = [&](int row) {
        if (from.chunk) return row < tokens ? rotary.ahead(row) : Turn::none();
        bool const held = row < from.length && positions[row] >= 0;
        return held ? rotary.back(positions[row], past) : Turn::none();
    };
    if (coded(p) && !from.chunk) {
        readTurnedRows<W, Count>(rotary, codedKeys(p, stateHead), turnOf, from.base, stride, tiles);
    } else {
        auto const rows = from.chunk ? plainRows<T>(p, p.t.k, head, from.length)
                                     : plainRows<T>(p, p.t.presentKey, stateHead, from.length);
        readTurnedRows<W, Count>(rotary, rows, turnOf, from.base, stride, tiles);
    }
}

// Turns the queries [first, first + 64) of the block's head; called by all threads.
template <class T>
__device__ __forceinline__ void turnQueries(PrefillParams const& p, int first) {
    int const chunk = p.shape.chunk, D = p.shape.headDim, count = min(p.t.newLength[blockIdx.z], chunk);
    long const head = queryHeadOf(p);
    auto const rows = plainRows<T>(p, p.t.q, head, chunk);
    Rotary const rotary = Rotary::of(p.shape, p.rules, p.t);
    int const vectors = D / 8;
    for (int x = threadIdx.x; x < max(0, min(kTileRows, count - first)) * vectors; x += kThreads) {
        int const query = first + x / vectors, column = x % vectors * 8;
        float element[8];
        readTurned(rotary, rows, query, rotary.ahead(query), column, element);
        T* targets[kParts<T>];
        for (int part = 0; part < kParts<T>; ++part) targets[part] = queriesOf<T>(p, part, head) + query * D + column;
        storeTurned(element, targets);
    }
}

// Turns the queries of the chunk: grid (ceil(T / 64), Hq, B).
template <class T>
__global__ void __launch_bounds__(kThreads) turnKernel(PrefillParams const p) {
    turnQueries<T>(p, static_cast<int>(blockIdx.x) * kTileRows);
}

}  // namespace less
