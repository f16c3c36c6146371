#include <algorithm>

#include "less_runtime.hpp"

namespace less {
namespace {

void require(bool ok, std::string const& why) {
    if (!ok) throw UsageError(why);
}

// One prompt being continued.
struct Row {
    size_t index;
    Prompt const* prompt;
    Sampler sampler;
    int64_t maxTokens;
    Generation result{};
    bool active = true;
};

// Checks a prompt that is to be followed by `room` more tokens; returns its length including the prefix.
int64_t checkPrompt(Contract const& contract, Prompt const& prompt, RowState const* prefix, int64_t room) {
    require(!prompt.empty(), prefix ? "a continuation is empty: it needs at least one token after its prefix"
                                    : "a prompt is empty: give it at least one token");
    for (int64_t id : prompt) {
        require(
            id >= 0 && id < contract.vocabSize,
            "token ids must lie in 0.." + std::to_string(contract.vocabSize - 1) + ": is this the model's tokenizer?");
    }
    int64_t const length = static_cast<int64_t>(prompt.size()) + (prefix ? prefix->length : 0);
    auto const limit = contract.tokenLimit();
    require(!limit || length + room <= *limit,
            "a prompt of " + std::to_string(length) + " tokens" + (room ? " and its new tokens do" : " does") +
                " not fit into the " + std::to_string(limit.value_or(0)) +
                " that this artifact takes: shorten it, or export with a larger --context or an evicting --policy");
    return length;
}

void start(Session& session, int64_t rows, RowState const* prefix) {
    session.open(rows);
    for (int64_t row = 0; prefix && row < rows; ++row) session.writeRow(row, *prefix);
}

// Feeds the prompts chunk by chunk; `done` is called with each row's logits after its last token.
void feed(Session& session, std::vector<Prompt const*> const& prompts,
          std::function<void(size_t, float const*)> const& done) {
    auto const chunk = static_cast<size_t>(session.contract().chunk);
    size_t longest = 0;
    for (Prompt const* prompt : prompts) longest = std::max(longest, prompt->size());
    std::vector<int64_t> ids;
    std::vector<int32_t> newLength(prompts.size());
    for (size_t begin = 0; begin < longest; begin += chunk) {
        size_t const width = std::min(chunk, longest - begin);
        ids.assign(prompts.size() * width, 0);
        for (size_t row = 0; row < prompts.size(); ++row) {
            Prompt const& prompt = *prompts[row];
            size_t const count = begin < prompt.size() ? std::min(width, prompt.size() - begin) : 0;
            std::copy_n(prompt.begin() + static_cast<ptrdiff_t>(count ? begin : 0), count, &ids[row * width]);
            newLength[row] = static_cast<int32_t>(count);
        }
        Logits const logits = session.step(ids, newLength);
        for (size_t row = 0; row < prompts.size(); ++row) {
            if (newLength[row] == 0 || begin + static_cast<size_t>(newLength[row]) < prompts[row]->size()) continue;
            done(row, logits.row(static_cast<int64_t>(row), logits.tokens > 1 ? newLength[row] - 1 : 0));
        }
    }
}

}  // namespace

std::vector<Generation> generate(Session& session, std::vector<Prompt> const& prompts, SamplingParams const& params,
                                 std::vector<int64_t> const& eosIds, RowState const* prefix,
                                 std::function<void(Token const&)> const& onToken) {
    Contract const& contract = session.contract();
    params.validate();
    if (prefix) session.check(*prefix);
    std::vector<Row> rows;
    for (Prompt const& prompt : prompts) {
        int64_t const length = checkPrompt(contract, prompt, prefix, 1);
        auto const limit = contract.tokenLimit();
        int64_t const room = limit ? *limit - length : params.maxNewTokens;
        rows.push_back({rows.size(), &prompt, Sampler(params, rows.size()), std::min(params.maxNewTokens, room)});
    }
    auto const accept = [&](Row& row, float const* logits) {
        int64_t const id = row.sampler(logits, contract.vocabSize);
        row.result.tokens.push_back(id);
        bool const eos = !params.ignoreEos && std::find(eosIds.begin(), eosIds.end(), id) != eosIds.end();
        bool const full = static_cast<int64_t>(row.result.tokens.size()) >= row.maxTokens;
        row.result.finish = eos ? FinishReason::kEos : FinishReason::kLength;
        row.active = !eos && !full;
        if (onToken) onToken({row.index, id, row.active ? std::nullopt : std::optional(row.result.finish)});
    };
    for (size_t begin = 0; begin < rows.size(); begin += static_cast<size_t>(contract.maxBatch)) {
        size_t const count = std::min(static_cast<size_t>(contract.maxBatch), rows.size() - begin);
        std::vector<Prompt const*> group;
        for (size_t row = 0; row < count; ++row) group.push_back(rows[begin + row].prompt);
        start(session, static_cast<int64_t>(count), prefix);
        feed(session, group, [&](size_t row, float const* logits) { accept(rows[begin + row], logits); });
        std::vector<int64_t> ids(count);
        std::vector<int32_t> newLength(count);
        while (true) {
            for (size_t row = 0; row < count; ++row) {
                ids[row] = rows[begin + row].result.tokens.back();
                newLength[row] = rows[begin + row].active;
            }
            if (std::count(newLength.begin(), newLength.end(), 1) == 0) break;
            Logits const logits = session.step(ids, newLength);
            for (size_t row = 0; row < count; ++row) {
                if (newLength[row]) accept(rows[begin + row], logits.row(static_cast<int64_t>(row)));
            }
        }
    }
    std::vector<Generation> results;
    for (Row& row : rows) results.push_back(std::move(row.result));
    return results;
}

RowState prefill(Session& session, Prompt const& prompt, RowState const* prefix) {
    if (prefix) session.check(*prefix);
    checkPrompt(session.contract(), prompt, prefix, 0);
    start(session, 1, prefix);
    feed(session, {&prompt}, [](size_t, float const*) {});
    return session.readRow(0);
}

}  // namespace less
