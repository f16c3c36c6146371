#include <algorithm>
#include <numeric>

#include "less_runtime.hpp"
#include "plan_runner.hpp"

namespace less {
namespace {

void require(bool ok, std::string const& why) {
    if (!ok) throw BackendError(why);
}

}  // namespace

Session::Session(Contract contract, std::string identity, std::unique_ptr<PlanRunner> runner)
    : contract_(std::move(contract)),
      identity_(std::move(identity)),
      layout_(contract_.layout()),
      runner_(std::move(runner)) {}

Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

void Session::open(int64_t batch) {
    require(batch >= 1 && batch <= contract_.maxBatch,
            "batch " + std::to_string(batch) + " is outside 1.." + std::to_string(contract_.maxBatch) +
                ": use fewer rows at a time or export with a larger --max-batch");
    finish();
    ++revision_;
    lengths_.clear();
    last_.clear();
    runner_->open(batch);
    lengths_.assign(static_cast<size_t>(batch), 0);
    undefined_.assign(static_cast<size_t>(batch), false);
}

void Session::close() {
    finish();
    ++revision_;
    lengths_.clear();
    last_.clear();
    runner_->close();
}

int32_t Session::length(int64_t row) const {
    checkRow(row);
    return lengths_[static_cast<size_t>(row)];
}

Logits Session::step(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength) {
    return step(inputIds, newLength, {0, batch()});
}

Logits Session::step(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength, RowRange rows) {
    advance(inputIds, newLength, rows);
    return latest();
}

Logits Session::stepRows(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength,
                         std::vector<int64_t> const& rows) {
    advanceRows(inputIds, newLength, rows);
    return latest();
}

// All logits of the latest step.
Logits Session::latest() {
    std::vector<int64_t> places(last_.size() * static_cast<size_t>(logitTokens_));
    std::iota(places.begin(), places.end(), int64_t{0});
    try {
        return {runner_->logits(places), logitTokens_, contract_.vocabSize};
    } catch (BackendError const&) {
        finish();
        throw;
    }
}

// Waits for a step in flight. If it has failed, the state of its rows is undefined.
void Session::finish() {
    bool const well = runner_->finish();
    for (int64_t row : latest_) {
        if (!well) undefined_[static_cast<size_t>(row)] = true;
    }
    latest_.clear();
}

std::vector<Choice> Session::choose(std::vector<Sampler*> const& samplers, std::vector<int64_t> const& rows) {
    require(samplers.size() == rows.size() && samplers.size() <= lengths_.size(),
            "choose() takes a row for each sampler, and at most " + std::to_string(batch()) + " samplers");
    for (int64_t row : rows) {
        require(row >= 0 && row < static_cast<int64_t>(last_.size()),
                "the latest step has no logits of a row " + std::to_string(row));
    }
    std::vector<Choice> choices(samplers.size());
    std::vector<Sampler*> asked;
    std::vector<int64_t> places, rest;
    std::vector<size_t> theirs, ours;
    auto const toHost = [&](size_t i) {
        theirs.push_back(i);
        rest.push_back(last_[static_cast<size_t>(rows[i])]);
    };
    for (size_t i = 0; i < samplers.size(); ++i) {
        if (!runner_->samples(*samplers[i])) {
            toHost(i);
            continue;
        }
        ours.push_back(i);
        asked.push_back(samplers[i]);
        places.push_back(last_[static_cast<size_t>(rows[i])]);
    }
    try {
        std::vector<int32_t> picks;
        if (!ours.empty()) picks = runner_->pick(asked, places);
        for (size_t i = 0; i < ours.size(); ++i) {
            choices[ours[i]].token = picks[i];
            if (picks[i] == kLessNoChoice) toHost(ours[i]);  // which says why
        }
        if (theirs.empty()) return choices;
        float const* const logits = runner_->logits(rest);
        for (size_t i = 0; i < theirs.size(); ++i) {
            try {
                choices[theirs[i]].token =
                    (*samplers[theirs[i]])(logits + rest[i] * contract_.vocabSize, contract_.vocabSize);
            } catch (...) {
                choices[theirs[i]].error = std::current_exception();
            }
        }
    } catch (BackendError const&) {  // the device has failed
        finish();
        for (Choice& choice : choices) {
            if (choice.token < 0) choice.error = std::current_exception();
        }
    }
    return choices;
}

void Session::advance(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength, RowRange rows) {
    require(batch() > 0, "the session is not open: call open(batch) first");
    require(rows.first >= 0 && rows.count > 0 && rows.first < batch() && rows.count <= batch() - rows.first,
            "rows must be a range of adjacent rows within 0.." + std::to_string(batch() - 1) + ", not " +
                std::to_string(rows.count) + " from row " + std::to_string(rows.first));
    std::vector<int64_t> chosen(static_cast<size_t>(rows.count));
    std::iota(chosen.begin(), chosen.end(), rows.first);
    run(inputIds, newLength, chosen);
}

void Session::advanceRows(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength,
                          std::vector<int64_t> const& rows) {
    require(batch() > 0, "the session is not open: call open(batch) first");
    std::vector<bool> seen(static_cast<size_t>(batch()), false);
    bool distinct = !rows.empty(), adjacent = true;
    for (size_t i = 0; distinct && i < rows.size(); ++i) {
        distinct = rows[i] >= 0 && rows[i] < batch() && !seen[static_cast<size_t>(rows[i])];
        if (distinct) seen[static_cast<size_t>(rows[i])] = true;
        adjacent &= i == 0 || rows[i] == rows[i - 1] + 1;
    }
    require(distinct, "rows must be distinct rows within 0.." + std::to_string(batch() - 1));
    require(adjacent || rowsByIndex(), "this plan runs adjacent rows in order: build the engine with the plugin");
    run(inputIds, newLength, rows);
}

bool Session::rowsByIndex() const noexcept { return runner_->rowsByIndex(); }

void Session::run(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength,
                  std::vector<int64_t> const& rows) {
    finish();  // it reads its inputs where those of this step will be
    checkDefined(rows);
    auto const count = static_cast<int64_t>(rows.size());
    int64_t const tokens = static_cast<int64_t>(inputIds.size()) / count;
    checkStep(inputIds, tokens, newLength, rows);
    // Padding may contain anything, but the embedding needs valid ids.
    padded_ = inputIds;
    for (int64_t row = 0; row < count; ++row) {
        auto const begin = padded_.begin() + row * tokens;
        std::fill(begin + newLength[static_cast<size_t>(row)], begin + tokens, 0);
    }
    past_.clear();
    for (int64_t row : rows) past_.push_back(lengths_[static_cast<size_t>(row)]);
    last_.clear();
    change(rows, [&] { runner_->step(rows, padded_.data(), tokens, past_.data(), newLength.data()); });
    for (size_t i = 0; i < rows.size(); ++i) {
        lengths_[static_cast<size_t>(rows[i])] += newLength[i];
        if (newLength[i] > 0) latest_.push_back(rows[i]);
    }
    logitTokens_ = contract_.allLogits ? tokens : 1;
    for (int32_t fed : newLength) {
        int64_t const at = contract_.allLogits ? std::max(fed - 1, 0) : 0;
        last_.push_back(static_cast<int64_t>(last_.size()) * logitTokens_ + at);
    }
}

// Runs `action`, which changes the state of `rows`: it is undefined from its start until it has succeeded.
void Session::change(std::vector<int64_t> const& rows, std::function<void()> const& action) {
    ++revision_;
    for (int64_t row : rows) undefined_[static_cast<size_t>(row)] = true;
    action();
    for (int64_t row : rows) undefined_[static_cast<size_t>(row)] = false;
}

void Session::checkDefined(std::vector<int64_t> const& rows) const {
    for (int64_t row : rows) {
        require(!undefined_[static_cast<size_t>(row)], "an earlier step failed, and the state of row " +
                                                           std::to_string(row) +
                                                           " is undefined: reset or overwrite it, or call "
                                                           "open(batch) again");
    }
}

void Session::checkStep(std::vector<int64_t> const& ids, int64_t tokens, std::vector<int32_t> const& newLength,
                        std::vector<int64_t> const& rows) const {
    auto const batch = static_cast<int64_t>(rows.size());
    std::string const size = std::to_string(batch);
    require(tokens > 0 && static_cast<int64_t>(ids.size()) == batch * tokens,
            "input_ids must be [" + size + ", T], not " + std::to_string(ids.size()) + " tokens");
    require(tokens <= contract_.chunk, "a step takes at most " + std::to_string(contract_.chunk) +
                                           " tokens (--chunk), not " + std::to_string(tokens));
    require(newLength.size() == rows.size(),
            "new_length must be [" + size + "], not [" + std::to_string(newLength.size()) + "]");
    int64_t const limit = std::min(contract_.tokenLimit().value_or(kMaxLength), kMaxLength);
    for (int64_t row = 0; row < batch; ++row) {
        int64_t const count = newLength[static_cast<size_t>(row)];
        require(count >= 0 && count <= tokens, "new_length must lie in 0.." + std::to_string(tokens));
        for (int64_t t = 0; t < count; ++t) {
            int64_t const id = ids[static_cast<size_t>(row * tokens + t)];
            require(id >= 0 && id < contract_.vocabSize,
                    "token ids must lie in 0.." + std::to_string(contract_.vocabSize - 1));
        }
        int64_t const longest = lengths_[static_cast<size_t>(rows[static_cast<size_t>(row)])] + count;
        require(longest <= limit, "this artifact takes sequences of at most " + std::to_string(limit) +
                                      " tokens, not " + std::to_string(longest) +
                                      ": shorten the text, or export with a larger --context or an evicting --policy");
    }
}

void Session::checkRow(int64_t row) const {
    require(batch() > 0, "the session is not open: call open(batch) first");
    require(row >= 0 && row < batch(), "row " + std::to_string(row) + " is outside 0.." + std::to_string(batch() - 1));
}

void Session::check(RowState const& state) const {
    auto const differ = [](std::string const& a, std::string const& b) { return !a.empty() && !b.empty() && a != b; };
    bool const foreign = differ(state.identity, identity_) || differ(state.layout, layout_);
    require(!foreign && static_cast<int64_t>(state.data.size()) == contract_.stateBytes(),
            "this state belongs to another export (model, kernels or contract differ): prefill again");
    require(state.length >= 0 && state.length <= kMaxLength,
            "this state is damaged (length " + std::to_string(state.length) + "): prefill again");
}

void Session::resetRow(int64_t row) {
    checkRow(row);
    finish();
    change({row}, [&] { runner_->resetRow(row); });
    lengths_[static_cast<size_t>(row)] = 0;
}

void Session::copyRow(int64_t from, int64_t to) {
    checkRow(from);
    checkRow(to);
    finish();
    checkDefined({from});
    if (from == to) return;
    change({to}, [&] { runner_->copyRow(from, to); });
    lengths_[static_cast<size_t>(to)] = lengths_[static_cast<size_t>(from)];
}

RowState Session::readRow(int64_t row) {
    checkRow(row);
    finish();
    checkDefined({row});
    RowState state{length(row), std::vector<std::byte>(static_cast<size_t>(contract_.stateBytes())), identity_,
                   layout_};
    runner_->readRow(row, state.data.data());
    return state;
}

void Session::writeRow(int64_t row, RowState const& state) {
    checkRow(row);
    check(state);
    finish();
    change({row}, [&] { runner_->writeRow(row, state.data.data()); });
    lengths_[static_cast<size_t>(row)] = static_cast<int32_t>(state.length);
}

}  // namespace less
