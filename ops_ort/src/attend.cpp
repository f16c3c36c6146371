#include "attend.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

#include "lanes.h"

namespace less {
namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();
// Query rows whose products share the loads of keys and values.
constexpr int kRows = 4;

// The memory of the thread that attends a tile: queries, weights and outputs.
thread_local Scratch tile_scratch;

// out[i, :] = sum_n weights[i, n] values[n, :] for rows i < Rows, `vectors` vectors of a row at a time.
template <int Rows, int Vectors>
void weigh(float const* weights, int stride, float const* values, int columns, int width, float* out) {
    Floats total[Rows][Vectors] = {};
    for (int n = 0; n < columns; ++n) {
        Floats value[Vectors];
        for (int j = 0; j < Vectors; ++j) value[j] = load<Floats>(values + static_cast<size_t>(n) * width + j * kLanes);
        for (int i = 0; i < Rows; ++i) {
            float const weight = weights[i * stride + n];
            for (int j = 0; j < Vectors; ++j) total[i][j] += weight * value[j];
        }
    }
    for (int i = 0; i < Rows; ++i)
        for (int j = 0; j < Vectors; ++j) store(out + i * width + j * kLanes, total[i][j]);
}

template <int Rows>
void weigh_rows(float const* weights, int stride, float const* values, int columns, int width, float* out) {
    int at = 0;
    for (; at + kVectors * kLanes <= width; at += kVectors * kLanes)
        weigh<Rows, kVectors>(weights, stride, values + at, columns, width, out + at);
    for (; at < width; at += kLanes) weigh<Rows, 1>(weights, stride, values + at, columns, width, out + at);
}

// scores[i, p * kLanes + lane] = scale * queries[i, :] . key of that column, for rows i < Rows and `Panels` panels.
template <int Rows, int Panels>
void multiply(float const* queries, int head_dim, float const* panel, float scale, float* scores, int stride) {
    Floats total[Rows][Panels] = {};
    for (int d = 0; d < head_dim; ++d) {
        Floats key[Panels];
        for (int p = 0; p < Panels; ++p) key[p] = load<Floats>(panel + (p * head_dim + d) * kLanes);
        for (int i = 0; i < Rows; ++i)
            for (int p = 0; p < Panels; ++p) total[i][p] += queries[i * head_dim + d] * key[p];
    }
    for (int i = 0; i < Rows; ++i)
        for (int p = 0; p < Panels; ++p) store(scores + i * stride + p * kLanes, total[i][p] * scale);
}

// to[:head_dim] = from turned by `distance` tokens; the channels from `rotated` on stay as they are.
void turn(float const* __restrict from, int head_dim, float const* __restrict angles, int rotated, int distance,
          float* __restrict to) {
    int const half = rotated / 2;
    float const* cos = angles + static_cast<size_t>(std::abs(distance)) * rotated;
    float const *sin = cos + half, sign = distance < 0 ? -1.0f : 1.0f;
    for (int i = 0; i < half; ++i) {
        float const s = sign * sin[i];
        to[i] = from[i] * cos[i] - from[i + half] * s;
        to[i + half] = from[i + half] * cos[i] + from[i] * s;
    }
    std::copy(from + rotated, from + head_dim, to + rotated);
}

}  // namespace

float* Scratch::reserve(size_t floats) {
    constexpr size_t boundary = 64 / sizeof(float);
    if (memory_.size() < floats + boundary) memory_.resize(floats + boundary);
    auto const address = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (64 - address % 64) % 64 / sizeof(float);
}

void Seen::prepare(Layer const& layer, State const& state, Tokens const& tokens) {
    layer_ = &layer, state_ = &state, tokens_ = &tokens;
    slot_columns_ = padded(layer.slots), chunk_columns_ = padded(tokens.count), width_ = padded(layer.head_dim);
    tiles_ = (layer.group * tokens.count + kTile - 1) / kTile;
    size_t const tokens_seen = columns(), head_dim = layer.head_dim, width = width_, rank = layer.rank;
    float* at = scratch_.reserve(tokens_seen * (head_dim + width) + rank * (width + 1) + 2 * head_dim);
    keys_ = at, values_ = keys_ + tokens_seen * head_dim, means_ = values_ + tokens_seen * width;
    log_z_ = means_ + rank * width, key_ = log_z_ + rank, turned_ = key_ + head_dim;
    positions_.assign(tokens_seen, -1);
    read_slots();
    read_chunk();
    for (int n = 0; n < columns(); ++n)
        if (positions_[n] < 0) clear(n);
    if (layer.absorb) read_means();
}

