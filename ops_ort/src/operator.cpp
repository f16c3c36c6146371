// less::LessAttention for ONNX Runtime's CPU provider, in float32.
//
// A kernel wins over the operator's body, the local function of the same name, so a bundle needs no change. Past and
// present state may share their memory: a row's present state is its past one, changed where it changes.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <new>
#include <vector>

#include "attend.h"
#include "choose.h"
#include "node.h"
#include "settle.h"

namespace less {
namespace {

using ort::Functions;
using ort::Status;

// So many rows and heads keep the threads busy, and so many queries of a head are worth dividing.
constexpr size_t kManyUnits = 8;
constexpr int64_t kLongUnit = 256;

class Kernel {
 public:
    static constexpr char const* kProvider = nullptr;  // the CPU provider

    Kernel(ort::Api const* table, ort::KernelInfo const* info) : api_(table), attributes_(read_attributes(api_, info)) {
        layer_.scale = attributes_.scale, layer_.decay = attributes_.decay;
        layer_.policy = static_cast<Policy>(attributes_.policy);
        layer_.heavy = attributes_.heavy, layer_.recent = attributes_.recent;
        layer_.window = attributes_.window, layer_.absorb = attributes_.absorb;
        layer_.max_distance = attributes_.max_distance;
    }

    Status* compute(ort::KernelContext* context) noexcept {
        return guarded(api_, [&] { run(context); });
    }

 private:
    // A call with what the CPU reads of it.
    struct Call : Tensors {
        Layer layer;
        std::vector<int> counts;  // valid tokens of each row
        ort::KernelContext const* context;
    };

    void run(ort::KernelContext* context) const {
        Call call;
        call.context = context;
        bind(context, &call);
        auto const units = static_cast<size_t>(call.rows * call.heads);
        if (units == 0) return;
        // The threads share the heads, or where these are few and the chunk is long, the tiles of each.
        bool const by_head = units >= kManyUnits || call.layer.group * call.chunk < kLongUnit;
        struct Work {
            Kernel const* kernel;
            Call const* call;
            std::atomic<int> fault{0};
        } work{this, &call};
        auto const one = [](void* data, size_t unit) noexcept {
            auto* w = static_cast<Work*>(data);
            try {
                if (!w->kernel->head(*w->call, unit, false)) w->fault = 1;
            } catch (...) {
                w->fault = 2;
            }
        };
        if (by_head && units > 1) {
            check(api_.parallel(context, one, units, &work));
        } else {
            for (size_t unit = 0; unit < units; ++unit)
                if (!head(call, unit, !by_head)) work.fault = 1;
        }
        require(work.fault != 1, "more tokens than slots under policy full");
        if (work.fault) throw std::bad_alloc();
    }

    void bind(ort::KernelContext* context, Call* call) const {
        read_inputs(api_, context, attributes_, {ort::kFloat}, call);
        Form const& form = call->form;
        Layer& layer = call->layer = layer_;
        layer.int8 = form.int8, layer.state16 = form.state16;
        layer.group = static_cast<int>(call->query_heads / call->heads), layer.slots = static_cast<int>(call->slots);
        layer.head_dim = static_cast<int>(call->width), layer.rank = static_cast<int>(call->rank);
        layer.rotated = static_cast<int>(call->rotated);
        for (int64_t row = 0; row < call->rows; ++row) {
            int32_t const past = call->input<int32_t>(form.lengths())[row],
                          fresh = call->input<int32_t>(form.lengths() + 1)[row];
            require(past >= 0 && past <= INT32_MAX - call->chunk && fresh >= 0 && fresh <= call->chunk,
                    "a length is out of range");
            call->counts.push_back(fresh);
        }
        open_outputs(api_, context, call);
        for (size_t i = 0; call->rows > 0 && i < form.state(); ++i) {
            Tensor const &past = call->inputs[kTokens + i], &present = call->state[i];
            if (present.data != past.data) std::memcpy(present.data, past.data, past.bytes());
        }
    }

