// less::LessAttention for ONNX Runtime's CPU provider, in float32.
//
// A kernel wins over the operator's body, the local function of the same name, so a bundle needs no change. Past and
// present state may share their memory: a row's present state is its past one, changed where it changes.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"
#include "attend.h"
#include "choose.h"
#include "settle.h"

namespace less {
namespace {

using ort::Functions;
using ort::Status;

// The inputs before the state, and what is in it (less_export.contract).
enum { kQ, kK, kV, kLogPhi, kPsi, kTokens };
enum { kKey, kValue, kPsiSlots, kScore, kPosition, kH, kZ, kPlain, kScales = 2 };
constexpr size_t kMost = 20;

// What the number of inputs and their dtypes say of a node.
struct Form {
    bool int8, state16, distance;

    static Form of(size_t inputs, ort::ElementType key, ort::ElementType psi) {
        Form form{key == ort::kInt8, psi == ort::kInt8, false};
        form.distance = inputs > form.constants() + (form.int8 ? 2 : 0);
        return form;
    }
    size_t state() const { return kPlain + (int8 ? kScales : 0) + (state16 ? 1 : 0); }
    size_t lengths() const { return kTokens + state(); }
    size_t constants() const { return lengths() + 2; }
    size_t inputs() const { return constants() + (int8 ? 2 : 0) + (distance ? 1 : 0); }
};

struct Tensor {
    ort::ElementType type = ort::kUndefined;
    std::vector<int64_t> shape;
    char* data = nullptr;
};

size_t bytes_of(Tensor const& x) {
    size_t size = x.type == ort::kInt8 ? 1 : 4;
    for (int64_t const n : x.shape) size *= n;
    return size;
}

// An error of ONNX Runtime's, on its way out of the operator.
struct Failure {
    Status* status;
};

void check(Status* status) {
    if (status) throw Failure{status};
}

// Runs `body` and turns what it throws into a status.
template <class Body>
Status* guarded(Functions const& api, Body const& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (Failure const& failure) {
        return failure.status;
    } catch (std::invalid_argument const& error) {
        return api.status(ort::kInvalidArgument, error.what());
    } catch (std::exception const& error) {
        return api.status(ort::kFail, error.what());
    }
}

void require(bool ok, char const* what) {
    if (!ok) throw std::invalid_argument(std::string("LessAttention: ") + what);
}

class Kernel {
 public:
    Kernel(ort::Api const* table, ort::KernelInfo const* info) : api_(table) {
        layer_.scale = attribute<float>(info, "scale");
        auto const policy = attribute<int64_t>(info, "policy");
        require(policy >= 0 && policy <= static_cast<int64_t>(Policy::full), "unknown policy");
        layer_.policy = static_cast<Policy>(policy);
        layer_.heavy = number(info, "heavy"), layer_.recent = number(info, "recent");
        layer_.window = number(info, "window");
        layer_.absorb = attribute<int64_t>(info, "absorb") != 0;
        optional([&] { layer_.decay = attribute<float>(info, "decay"); });      // graphs of version 1 have none
        optional([&] { layer_.max_distance = number(info, "max_distance"); });  // layers that rotate nothing
    }

    Status* compute(ort::KernelContext* context) noexcept {
        return guarded(api_, [&] { run(context); });
    }

 private:
    template <class T>
    T attribute(ort::KernelInfo const* info, char const* name) const {
        T value;
        check(api_.attribute(info, name, &value));
        return value;
    }

    // Runs `read`, which may find no such attribute.
    template <class Read>
    void optional(Read const& read) const {
        try {
            read();
        } catch (Failure const& missing) {
            api_.release(missing.status);
        }
    }

    int number(ort::KernelInfo const* info, char const* name) const {
        auto const value = attribute<int64_t>(info, name);
        require(value >= 0 && value < 1 << 30, "an attribute is out of range");
        return static_cast<int>(value);
    }

    void read(ort::Value const* value, Tensor* tensor) const {
        ort::TensorInfo* info;
        check(api_.info(value, &info));
        size_t rank;
        Status* status = api_.type(info, &tensor->type);
        if (!status) status = api_.rank(info, &rank);
        if (!status) {
            tensor->shape.resize(rank);
            status = api_.shape(info, tensor->shape.data(), rank);
        }
        api_.release(info);
        check(status);
        void* data;
        check(api_.data(const_cast<ort::Value*>(value), &data));
        tensor->data = static_cast<char*>(data);
    }

    // Inputs, outputs and sizes of one call.
    struct Call {
        Layer layer;
        Form form;
        std::array<Tensor, kMost> inputs, state;
        Tensor out;
        int64_t rows, heads, query_heads, chunk;
        std::vector<int> counts;  // valid tokens of each row
        ort::KernelContext const* context;

        template <class T>
        T* input(size_t i) const {
            return reinterpret_cast<T*>(inputs[i].data);
        }
    };

