// Prefills one chunk: a short one with two kernels, a longer one with up to eight, one after another.
#include <algorithm>
#include <type_traits>

#include "attend.cuh"
#include "score.cuh"
#include "settle.cuh"
#include "short_chunk.cuh"
#include "steps.h"

namespace less {
namespace {

size_t headsOf(AttentionShape const& s) { return static_cast<size_t>(s.batch) * s.kvHeads; }

// Whether tokens of the chunk are absorbed as int8 slots would hold them.
bool measures(AttentionShape const& s, AttentionRules const& rules) {
    return s.slotType == SlotType::kInt8 && rules.absorb != 0;
}

// Numbers that represent an element of a rotated query.
size_t partsOf(DType dtype) {
    switch (dtype) {
        case DType::kFloat16:
            return kParts<__half>;
        case DType::kBFloat16:
            return kParts<__nv_bfloat16>;
        default:
            return kParts<float>;
    }
}

size_t turnedBytes(AttentionShape const& s) {
    size_t const item = s.dtype == DType::kFloat32 ? sizeof(float) : sizeof(__half);
    return partsOf(s.dtype) * s.batch * s.queryHeads * s.chunk * s.headDim * item;
}

struct Workspace {
    // Aligned bytes of each part; there are two statistics.
    size_t statistics, logits, gained, fates, freed, rounding, psis, psiSums, turned;
    Workspace(AttentionShape const& s, AttentionRules const& rules)
        : statistics(isShort(s, rules) ? 0 : aligned(sizeof(float) * s.batch * s.queryHeads * s.chunk)),
          logits(isShort(s, rules) ? aligned(s.batch * KeptLogits::bytesOfRow(s, rules)) : 0),
          gained(aligned(static_cast<size_t>(s.batch) * s.queryHeads * (s.slots + s.chunk) * sizeof(float))),
          fates(aligned(headsOf(s) * (s.slots + s.chunk) * sizeof(int))),
          freed(aligned(headsOf(s) * s.slots * sizeof(int))),
          rounding(measures(s, rules) ? aligned(headsOf(s) * s.chunk * sizeof(float)) : 0),
          psis(keepsMeans(s) ? aligned(headsOf(s) * s.chunk * s.rank) : 0),
          psiSums(keepsMeans(s) ? aligned(headsOf(s) * (s.slots + s.chunk) * sizeof(float)) : 0),
          turned(rules.maxDistance > 0 ? aligned(turnedBytes(s)) : 0) {}
    size_t total() const {
        return 2 * statistics + logits + gained + fates + freed + rounding + psis + psiSums + turned;
    }
};

// Calls f with the width of a tile, which is D rounded up.
template <class F>
cudaError_t withWidth(int D, F&& f) {
    if (D <= 64) return f(std::integral_constant<int, 64>{});
#ifdef LESS_TRIAL
    return cudaErrorNotSupported;
#else
    if (D <= 96) return f(std::integral_constant<int, 96>{});
    if (D <= 128) return f(std::integral_constant<int, 128>{});
    return f(std::integral_constant<int, 256>{});
#endif
}

// The scale of the logits makes up for kReduction.
template <class T>
PrefillParams forTurned(PrefillParams params) {
    if (turns(params)) params.rules.scale /= kReduction<T> * kReduction<T>;
    return params;
}

// Kernels with and without a largest distance are one, unless heads are so wide that what turns takes registers which
// the others need.

// ---- short chunks

template <class T, int W, bool Turns>
cudaError_t runShortAttention(Mode mode, PrefillParams const& params, cudaStream_t stream) {
    dim3 const heads(1, params.shape.queryHeads, params.shape.batch);
    return run(mode, shortAttendKernel<T, W, Turns>, heads, sizeof(ShortShared<T, W>), params, stream);
}

template <class T, class S>
cudaError_t runShort(Mode mode, PrefillParams const& params, cudaStream_t stream) {
    cudaError_t const status = withWidth(params.shape.headDim, [&](auto width) {
        constexpr int W = decltype(width)::value;
        if constexpr (W > 128) {
            if (!turns(params)) return runShortAttention<T, W, false>(mode, params, stream);
        }
        return runShortAttention<T, W, true>(mode, forTurned<T>(params), stream);
    });
    if (status != cudaSuccess) return status;
    dim3 const heads(params.shape.kvHeads, params.shape.batch);
    return run(mode, shortSettleKernel<T, S>, heads, shortSettleBytes(params.shape.headDim), params, stream);
}

// ---- long chunks

template <class T, int W>
auto attendKernelOf(PrefillParams const& params) {
    if constexpr (W > 128) {
        if (!turns(params)) return attendKernel<T, W, false>;
    }
    return attendKernel<T, W, true>;
}

template <class T, int W>
cudaError_t runAttention(Mode mode, PrefillParams const& params, cudaStream_t stream) {
    AttentionShape const& s = params.shape;
    auto const batch = static_cast<unsigned>(s.batch);
    dim3 const queries(tilesOf(s.chunk), s.queryHeads, batch),
        keys(tilesOf(s.slots) + tilesOf(s.chunk), s.queryHeads, batch);
    cudaError_t const status =
        run(mode, attendKernelOf<T, W>(params), queries, sizeof(AttendShared<T, W>), params, stream);
    if (status != cudaSuccess || !keepsScores(params.rules)) return status;
    size_t const bytes = ScoreShared<T, W>::bytes(coded(params) || turns(params));
    return run(mode, scoreKernel<T, W>, keys, bytes, params, stream);
}

template <class T>
cudaError_t attention(Mode mode, PrefillParams const& params, cudaStream_t stream) {
    if (turns(params)) {
        dim3 const grid(tilesOf(params.shape.chunk), params.shape.queryHeads, params.shape.batch);
        cudaError_t const status = run(mode, turnKernel<T>, grid, 0, params, stream);
        if (status != cudaSuccess) return status;
    }
    return withWidth(params.shape.headDim, [&](auto width) {
        return runAttention<T, decltype(width)::value>(mode, forTurned<T>(params), stream);
    });
}

template <class T, class S>
cudaError_t runLong(Mode mode, PrefillParams const& params, cudaStream_t stream) {
    AttentionShape const& s = params.shape;
    auto const heads = static_cast<unsigned>(s.kvHeads), batch = static_cast<unsigned>(s.batch);
    dim3 const tokens(tilesOf(s.chunk), heads, batch);
    cudaError_t status = attention<T>(mode, params, stream);
    if (status != cudaSuccess) return status;
    status = run(mode, selectKernel, dim3(heads, batch), kSelectInts * sizeof(int), params, stream);
    if (status != cudaSuccess) return status;
    if (measures(s, params.rules)) {
        status = run(mode, measureKernel<T>, tokens, 0, params, stream);
        if (status != cudaSuccess) return status;
    }
    if (keepsMeans(s)) {
        dim3 const all(tilesOf(s.slots) + tilesOf(s.chunk), heads, batch);
        status = run(mode, psiKernel, all, 0, params, stream);
        if (status != cudaSuccess) return status;
    }
    if (params.rules.absorb) {
        dim3 const grid((s.rank + kFeatures - 1) / kFeatures, heads, batch);
        status = run(mode, absorbKernel<T, S>, grid, absorbBytes(s.headDim), params, stream);
        if (status != cudaSuccess) return status;
    }
    return run(mode, placeKernel<T, S>, tokens, 0, params, stream);
}

template <class T, class S>
cudaError_t runPrefill(Mode mode, PrefillParams const& params, cudaStream_t stream) {
    return isShort(params.shape, params.rules) ? runShort<T, S>(mode, params, stream)
                                               : runLong<T, S>(mode, params, stream);
}

}  // namespace

size_t prefillWorkspaceBytes(AttentionShape const& shape, AttentionRules const& rules) {
    AttentionShape shorter = shape;  // the longest short chunk
    shorter.chunk = std::min(shape.chunk, kTileRows);
    while (shorter.chunk > 1 && !isShort(shorter, rules)) --shorter.chunk;
    return std::max(Workspace(shape, rules).total(), Workspace(shorter, rules).total());
}

cudaError_t prefill(Mode mode, AttentionShape const& shape, AttentionRules const& rules,
                    AttentionTensors const& tensors, void* workspace, cudaStream_t stream) {
    Workspace const bytes(shape, rules);
    char* memory = static_cast<char*>(workspace);
    auto const take = [&](size_t size) {
        char* const part = memory;
        if (memory != nullptr) memory += size;
        return part;
    };
    PrefillParams params{};
    params.rules = rules;
    params.shape = shape;
    params.t = tensors;
    params.peaks = reinterpret_cast<float*>(take(bytes.statistics));
    params.scales = reinterpret_cast<float*>(take(bytes.statistics));
    params.logits = reinterpret_cast<float*>(take(bytes.logits));
    params.gained = reinterpret_cast<float*>(take(bytes.gained));
    params.fates = reinterpret_cast<int*>(take(bytes.fates));
    params.freed = reinterpret_cast<int*>(take(bytes.freed));
    params.rounding = reinterpret_cast<float*>(take(bytes.rounding));
    params.psis = reinterpret_cast<int8_t*>(take(bytes.psis));
    params.psiSums = reinterpret_cast<float*>(take(bytes.psiSums));
    params.turned = take(bytes.turned);
    return withType(shape.dtype, [&](auto type) {
        using T = decltype(type);
        return coded(params) ? runPrefill<T, int8_t>(mode, params, stream) : runPrefill<T, T>(mode, params, stream);
    });
}

}  // namespace less
