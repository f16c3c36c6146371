// LESS attention (arXiv 2402.09398) on CUDA: one step of one layer, with the state updated in place.
//
// Depends on CUDA only; src/less_attention_plugin.h builds the TensorRT plugin on it. The semantics are those of
// less_export/less/reference.py, the reference of the operator less::LessAttention, version 2.
// Shapes: B rows, Hq query heads, Hk KV heads (Hq is a multiple of Hk), T tokens of the chunk, C slots, R features,
// D head_dim. All tensors are dense and row-major.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace less {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// What slots hold keys and values in: the compute dtype, or int8 codes with a float32 scale per token and head. The
// values are those of the node's attribute slot_bits. The rule of rounding is that of less_export/less/int8.py.
enum class SlotType : int32_t { kModel = 0, kInt8 = 8 };

// What the low-rank state keeps of what a feature absorbed: a sum in float32, or a mean in 16 bits, with psi of the
// slots in 8 bits. The values are those of the node's attribute state_bits. The rule of rounding is that of
// less_export/less/state16.py.
enum class StateType : int32_t { kMeans16 = 16, kSums32 = 32 };

// Decides which tokens keep a slot; the values are those of the operator's attribute.
enum class Policy : int32_t { kH2O = 0, kTova = 1, kSink = 2, kWindow = 3, kFull = 4 };

// The attributes of the operator.
struct AttentionRules {
    float scale;     // multiplies q.k
    Policy policy;   // which tokens keep a slot
    int32_t heavy;   // slots for heavy hitters (sink: for the first positions, never evicted)
    int32_t recent;  // newest tokens, never evicted
    int32_t window;  // > 0: a query sees its newest `window` positions, itself included
    int32_t absorb;  // 1: tokens that lose their slot are added to H and z; 0: there is no low-rank term
    float decay;     // what a token leaves of the scores before it (policy h2o), 0 < decay <= 1; 1: they never fade
    int32_t maxDistance = 0;  // > 0: q and k come unrotated, and slots are seen at this distance at most, see rotary
};

struct AttentionShape {
    DType dtype;  // of q, k, v, psi, out, and of slots that are not int8
    int32_t batch, queryHeads, kvHeads, chunk, headDim, slots, rank;
    SlotType slotType;
    int32_t distances = 0, rotary = 0;         // P and D_rot, the sizes of the table with maxDistance
    StateType stateType = StateType::kSums32;  // kMeans16 goes with int8 slots and layers that absorb
    int32_t stateRows = 0;                     // N, with rows
};

// Inputs in the operator's order, then outputs. T below is the dtype of the shape, S that of the slots. present* must
// either be the same memory as past* (in place) or not overlap it. The scales of slots, keyMean and keyStd exist with
// int8 slots only, pastHScale with a state of 16 bits only, rotary with maxDistance only, rows as the caller likes.
struct AttentionTensors {
    void const* q;                // T   [B,Hq,T,D], rotary embedding applied unless there is maxDistance, as in k
    void const* k;                // T   [B,Hk,T,D]
    void const* v;                // T   [B,Hk,T,D]
    float const* logPhiQ;         // f32 [B,Hq,T,R], -inf allowed
    void const* psiK;             // T   [B,Hk,T,R], >= 0
    void const* pastKey;          // S   [B,Hk,C,D]
    void const* pastValue;        // S   [B,Hk,C,D]
    void const* pastPsi;          // T   [B,Hk,C,R], int8 codes with a state of 16 bits
    float const* pastScore;       // f32 [B,Hk,C]
    int32_t const* pastPosition;  // i32 [B,Hk,C], -1 where the slot is empty
    void const* pastH;            // f32 [B,Hk,R,D] sums, or int8 [B,Hk,R,2D]: D high bytes of means, then D low ones
    float const* pastZ;           // f32 [B,Hk,R]
    float const* pastKeyScale;    // f32 [B,Hk,C]
    float const* pastValueScale;  // f32 [B,Hk,C]
    float const* pastHScale;      // f32 [B,Hk,R], what a unit of a mean stands for
    int32_t const* pastLength;    // i32 [B], tokens seen before the chunk
    int32_t const* newLength;     // i32 [B], valid tokens of the chunk, 0..T
    float const* keyMean;         // f32 [Hk,D], keys are centred with these before they are rounded
    float const* keyStd;          // f32 [Hk,D], > 0
    float const* rotary;          // f32 [P,D_rot], with maxDistance; see below
    int32_t const* rows;          // i32 [B], rows of the state by index; nullptr: row b of the step has row b
    void* out;                    // T   [B,Hq,T,D], zero where t >= newLength
    void* presentKey;             // shaped like its past
    void* presentValue;
    void* presentPsi;
    float* presentScore;
    int32_t* presentPosition;
    void* presentH;
    float* presentZ;
    float* presentKeyScale;
    float* presentValueScale;
    float* presentHScale;
};

// The table of a layer with maxDistance: row d holds the cosines of the angles of distance d (D_rot / 2), then the
// sines; in row 0 they are 1 and 0. D_rot is even and at most D, P is larger than maxDistance and at least T. Channel
// i < D_rot / 2 of q and k forms a pair with channel i + D_rot / 2; the channels from D_rot on are not rotated. Queries
// and tokens of the chunk are rotated by their offset t in it, a slot's key by -min(past_length - position,
// maxDistance), in float32. A token takes its slot unrotated.

// With `rows`, the state tensors have N rows ([N,Hk,C,D] and so on), all others B, and row b of the step reads and
// writes row rows[b] of the state; the other rows are neither read nor written, except that all N are copied if
// present* is not past*. Callers ensure that the indices are distinct and within 0..N-1, which nothing checks: rows of
// the step that share a row of the state leave it undefined, and an index out of range counts as N-1, so that no memory
// outside of the tensors is touched. TensorRT times plugins on inputs of any content.
//
// A row with newLength 0 is parked: its out is zero, and nothing reads or writes its tokens and its row of the state.
// Its index may be any, also that of another row of the step.

// Size of the counters in device memory, with which a decode step that splits its slots over several blocks counts
// the blocks that are done. They must be zero before the first launch; every launch leaves them zero. Launches that may
// overlap must not share them.
constexpr size_t kCounterBytes = 4096;

// The reason why this layer cannot run (a static string), or nullptr. `chunk` and `batch` are ignored.
char const* whyUnsupported(AttentionShape const& shape, AttentionRules const& rules) noexcept;

// Bytes of scratch memory sufficient for every launch up to this batch and chunk. Needs no device.
size_t workspaceBytes(AttentionShape const& shape, AttentionRules const& rules) noexcept;

// Loads onto the current device the kernels that `enqueue` will launch, so that `enqueue` can be captured.
cudaError_t prepare(AttentionShape const& shape, AttentionRules const& rules) noexcept;

// One step on `stream`: chunk = 1 decodes, chunk > 1 prefills. No allocation, no synchronisation.
// `workspace` has workspaceBytes(shape, rules) bytes, aligned to 256, with any contents.
cudaError_t enqueue(AttentionShape const& shape, AttentionRules const& rules, AttentionTensors const& tensors,
                    void* workspace, uint32_t* counters, cudaStream_t stream) noexcept;

}  // namespace less
