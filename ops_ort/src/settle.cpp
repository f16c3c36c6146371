#include "settle.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace less {
namespace {

// The rules of less_export.less.int8 and less_export.less.state16.
constexpr float kLargest = 127, kSmallestScale = 0x1p-126f;
constexpr float kLargest16 = 127 * 256 + 127;
constexpr int kPeriod = 1 << 14, kStep = 40503, kChannelStep = 49471, kFeatureStep = 37345;

// The larger magnitude; NaN stays.
float further(float peak, float x) { return std::fabs(x) > peak || std::isnan(x) ? std::fabs(x) : peak; }

// Codes of x[0:n], and returns their scale. Where it is no finite number, codes are zeros, and the scale says so.
float quantise(float const* x, int n, int8_t* code) {
    float peak = 0;
    for (int i = 0; i < n; ++i) peak = further(peak, x[i]);
    float const scale = peak / kLargest;
    if (scale >= kSmallestScale && std::isfinite(scale)) {
        for (int i = 0; i < n; ++i)
            code[i] = static_cast<int8_t>(std::clamp(std::nearbyint(x[i] / scale), -kLargest, kLargest));
        return scale;
    }
    std::fill(code, code + n, static_cast<int8_t>(0));
    return scale < kSmallestScale ? 0 : scale;
}

// A token that leaves or takes a slot, as slots hold it.
struct Stored {
    explicit Stored(Layer const& x) : key(x.head_dim), value(x.head_dim), psi(x.rank) {}

    std::vector<int8_t> key, value, psi;
    float key_scale = 0, value_scale = 0;
};

// What the tokens that leave add to the low-rank state.
class Leaving {
 public:
    explicit Leaving(Layer const& x)
        : layer_(x),
          psi_(x.rank),
          value_(x.head_dim),
          mass_(x.rank),
          total_(static_cast<size_t>(x.rank) * x.head_dim) {}

    void add(float const* value, float const* psi) {
        any_ = true;
        for (int r = 0; r < layer_.rank; ++r) {
            mass_[r] += psi[r];
            float* total = total_.data() + static_cast<size_t>(r) * layer_.head_dim;
            for (int d = 0; d < layer_.head_dim; ++d) total[d] += psi[r] * value[d];
        }
    }
    void add(int8_t const* value, float scale, float const* psi) {
        for (int d = 0; d < layer_.head_dim; ++d) value_[d] = value[d] * scale;
        add(value_.data(), psi);
    }
    void add(int8_t const* value, float scale, int8_t const* psi) {
        float whole = 0;
        for (int r = 0; r < layer_.rank; ++r) whole += psi[r];
        for (int r = 0; r < layer_.rank; ++r) psi_[r] = psi[r] / std::max(whole, 1.0f);
        add(value, scale, psi_.data());
    }

    // The state with what was added, in sums or in means of 16 bits.
    void absorb(int32_t position, State* state) {
        if (!any_) return;
        for (int r = 0; r < layer_.rank; ++r) {
            float const* total = total_.data() + static_cast<size_t>(r) * layer_.head_dim;
            if (layer_.state16) {
                absorb16(r, total, position, state);
                continue;
            }
            float* h = static_cast<float*>(state->h) + static_cast<size_t>(r) * layer_.head_dim;
            for (int d = 0; d < layer_.head_dim; ++d) h[d] += total[d];
            state->z[r] += mass_[r];
        }
    }

