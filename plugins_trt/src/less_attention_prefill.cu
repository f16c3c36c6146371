// Prefills one chunk with up to five kernels, one after another.
#include <algorithm>

#include "settle.cuh"
#include "steps.h"

namespace less {
namespace {

size_t headsOf(AttentionShape const& s) { return static_cast<size_t>(s.batch) * s.kvHeads; }

struct Workspace {
    size_t statistics, gained, fates, freed;  // aligned bytes of each part; there are two statistics
    explicit Workspace(AttentionShape const& s)
        : statistics(aligned(static_cast<size_t>(s.batch) * s.queryHeads * s.chunk * sizeof(float))),
          gained(aligned(static_cast<size_t>(s.batch) * s.queryHeads * (s.slots + s.chunk) * sizeof(float))),
          fates(aligned(headsOf(s) * (s.slots + s.chunk) * sizeof(int))),
          freed(aligned(headsOf(s) * s.slots * sizeof(int))) {}
    size_t total() const { return 2 * statistics + gained + fates + freed; }
};

unsigned tilesOf(int n) { return static_cast<unsigned>((n + kTileRows - 1) / kTileRows); }

template <class T, int W>
cudaError_t runAttention(Mode mode, PrefillParams const& params, cudaStream_t stream) {
    AttentionShape const& s = params.shape;
    auto const batch = static_cast<unsigned>(s.batch);
    dim3 const queries(tilesOf(s.chunk), s.queryHeads, batch),
        keys(tilesOf(s.slots) + tilesOf(s.chunk), s.queryHeads, batch);
    cudaError_t const status = run(mode, attendKernel<T, W>, queries, sizeof(AttendShared<T, W>), params, stream);
    if (status != cudaSuccess || !keepsScores(params.rules)) return status;
    return run(mode, scoreKernel<T, W>, keys, sizeof(ScoreShared<T, W>), params, stream);
}

template <class T>
cudaError_t attention(Mode mode, PrefillParams const& params, cudaStream_t stream) {
    int const width = params.shape.headDim;
    if (width <= 64) return runAttention<T, 64>(mode, params, stream);
#ifdef LESS_TRIAL
    return cudaErrorNotSupported;
#else
    if (width <= 96) return runAttention<T, 96>(mode, params, stream);
    if (width <= 128) return runAttention<T, 128>(mode, params, stream);
    return runAttention<T, 256>(mode, params, stream);
#endif
}

template <class T>
cudaError_t runPrefill(Mode mode, PrefillParams const& params, cudaStream_t stream) {
    AttentionShape const& s = params.shape;
    auto const heads = static_cast<unsigned>(s.kvHeads), batch = static_cast<unsigned>(s.batch);
    cudaError_t status = attention<T>(mode, params, stream);
    if (status != cudaSuccess) return status;
    size_t const scratch = (kBins + 2) * sizeof(int);
    status = run(mode, selectKernel, dim3(heads, batch), scratch, params, stream);
    if (status != cudaSuccess) return status;
    if (params.rules.absorb) {
        int const lanes = kThreads / (s.headDim / 8);
        dim3 const grid((s.rank + kFeatures - 1) / kFeatures, heads, batch);
        status = run(mode, absorbKernel<T>, grid, lanes * (s.headDim + 1) * sizeof(float), params, stream);
        if (status != cudaSuccess) return status;
    }
    return run(mode, placeKernel<T>, dim3(tilesOf(s.chunk), heads, batch), 0, params, stream);
}

}  // namespace

size_t prefillWorkspaceBytes(AttentionShape const& shape, AttentionRules const&) { return Workspace(shape).total(); }

cudaError_t prefill(Mode mode, AttentionShape const& shape, AttentionRules const& rules,
                    AttentionTensors const& tensors, void* workspace, cudaStream_t stream) {
    Workspace const bytes(shape);
    char* memory = static_cast<char*>(workspace);
    auto const take = [&](size_t size) {
        char* const part = memory;
        if (memory != nullptr) memory += size;
        return part;
    };
    PrefillParams params{rules, shape, tensors, nullptr, nullptr, nullptr, nullptr, nullptr};
    params.peaks = reinterpret_cast<float*>(take(bytes.statistics));
    params.scales = reinterpret_cast<float*>(take(bytes.statistics));
    params.gained = reinterpret_cast<float*>(take(bytes.gained));
    params.fates = reinterpret_cast<int*>(take(bytes.fates));
    params.freed = reinterpret_cast<int*>(take(bytes.freed));
    return withType(shape.dtype, [&](auto type) { return runPrefill<decltype(type)>(mode, params, stream); });
}

}  // namespace less
