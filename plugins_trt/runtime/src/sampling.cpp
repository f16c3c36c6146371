#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>

#include "less_runtime.hpp"

namespace less {
namespace {

std::string number(double value) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%g", value);
    return buffer;
}

void require(bool ok, std::string const& why) {
    if (!ok) throw UsageError(why);
}

}  // namespace

void SamplingParams::validate() const {
    require(std::isfinite(temperature) && temperature >= 0,
            "temperature must be 0 (greedy) or more, not " + number(temperature));
    require(topK >= 0, "top_k must be 0 (off) or a whole number, not " + std::to_string(topK));
    require(topP > 0 && topP <= 1, "top_p must lie in (0, 1], not " + number(topP));
    require(minP >= 0 && minP <= 1, "min_p must lie in [0, 1], not " + number(minP));
    require(repetitionPenalty >= 0.01 && repetitionPenalty <= 100,
            "repetition_penalty must lie in 0.01..100 (1 is off), not " + number(repetitionPenalty));
    auto const isShift = [](double x) { return std::abs(x) <= 1e30; };  // of a logit: float32 holds the result
    require(isShift(presencePenalty), "presence_penalty must be a number (0 is off), not " + number(presencePenalty));
    require(isShift(frequencyPenalty),
            "frequency_penalty must be a number (0 is off), not " + number(frequencyPenalty));
    for (auto const& [id, shift] : logitBias) {
        require(isShift(shift), "logit_bias must map token ids (whole numbers) to numbers");
    }
    require(maxNewTokens >= 1, "max_new_tokens must be at least 1, not " + std::to_string(maxNewTokens));
}

namespace {

// The highest logit and its lowest id; throws BackendError if it is no number.
std::pair<float, int64_t> highest(float const* logits, int64_t vocab) {
    float peak = -std::numeric_limits<float>::infinity();
    int64_t best = 0;
    for (int64_t i = 0; i < vocab; ++i) {
        if (logits[i] > peak || std::isnan(logits[i])) {
            peak = logits[i];
            best = i;
        }
        if (std::isnan(peak)) break;
    }
    if (!std::isfinite(peak)) {
        throw BackendError("the model produced " + number(peak) + " logits: check its weights and its dtype");
    }
    return {peak, best};
}

}  // namespace

int64_t chooseToken(float const* logits, int64_t vocab, SamplingParams const& params, double uniform) {
    auto const [peak, best] = highest(logits, vocab);
    if (params.temperature == 0) return best;

    std::vector<double> weight(static_cast<size_t>(vocab));
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = std::exp((double{logits[i]} - peak) / params.temperature);
    std::vector<size_t> tokens(weight.size());
    std::iota(tokens.begin(), tokens.end(), size_t{0});
    auto const heavier = [logits](size_t a, size_t b) {
        return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;  // ties: lower ids first
    };
    if (params.topK > 0 && params.topK < vocab) {
        auto const end = tokens.begin() + params.topK;
        std::partial_sort(tokens.begin(), end, tokens.end(), heavier);
        tokens.erase(end, tokens.end());
    }
    if (params.topP < 1) {
        double total = 0;
        for (size_t token : tokens) total += weight[token];
        // All tokens lighter than this together weigh less than 1 - top_p. Dropping them avoids sorting the vocabulary.
        double const minimum = total * (1 - params.topP) / static_cast<double>(tokens.size());
        tokens.erase(std::remove_if(tokens.begin(), tokens.end(), [&](size_t t) { return weight[t] < minimum; }),
                     tokens.end());
        std::sort(tokens.begin(), tokens.end(), heavier);
        double cumulative = 0;
        size_t count = 0;
        while (count < tokens.size() && cumulative < params.topP * total) cumulative += weight[tokens[count++]];
        tokens.resize(std::max<size_t>(count, 1));
    }
    if (params.minP > 0) {
        double heaviest = 0;
        for (size_t token : tokens) heaviest = std::max(heaviest, weight[token]);
        auto const unlikely = [&](size_t t) { return weight[t] < params.minP * heaviest; };
        tokens.erase(std::remove_if(tokens.begin(), tokens.end(), unlikely), tokens.end());
    }
    double total = 0;
    for (size_t token : tokens) total += weight[token];
    // uniform is at most 1 - 2^-53, so the product is below the total and the token has a positive weight.
    double const target = uniform * total;
    double cumulative = 0;
    for (size_t token : tokens) {
        cumulative += weight[token];
        if (cumulative > target) return static_cast<int64_t>(token);
    }
    return static_cast<int64_t>(tokens.front());
}

Sampler::Sampler(SamplingParams const& params, uint64_t row, std::vector<int64_t> const& prompt)
    : params_(params),
      penalises_(params.repetitionPenalty != 1 || params.presencePenalty != 0 || params.frequencyPenalty != 0) {
    params_.validate();
    if (params_.repetitionPenalty != 1) prompt_.insert(prompt.begin(), prompt.end());
    std::random_device device;
    uint64_t const seed = params_.seed ? *params_.seed : uint64_t{device()} << 32 | device();
    auto const low = [](uint64_t x) { return static_cast<uint32_t>(x); };
    std::seed_seq seeds{low(seed), low(seed >> 32), low(row), low(row >> 32)};
    random_.seed(seeds);
}

uint64_t Sampler::Identity::next() {
    static std::atomic<uint64_t> latest{0};
    return ++latest;
}

double Sampler::drawn() {
    // The distributions of the standard library differ between implementations; the generators do not.
    return params_.temperature > 0 ? static_cast<double>(random_() >> 11) * 0x1p-53 : 0;
}

void Sampler::chosen(int64_t token) {
    ++count_;
    if (penalises_) ++counts_[token];
}

int64_t Sampler::operator()(float const* logits, int64_t vocab) {
    double const uniform = drawn();
    if (!penalises_ && params_.logitBias.empty()) {
        int64_t const token = chooseToken(logits, vocab, params_, uniform);
        chosen(token);
        return token;
    }
    highest(logits, vocab);
    std::vector<float> adjusted(logits, logits + vocab);
    adjust(adjusted);
    if (!std::isfinite(*std::max_element(adjusted.begin(), adjusted.end()))) {
        throw UsageError("logit_bias leaves no token to choose");
    }
    int64_t const token = chooseToken(adjusted.data(), vocab, params_, uniform);
    chosen(token);
    return token;
}

// In float32, as in Python.
void Sampler::adjust(std::vector<float>& logits) const {
    auto const at = [&](int64_t id) -> float& { return logits.at(static_cast<size_t>(id)); };
    if (params_.repetitionPenalty != 1) {
        std::set<int64_t> seen = prompt_;
        for (auto const& [id, count] : counts_) seen.insert(id);
        auto const penalty = static_cast<float>(params_.repetitionPenalty);
        for (int64_t id : seen) at(id) = at(id) > 0 ? at(id) / penalty : at(id) * penalty;
    }
    auto const presence = static_cast<float>(params_.presencePenalty);
    auto const frequency = static_cast<float>(params_.frequencyPenalty);
    for (auto const& [id, count] : counts_) {
        float const often = frequency * static_cast<float>(count);
        at(id) -= presence + often;
    }
    for (auto const& [id, shift] : params_.logitBias) at(id) += static_cast<float>(shift);
}

}  // namespace less
