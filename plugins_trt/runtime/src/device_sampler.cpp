#include "device_sampler.hpp"

#include <algorithm>
#include <utility>

namespace less {

DeviceSampler::DeviceSampler(Device& device, SampleKernel kernel, int64_t vocab, int64_t rows)
    : device_(device),
      kernel_(std::move(kernel)),
      vocab_(vocab),
      asked_(device, rows * sizeof(LessSampleRow)),
      hostAsked_(device, rows * sizeof(LessSampleRow), true),
      picks_(device, rows * sizeof(int32_t)),
      hostPicks_(device, rows * sizeof(int32_t), true),
      histories_(static_cast<size_t>(rows)) {}

bool DeviceSampler::suits(Sampler const& sampler) {
    return sampler.params_.logitBias.empty() && (!sampler.penalises_ || hasHistories());
}

// Whether there is memory for histories, which is tried once.
bool DeviceSampler::hasHistories() {
    if (triedHistories_) return memory_.get() != nullptr;
    triedHistories_ = true;
    try {
        memory_ = Memory(device_, histories_.size() * static_cast<size_t>(vocab_) * sizeof(uint32_t));
    } catch (BackendError const&) {  // the host applies penalties
        return false;
    }
    return true;
}

void DeviceSampler::ask(float const* logits, std::vector<Sampler*> const& samplers,
                        std::vector<int64_t> const& places) {
    ++calls_;
    auto* const asked = reinterpret_cast<LessSampleRow*>(hostAsked_.get());
    for (size_t i = 0; i < samplers.size(); ++i) {
        Sampler& sampler = *samplers[i];
        SamplingParams const& p = sampler.params_;
        int32_t const history = sampler.penalises_ ? historyOf(sampler) : -1;
        asked[i] = {sampler.drawn(),
                    p.temperature,
                    p.topP,
                    p.minP,
                    static_cast<int32_t>(std::min(p.topK, vocab_)),
                    static_cast<int32_t>(places[i]),
                    history,
                    static_cast<float>(p.repetitionPenalty),
                    static_cast<float>(p.presencePenalty),
                    static_cast<float>(p.frequencyPenalty)};
    }
    auto* const rows = reinterpret_cast<LessSampleRow*>(asked_.get());
    auto* const chosen = reinterpret_cast<int32_t*>(picks_.get());
    device_.copy(rows, asked, samplers.size() * sizeof *asked);
    kernel_(logits, vocab_, rows, static_cast<int32_t>(samplers.size()), reinterpret_cast<uint32_t*>(memory_.get()),
            chosen);
    device_.copy(hostPicks_.get(), chosen, samplers.size() * sizeof *chosen);
}

std::vector<int32_t> DeviceSampler::chosen(std::vector<Sampler*> const& samplers) {
    copied_.clear();
    auto const* const picks = reinterpret_cast<int32_t const*>(hostPicks_.get());
    for (size_t i = 0; i < samplers.size(); ++i) {
        if (picks[i] == kLessNoChoice) continue;
        samplers[i]->chosen(picks[i]);
        for (History& history : histories_) {
            if (history.sampler == samplers[i]->identity_.value) history.count = samplers[i]->count_;
        }
    }
    return {picks, picks + samplers.size()};
}

void DeviceSampler::forget() {
    copied_.clear();
    histories_.assign(histories_.size(), {});
}

// The place of a sequence's history, which is up to date.
int32_t DeviceSampler::historyOf(Sampler const& sampler) {
    auto const vocab = static_cast<size_t>(vocab_);
    auto place = std::find_if(histories_.begin(), histories_.end(),
                              [&](History const& h) { return h.sampler == sampler.identity_.value; });
    bool const known = place != histories_.end() && place->count == sampler.count_;
    if (place == histories_.end()) {  // that of the sequence that was chosen for longest ago
        place = std::min_element(histories_.begin(), histories_.end(),
                                 [](History const& a, History const& b) { return a.used < b.used; });
    }
    auto const index = place - histories_.begin();
    if (!known) {
        std::vector<uint32_t>& history = copied_.emplace_back(vocab, 0);
        for (auto const& [id, count] : sampler.counts_) history[static_cast<size_t>(id)] = static_cast<uint32_t>(count);
        for (int64_t id : sampler.prompt_) history[static_cast<size_t>(id)] |= kLessPrompt;
        size_t const bytes = vocab * sizeof(uint32_t);
        device_.copy(memory_.get() + static_cast<size_t>(index) * bytes, history.data(), bytes);
    }
    *place = {sampler.identity_.value, sampler.count_, calls_};
    return static_cast<int32_t>(index);
}

}  // namespace less
