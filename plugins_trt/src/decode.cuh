// One decode step (T = 1) of a layer in one launch: grid (splits, Hk, B).
//
// Each block reads its share of a KV head's slots once, for all query heads of the group, with a running maximum per
// head. The block that finishes last (with one split, the only one) merges the shares in order, adds the new token and
// the low-rank term, updates the scores, chooses which token leaves, absorbs it into H and z while reading H for the
// output (means of 16 bits: afterwards, as they are rounded together), and stores the new token. S is the type of the
// slots. With Turns, for a layer with a largest distance, the slots' keys are rotated as they are read; the new token
// and its queries are at distance 0, which leaves them as they are.
#pragma once

#include "decode_block.cuh"

namespace less {

template <class S, int LPR, int GT, bool Turns>
__global__ void __launch_bounds__(kThreads, GT > 4 ? 2 : 4) decodeKernel(DecodeParams const p) {
    using T = std::conditional_t<kCoded<S>, AnyType, S>;  // of the other tensors
    using Layout = DecodeLayout<S, LPR, GT>;
    constexpr int kWidth = Layout::kWidth;
    constexpr int kRowsPerWarp = kWarpSize / LPR;
    // Slots in flight per thread; the partners of keys take registers too.
    constexpr int kUnroll = (GT > 4 || sizeof(S) == 4 ? 2 : 4) / (Turns ? 2 : 1);
    constexpr int kRows = kWarps * kRowsPerWarp;  // slots that a block processes at a time
    LESS_SHARED_MEMORY(raw);
    float* const shared = reinterpret_cast<float*>(raw);
    float* const accShared = shared + Layout::kAcc;
    float* const peakShared = shared + Layout::kPeak;
    float* const massShared = shared + Layout::kMass;

    AttentionRules const rules = p.rules;
    int const tid = threadIdx.x, warp = tid / kWarpSize, lane = tid % kWarpSize;
    int const row = lane / LPR, column = lane % LPR * 8;
    int const Hk = p.shape.kvHeads, G = p.shape.queryHeads / Hk, C = p.shape.slots, D = p.shape.headDim,
              R = p.shape.rank;
    int const batch = blockIdx.z, split = blockIdx.x;
    long const head = static_cast<long>(batch) * Hk + blockIdx.y;  // of the keys and values
    Elements<T> const q(p.t.q, p.shape.dtype, head * G * D), out(p.t.out, p.shape.dtype, head * G * D);
    if (p.t.newLength[batch] <= 0) {  // parked: the state does not change
        if (split == 0) {
            for (int x = tid; x < G * D; x += kThreads) out.set(x, 0.f);
        }
        return;
    }
    int const now = p.t.pastLength[batch];
    SlotRows<S> const keys(p.t.presentKey, p.t.presentKeyScale, head, C, D);
    SlotRows<S> const values(p.t.presentValue, p.t.presentValueScale, head, C, D);
    auto const centring =
        Centring<S>::of(p.t, static_cast<int>(blockIdx.y), D).copied(shared + Layout::kCentring, kWidth, D);
    int* const positions = p.t.presentPosition + head * C;
    bool const scores = keepsScores(rules);

    // Per head of the group, after the head-independent arrays.
    float* const exactPeak = shared + Layout::kHeads;  // maximum logit over the slots and the new token
    float* const exactScale = exactPeak + G;           // 1 / sum of exp(logit - maximum) over those
    float* const oldPeak = exactScale + G;             // maximum logit over the slots
    float* const oldWeight = oldPeak + G;              // weight of the accumulator in the output
    float* const newWeight = oldWeight + G;            // weight of the new value in the output
    float* const newShare = newWeight + G;             // score of the new token
    float* const lowWeight = newShare + G;             // [G][R] weights of H
    float* const leaverPsi = lowWeight + G * R;        // [R]
    float* const logits = p.logits != nullptr ? p.logits + head * G * C : leaverPsi + R;
    Choice* const scratch = reinterpret_cast<Choice*>(shared + Layout::kReduce);
    int* const lastFlag = reinterpret_cast<int*>(shared + Layout::kReduce + kWarps * 6);

    // ---- the slots of this split, for GT heads at a time
    int const share = (C + p.splits - 1) / p.splits, begin = split * share, end = min(C, begin + share);
    bool const direct = p.partials == nullptr;  // the accumulator stays in shared memory
    float* const partial = direct ? nullptr : p.partials + (head * p.splits + split) * G * (D + 2);
    bool const inRange = column < D;
    for (int tile = 0; tile < G; tile += GT) {
        float query[GT][8], acc[GT][8], peak[GT], mass[GT];
#pragma unroll
        for (int g = 0; g < GT; ++g) {
            q.load8((tile + g) * D + column, inRange && tile + g < G, query[g]);
            peak[g] = -kInfinity;
            mass[g] = 0.f;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                query[g][i] *= rules.scale;
                acc[g][i] = 0.f;
            }
        }
        for (int first = begin + warp * kRowsPerWarp; first < end; first += kRows * kUnroll) {
            Piece<S> key[kUnroll], value[kUnroll];
            int position[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {  // load unconditionally; invisible slots are dropped below
                int const slot = min(first + row + u * kRows, end - 1);
                position[u] = positions[slot];
                zero(key[u]);
                zero(value[u]);
                if (inRange) {
                    key[u] = keys.loadOnce(slot, column);
                    value[u] = values.loadOnce(slot, column);
                }
            }
            float logit[kUnroll][GT];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                int const slot = first + row + u * kRows;
                bool const seen = slot < end && visible(rules, position[u], now);
                if (!seen) zero(value[u]);
                float k[8];
                centring.read(key[u], column, k);
                if constexpr (Turns) {
                    Rotary const rotary = Rotary::of(p.shape, rules, p.t);
                    Turn const turn = rotary.back(position[u], now);
                    if (rotary.inEights()) {
                        int const partners = rotary.rotates(column) ? rotary.partner(column) : column;
                        float others[8];
                        centring.read(shuffled(key[u], row * LPR + partners / 8), partners, others);
                        rotary.turnEight(turn, column, k, others);
                    } else if (inRange) {
                        Eight const turned =
                            turnedOneByOne(rotary, Rows<S>{keys, centring}, min(slot, end - 1), turn, column);
#pragma unroll
                        for (int i = 0; i < 8; ++i) k[i] = turned.x[i];
                    }
                }
#pragma unroll
                for (int g = 0; g < GT; ++g) {
                    float dot = 0.f;
#pragma unroll
                    for (int i = 0; i < 8; ++i) dot += query[g][i] * k[i];
#pragma unroll
                    for (int offset = LPR / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
                    logit[u][g] = seen ? dot : -kInfinity;
                    if (scores && column == 0 && slot < end && tile + g < G)
                        logits[(tile + g) * C + slot] = logit[u][g];
                }
            }
#pragma unroll
            for (int g = 0; g < GT; ++g) {
                float top = peak[g];
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) top = fmaxf(top, logit[u][g]);
                float const shrink = expDifference(peak[g], top);
                peak[g] = top;
                mass[g] *= shrink;
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[g][i] *= shrink;
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    float const weight = expDifference(logit[u][g], top);
                    float v[8];
                    unpack(value[u].x, v);
                    mass[g] += weight;
#pragma unroll
                    for (int i = 0; i < 8; ++i) acc[g][i] += value[u].share(weight) * v[i];
                }
            }
        }
        // Merge the rows of a warp, then the warps.
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
                    float const other = __shfl_xor_sync(~0u, acc[g][i], offset);
                    acc[g][i] = acc[g][i] * mineFactor + other * theirFactor;
                }
            }
        }
        __syncthreads();  // the previous tile has been read
        if (row == 0) {
#pragma unroll
            for (int g = 0; g < GT; ++g) {
#pragma unroll
                for (int i = 0; i < 8; ++i) accShared[(warp * GT + g) * kWidth + column + i] = acc[g][i];
                if (column == 0) {
                    peakShared[warp * GT + g] = peak[g];
                    massShared[warp * GT + g] = mass[g];
                }
            }
        }
        __syncthreads();
        for (int x = tid; x < GT * kWidth; x += kThreads) {
            int const g = x / kWidth, d = x % kWidth;
            float top = -kInfinity, sum = 0.f, total = 0.f;
            for (int w = 0; w < kWarps; ++w) top = fmaxf(top, peakShared[w * GT + g]);
            for (int w = 0; w < kWarps; ++w) {
                float const factor = expDifference(peakShared[w * GT + g], top);
                sum += factor * accShared[(w * GT + g) * kWidth + d];
                total += factor * massShared[w * GT + g];
            }
            if (direct) {
                accShared[g * kWidth + d] = sum;  // warp 0's own place: no other thread reads it
            } else if (tile + g < G && d < D) {
                float* const target = partial + (tile + g) * (D + 2);
                target[d] = sum;
                if (d == 0) {
                    target[D] = top;
                    target[D + 1] = total;
                }
            }
        }
    }
    if (!direct) {
        if (p.splits > 1) __threadfence();
        __syncthreads();
        if (p.splits > 1) {
            if (tid == 0) *lastFlag = atomicAdd(p.counters + head, 1u) == static_cast<uint32_t>(p.splits) - 1;
            __syncthreads();
            if (*lastFlag == 0) return;
            if (tid == 0) p.counters[head] = 0;
            __threadfence();
        }
    }
    float const* const parts = direct ? nullptr : p.partials + head * p.splits * G * (D + 2);
    int const stride = G * (D + 2);

    // ---- one warp per head: new token, low-rank term, all weights
    Elements<T> const newKey(p.t.k, p.shape.dtype, head * D), newValue(p.t.v, p.shape.dtype, head * D);
    bool const inMeans = keepsMeans<S>(p.shape);
    Means const means = Means::of(p.t, head, p.shape);
    float* const h = static_cast<float*>(p.t.presentH) + head * R * D;
    float* const z = p.t.presentZ + head * R;
    float const* const logPhi = p.t.logPhiQ + head * G * R;
    for (int g = warp; g < G; g += kWarps) {
        float top = -kInfinity, total = 0.f;
        int const shares = direct ? kWarps : p.splits;
        auto const peakOf = [&](int s) {
            return direct ? peakShared[s * GT + g] : __ldcg(parts + s * stride + g * (D + 2) + D);
        };
        auto const massOf = [&](int s) {
            return direct ? massShared[s * GT + g] : __ldcg(parts + s * stride + g * (D + 2) + D + 1);
        };
        for (int s = lane; s < shares; s += kWarpSize) top = fmaxf(top, peakOf(s));
        top = warpMax(top);
        for (int s = lane; s < shares; s += kWarpSize) total += expDifference(peakOf(s), top) * massOf(s);
        total = warpSum(total);
        float dot = 0.f;
        for (int d = lane; d < D; d += kWarpSize) dot += q[g * D + d] * newKey[d];
        float const newLogit = warpSum(dot) * rules.scale;
        float const exact = fmaxf(top, newLogit);
        float const exactTotal = total * expDifference(top, exact) + __expf(newLogit - exact);
        float low = -kInfinity;
        if (rules.absorb) {
            for (int r = lane; r < R; r += kWarpSize) {
                if (z[r] > 0.f) low = fmaxf(low, logPhi[g * R + r] + __logf(z[r]));
            }
            low = warpMax(low);
        }
        float const all = fmaxf(exact, low);
        float lowTotal = 0.f;
        if (rules.absorb) {
            for (int r = lane; r < R; r += kWarpSize) {
                float const part = z[r] > 0.f ? expDifference(logPhi[g * R + r] + __logf(z[r]), all) : 0.f;
                lowTotal += part;
                float const mean = inMeans ? part * means.scales[r] : part / z[r];
                lowWeight[g * R + r] = z[r] > 0.f ? mean : 0.f;
            }
            lowTotal = warpSum(lowTotal);
        }
        float const norm = 1.f / (exactTotal * __expf(exact - all) + lowTotal);
        if (rules.absorb) {
            for (int r = lane; r < R; r += kWarpSize) lowWeight[g * R + r] *= norm;  // written by the same lane
        }
        if (lane == 0) {
            exactPeak[g] = exact;
            exactScale[g] = 1.f / exactTotal;
            oldPeak[g] = top;
            oldWeight[g] = expDifference(top, all) * norm;
            newWeight[g] = __expf(newLogit - all) * norm;
            newShare[g] = __expf(newLogit - exact) / exactTotal;
        }
    }
    __syncthreads();

    // ---- scores, and which token leaves
    float* const slotScores = p.t.presentScore + head * C;
    int const next = now + 1;  // position of the next query
    Choice choice{~0ull, C, C, 0, 0};
    for (int c = tid; c < C; c += kThreads) {
        int const position = positions[c];
        bool const stays = mayStay(rules, position, next);
        if (position < 0 || !stays) choice.free = min(choice.free, c);
        if (position >= 0 && !stays) {
            choice.leaving = min(choice.leaving, c);
            ++choice.leavers;
        }
        if (scores && position >= 0) {
            float score = 0.f;  // of this step alone, so that adding it to the long-running sum rounds once
            for (int g = 0; g < G; ++g) {
                float const logit = p.logits != nullptr ? __ldcg(logits + g * C + c) : logits[g * C + c];
                score += expDifference(logit, exactPeak[g]) * exactScale[g];
            }
            if (rules.policy == Policy::kH2O) score += slotScores[c] * rules.decay;
            slotScores[c] = score;
            if (stays) {
                unsigned long long const rank = rankOf(rules, position, score, next);
                choice.victim = min(choice.victim, rank << 32 | (0xffffffffu - static_cast<unsigned>(c)));
            }
        }
        choice.stayers += stays;
    }
    choice = blockCombined(choice, scratch);
    // With the new token there is one too many: the lowest score leaves, of equal scores the higher index.
    bool const evict = scores && choice.stayers == C;
    int const victim = evict ? static_cast<int>(0xffffffffu - static_cast<unsigned>(choice.victim)) : C;
    int const target = min(choice.free, victim);  // where the new token goes
    int const leaver = min(choice.leaving, victim);
    bool const absorbs = rules.absorb && !inMeans && leaver < C, moves = inMeans && leaver < C;

    // ---- output; the same pass absorbs the first leaver into H and z
    Elements<T> const psis(p.t.presentPsi, p.shape.dtype, head * C * R);
    for (int r = tid; r < R; r += kThreads) leaverPsi[r] = absorbs ? psis[static_cast<long>(leaver) * R + r] : 0.f;
    __syncthreads();
    if (absorbs) {
        for (int r = tid; r < R; r += kThreads) z[r] += leaverPsi[r];
    }
    for (int tile = 0; tile < G; tile += GT) {
        bool const update = absorbs && tile + GT >= G;
        for (int d = tid; d < D; d += kThreads) {
            float result[GT];
            float const newElement = newValue[d];
            float const leaverValue = update ? values.at(leaver, d) : 0.f;
#pragma unroll
            for (int g = 0; g < GT; ++g) {
                result[g] = 0.f;
                if (tile + g >= G) continue;
                float sum = 0.f;
                if (direct) {
                    sum = accShared[g * kWidth + d];
                } else {
                    for (int s = 0; s < p.splits; ++s) {
                        float const* const part = parts + s * stride + (tile + g) * (D + 2);
                        sum += expDifference(__ldcg(part + D), oldPeak[tile + g]) * __ldcg(part + d);
                    }
                }
                result[g] = sum * oldWeight[tile + g] + newElement * newWeight[tile + g];
            }
            auto const addFeatures = [&](auto const& element) {
#pragma unroll 8
                for (int r = 0; r < R; ++r) {
                    float const x = element(r);
#pragma unroll
                    for (int g = 0; g < GT; ++g) {
                        if (tile + g < G) result[g] += lowWeight[(tile + g) * R + r] * x;
                    }
                }
            };
            if (inMeans) {
                addFeatures([&](int r) { return means.code(r, d); });
            } else if (rules.absorb) {
                addFeatures([&](int r) {
                    float const sum = h[r * D + d];
                    if (update) h[r * D + d] = sum + leaverPsi[r] * leaverValue;
                    return sum;
                });
            }
#pragma unroll
            for (int g = 0; g < GT; ++g) {
                if (tile + g < G) out.set((tile + g) * D + d, result[g]);
            }
        }
    }
    // Several tokens leave at once only if the state was not produced step by step; the sum is the same.
    bool const several = choice.leavers > 1;
    auto const leavesToo = [&](int c) { return positions[c] >= 0 && !mayStay(rules, positions[c], next); };
    if (moves || (absorbs && several)) __syncthreads();  // other threads may still read means, or update H
    if (moves) {
        auto const leaves = [&](int c) { return c == leaver || leavesToo(c); };
        absorbInMeans<kWidth>(means, values, leaver, several ? C : leaver + 1, leaves, now);
    } else if (absorbs && several) {
        for (int c = leaver + 1; c < C; ++c) {
            if (!leavesToo(c)) continue;
            for (int x = tid; x < R * D; x += kThreads) {
                h[x] += psis[static_cast<long>(c) * R + x / D] * values.at(c, x % D);
            }
            for (int r = tid; r < R; r += kThreads) z[r] += psis[static_cast<long>(c) * R + r];
        }
    }
    __syncthreads();

    // ---- slots: free those of the leavers, store the new token
    if (choice.leavers > 0) {
        for (int c = tid; c < C; c += kThreads) {
            if (c != target && leavesToo(c)) positions[c] = -1;
        }
    }
    if (tid == 0 && victim < C && victim != target) positions[victim] = -1;
    if (target == C) return;  // policy full with more tokens than slots: the callers refuse this
    if (warp == 0) keys.store(target, [&](int d) { return centring.centred(newKey[d], d); });
    if (warp == 1) values.store(target, [&](int d) { return newValue[d]; });
    Elements<T> const newPsi(p.t.psiK, p.shape.dtype, head * R);
    if (inMeans) {
        if (warp == 2) storePsi(means.psiOf(target), [&](int r) { return newPsi[r]; }, R);
    } else {
        for (int r = tid; r < R; r += kThreads) psis.set(static_cast<long>(target) * R + r, newPsi[r]);
    }
    if (tid == 0) {
        float score = 0.f;
        if (scores) {
            for (int g = 0; g < G; ++g) score += newShare[g];
        }
        slotScores[target] = score;
        positions[target] = now;
    }
}

}  // namespace less
