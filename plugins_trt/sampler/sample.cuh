// Chooses a token by a row of logits, as less_export/runtime/sampling.py does: one block a row, no sort.
//
// A weight, exp((logit - peak) / temperature), is a whole number of units of 2^-44. Sums of whole numbers are exact in
// any order, so a choice depends on the row alone, and on no launch. The host adds floating-point numbers: it can
// choose another token only where its rounding, or half a unit a token, moves the edge between two tokens across the
// drawn number, top_p or min_p.
//
// Tokens are ranked by their logits, and by their ids where these are equal. What ends a cut, and what is drawn, is the
// first token at which a running sum reaches a number: `placeOf` finds it, four bits of a key a round.
#pragma once

#include "device.cuh"
#include "sample.h"

namespace less {

constexpr int kSampleThreads = 512;
constexpr int kSampleWarps = kSampleThreads / kWarpSize;
constexpr int kListed = 4096;  // most tokens that are kept in shared memory
constexpr int kFlight = 8;     // loads of a thread that are on their way at once: a block has to hide their latency

constexpr int kDigitBits = 4;
constexpr int kDigits = 1 << kDigitBits;
static_assert(2 * kDigits == kWarpSize && kSampleWarps <= kWarpSize, "see addUp");

using Units = unsigned long long;
constexpr int kUnitBits = 44;
constexpr Units kPeakUnits = Units{1} << kUnitBits;  // the sum over a vocabulary fits in 64 bits

struct SampleParams {
    float const* logits;
    LessSampleRow const* rows;
    uint32_t* histories;
    int32_t* picks;
    int vocab;
};

struct Listed {
    float logit;
    int id;
};

struct SampleShared {
    Units sums[kDigits][kSampleWarps];
    Units totals[kDigits];
    Units highest[kSampleWarps];
    int listed;
    Listed list[kListed];
};

// ---- numbers

// Sorts like the logit; both zeros are equal.
__device__ __forceinline__ uint32_t keyOf(float logit) {
    uint32_t const bits = __float_as_uint(__fadd_rn(logit, 0.f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logitOf(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The units of 2^exponent, for exponents up to 0. With operations that round the same everywhere.
__device__ __forceinline__ Units unitsOf(double exponent) {
    if (!(exponent > -(kUnitBits + 2))) return 0;
    double const whole = std::rint(exponent), x = (exponent - whole) * 0x1.62e42fefa39efp-1;  // ln 2
    double power = 1;
#pragma unroll
    for (int n = 12; n > 0; --n) power = std::fma(power * x, 1. / n, 1.);  // exp(x) by its series: exact to a rounding
    int const dropped = 52 - kUnitBits - static_cast<int>(whole);
    return (static_cast<Units>(power * 0x1p52) + (Units{1} << (dropped - 1))) >> dropped;
}

// ---- one row

struct SampleRow {
    LessSampleRow how;
    float const* logits;
    uint32_t* history;  // nullptr: no penalties
    int vocab;

    // The logit of a token after penalties, in the operations of the host.
    __device__ __forceinline__ float logit(int id) const {
        float x = logits[id];
        if (history == nullptr) return x;
        uint32_t const entry = history[id];
        if (entry == 0) return x;
        x = x > 0.f ? __fdiv_rn(x, how.repetition) : __fmul_rn(x, how.repetition);
        float const times = static_cast<float>(entry & ~kLessPrompt);
        if (times == 0.f) return x;
        return __fsub_rn(x, __fadd_rn(how.presence, __fmul_rn(how.frequency, times)));
    }
};

// The tokens of a row: all of them, or those in a list.
struct Tokens {
    SampleRow const& row;
    Listed const* list;  // nullptr: all
    int count;
};

// Calls f(id, logit) for a thread's share of tokens, but those whose ids are not `wanted`, which are not read.
template <class Wanted, class F>
__device__ __forceinline__ void visit(Tokens const& tokens, Wanted const& wanted, F const& f) {
    if (tokens.list != nullptr) {
        for (int n = threadIdx.x; n < tokens.count; n += kSampleThreads) {
            if (wanted(tokens.list[n].id)) f(tokens.list[n].id, tokens.list[n].logit);
        }
        return;
    }
    for (int first = threadIdx.x; first < tokens.count; first += kFlight * kSampleThreads) {
        float logits[kFlight] = {};
#pragma unroll
        for (int i = 0; i < kFlight; ++i) {
            int const id = first + i * kSampleThreads;
            if (id < tokens.count && wanted(id)) logits[i] = tokens.row.logit(id);
        }
#pragma unroll
        for (int i = 0; i < kFlight; ++i) {
            int const id = first + i * kSampleThreads;
            if (id < tokens.count && wanted(id)) f(id, logits[i]);
        }
    }
}

template <class F>
__device__ __forceinline__ void visit(Tokens const& tokens, F const& f) {
    visit(tokens, [](int) { return true; }, f);
}

// The weights of a row.
struct Weights {
    double peak, scale;
    Units lightest;  // lighter ones count as nothing

    __device__ __forceinline__ Units operator()(float logit) const {
        double const below = static_cast<double>(logit) - peak;
        Units const units = below == 0 ? kPeakUnits : unitsOf(below * scale);
        return units >= lightest ? units : 0;
    }
};

// ---- the block

// Sums of each of a thread's numbers over the block, the same in every thread.
__device__ __forceinline__ void addUp(Units (&sums)[kDigits], SampleShared& shared) {
    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    // Lanes exchange halves of what they have left to add, until lanes d and d + 16 have the sum of number d.
#pragma unroll
    for (int half = kDigits / 2; half > 0; half /= 2) {
        bool const upper = lane & half;
#pragma unroll
        for (int d = 0; d < half; ++d) {
            Units const given = upper ? sums[d] : sums[d + half], kept = upper ? sums[d + half] : sums[d];
            sums[d] = kept + __shfl_xor_sync(~0u, given, half);
        }
    }
    Units const sum = sums[0] + __shfl_xor_sync(~0u, sums[0], kDigits);
    if (lane < kDigits) shared.sums[lane][warp] = sum;
    __syncthreads();
    for (int d = warp; d < kDigits; d += kSampleWarps) {
        Units const total = warpSum(lane < kSampleWarps ? shared.sums[d][lane] : 0);
        if (lane == 0) shared.totals[d] = total;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDigits; ++d) sums[d] = shared.totals[d];
}

// The sum of `amountOf` the logits of tokens.
template <class Amount>
__device__ __forceinline__ Units sumOver(Tokens const& tokens, Amount const& amountOf, SampleShared& shared) {
    Units sums[kDigits] = {};
    visit(tokens, [&](int, float logit) { sums[0] += amountOf(logit); });
    addUp(sums, shared);
    return sums[0];
}

// Orders of tokens: by key, the highest first.
struct ByLogit {
    static constexpr int kBits = 32;
    static constexpr bool kOfId = false;
    __device__ __forceinline__ static uint32_t key(int, float logit) { return keyOf(logit); }
};
struct ById {  // the lowest id first
    static constexpr int kBits = 20;
    static constexpr bool kOfId = true;
    static constexpr uint32_t kLast = (1u << kBits) - 1;
    __device__ __forceinline__ static uint32_t key(int id, float) { return kLast - static_cast<uint32_t>(id); }
    __device__ __forceinline__ static int id(uint32_t key) { return static_cast<int>(kLast - key); }
};
static_assert(kLessMaxVocab <= ById::kLast, "ids have to fit");

// Where a running sum from the highest key down reaches a number.
struct Place {
    uint32_t key;
    Units above;  // the sum over higher keys
};

// The place at which the running sum of `amountOf` the logits of tokens, in an order, reaches `wantedOf(total)`, which
// is in 1..total.
template <class Order, class Amount, class Wanted>
__device__ __forceinline__ Place placeOf(Tokens const& tokens, Amount const& amountOf, Wanted const& wantedOf,
                                         SampleShared& shared) {
    Place place{0, 0};
    Units wanted = 0;
    for (int shift = Order::kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
        Units sums[kDigits] = {};
        auto const ruledOut = [&](uint32_t key) { return ((key ^ place.key) >> shift) >= kDigits; };
        auto const add = [&](int id, float logit) {
            uint32_t const key = Order::key(id, logit);
            if (ruledOut(key)) return;
            Units const amount = amountOf(logit);
            uint32_t const digit = key >> shift & (kDigits - 1);
#pragma unroll
            for (int d = 0; d < kDigits; ++d) sums[d] += d == static_cast<int>(digit) ? amount : 0;
        };
        visit(tokens, [&](int id) { return !Order::kOfId || !ruledOut(Order::key(id, 0.f)); }, add);
        addUp(sums, shared);
        if (wanted == 0) {
            Units total = 0;
#pragma unroll
            for (int d = 0; d < kDigits; ++d) total += sums[d];
            wanted = wantedOf(total);
        }
        int digit = 0;
#pragma unroll
        for (int d = kDigits - 1; d > 0; --d) {
            if (digit > 0) continue;
            if (place.above + sums[d] >= wanted) {
                digit = d;
            } else {
                place.above += sums[d];
            }
        }
        place.key |= static_cast<uint32_t>(digit) << shift;
    }
    return place;
}

// The tokens whose keys reach a floor, in any order; all tokens if these are too many for the list. What was in the
// list has been read: sums end with a barrier.
__device__ __forceinline__ Tokens reaching(Tokens const all, uint32_t floor, SampleShared& shared) {
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
    visit(all, [&](int id, float logit) {
        if (keyOf(logit) < floor) return;
        int const place = atomicAdd(&shared.listed, 1);
        if (place < kListed) shared.list[place] = {logit, id};
    });
    __syncthreads();
    return shared.listed <= kListed ? Tokens{all.row, shared.list, shared.listed} : all;
}

// The key of the highest logit and, below it, how far its lowest id is from the end: the highest number of a block.
// `own` is that of a thread's tokens.
__device__ __forceinline__ Units highestOf(SampleRow const& row, Units& own, SampleShared& shared) {
    int const warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    own = 0;
    visit(Tokens{row, nullptr, row.vocab}, [&](int id, float logit) {
        uint32_t const key = std::isnan(logit) ? ~0u : keyOf(logit);
        own = max(own, Units{key} << 32 | static_cast<uint32_t>(row.vocab - id));
    });
    Units highest = own;
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        highest = max(highest, __shfl_xor_sync(~0u, highest, offset));
    }
    if (lane == 0) shared.highest[warp] = highest;
    __syncthreads();
    for (int w = 0; w < kSampleWarps; ++w) highest = max(highest, shared.highest[w]);
    return highest;
}

// ---- the choice

// The key of the `count`-th highest logit, and how many are above it.
__device__ __forceinline__ Place placeOfHighest(Tokens const& tokens, int count, SampleShared& shared) {
    auto const each = [](float) { return Units{1}; };
    return placeOf<ByLogit>(tokens, each, [=](Units) { return static_cast<Units>(count); }, shared);
}

// A floor that the `count` highest logits reach: each thread's highest is listed, and `count` of those reach it.
__device__ __forceinline__ uint32_t floorOf(SampleRow const& row, Units own, int count, SampleShared& shared) {
    int const threads = min(row.vocab, kSampleThreads), tid = threadIdx.x;
    if (count > threads) return 0;
    if (tid < threads) shared.list[tid] = {logitOf(static_cast<uint32_t>(own >> 32)), tid};
    __syncthreads();
    return placeOfHighest(Tokens{row, shared.list, threads}, count, shared).key;
}

// The key of the logit of a weight in units, or a little less.
__device__ __forceinline__ uint32_t floorOfWeight(double units, double peak, double temperature) {
    double const logit = peak + temperature * (std::log(units) - kUnitBits * 0x1.62e42fefa39efp-1 - 1e-9);
    float const rounded = static_cast<float>(logit);
    return rounded > -kInfinity ? keyOf(rounded) - 2 : 0;
}

// The number of units that the drawn number falls on, from 1.
__device__ __forceinline__ Units drawn(double uniform, Units total) {
    return min(static_cast<Units>(uniform * static_cast<double>(total)), total - 1) + 1;
}

// Draws in the order of ids, which is that of the host without top_k and top_p.
__device__ __forceinline__ int drawById(Tokens const& tokens, Weights const& weights, SampleShared& shared) {
    double const uniform = tokens.row.how.uniform;
    auto const wanted = [=](Units total) { return drawn(uniform, total); };
    return ById::id(placeOf<ById>(tokens, weights, wanted, shared).key);
}

// Draws from the highest tokens whose weights sum to `total`, in the order of their ranks.
__device__ __forceinline__ int drawByRank(Tokens const& tokens, Weights const& weights, Units total,
                                          SampleShared& shared) {
    Units const number = drawn(tokens.row.how.uniform, total);
    Place const place = placeOf<ByLogit>(tokens, weights, [=](Units) { return number; }, shared);
    Units const nth = (number - place.above - 1) / weights(logitOf(place.key)) + 1;  // of equal logits
    auto const equal = [&](float logit) { return static_cast<Units>(keyOf(logit) == place.key); };
    return ById::id(placeOf<ById>(tokens, equal, [=](Units) { return nth; }, shared).key);
}

// The weight of the `count` highest tokens.
__device__ __forceinline__ Units weightOfHighest(Tokens const& tokens, Weights const& weights, int count,
                                                 SampleShared& shared) {
    Place const last = placeOfHighest(tokens, count, shared);
    auto const higher = [&](float logit) { return keyOf(logit) > last.key ? weights(logit) : 0; };
    return sumOver(tokens, higher, shared) + (count - last.above) * weights(logitOf(last.key));
}

// The weight of the fewest highest tokens that have a share of `total`.
__device__ __forceinline__ Units weightOfShare(Tokens const& tokens, Weights const& weights, Units total, double share,
                                               SampleShared& shared) {
    Units const wanted = max(min(static_cast<Units>(std::ceil(share * static_cast<double>(total))), total), Units{1});
    Place const last = placeOf<ByLogit>(tokens, weights, [=](Units) { return wanted; }, shared);
    Units const each = weights(logitOf(last.key));
    return last.above + (wanted - last.above + each - 1) / each * each;
}

// `peak` is the highest logit, `own` the highest number of this thread.
__device__ int choose(SampleRow const& row, float peak, Units own, SampleShared& shared) {
    LessSampleRow const& how = row.how;
    bool const cut = how.topK > 0 && how.topK < row.vocab;
    Tokens const all{row, nullptr, row.vocab};
    Weights const every{peak, 0x1.71547652b82fep+0 / how.temperature, 0};  // 1 / ln 2
    Weights heavy = every;
    heavy.lightest = static_cast<Units>(std::ceil(how.minP * static_cast<double>(kPeakUnits)));
    if (!cut && how.topP == 1) {
        if (how.minP == 0) return drawById(all, every, shared);
        double const least = static_cast<double>(heavy.lightest) - 0.75;  // what is rounded up to it is not lighter
        return drawById(reaching(all, floorOfWeight(least, peak, how.temperature), shared), heavy, shared);
    }
    uint32_t floor = 0;
    Units total = 0;
    if (cut) {
        floor = floorOf(row, own, how.topK, shared);
    } else {
        total = sumOver(all, every, shared);
        // All tokens lighter than this together weigh less than 1 - top_p.
        double const tail = (1 - how.topP) * static_cast<double>(total) / row.vocab - 1;
        if (tail > 1) floor = floorOfWeight(tail, peak, how.temperature);
    }
    Tokens const tokens = floor > 0 ? reaching(all, floor, shared) : all;
    if (cut) total = weightOfHighest(tokens, every, how.topK, shared);
    if (how.topP < 1) total = weightOfShare(tokens, every, total, how.topP, shared);
    if (how.minP > 0) total = min(total, sumOver(tokens, heavy, shared));
    return drawByRank(tokens, every, total, shared);
}

// grid (rows)
static __global__ void __launch_bounds__(kSampleThreads) sampleKernel(SampleParams const p) {
    LESS_SHARED_MEMORY(raw);
    SampleShared& shared = *reinterpret_cast<SampleShared*>(raw);
    LessSampleRow const how = p.rows[blockIdx.x];
    SampleRow const row{how, p.logits + static_cast<long>(how.logits) * p.vocab,
                        how.history < 0 ? nullptr : p.histories + static_cast<long>(how.history) * p.vocab, p.vocab};
    Units own = 0;
    Units const highest = highestOf(row, own, shared);
    float const peak = logitOf(static_cast<uint32_t>(highest >> 32));
    int pick = kLessNoChoice;
    if (std::isfinite(peak)) {
        pick =
            how.temperature == 0 ? row.vocab - static_cast<int>(highest & 0xffffffffu) : choose(row, peak, own, shared);
    }
    if (threadIdx.x != 0) return;
    p.picks[blockIdx.x] = pick;
    // The others have read the history: the last sum, or the highest number, came after a barrier.
    if (row.history != nullptr && pick >= 0) ++row.history[pick];
}

}  // namespace less
