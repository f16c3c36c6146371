#include "plan_runner.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "plan_checks.hpp"

namespace less {
namespace {

constexpr size_t kAlignment = 256;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

PlanRunner::PlanRunner(Contract contract, std::unique_ptr<Device> device, std::unique_ptr<Plan> plan, bool inPlace,
                       bool graphs, bool rowsByIndex, SampleKernel sample)
    : contract_(std::move(contract)),
      device_(std::move(device)),
      plan_(std::move(plan)),
      contexts_(*plan_),
      inPlace_(inPlace),
      graphs_(graphs),
      rowsByIndex_(rowsByIndex),
      sample_(contract_.vocabSize <= kLessMaxVocab ? std::move(sample) : SampleKernel{}) {
    checkPlan(*plan_, contract_, inPlace_, rowsByIndex_);
    for (StateTensor& tensor : contract_.state()) slots_.push_back({std::move(tensor)});
}

std::byte* PlanRunner::at(Slot const& slot, int64_t row, int side) const {
    return state_[inPlace_ ? 0 : side].get() + slot.offset + row * slot.tensor.rowBytes;
}

void PlanRunner::open(int64_t batch) {
    device_->activate();
    if (batch != batch_) allocate(batch);
    sides_.assign(static_cast<size_t>(batch), 0);
    for (Slot const& slot : slots_) device_->fill(at(slot, 0, 0), slot.tensor.empty, batch_ * slot.tensor.rowBytes);
    device_->wait();
}

void PlanRunner::allocate(int64_t batch) try {
    close();
    size_t total = 0, emptyBytes = 0;
    for (Slot& slot : slots_) {
        slot.offset = total;
        slot.emptyOffset = emptyBytes;
        total += aligned(batch * slot.tensor.rowBytes);
        emptyBytes += slot.tensor.rowBytes;
    }
    empty_ = Memory(*device_, emptyBytes);
    for (Slot const& slot : slots_) {
        device_->fill(empty_.get() + slot.emptyOffset, slot.tensor.empty, slot.tensor.rowBytes);
    }
    for (int block = 0; block < (inPlace_ ? 1 : 2); ++block) state_[block] = Memory(*device_, total);
    // past_length, new_length, rows and input_ids, in this order, so that a decode step copies only the first bytes.
    newOffset_ = aligned(contract_.pastLength().bytes(batch, 1));
    rowsOffset_ = newOffset_ + aligned(contract_.newLength().bytes(batch, 1));
    idsOffset_ = rowsOffset_ + (rowsByIndex_ ? aligned(contract_.rows().bytes(batch, 1)) : 0);
    size_t const input = idsOffset_ + contract_.inputIds().bytes(batch, contract_.chunk);
    size_t const logits = contract_.logits().bytes(batch, contract_.chunk);
    input_ = Memory(*device_, input);
    hostInput_ = Memory(*device_, input, true);
    logits_ = Memory(*device_, logits);
    hostLogits_ = Memory(*device_, logits, true);
    if (sample_) sampler_ = std::make_unique<DeviceSampler>(*device_, sample_, contract_.vocabSize, batch);
    activations_ = Memory(*device_, std::max<size_t>(plan_->activationBytes(), 1));
    batch_ = batch;
    contexts_.open(batch, [this](int context) { bind(context); });
} catch (BackendError const& error) {
    close();
    char megabytes[32];
    std::snprintf(megabytes, sizeof megabytes, "%.1f", static_cast<double>(contract_.stateBytes()) / 1e6);
    throw BackendError("not enough GPU memory for " + std::to_string(batch) + " rows of " + megabytes +
                       " MB: use fewer rows at a time (" + error.what() + ")");
}

PlanRunner::~PlanRunner() { drain(); }

void PlanRunner::drain() noexcept try {
    device_->activate();
    device_->wait();
} catch (BackendError const&) {
    // The failed step has already been reported; here it only matters that nothing uses the memory any more.
}

void PlanRunner::close() {
    drain();
    inFlight_ = false;
    contexts_.close();
    sampler_.reset();
    for (Memory& block : state_) block = Memory();
    for (Memory* memory : {&empty_, &input_, &hostInput_, &logits_, &hostLogits_, &activations_}) *memory = Memory();
    for (Slot& slot : slots_) {
        slot.staged = {};
        slot.stagedRows = 0;
    }
    batch_ = 0;
    sides_.clear();
}

// Binds what no step changes: the tokens and the logits, memory for activations, and the state of a plan that takes
// rows by index.
void PlanRunner::bind(int context) {
    plan_->useMemory(context, activations_.get(), plan_->activationBytes());
    plan_->bind(context, contract_.pastLength().name, input_.get());
    plan_->bind(context, contract_.newLength().name, input_.get() + newOffset_);
    plan_->bind(context, contract_.inputIds().name, input_.get() + idsOffset_);
    plan_->bind(context, contract_.logits().name, logits_.get());
    if (!rowsByIndex_) return;
    plan_->bind(context, contract_.rows().name, input_.get() + rowsOffset_);
    for (Slot const& slot : slots_) {
        for (TensorSpec const* spec : {&slot.tensor.past, &slot.tensor.present}) {
            plan_->bind(context, spec->name, at(slot, 0, 0));
        }
    }
}

void PlanRunner::step(std::vector<int64_t> const& rows, int64_t const* ids, int64_t tokens, int32_t const* pastLength,
                      int32_t const* newLength) {
    device_->activate();
    failure_ = nullptr;
    auto const put = [&](size_t offset, size_t index, auto const* values, size_t count) {
        std::memcpy(hostInput_.get() + offset + index * count * sizeof *values, values, count * sizeof *values);
    };
    logitTokens_ = contract_.allLogits ? tokens : 1;
    ran_.assign(rows.size(), -1);
    size_t running = 0;  // rows: all, but for parked ones that need not run
    for (size_t i = 0; i < rows.size(); ++i) {
        if (rowsByIndex_ && newLength[i] == 0) continue;
        auto const row = static_cast<int32_t>(rows[i]);
        put(0, running, pastLength + i, 1);
        put(newOffset_, running, newLength + i, 1);
        if (rowsByIndex_) put(rowsOffset_, running, &row, 1);
        put(idsOffset_, running, ids + static_cast<int64_t>(i) * tokens, static_cast<size_t>(tokens));
        ran_[i] = static_cast<int64_t>(running++);
    }
    if (running) launch(rowsByIndex_ ? 0 : rows[0], static_cast<int64_t>(running), tokens);
    if (!sampler_) spread();
}

// Adds parked rows behind those of the input, up to `count`; which row of the state they name does not matter.
void PlanRunner::park(int64_t running, int64_t count, int64_t tokens) {
    if (running == count) return;
    auto const clear = [&](size_t offset, TensorSpec const& spec) {
        auto const begin = static_cast<size_t>(spec.bytes(running, tokens)),
                   end = static_cast<size_t>(spec.bytes(count, tokens));
        std::memset(hostInput_.get() + offset + begin, 0, end - begin);
    };
    clear(0, contract_.pastLength());
    clear(newOffset_, contract_.newLength());
    clear(idsOffset_, contract_.inputIds());
    clear(rowsOffset_, contract_.rows());
}

// Moves the downloaded logits of the rows that ran to the places of these among all, and clears those of the others.
void PlanRunner::spread() {
    size_t const bytes = logitTokens_ * contract_.vocabSize * sizeof(float);
    for (size_t i = ran_.size(); i-- > 0;) {
        std::byte* const place = hostLogits_.get() + i * bytes;
        auto const from = static_cast<size_t>(ran_[i]);
        if (ran_[i] < 0) {
            std::memset(place, 0, bytes);
        } else if (from != i) {
            std::memmove(place, hostLogits_.get() + from * bytes, bytes);
        }
    }
}

// Where the logits at a place among those of all rows lie on the device; -1: nowhere.
int64_t PlanRunner::onDevice(int64_t place) const {
    int64_t const row = ran_[static_cast<size_t>(place / logitTokens_)];
    return row < 0 ? -1 : row * logitTokens_ + place % logitTokens_;
}

// Runs the rows that the input holds, as many as `running`: from a row on, or where the input says.
void PlanRunner::launch(int64_t first, int64_t running, int64_t tokens) {
    std::pair<int64_t, PlanContext*> chosen = {running, &contexts_.ofAnyRows()};
    if (tokens > 1) {
        chosen.second = &contexts_.ofPrompts();
    } else if (rowsByIndex_ && graphs_) {
        chosen = contexts_.ofBucket(running);
    }
    PlanContext& context = *chosen.second;
    RowRange const rows = {first, chosen.first};
    park(running, rows.count, tokens);
    int const side = rowsByIndex_ ? 0 : meet(rows);
    // After a change of shapes or addresses, an engine has to run once before it can be captured.
    bool const warm = context.shaped == std::pair(rows.count, tokens);
    if (!warm) reshape(context, rows.count, tokens);
    bool const captures = tokens == 1 && first == 0;  // always, by index
    std::unique_ptr<Graph>& graph = context.graphs[static_cast<size_t>(side)];
    if (graphs_ && warm && captures && !graph) {
        graph = device_->capture([&] { run(context, rows, side, tokens, rows.count); });
        graphs_ = graph != nullptr;
        if (!graphs_) {
            contexts_.dropGraphs();
            plan_->note("less: decoding without CUDA graphs, as the step cannot be captured");
        }
    }
    try {
        if (captures && graph) {
            graph->launch();
        } else {
            run(context, rows, side, tokens, running);
        }
        inFlight_ = sampler_ && rowsByIndex_ && tokens == 1;  // what is chosen by the logits waits for both
        if (!inFlight_) device_->wait();
    } catch (BackendError const&) {
        context.shaped = {};
        throw;
    }
    for (int64_t row = first; !inPlace_ && row < first + rows.count; ++row) sides_[row] = 1 - side;
}

// Waits for the device; throws what it failed with, or what the step failed with that was in flight.
void PlanRunner::wait() {
    bool const step = std::exchange(inFlight_, false);
    try {
        device_->wait();
    } catch (BackendError const&) {
        if (step) failure_ = std::current_exception();
        throw;
    }
    if (failure_) std::rethrow_exception(failure_);
}

bool PlanRunner::finish() try {
    if (inFlight_) {
        device_->activate();
        wait();
    }
    return !failure_;
} catch (BackendError const&) {
    return false;
}

float const* PlanRunner::logits(std::vector<int64_t> const& places) {
    if (sampler_) {
        device_->activate();
        size_t const bytes = contract_.vocabSize * sizeof(float);
        for (size_t i = 0; i < places.size();) {
            int64_t const from = onDevice(places[i]);
            std::byte* const to = hostLogits_.get() + places[i] * bytes;
            int64_t count = 1;  // of places that lie one behind the other, here and there
            auto const follows = [&](size_t next) {
                return next < places.size() && places[next] == places[i] + count &&
                       onDevice(places[next]) == (from < 0 ? -1 : from + count);
            };
            while (follows(i + static_cast<size_t>(count))) ++count;
            if (from < 0) {
                std::memset(to, 0, static_cast<size_t>(count) * bytes);
            } else {
                device_->copy(to, logits_.get() + from * bytes, static_cast<size_t>(count) * bytes);
            }
            i += static_cast<size_t>(count);
        }
        wait();
    }
    return reinterpret_cast<float const*>(hostLogits_.get());
}

std::vector<int32_t> PlanRunner::pick(std::vector<Sampler*> const& samplers, std::vector<int64_t> const& places) {
    device_->activate();
    std::vector<int64_t> from;  // for parked rows, which have no logits, any
    for (int64_t place : places) from.push_back(std::max<int64_t>(onDevice(place), 0));
    try {
        sampler_->ask(reinterpret_cast<float const*>(logits_.get()), samplers, from);
        wait();
    } catch (BackendError const&) {
        finish();
        drain();  // what was queued of the choice
        sampler_->forget();
        throw;
    }
    return sampler_->chosen(samplers);
}

// Brings rows into the block where most of them are; returns that block.
int PlanRunner::meet(RowRange rows) {
    auto const begin = sides_.begin() + rows.first;
    int const side = 2 * std::count(begin, begin + rows.count, 1) > rows.count;
    for (int64_t row = rows.first; row < rows.first + rows.count; ++row) {
        if (sides_[row] == side) continue;
        for (Slot const& slot : slots_) {
            device_->copy(at(slot, row, side), rowOf(slot, row), slot.tensor.rowBytes);
        }
        sides_[row] = side;
    }
    return side;
}

void PlanRunner::reshape(PlanContext& context, int64_t count, int64_t tokens) {
    context.shaped = {};
    if (context.graphs[0] || context.graphs[1]) {
        device_->wait();
        context.graphs = {};  // they run other shapes
    }
    int64_t const stateRows = rowsByIndex_ ? batch_ : count;
    for (TensorSpec const& spec : contract_.inputs(rowsByIndex_)) {
        Shape const shape = spec.sized(count, tokens, stateRows);
        if (!plan_->setShape(context.index, spec.name, shape)) {
            throw BackendError("the plan does not accept " + spec.name + " " + textOf(shape) + ": build it again");
        }
    }
    // The outputs must fit the memory allocated for them.
    for (TensorSpec const& spec : contract_.outputs(rowsByIndex_)) {
        Shape const shape = spec.sized(count, tokens, stateRows), actual = plan_->shape(context.index, spec.name);
        if (actual != shape) {
            throw BackendError("the plan returns " + spec.name + " " + textOf(actual) + ", not " + textOf(shape) +
                               ": build it again");
        }
    }
    context.shaped = {count, tokens};
}

// Makes aligned memory for at least `count` rows of a tensor.
void PlanRunner::stage(Slot& slot, int64_t count) {
    if (slot.stagedRows >= count) return;
    device_->wait();
    slot.stagedRows = 0;
    for (int side = 0; side < (inPlace_ ? 1 : 2); ++side) {
        slot.staged[side] = Memory();
        slot.staged[side] = Memory(*device_, count * slot.tensor.rowBytes);
    }
    slot.stagedRows = count;
}

// Queues a step; the logits of its first `wanted` rows come back.
void PlanRunner::run(PlanContext const& context, RowRange rows, int side, int64_t tokens, int64_t wanted) {
    std::vector<Slot const*> staged;
    for (Slot& slot : slots_) {
        if (rowsByIndex_) break;  // bound already
        std::byte *past = at(slot, rows.first, side), *present = at(slot, rows.first, 1 - side);
        if (rows.first * slot.tensor.rowBytes % kAlignment) {
            stage(slot, rows.count);
            staged.push_back(&slot);
            device_->copy(slot.staged[0].get(), past, rows.count * slot.tensor.rowBytes);
            past = slot.staged[0].get();
            present = slot.staged[inPlace_ ? 0 : 1].get();
        }
        plan_->bind(context.index, slot.tensor.past.name, past);
        plan_->bind(context.index, slot.tensor.present.name, present);
    }
    device_->copy(input_.get(), hostInput_.get(), idsOffset_ + contract_.inputIds().bytes(rows.count, tokens));
    plan_->enqueue(context.index);
    for (Slot const* slot : staged) {
        device_->copy(at(*slot, rows.first, 1 - side), slot->staged[inPlace_ ? 0 : 1].get(),
                      rows.count * slot->tensor.rowBytes);
    }
    if (!sampler_) device_->copy(hostLogits_.get(), logits_.get(), contract_.logits().bytes(wanted, tokens));
}

void PlanRunner::resetRow(int64_t row) {
    device_->activate();
    std::vector<Copy> copies;
    for (Slot const& slot : slots_) {
        copies.push_back({rowOf(slot, row), empty_.get() + slot.emptyOffset, size_t(slot.tensor.rowBytes)});
    }
    device_->copies(copies);
    device_->wait();
}

void PlanRunner::copyRow(int64_t from, int64_t to) {
    device_->activate();
    int const side = sides_[static_cast<size_t>(from)];
    std::vector<Copy> copies;
    for (Slot const& slot : slots_) {
        copies.push_back({at(slot, to, side), at(slot, from, side), size_t(slot.tensor.rowBytes)});
    }
    device_->copies(copies);
    device_->wait();
    sides_[static_cast<size_t>(to)] = side;
}

void PlanRunner::readRow(int64_t row, std::byte* data) {
    device_->activate();
    for (Slot const& slot : slots_) {
        device_->copy(data, rowOf(slot, row), slot.tensor.rowBytes);
        data += slot.tensor.rowBytes;
    }
    device_->wait();
}

void PlanRunner::writeRow(int64_t row, std::byte const* data) {
    device_->activate();
    for (Slot const& slot : slots_) {
        device_->copy(rowOf(slot, row), data, slot.tensor.rowBytes);
        data += slot.tensor.rowBytes;
    }
    device_->wait();
}

}  // namespace less
