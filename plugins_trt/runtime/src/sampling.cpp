#include <algorithm>
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
    require(maxNewTokens >= 1, "max_new_tokens must be at least 1, not " + std::to_string(maxNewTokens));
}

int64_t chooseToken(float const* logits, int64_t vocab, SamplingParams const& params, double uniform) {
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
    if (params.temperature == 0) return best;

    std::vector<double> weight(static_cast<size_t>(vocab));
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = std::exp((double{logits[i]} - peak) / params.temperature);
    std::vector<size_t> tokens(weight.size());
    std::iota(tokens.begin(), tokens.end(), size_t{0});
    auto const heavier = [&weight](size_t a, size_t b) {
        return weight[a] != weight[b] ? weight[a] > weight[b] : a < b;  // ties: lower ids first
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

Sampler::Sampler(SamplingParams const& params, uint64_t row) : params_(params) {
    params_.validate();
    std::random_device device;
    uint64_t const seed = params_.seed ? *params_.seed : uint64_t{device()} << 32 | device();
    auto const low = [](uint64_t x) { return static_cast<uint32_t>(x); };
    std::seed_seq seeds{low(seed), low(seed >> 32), low(row), low(row >> 32)};
    random_.seed(seeds);
}

int64_t Sampler::operator()(float const* logits, int64_t vocab) {
    // The distributions of the standard library differ between implementations; the generators do not.
    double const uniform = params_.temperature > 0 ? static_cast<double>(random_() >> 11) * 0x1p-53 : 0;
    return chooseToken(logits, vocab, params_, uniform);
}

}  // namespace less