// A column without a token: its weight is zero, and zero times what memory held before need not be.
void Seen::clear(int column) {
    float* key = panel(column);
    for (int d = 0; d < layer_->head_dim; ++d) key[d * kLanes] = 0;
    std::fill_n(values_ + static_cast<size_t>(column) * width_, width_, 0.0f);
}

float* Seen::panel(int column) const {
    return keys_ + static_cast<size_t>(column / kLanes) * layer_->head_dim * kLanes + column % kLanes;
}

void Seen::put_key(int column, float const* key, int distance) {
    Layer const& x = *layer_;
    if (x.max_distance) {
        turn(key, x.head_dim, tokens_->angles, x.rotated, distance, turned_);
        key = turned_;
    }
    float* to = panel(column);
    for (int d = 0; d < x.head_dim; ++d) to[d * kLanes] = key[d];
}

void Seen::read_slots() {
    Layer const& x = *layer_;
    for (int slot = 0; slot < x.slots; ++slot) {
        int32_t const position = state_->position[slot];
        if (position < 0) continue;
        positions_[slot] = position;
        int const distance = -std::clamp(tokens_->past_length - position, 0, x.max_distance);
        size_t const at = static_cast<size_t>(slot) * x.head_dim;
        float* value = values_ + static_cast<size_t>(slot) * width_;
        std::fill(value + x.head_dim, value + width_, 0.0f);
        if (!x.int8) {
            put_key(slot, static_cast<float const*>(state_->key) + at, distance);
            std::copy_n(static_cast<float const*>(state_->value) + at, x.head_dim, value);
            continue;
        }
        auto const *codes = static_cast<int8_t const*>(state_->key) + at,
                   *value_codes = static_cast<int8_t const*>(state_->value) + at;
        float const scale = state_->key_scale[slot], value_scale = state_->value_scale[slot];
        for (int d = 0; d < x.head_dim; ++d) key_[d] = codes[d] * scale * tokens_->key_std[d] + tokens_->key_mean[d];
        for (int d = 0; d < x.head_dim; ++d) value[d] = value_codes[d] * value_scale;
        put_key(slot, key_, distance);
    }
}

void Seen::read_chunk() {
    int const head_dim = layer_->head_dim;
    for (int j = 0; j < tokens_->count; ++j) {
        size_t const at = static_cast<size_t>(j) * head_dim;
        positions_[column(j)] = tokens_->past_length + j;
        put_key(column(j), tokens_->k + at, j);
        float* value = values_ + static_cast<size_t>(column(j)) * width_;
        std::copy_n(tokens_->v + at, head_dim, value);
        std::fill(value + head_dim, value + width_, 0.0f);
    }
}

// Features without mass count for nothing: their logarithm is -inf, their mean zero.
void Seen::read_means() {
    Layer const& x = *layer_;
    for (int r = 0; r < x.rank; ++r) {
        float* mean = means_ + static_cast<size_t>(r) * width_;
        std::fill(mean, mean + width_, 0.0f);
        float const z = state_->z[r];
        log_z_[r] = z > 0 ? std::log(z) : kHidden;
        if (!(z > 0)) continue;
        if (x.state16) {
            int8_t const* high = static_cast<int8_t const*>(state_->h) + static_cast<size_t>(r) * 2 * x.head_dim;
            int8_t const* low = high + x.head_dim;
            for (int d = 0; d < x.head_dim; ++d) mean[d] = (high[d] * 256.0f + low[d]) * state_->h_scale[r];
        } else {
            float const* h = static_cast<float const*>(state_->h) + static_cast<size_t>(r) * x.head_dim;
            for (int d = 0; d < x.head_dim; ++d) mean[d] = h[d] / z;
        }
    }
}

void Seen::logits(float const* queries, int rows, int columns, float* out) const {
    int const head_dim = layer_->head_dim, stride = this->columns();
    for (int row = 0; row < rows; row += kRows) {
        float const* q = queries + static_cast<size_t>(row) * head_dim;
        float* to = out + static_cast<size_t>(row) * stride;
        int at = 0;
        for (; at + kVectors * kLanes <= columns; at += kVectors * kLanes)
            multiply<kRows, kVectors>(q, head_dim, keys_ + static_cast<size_t>(at) * head_dim, layer_->scale, to + at,
                                      stride);
        for (; at < columns; at += kLanes)
            multiply<kRows, 1>(q, head_dim, keys_ + static_cast<size_t>(at) * head_dim, layer_->scale, to + at, stride);
    }
}