    void run(ort::KernelContext* context) const {
        Call call;
        call.context = context;
        bind(context, &call);
        auto const units = static_cast<size_t>(call.rows * call.heads);
        // Tiles of queries share the work where there is one head; else, heads do.
        bool const by_head = units > 1 || call.chunk == 1;
        struct Work {
            Kernel const* kernel;
            Call const* call;
            std::atomic<int> fault{0};
        } work{this, &call};
        auto const one = [](void* data, size_t unit) noexcept {
            auto* w = static_cast<Work*>(data);
            try {
                if (!w->kernel->head(*w->call, unit, false)) w->fault = 1;
            } catch (std::exception const&) {
                w->fault = 2;
            }
        };
        if (by_head && units > 1)
            check(api_.parallel(context, one, units, &work));
        else if (units == 1 && !head(call, 0, !by_head))
            work.fault = 1;
        require(work.fault != 1, "more tokens than slots under policy full");
        if (work.fault) throw std::bad_alloc();
    }

    // Checks all shapes: what a graph states is not trusted.
    void bind(ort::KernelContext* context, Call* call) const {
        size_t count, outputs;
        check(api_.inputs(context, &count));
        check(api_.outputs(context, &outputs));
        require(count >= kTokens + kPlain + 2 && count <= kMost, "wrong number of inputs");
        for (size_t i = 0; i < count; ++i) {
            ort::Value const* value;
            check(api_.input(context, i, &value));
            require(value != nullptr, "an input is missing");
            read(value, &call->inputs[i]);
        }
        auto& x = call->inputs;
        Form& form = call->form = Form::of(count, x[kTokens + kKey].type, x[kTokens + kPsiSlots].type);
        require(count == form.inputs() && outputs == 1 + form.state(), "wrong number of inputs or outputs");
        require(x[kQ].shape.size() == 4 && x[kTokens + kKey].shape.size() == 4 && x[kPsi].shape.size() == 4,
                "wrong rank");

        int64_t const rows = x[kQ].shape[0], query_heads = x[kQ].shape[1], chunk = x[kQ].shape[2],
                      width = x[kQ].shape[3];
        int64_t const heads = x[kTokens + kKey].shape[1], slots = x[kTokens + kKey].shape[2], rank = x[kPsi].shape[3];
        require(heads > 0 && query_heads % heads == 0 && chunk > 0 && width > 0 && rank > 0, "wrong sizes");
        Layer& layer = call->layer = layer_;
        require(slots == static_cast<int64_t>(layer.heavy) + layer.recent, "heavy + recent is not the number of slots");
        call->rows = rows, call->heads = heads, call->query_heads = query_heads, call->chunk = chunk;
        auto const is = [&](size_t i, ort::ElementType type, std::vector<int64_t> shape) {
            require(x[i].type == type, "an input has another dtype than float32 graphs have");
            require(x[i].shape == shape, "an input has another shape");
        };
        ort::ElementType const number = ort::kFloat, slot = form.int8 ? ort::kInt8 : number,
                               psi = form.state16 ? ort::kInt8 : number;
        is(kQ, number, {rows, query_heads, chunk, width});
        is(kK, number, {rows, heads, chunk, width});
        is(kV, number, {rows, heads, chunk, width});
        is(kLogPhi, number, {rows, query_heads, chunk, rank});
        is(kPsi, number, {rows, heads, chunk, rank});
        is(kTokens + kKey, slot, {rows, heads, slots, width});
        is(kTokens + kValue, slot, {rows, heads, slots, width});
        is(kTokens + kPsiSlots, psi, {rows, heads, slots, rank});
        is(kTokens + kScore, number, {rows, heads, slots});
        is(kTokens + kPosition, ort::kInt32, {rows, heads, slots});
        is(kTokens + kH, psi, {rows, heads, rank, form.state16 ? 2 * width : width});
        is(kTokens + kZ, number, {rows, heads, rank});
        for (int i = 0; form.int8 && i < kScales; ++i) is(kTokens + kPlain + i, number, {rows, heads, slots});
        if (form.state16) is(kTokens + kPlain + kScales, number, {rows, heads, rank});
        for (int i = 0; i < 2; ++i) is(form.lengths() + i, ort::kInt32, {rows});
        for (int i = 0; form.int8 && i < 2; ++i) is(form.constants() + i, number, {heads, width});
        require(!form.state16 || form.int8, "a state of 16 bits goes with int8 slots");
        require(form.distance == (layer.max_distance > 0), "a largest distance goes with a table of angles");
        if (form.distance) {
            auto const& table = x[form.inputs() - 1];
            require(table.type == number && table.shape.size() == 2 && table.shape[0] > layer.max_distance &&
                        table.shape[0] >= chunk && table.shape[1] % 2 == 0 && table.shape[1] <= width,
                    "the table of angles has another shape");
            layer.rotated = static_cast<int>(table.shape[1]);
        }
        layer.int8 = form.int8, layer.state16 = form.state16;
        layer.group = static_cast<int>(query_heads / heads), layer.slots = static_cast<int>(slots);
        layer.head_dim = static_cast<int>(width), layer.rank = static_cast<int>(rank);
        for (int64_t row = 0; row < rows; ++row) {
            int32_t const past = call->input<int32_t>(form.lengths())[row],
                          fresh = call->input<int32_t>(form.lengths() + 1)[row];
            require(past >= 0 && past <= INT32_MAX - chunk && fresh >= 0 && fresh <= chunk, "a length is out of range");
            call->counts.push_back(fresh);
        }

        for (size_t i = 0; i < 1 + form.state(); ++i) {
            Tensor& present = i ? call->state[i - 1] : call->out;
            Tensor const& past = i ? x[kTokens + i - 1] : x[kQ];
            ort::Value* value;
            check(api_.output(context, i, past.shape.data(), past.shape.size(), &value));
            present = past;
            void* data;
            check(api_.data(value, &data));
            present.data = static_cast<char*>(data);
            if (i && present.data != past.data) std::memcpy(present.data, past.data, bytes_of(past));
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
        if (by_tile) {
            struct Tiles {
                Seen* seen;
                std::atomic<bool> failed{false};
            } tiles{&seen};
            auto const one = [](void* data, size_t tile) noexcept {
                auto* t = static_cast<Tiles*>(data);
                try {
                    t->seen->attend(static_cast<int>(tile));
                } catch (std::exception const&) {
                    t->failed = true;
                }
            };
            check(api_.parallel(call.context, one, seen.tiles(), &tiles));
            if (tiles.failed) throw std::bad_alloc();
        } else {
            for (int tile = 0; tile < seen.tiles(); ++tile) seen.attend(tile);
        }
        scores.assign(layer.slots + tokens.count, 0.0f);
        if (layer.scored()) {
            gains.resize(seen.columns());
            seen.sum_gains(gains.data());
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

    // The present state of a row and KV head.
    static State slice(Call const& call, size_t unit) {
        auto const at = [&](size_t i) -> void* {
            Tensor const& x = call.state[i];
            return x.data + unit * (bytes_of(x) / (call.rows * call.heads));
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
    Layer layer_;
};

Functions const* functions;  // of the process, for shape inference, which is not told them

Status* infer(ort::CustomOp const*, ort::ShapeInferContext* context) {
    return guarded(*functions, [&] {
        size_t count;
        check(functions->inferred_inputs(context, &count));
        auto const type_of = [&](size_t i) {
            ort::TensorInfo* info;
            ort::ElementType type;
            check(functions->inferred_input(context, i, &info));
            check(functions->type(info, &type));
            return type;
        };
        require(count >= kTokens + kPlain + 2, "wrong number of inputs");
        Form const form = Form::of(count, type_of(kTokens + kKey), type_of(kTokens + kPsiSlots));
        for (size_t i = 0; i < 1 + form.state(); ++i) {
            ort::TensorInfo* info;
            check(functions->inferred_input(context, i == 0 ? size_t{kQ} : kTokens + i - 1, &info));
            check(functions->infer_output(context, i, info));
        }
    });
}

// One variadic input and output of any dtypes: a node has more of them with int8 slots, a state of 16 bits or angles.
struct Attention : ort::CustomOp {
    Attention() {
        name = [](CustomOp const*) { return "LessAttention"; };
        provider = [](CustomOp const*) -> char const* { return nullptr; };  // the CPU provider
        input_type = output_type = [](CustomOp const*, size_t) { return ort::kUndefined; };
        input_count = output_count = [](CustomOp const*) -> size_t { return 1; };
        input_kind = output_kind = [](CustomOp const*, size_t) { return ort::kVariadic; };
        input_memory = [](CustomOp const*, size_t) { return 0; };
        variadic_inputs = variadic_outputs = [](CustomOp const*) { return 1; };
        inputs_alike = outputs_alike = [](CustomOp const*) { return 0; };
        first_version = [](CustomOp const*) { return 1; };
        last_version = [](CustomOp const*) { return 2; };
        create_kernel2 = [](CustomOp const*, ort::Api const* table, ort::KernelInfo const* info, void** kernel) {
            return guarded(Functions(table), [&] { *kernel = new Kernel(table, info); });
        };
        compute2 = [](void* kernel, ort::KernelContext* context) {
            return static_cast<Kernel*>(kernel)->compute(context);
        };
        destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        less::Attention::infer = less::infer;
    }
};

}  // namespace
}  // namespace less

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 ort::ApiBase const* base) {
    static ort::Api const* table = base->get(ort::kVersion);
    if (!table) return nullptr;  // too old for the operator: its body runs
    static ort::Functions const api(table);
    static less::Attention const attention;
    less::functions = &api;
    ort::CustomOpDomain* domain;
    ort::Status* status = api.domain("less", &domain);
    if (!status) status = api.add(domain, &attention);
    return status ? status : api.add(options, domain);
}
