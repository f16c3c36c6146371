// What a step of a layer works on: its numbers, and the tensors of one row and KV head.
//
// Sizes: B rows, Hk KV heads, G query heads of each, T tokens of a chunk, C slots, R features, D head_dim.
#pragma once

#include <cstdint>

namespace less {

// The codes of less_export.less.policies.
enum class Policy : int64_t { h2o = 0, tova = 1, sink = 2, window = 3, full = 4 };

// Attributes and sizes of a LessAttention node.
struct Layer {
    float scale = 1;
    Policy policy = Policy::full;
    int heavy = 0, recent = 0;
    int window = 0;  // 0: none
    bool absorb = false;
    float decay = 1;
    int max_distance = 0;  // 0: q and k come rotated
    bool int8 = false;     // slots hold codes and scales
    bool state16 = false;  // so do h and psi

    int group = 1;
    int slots = 0, head_dim = 0, rank = 0;
    int rotated = 0;  // channels that the table of angles turns

    // Whether a token's share of attention counts when slots are given, and adds up.
    bool scored() const { return policy == Policy::h2o || policy == Policy::tova; }
    bool accumulates() const { return policy == Policy::h2o; }
};

// The slots and the low-rank state of a KV head. Keys, values and psi are float, or int8 with scales; h is H [R,D], or
// two int8 planes [R,2D] of the means with scales.
struct State {
    void *key, *value, *psi;
    float* score;
    int32_t* position;  // -1: empty
    void* h;
    float* z;
    float *key_scale, *value_scale, *h_scale;
};

// The tokens of a chunk, as one row and KV head gets them; of those from `count` on, nothing is read.
struct Tokens {
    float const *q, *log_phi;  // [G,T,D], [G,T,R]
    float const *k, *v, *psi;  // [T,D], [T,D], [T,R]
    float* out;                // [G,T,D]
    int chunk, count;          // T, and how many of them are valid
    int32_t past_length;
    float const *key_mean, *key_std;  // [D], of int8 slots
    float const* angles;              // [distances, rotated]: cosines, then sines
};

}  // namespace less
