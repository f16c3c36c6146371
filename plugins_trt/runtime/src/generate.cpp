#include <algorithm>

#include "less_runtime.hpp"
#include "sequence.hpp"

namespace less {
namespace {

void start(Session& session, int64_t rows, RowState const* prefix) {
    session.open(rows);
    for (int64_t row = 0; prefix && row < rows; ++row) session.writeRow(row, *prefix);
}

// Feeds the prompts chunk by chunk; `done` is called with the rows whose last token was fed.
void feed(Session& session, std::vector<Prompt const*> const& prompts,
          std::function<void(std::vector<int64_t> const&)> const& done) {
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
        session.advance(ids, newLength, {0, session.batch()});
        std::vector<int64_t> ended;
        for (size_t row = 0; row < prompts.size(); ++row) {
            if (newLength[row] == 0 || begin + static_cast<size_t>(newLength[row]) < prompts[row]->size()) continue;
            ended.push_back(static_cast<int64_t>(row));
        }
        if (!ended.empty()) done(ended);
    }
}

}  // namespace

std::vector<Generation> generate(Session& session, std::vector<Prompt> const& prompts, SamplingParams const& params,
                                 std::vector<int64_t> const& eosIds, RowState const* prefix,
                                 std::function<void(Token const&)> const& onToken) {
    Contract const& contract = session.contract();
    checkParams(contract, params);
    if (prefix) session.check(*prefix);
    std::vector<Sequence> rows;
    for (Prompt const& prompt : prompts) rows.emplace_back(contract, prompt, params, eosIds, rows.size(), prefix);
    // A token for each of these rows of the group that begins with row `begin`.
    auto const accept = [&](size_t begin, std::vector<int64_t> const& group) {
        std::vector<Sampler*> samplers;
        for (int64_t row : group) samplers.push_back(&rows[begin + static_cast<size_t>(row)].sampler());
        std::vector<Choice> const choices = session.choose(samplers, group);
        for (size_t i = 0; i < group.size(); ++i) {
            size_t const row = begin + static_cast<size_t>(group[i]);
            rows[row].accept(choices[i]);
            if (onToken) onToken({row, rows[row].tokens.back(), rows[row].finish});
        }
    };
    for (size_t begin = 0; begin < rows.size(); begin += static_cast<size_t>(contract.maxBatch)) {
        size_t const count = std::min(static_cast<size_t>(contract.maxBatch), rows.size() - begin);
        std::vector<Prompt const*> group;
        for (size_t row = 0; row < count; ++row) group.push_back(&prompts[begin + row]);
        start(session, static_cast<int64_t>(count), prefix);
        feed(session, group, [&](std::vector<int64_t> const& ended) { accept(begin, ended); });
        std::vector<int64_t> ids(count);
        std::vector<int32_t> newLength(count);
        while (true) {
            for (size_t row = 0; row < count; ++row) {
                ids[row] = rows[begin + row].tokens.back();
                newLength[row] = rows[begin + row].active();
            }
            if (std::count(newLength.begin(), newLength.end(), 1) == 0) break;
            session.advance(ids, newLength, {0, session.batch()});
            std::vector<int64_t> active;
            for (size_t row = 0; row < count; ++row) {
                if (newLength[row]) active.push_back(static_cast<int64_t>(row));
            }
            accept(begin, active);
        }
    }
    std::vector<Generation> results;
    for (Sequence& row : rows) results.push_back({std::move(row.tokens), *row.finish});
    return results;
}

RowState prefill(Session& session, Prompt const& prompt, RowState const* prefix) {
    if (prefix) session.check(*prefix);
    checkPrompt(session.contract(), prompt, prefix, 0);
    start(session, 1, prefix);
    feed(session, {&prompt}, [](std::vector<int64_t> const&) {});
    return session.readRow(0);
}

}  // namespace less