    // One row and KV head; false if its tokens do not fit into the slots.
    bool head(Call const& call, size_t unit, bool by_tile) const {
        Layer const& layer = call.layer;
        size_t const row = unit / call.heads, kv_head = unit % call.heads;
        size_t const chunk = call.chunk, width = layer.head_dim, rank = layer.rank;
        size_t const query_head = row * call.query_heads + kv_head * layer.group;
        Tokens tokens;
        tokens.q = call.input<float>(kQ) + query_head * chunk * width;
        tokens.log_phi = call.input<float>(kLogPhi) + query_head * chunk * rank;
        tokens.k = call.input<float>(kK) + unit * chunk * width;
        tokens.v = call.input<float>(kV) + unit * chunk * width;
        tokens.psi = call.input<float>(kPsi) + unit * chunk * rank;
        tokens.out = reinterpret_cast<float*>(call.out.data) + query_head * chunk * width;
        tokens.chunk = static_cast<int>(chunk), tokens.count = call.counts[row];
        tokens.past_length = call.input<int32_t>(call.form.lengths())[row];
        if (layer.int8) {
            tokens.key_mean = call.input<float>(call.form.constants()) + kv_head * width;
            tokens.key_std = call.input<float>(call.form.constants() + 1) + kv_head * width;
        }
        tokens.angles = call.form.distance ? call.input<float>(call.form.inputs() - 1) : nullptr;
        for (int g = 0; g < layer.group; ++g)
            std::fill(tokens.out + (g * chunk + tokens.count) * width, tokens.out + (g + 1) * chunk * width, 0.0f);
        if (tokens.count == 0) return true;

        State state = slice(call, unit);
        thread_local Seen seen;
        thread_local std::vector<float> gains, scores;
        thread_local Choice choice;
        seen.prepare(layer, state, tokens);
        size_t const columns = layer.scored() ? seen.columns() : 0;
        gains.assign(columns, 0.0f);
        if (by_tile)
            attend_tiles(call.context, seen, columns, &gains);
        else
            attend(seen, columns, &gains);
        scores.assign(layer.slots + tokens.count, 0.0f);
        if (layer.scored()) {
            float const left = std::pow(layer.decay, static_cast<float>(tokens.count));
            for (int i = 0; i < layer.slots; ++i) {
                if (state.position[i] < 0) continue;
                scores[i] = gains[i] + (layer.accumulates() ? state.score[i] * left : 0);
            }
            for (int j = 0; j < tokens.count; ++j) scores[layer.slots + j] = gains[seen.column(j)];
        }
        if (!choose(layer, state, tokens, scores.data(), &choice)) return false;
        settle(layer, tokens, choice, scores.data(), &state);
        return true;
    }

    // What columns gain is added in the order of tiles, whoever attends them: threads change no bit.
    static void attend(Seen const& seen, size_t columns, std::vector<float>* gains) {
        thread_local std::vector<float> own;
        own.resize(columns);
        for (int tile = 0; tile < seen.tiles(); ++tile) {
            seen.attend(tile, own.data());
            for (size_t n = 0; n < columns; ++n) (*gains)[n] += own[n];
        }
    }

    void attend_tiles(ort::KernelContext const* context, Seen const& seen, size_t columns,
                      std::vector<float>* gains) const {
        struct Tiles {
            Seen const* seen;
            size_t columns;
            std::vector<float> gains;  // of each tile
            std::atomic<bool> failed{false};
        } tiles{&seen, columns, std::vector<float>(columns * seen.tiles())};
        auto const one = [](void* data, size_t tile) noexcept {
            auto* t = static_cast<Tiles*>(data);
            try {
                t->seen->attend(static_cast<int>(tile), t->gains.data() + tile * t->columns);
            } catch (...) {
                t->failed = true;
            }
        };
        check(api_.parallel(context, one, seen.tiles(), &tiles));
        if (tiles.failed) throw std::bad_alloc();
        for (int tile = 0; tile < seen.tiles(); ++tile)
            for (size_t n = 0; n < columns; ++n) (*gains)[n] += tiles.gains[tile * columns + n];
    }

    // The present state of a row and KV head.
    static State slice(Call const& call, size_t unit) {
        auto const at = [&](size_t i) -> void* {
            Tensor const& x = call.state[i];
            return x.data + unit * (x.bytes() / (call.rows * call.heads));
        };
        size_t const scales = kPlain;
        State state{};
        state.key = at(kKey), state.value = at(kValue), state.psi = at(kPsiSlots);
        state.score = static_cast<float*>(at(kScore)), state.position = static_cast<int32_t*>(at(kPosition));
        state.h = at(kH), state.z = static_cast<float*>(at(kZ));
        if (call.form.int8) {
            state.key_scale = static_cast<float*>(at(scales));
            state.value_scale = static_cast<float*>(at(scales + 1));
        }
        if (call.form.state16) state.h_scale = static_cast<float*>(at(scales + kScales));
        return state;
    }

    Functions api_;
    Attributes attributes_;
    Layer layer_;
};

}  // namespace
}  // namespace less

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 ort::ApiBase const* base) {
    static less::Attention<less::Kernel> const attention;
    return less::enlist(options, base, &attention);
}