void Seen::attend(int tile, float* gain) const {
    Layer const& x = *layer_;
    Tokens const& tokens = *tokens_;
    int const first = tile * kTile, rows = std::min(kTile, x.group * tokens.count - first);
    int const whole = (rows + kRows - 1) / kRows * kRows, stride = columns();  // of queries, in whole blocks
    size_t const features = static_cast<size_t>(whole) * x.head_dim;
    float* queries = tile_scratch.reserve(features + static_cast<size_t>(whole) * (stride + width_) + kLanes);
    float* weights = queries + (features + kLanes - 1) / kLanes * kLanes;
    float* outputs = weights + static_cast<size_t>(whole) * stride;

    // Row i of the tile is query `token[i]` of query head (first + i) / count.
    auto const token = [&](int i) { return (first + i) % tokens.count; };
    int newest = 0;
    for (int i = 0; i < whole; ++i) {
        float* to = queries + static_cast<size_t>(i) * x.head_dim;
        if (i >= rows) {
            std::fill(to, to + x.head_dim, 0.0f);
            continue;
        }
        int const head = (first + i) / tokens.count, t = token(i);
        newest = std::max(newest, t);
        float const* q = tokens.q + (static_cast<size_t>(head) * tokens.chunk + t) * x.head_dim;
        if (x.max_distance)
            turn(q, x.head_dim, tokens.angles, x.rotated, t, to);
        else
            std::copy_n(q, x.head_dim, to);
    }
    int const end =
        std::min(stride, slot_columns_ + padded(newest + 1));  // later tokens are seen by no query of the tile
    logits(queries, whole, end, weights);

    if (x.scored()) std::fill(gain, gain + stride, 0.0f);
    float total[kTile];
    for (int i = 0; i < rows; ++i) {
        float* row = weights + static_cast<size_t>(i) * stride;
        int32_t const now = tokens.past_length + token(i);
        int32_t const oldest = x.window ? now - x.window : -1;  // what is after it is in sight
        Floats peak = all(kHidden);
        for (int n = 0; n < end; n += kLanes) {
            Ints const position = load<Ints>(positions_.data() + n);
            Ints const visible = (position >= 0) & (position <= now) & (position > std::max(oldest, -1));
            Floats const logit = visible ? load<Floats>(row + n) : all(kHidden);
            store(row + n, logit);
            peak = larger(logit, peak);
        }
        float const most = largest(peak);
        Floats parts = {};
        for (int n = 0; n < end; n += kLanes) {
            Floats const weight = exponential(load<Floats>(row + n) - most);
            store(row + n, weight);
            parts += weight;
        }
        float const mass = sum(parts), share = 1 / mass;
        total[i] = most + std::log(mass);
        // What later tokens leave of this query's scores, see `reference.fading`.
        int const age = tokens.count - 1 - token(i);
        float const worth = x.accumulates() ? share * std::pow(x.decay, static_cast<float>(age)) : share;
        bool const counts = x.accumulates() || (x.scored() && age == 0);
        for (int n = 0; counts && n < end; n += kLanes)
            store(gain + n, load<Floats>(gain + n) + load<Floats>(row + n) * worth);
        for (int n = 0; n < end; n += kLanes) store(row + n, load<Floats>(row + n) * share);
    }
    for (int i = 0; i < whole; i += kRows)
        weigh_rows<kRows>(weights + static_cast<size_t>(i) * stride, stride, values_, end, width_,
                          outputs + static_cast<size_t>(i) * width_);

    for (int i = 0; i < rows; ++i) {
        size_t const query = static_cast<size_t>((first + i) / tokens.count) * tokens.chunk + token(i);
        float const* from = outputs + static_cast<size_t>(i) * width_;
        float* to = tokens.out + query * x.head_dim;
        if (!x.absorb) {
            std::copy_n(from, x.head_dim, to);
            continue;
        }
        float const* log_phi = tokens.log_phi + query * x.rank;
        float peak = total[i];
        for (int r = 0; r < x.rank; ++r) peak = std::max(peak, log_phi[r] + log_z_[r]);
        float const exact = std::exp(total[i] - peak);
        float mass = exact;
        for (int r = 0; r < x.rank; ++r) mass += std::exp(log_phi[r] + log_z_[r] - peak);
        for (int d = 0; d < x.head_dim; ++d) to[d] = from[d] * (exact / mass);
        for (int r = 0; r < x.rank; ++r) {
            float const weight = std::exp(log_phi[r] + log_z_[r] - peak) / mass;
            float const* mean = means_ + static_cast<size_t>(r) * width_;
            for (int d = 0; d < x.head_dim; ++d) to[d] += weight * mean[d];
        }
    }
}

}  // namespace less
