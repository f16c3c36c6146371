// Chooses tokens on the device: the interface of libless_sampler.so, in C.
#pragma once

#include <cstdint>

// How the token of one row is chosen. The rules are those of less_export/runtime/sampling.py.
struct LessSampleRow {
    double uniform;      // in [0, 1); what the choice depends on
    double temperature;  // 0: the highest logit, whatever the cuts below say
    double topP;         // in (0, 1]; 1: off
    double minP;         // in [0, 1]; 0: off
    int32_t topK;        // 0: off
    int32_t logits;      // which row of the logits
    int32_t history;     // which row of the histories, or -1: no penalties
    float repetition, presence, frequency;
};

constexpr int64_t kLessMaxVocab = 1 << 19;     // largest vocabulary
constexpr uint32_t kLessPrompt = 0x80000000u;  // of an entry of a history: the token is in the prompt
constexpr int32_t kLessNoChoice = -1;          // a pick: the highest logit is NaN or infinite
constexpr int32_t kLessSampleInterface = 1;    // changes with this file

extern "C" {
#pragma GCC visibility push(default)

// kLessSampleInterface of the library.
int32_t lessSampleInterface() noexcept;

// Why the kernel cannot run with this machine's driver: the reason, or nullptr, also without a driver.
char const* lessSampleWhyUnusable() noexcept;

// Chooses a token for each of `count` rows, in stream order. All pointers but `stream` are on the device.
//
// logits     [*, vocab]; rows that are not asked for are not read
// rows       [count]
// histories  [*, vocab]: how often each token was chosen, and kLessPrompt where the prompt has it; the choice is added.
//            No two rows share one. nullptr if no row has penalties.
// picks      [count]: token ids, or kLessNoChoice
//
// Returns a cudaError_t.
int32_t lessSample(float const* logits, int64_t vocab, LessSampleRow const* rows, int32_t count, uint32_t* histories,
                   int32_t* picks, void* stream) noexcept;

#pragma GCC visibility pop
}