 private:
    void absorb16(int r, float const* total, int32_t position, State* state) {
        float const mass = mass_[r], before = state->z[r], after = before + mass;
        state->z[r] = after;
        if (mass <= 0) return;
        int const head_dim = layer_.head_dim;
        int8_t* high = static_cast<int8_t*>(state->h) + static_cast<size_t>(r) * 2 * head_dim;
        int8_t* low = high + head_dim;
        float const scale = before > 0 ? state->h_scale[r] : 0;
        float peak = 0;
        for (int d = 0; d < head_dim; ++d) {
            float const mean = (high[d] * 256.0f + low[d]) * scale;
            value_[d] = mean + (total[d] - mass * mean) / after;
            peak = further(peak, value_[d]);
        }
        float next = peak / kLargest16;
        if (next < kSmallestScale) next = 0;
        state->h_scale[r] = next;
        int const walk = (position % kPeriod + kPeriod) % kPeriod * kStep + r * kFeatureStep;
        for (int d = 0; d < head_dim; ++d) {
            float whole = 0;
            if (next != 0 && std::isfinite(next)) {
                float const dither = static_cast<float>((walk + d * kChannelStep) % 65536) / 65536;
                whole = std::clamp(std::floor(value_[d] / next + dither), -kLargest16, kLargest16);
            }
            float const upper = std::floor((whole + 128) / 256);
            high[d] = static_cast<int8_t>(upper);
            low[d] = static_cast<int8_t>(whole - 256 * upper);
        }
    }

    Layer const& layer_;
    std::vector<float> psi_, value_, mass_, total_;
    bool any_ = false;
};

// Elements of a tensor with rows of `width`, from row i on.
template <class T>
T* row(void* tensor, int i, int width) {
    return static_cast<T*>(tensor) + static_cast<size_t>(i) * width;
}

void leave_slot(Layer const& x, State const& state, int i, Leaving* leaving) {
    if (!x.int8) return leaving->add(row<float>(state.value, i, x.head_dim), row<float>(state.psi, i, x.rank));
    int8_t const* value = row<int8_t>(state.value, i, x.head_dim);
    if (x.state16) return leaving->add(value, state.value_scale[i], row<int8_t>(state.psi, i, x.rank));
    leaving->add(value, state.value_scale[i], row<float>(state.psi, i, x.rank));
}

}  // namespace

void settle(Layer const& x, Tokens const& tokens, Choice const& choice, float const* score, State* state) {
    Leaving leaving(x);
    for (int i = 0; i < x.slots; ++i) {
        state->score[i] = choice.held[i] ? score[i] : 0;
        if (choice.kept[i]) continue;
        if (x.absorb && choice.held[i]) leave_slot(x, *state, i, &leaving);
        state->position[i] = -1;
    }

    Stored stored(x);
    std::vector<float> key(x.head_dim);
    for (int j = 0; j < tokens.count; ++j) {
        float const *k = tokens.k + static_cast<size_t>(j) * x.head_dim,
                    *v = tokens.v + static_cast<size_t>(j) * x.head_dim,
                    *psi = tokens.psi + static_cast<size_t>(j) * x.rank;
        int const slot = choice.slot[j];
        if (slot < 0 && !x.absorb) continue;
        if (x.int8) stored.value_scale = quantise(v, x.head_dim, stored.value.data());
        if (x.state16) quantise(psi, x.rank, stored.psi.data());
        if (slot < 0) {
            if (!x.int8)
                leaving.add(v, psi);
            else if (x.state16)
                leaving.add(stored.value.data(), stored.value_scale, stored.psi.data());
            else
                leaving.add(stored.value.data(), stored.value_scale, psi);
            continue;
        }
        state->position[slot] = tokens.past_length + j;
        state->score[slot] = score[x.slots + j];
        if (x.int8) {
            for (int d = 0; d < x.head_dim; ++d) key[d] = (k[d] - tokens.key_mean[d]) / tokens.key_std[d];
            state->key_scale[slot] = quantise(key.data(), x.head_dim, row<int8_t>(state->key, slot, x.head_dim));
            state->value_scale[slot] = stored.value_scale;
            std::copy(stored.value.begin(), stored.value.end(), row<int8_t>(state->value, slot, x.head_dim));
        } else {
            std::copy_n(k, x.head_dim, row<float>(state->key, slot, x.head_dim));
            std::copy_n(v, x.head_dim, row<float>(state->value, slot, x.head_dim));
        }
        if (x.state16)
            std::copy(stored.psi.begin(), stored.psi.end(), row<int8_t>(state->psi, slot, x.rank));
        else
            std::copy_n(psi, x.rank, row<float>(state->psi, slot, x.rank));
    }
    if (x.absorb) leaving.absorb(tokens.past_length, state);
}

}  // namespace less
