// One prompt on its way: how it is continued, what it has so far, and what ends it.
#pragma once

#include "less_runtime.hpp"

namespace less {

// Throws UsageError if a parameter is out of range, also for this vocabulary.
void checkParams(Contract const& contract, SamplingParams const& params);

// Checks a prompt that is to be followed by `room` more tokens; returns its length including the prefix. Throws
// UsageError.
int64_t checkPrompt(Contract const& contract, Prompt const& prompt, RowState const* prefix, int64_t room);

class Sequence {
 public:
    // Checks the prompt, as checkPrompt() does; the parameters and the prefix have been checked. `index` chooses the
    // random numbers of a seed.
    Sequence(Contract const& contract, Prompt const& prompt, SamplingParams const& params,
             std::vector<int64_t> const& eosIds, uint64_t index, RowState const* prefix);

    // What chooses the tokens that follow.
    Sampler& sampler() noexcept { return sampler_; }
    // Adds the token that follows. Throws the error in its place.
    void accept(Choice const& choice);

    bool active() const noexcept { return !finish; }  // whether it wants another token

    std::vector<int64_t> tokens;         // the new ones so far
    std::optional<FinishReason> finish;  // why it has ended

 private:
    Sampler sampler_;
    int64_t maxTokens_;
    std::vector<int64_t> eosIds_, stopIds_;
};

}  // namespace less
