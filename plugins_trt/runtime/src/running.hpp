// What a scheduler holds of its requests, and what happens to them.
#pragma once

#include <algorithm>
#include <chrono>

#include "sequence.hpp"

namespace less {

// A request on its way.
struct Running {
    uint64_t id;
    Prompt prompt;
    std::shared_ptr<RowState const> prefix;  // until the prompt was fed
    bool keepState;
    Sequence sequence;
    size_t fed = 0;  // tokens of the prompt that the model has seen
    std::optional<int64_t> row = {};
};
using Ref = std::shared_ptr<Running>;

// A prompt that is fed in `row`, for the first of `sequences`, which has that row, and for its twins.
struct Prefill {
    int64_t row;
    std::vector<Ref> sequences;

    Running& leader() const { return *sequences.front(); }
    bool isFor(Running const& other) const {
        return other.prefix == leader().prefix && other.prompt == leader().prompt;
    }
    bool has(Ref const& sequence) const {
        return std::find(sequences.begin(), sequences.end(), sequence) != sequences.end();
    }
    // Goes on without one of the sequences, the next one in the place of the first; false if none is left.
    bool drop(Ref const& sequence) {
        size_t const fed = leader().fed;
        sequences.erase(std::find(sequences.begin(), sequences.end(), sequence));
        sequence->row.reset();
        if (sequences.empty()) return false;
        leader().row = row;
        leader().fed = fed;
        return true;
    }
};

// An event of a sequence that the caller has not seen.
struct Outcome {
    Ref sequence;
    std::optional<int64_t> token = {};
    std::optional<FinishReason> finish = {};
    std::optional<std::string> error = {};
    std::shared_ptr<RowState const> state = {};
};
using Outcomes = std::vector<Outcome>;

inline Outcome failed(Ref sequence, std::string const& error) {
    Outcome outcome{std::move(sequence)};
    outcome.error = error;
    return outcome;
}

// What `action` threw, if it did.
template <class F>
std::optional<std::string> errorOf(F const& action) {
    try {
        action();
        return std::nullopt;
    } catch (std::exception const& error) {
        return error.what();
    }
}

// Adds the seconds of its life to a figure.
class Clock {
 public:
    explicit Clock(double& seconds) : seconds_(seconds) {}
    ~Clock() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count(); }

 private:
    double& seconds_;
    std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace less
