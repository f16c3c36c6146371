#include <algorithm>

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
    ++revision_;
    lengths_.clear();
    runner_->open(batch);
    lengths_.assign(static_cast<size_t>(batch), 0);
    undefined_.assign(static_cast<size_t>(batch), false);
}

void Session::close() {
    ++revision_;
    lengths_.clear();
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
    require(batch() > 0, "the session is not open: call open(batch) first");
    require(rows.first >= 0 && rows.count > 0 && rows.first < batch() && rows.count <= batch() - rows.first,
            "rows must be a range of adjacent rows within 0.." + std::to_string(batch() - 1) + ", not " +
                std::to_string(rows.count) + " from row " + std::to_string(rows.first));
    checkDefined(rows);
    int64_t const tokens = static_cast<int64_t>(inputIds.size()) / rows.count;
    checkStep(inputIds, tokens, newLength, rows);
    // Padding may contain anything, but the embedding needs valid ids.
    padded_ = inputIds;
    for (int64_t row = 0; row < rows.count; ++row) {
        auto const begin = padded_.begin() + row * tokens;
        std::fill(begin + newLength[static_cast<size_t>(row)], begin + tokens, 0);
    }
    float const* logits = nullptr;
    int32_t* const past = lengths_.data() + rows.first;
    change(rows, [&] { logits = runner_->step(rows, padded_.data(), tokens, past, newLength.data()); });
    for (size_t row = 0; row < newLength.size(); ++row) past[row] += newLength[row];
    return {logits, contract_.allLogits ? tokens : 1, contract_.vocabSize};
}

// Runs `action`, which changes the state of `rows`: it is undefined from its start until it has succeeded.
void Session::change(RowRange rows, std::function<void()> const& action) {
    ++revision_;
    auto const begin = undefined_.begin() + rows.first;
    std::fill(begin, begin + rows.count, true);
    action();
    std::fill(begin, begin + rows.count, false);
}

void Session::checkDefined(RowRange rows) const {
    for (int64_t row = rows.first; row < rows.first + rows.count; ++row) {
        require(!undefined_[static_cast<size_t>(row)], "an earlier step failed, and the state of row " +
                                                           std::to_string(row) +
                                                           " is undefined: reset or overwrite it, or call "
                                                           "open(batch) again");
    }
}

void Session::checkStep(std::vector<int64_t> const& ids, int64_t tokens, std::vector<int32_t> const& newLength,
                        RowRange range) const {
    std::string const rows = std::to_string(range.count);
    require(tokens > 0 && static_cast<int64_t>(ids.size()) == range.count * tokens,
            "input_ids must be [" + rows + ", T], not " + std::to_string(ids.size()) + " tokens");
    require(tokens <= contract_.chunk, "a step takes at most " + std::to_string(contract_.chunk) +
                                           " tokens (--chunk), not " + std::to_string(tokens));
    require(static_cast<int64_t>(newLength.size()) == range.count,
            "new_length must be [" + rows + "], not [" + std::to_string(newLength.size()) + "]");
    int64_t const limit = std::min(contract_.tokenLimit().value_or(kMaxLength), kMaxLength);
    for (int64_t row = 0; row < range.count; ++row) {
        int64_t const count = newLength[static_cast<size_t>(row)];
        require(count >= 0 && count <= tokens, "new_length must lie in 0.." + std::to_string(tokens));
        for (int64_t t = 0; t < count; ++t) {
            int64_t const id = ids[static_cast<size_t>(row * tokens + t)];
            require(id >= 0 && id < contract_.vocabSize,
                    "token ids must lie in 0.." + std::to_string(contract_.vocabSize - 1));
        }
        int64_t const longest = lengths_[static_cast<size_t>(range.first + row)] + count;
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
    change({row, 1}, [&] { runner_->resetRow(row); });
    lengths_[static_cast<size_t>(row)] = 0;
}

void Session::copyRow(int64_t from, int64_t to) {
    checkRow(from);
    checkRow(to);
    checkDefined({from, 1});
    if (from == to) return;
    change({to, 1}, [&] { runner_->copyRow(from, to); });
    lengths_[static_cast<size_t>(to)] = lengths_[static_cast<size_t>(from)];
}

RowState Session::readRow(int64_t row) {
    checkRow(row);
    checkDefined({row, 1});
    RowState state{length(row), std::vector<std::byte>(static_cast<size_t>(contract_.stateBytes())), identity_,
                   layout_};
    runner_->readRow(row, state.data.data());
    return state;
}

void Session::writeRow(int64_t row, RowState const& state) {
    checkRow(row);
    check(state);
    change({row, 1}, [&] { runner_->writeRow(row, state.data.data()); });
    lengths_[static_cast<size_t>(row)] = static_cast<int32_t>(state.length);
}

}  // namespace less
