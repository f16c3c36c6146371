#include "choose.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace less {
namespace {

// Orders like the numbers, and both zeros alike; the place of NaN is unspecified.
uint32_t sortable(float x) {
    x += 0.0f;  // of -0, too
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace

bool choose(Layer const& layer, State const& state, Tokens const& tokens, float const* score, Choice* choice) {
    int const slots = layer.slots, candidates = slots + tokens.count;
    int64_t const end = static_cast<int64_t>(tokens.past_length) + tokens.count;
    auto const position = [&](int i) -> int64_t {
        return i < slots ? state.position[i] : static_cast<int64_t>(tokens.past_length) + i - slots;
    };
    // The next query sees itself and `window - 1` tokens before it; the window policy keeps one more.
    int64_t const oldest = layer.window ? end - layer.window + (layer.policy == Policy::window ? 0 : 1) : 0;
    choice->held.assign(candidates, 0);
    choice->kept.assign(candidates, 0);
    choice->slot.assign(tokens.count, -1);

    std::vector<uint64_t> ranks;
    for (int i = 0; i < candidates; ++i) {
        choice->held[i] = position(i) >= 0;
        bool const live = choice->held[i] && position(i) >= oldest;
        if (!live) continue;
        bool const recent = position(i) >= end - layer.recent;
        if (layer.policy == Policy::sink) {
            choice->kept[i] = recent || position(i) < layer.heavy;
        } else if (layer.scored()) {
            // The highest rank stays, of equal ones that of the first candidate.
            uint64_t const rank = recent ? UINT32_MAX : sortable(score[i]);
            ranks.push_back(rank << 32 | static_cast<uint32_t>(~i));
        } else {
            choice->kept[i] = 1;
        }
    }
    size_t const capacity = static_cast<size_t>(layer.heavy) + layer.recent;
    if (ranks.size() > capacity) {
        std::nth_element(ranks.begin(), ranks.begin() + capacity, ranks.end(), std::greater<uint64_t>());
        ranks.resize(capacity);
    }
    for (uint64_t const rank : ranks) choice->kept[static_cast<uint32_t>(~rank)] = 1;

    int slot = 0;
    for (int j = 0; j < tokens.count; ++j) {
        if (!choice->kept[slots + j]) continue;
        while (slot < slots && choice->kept[slot]) ++slot;
        if (slot == slots) return false;
        choice->slot[j] = slot++;
    }
    return true;
}

}  // namespace less
