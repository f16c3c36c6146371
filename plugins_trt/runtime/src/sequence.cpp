#include "sequence.hpp"

#include <algorithm>

namespace less {
namespace {

void require(bool ok, std::string const& why) {
    if (!ok) throw UsageError(why);
}

bool contains(std::vector<int64_t> const& ids, int64_t id) {
    return std::find(ids.begin(), ids.end(), id) != ids.end();
}

int64_t mostTokens(Contract const& contract, SamplingParams const& params, int64_t length) {
    auto const limit = contract.tokenLimit();
    return limit ? std::min(params.maxNewTokens, *limit - length) : params.maxNewTokens;
}

}  // namespace

char const* nameOf(FinishReason reason) noexcept {
    return reason == FinishReason::kEos ? "eos" : reason == FinishReason::kStop ? "stop" : "length";
}

void checkParams(Contract const& contract, SamplingParams const& params) {
    params.validate();
    std::vector<int64_t> ids = params.stopTokenIds;
    for (auto const& [id, shift] : params.logitBias) ids.push_back(id);
    for (int64_t id : ids) {
        require(id >= 0 && id < contract.vocabSize,
                "token ids of logit_bias and stop_token_ids must lie in 0.." + std::to_string(contract.vocabSize - 1));
    }
}

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

Sequence::Sequence(Contract const& contract, Prompt const& prompt, SamplingParams const& params,
                   std::vector<int64_t> const& eosIds, uint64_t index, RowState const* prefix)
    : sampler_(params, index, prompt),
      maxTokens_(mostTokens(contract, params, checkPrompt(contract, prompt, prefix, 1))),
      stopIds_(params.stopTokenIds) {
    if (!params.ignoreEos) eosIds_ = eosIds;
}

void Sequence::accept(Choice const& choice) {
    if (choice.error) std::rethrow_exception(choice.error);
    int64_t const id = choice.token;
    tokens.push_back(id);
    if (contains(eosIds_, id)) {
        finish = FinishReason::kEos;
    } else if (contains(stopIds_, id)) {
        finish = FinishReason::kStop;
    } else if (static_cast<int64_t>(tokens.size()) >= maxTokens_) {
        finish = FinishReason::kLength;
    }
}

}  // namespace less
