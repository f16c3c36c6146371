// A session on the host machine, and the oracle of its engine.
#pragma once

#include "contracts.hpp"
#include "host_machine.hpp"
#include "plan_runner.hpp"

namespace less::testing {

struct Rig {
    explicit Rig(Contract c = twoLayers(), bool useGraphs = true) : contract(std::move(c)), graphs(useGraphs) {}
    Contract contract;
    bool graphs;
    Machine machine;

    Session session(std::function<void(HostPlan&)> const& change = {}, SampleKernel sample = {}) {
        auto plan = std::make_unique<HostPlan>(contract, machine);
        if (change) change(*plan);
        auto device = std::make_unique<HostDevice>(machine);
        return Session(contract, "this one",
                       std::make_unique<PlanRunner>(contract, std::move(device), std::move(plan), machine.inPlace,
                                                    graphs, machine.byIndex, std::move(sample)));
    }
};

// One sequence, token by token.
class Oracle {
 public:
    explicit Oracle(Contract const& contract) : contract_(contract) {
        for (StateTensor const& t : contract.state()) {
            state_.emplace_back(static_cast<size_t>(t.rowBytes), static_cast<unsigned char>(t.empty));
        }
    }
    void feed(int64_t token) {
        hash_ = 0;
        for (size_t i = 0; i < state_.size(); ++i) {
            for (size_t j = 0; j < state_[i].size(); ++j) {
                state_[i][j] = mixed(state_[i][j], token, length_, i, j);
            }
            hash_ += hashed(state_[i].data(), state_[i].size(), i);
        }
        ++length_;
    }
    int64_t length() const { return length_; }
    float logitOf(int64_t token) const { return logit(hash_, token); }
    int64_t best() const {
        int64_t top = 0;
        for (int64_t v = 1; v < contract_.vocabSize; ++v) top = logitOf(v) > logitOf(top) ? v : top;
        return top;
    }
    bool agrees(float const* logits) const {
        for (int64_t v = 0; v < contract_.vocabSize; ++v) {
            if (logits[v] != logitOf(v)) return false;
        }
        return true;
    }

 private:
    Contract contract_;
    std::vector<std::vector<unsigned char>> state_;
    uint64_t hash_ = 0;
    int64_t length_ = 0;
};

inline std::vector<int64_t> greedy(Contract const& contract, Prompt const& prompt, size_t count) {
    Oracle oracle(contract);
    for (int64_t id : prompt) oracle.feed(id);
    std::vector<int64_t> tokens;
    while (tokens.size() < count) {
        tokens.push_back(oracle.best());
        oracle.feed(tokens.back());
    }
    return tokens;
}

inline Prompt ramp(int64_t length, int64_t from = 1) {
    Prompt prompt;
    for (int64_t i = 0; i < length; ++i) prompt.push_back((from + 3 * i) % 50);
    return prompt;
}

}  // namespace less::testing
