// A device in host memory and an engine of simple arithmetic, for tests of the code that uses them.
//
// The stream runs only on wait(). Allocated memory is poisoned, and every access is checked against the allocations.
// The engine mixes every byte of the state with each token, its position and the byte's own index, so that a tensor,
// row or block that is swapped, shifted or stale changes the logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <set>
#include <utility>

#include "engine.hpp"
#include "plan_runner.hpp"

namespace less::testing {

[[noreturn]] inline void bug(char const* message) {
    std::fprintf(stderr, "host machine: %s\n", message);
    std::abort();
}

// One byte of state after a token.
inline unsigned char mixed(unsigned char byte, int64_t token, int64_t position, size_t tensor, size_t index) {
    return static_cast<unsigned char>(byte * 31 + token + position + 7 * tensor + index);
}

// The logits depend on the sum of hashed(...) over the state tensors of a row.
inline uint64_t hashed(unsigned char const* bytes, size_t count, size_t tensor) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; ++i) sum += bytes[i] * (i * 2654435761u + tensor + 1);
    return sum;
}

inline float logit(uint64_t hash, int64_t token) {
    uint64_t const x = (hash ^ static_cast<uint64_t>(token) * 0x9E3779B97F4A7C15u) * 0xBF58476D1CE4E5B9u;
    return static_cast<float>(x >> 40) * 0x1p-20f;
}

// What one run of the engine was given, row by row, without parked ones if they came by index.
struct Feed {
    std::vector<int64_t> rows;  // if the first state tensor was bound where it lies, or the rows came by index
    std::vector<std::vector<int64_t>> ids;
    std::vector<int32_t> past;
};

// What a test configures and observes; must outlive the session.
struct Machine {
    size_t freeBytes = size_t{1} << 30;
    bool captures = true, runs = true;  // whether capturing and running a step succeed
    bool inPlace = true;                // the plan has the plugin
    bool byIndex = false;               // the plan takes rows by index, and works in place
    bool fault = false;                 // the next wait throws, after what is queued
    int waits = 0;
    int moreContexts = 99;  // that can be created; for others there is no memory
    int launches = 0, captured = 0, captureAttempts = 0;
    std::vector<std::pair<int, Shape>> steps;  // profile and [B, T]
    std::vector<Feed> feeds;
    // Called with "run" before the engine runs, and with "copy", "read", "write" or "reset" before a row's state is;
    // may throw. It needs the bytes of the first state tensor of all rows, and those of a row's whole state.
    std::function<void(char const*)> before;
    size_t firstBytes = 0, rowBytes = 0;
    std::map<char*, size_t> memory;
    std::set<char const*> pinned;  // of these, those of the host
    size_t copiedBack = 0;         // bytes from the device to pinned memory
    std::vector<std::function<void()>> stream;
    std::vector<std::function<void()>>* sink = &stream;

    void check(void const* at, size_t bytes) {
        auto const* begin = static_cast<char const*>(at);
        for (auto const& [base, size] : memory) {
            if (begin >= base && begin + bytes <= base + size) return;
        }
        bug("an access outside of the allocations");
    }
    // Where the allocation begins in which an address lies, or nullptr.
    char const* base(void const* at) const {
        auto const next = memory.upper_bound(static_cast<char*>(const_cast<void*>(at)));
        if (next == memory.begin()) return nullptr;
        auto const& [begin, bytes] = *std::prev(next);
        return at < begin + bytes ? begin : nullptr;
    }
    void about(char const* what) {
        if (before && sink == &stream) before(what);
    }
    // Tells of a copy of a row's state, by its first tensor: within a block, out of one, or into one; an empty row lies
    // in memory of its own.
    void aboutCopy(void const* to, void const* from) {
        char const *target = base(to), *source = base(from);
        auto const first = [&](void const* at, char const* block) {
            return static_cast<char const*>(at) < block + firstBytes;
        };
        if (source && source == target && first(to, target)) about("copy");
        if (source && target && from == source && memory.at(const_cast<char*>(source)) == rowBytes) about("reset");
        if (source && !target && first(from, source)) about("read");
        if (!source && target && first(to, target)) about("write");
    }
};

class HostDevice : public Device {
 public:
    explicit HostDevice(Machine& machine) : machine_(machine) {}
    ~HostDevice() override {
        if (!machine_.memory.empty()) bug("memory was not released");
    }
    void activate() override {}
    void* allocate(size_t bytes) override {
        if (bytes > machine_.freeBytes) throw BackendError("cudaMalloc failed on the GPU: out of memory");
        machine_.freeBytes -= bytes;
        auto* memory = static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
        std::memset(memory, 0xA5, bytes);
        machine_.memory[memory] = bytes;
        return memory;
    }
    void* allocateHost(size_t bytes) override {
        void* const memory = allocate(bytes);
        machine_.pinned.insert(static_cast<char const*>(memory));
        return memory;
    }
    void release(void* memory) noexcept override {
        auto const allocation = machine_.memory.find(static_cast<char*>(memory));
        if (allocation == machine_.memory.end()) bug("memory was released twice");
        machine_.freeBytes += allocation->second;
        machine_.memory.erase(allocation);
        std::free(memory);
    }
    void releaseHost(void* memory) noexcept override {
        machine_.pinned.erase(static_cast<char const*>(memory));
        release(memory);
    }
    void copy(void* to, void const* from, size_t bytes) override {
        machine_.aboutCopy(to, from);
        char const* const source = machine_.base(from);
        if (source && !machine_.pinned.count(source) && machine_.pinned.count(machine_.base(to))) {
            machine_.copiedBack += bytes;
        }
        machine_.sink->push_back([=] { std::memcpy(to, from, bytes); });
    }
    void fill(void* at, int byte, size_t bytes) override {
        machine_.check(at, bytes);
        machine_.sink->push_back([=] { std::memset(at, byte, bytes); });
    }
    void wait() override {
        ++machine_.waits;
        for (auto const& work : machine_.stream) work();
        machine_.stream.clear();
        // CUDA's API reference on most calls: they may return error codes from previous, asynchronous launches.
        if (std::exchange(machine_.fault, false)) throw BackendError("the step failed on the GPU: a fault");
    }
    std::unique_ptr<Graph> capture(std::function<void()> const& work) override;

 private:
    Machine& machine_;
};

class HostGraph : public Graph {
 public:
    explicit HostGraph(Machine& machine) : machine_(machine) {}
    void launch() override {
        machine_.about("run");
        ++machine_.launches;
        machine_.stream.insert(machine_.stream.end(), work.begin(), work.end());
    }
    std::vector<std::function<void()>> work;

 private:
    Machine& machine_;
};

inline std::unique_ptr<Graph> HostDevice::capture(std::function<void()> const& work) {
    auto graph = std::make_unique<HostGraph>(machine_);
    bool recorded = machine_.captures;
    ++machine_.captureAttempts;
    machine_.sink = &graph->work;
    try {
        work();
    } catch (BackendError const&) {
        recorded = false;
    }
    machine_.sink = &machine_.stream;
    if (!recorded) return nullptr;
    ++machine_.captured;
    return graph;
}

class HostPlan : public Plan {
 public:
    HostPlan(Contract contract, Machine& machine) : contract_(std::move(contract)), machine_(machine) {
        for (bool input : {true, false}) {
            for (TensorSpec const& spec :
                 input ? contract_.inputs(machine.byIndex) : contract_.outputs(machine.byIndex)) {
                io.push_back({spec.name, input, nameOf(spec.type), spec.sized(-1, -1)});
            }
        }
        profileCount = contract_.chunk > 1 ? 2 : 1;
        maxChunk = contract_.chunk;
        for (int profile = 0; profile < profileCount; ++profile) contexts_.push_back({profile});
    }

    // Tests may change these.
    std::vector<PlanTensor> io;
    int profileCount;
    int64_t maxChunk;
    std::string alias;  // of present.0.key, if the engine tells; engines do not tell what a plugin does

    std::vector<PlanTensor> tensors() const override { return io; }
    int profiles() const override { return profileCount; }
    std::pair<Shape, Shape> range(std::string const& input, int profile) const override {
        for (TensorSpec const& spec : contract_.inputs(machine_.byIndex)) {
            if (spec.name == input) return {spec.sized(1, 1), spec.sized(contract_.maxBatch, profile ? maxChunk : 1)};
        }
        bug("no such input");
    }
    std::string aliasedInput(std::string const& output) const override {
        return output == "present.0.key" ? alias : "";
    }
    int addContext(int profile) override {
        if (machine_.moreContexts-- <= 0) return -1;
        contexts_.push_back({profile});
        return static_cast<int>(contexts_.size()) - 1;
    }
    size_t activationBytes() const override { return 512; }
    void useMemory(int context, void* memory, size_t bytes) override {
        if (bytes < activationBytes()) bug("too little memory for activations");
        at(context).memory = memory;
        at(context).changed();
    }
    bool setShape(int context, std::string const& input, Shape const& shape) override {
        auto const [minimum, maximum] = range(input, at(context).profile);
        for (size_t i = 0; i < shape.size(); ++i) {
            if (shape[i] < minimum[i] || shape[i] > maximum[i]) return false;
        }
        at(context).shapes[input] = shape;
        at(context).changed();
        return true;
    }
    Shape shape(int context, std::string const& tensor) const override {
        Context const& of = contexts_.at(static_cast<size_t>(context));
        Shape const& ids = of.shapes.at(contract_.inputIds().name);
        for (TensorSpec const& spec : contract_.outputs(machine_.byIndex)) {
            if (spec.name == tensor) return spec.sized(ids[0], ids[1], stateRows(of));
        }
        return of.shapes.at(tensor);
    }
    void bind(int context, std::string const& tensor, void* memory) override {
        if (reinterpret_cast<uintptr_t>(memory) % 256) bug("an address is not aligned");
        at(context).bound[tensor] = static_cast<unsigned char*>(memory);
        if (machine_.byIndex) at(context).changed();
    }
    void enqueue(int context) override {
        machine_.about("run");
        if (!machine_.runs) throw BackendError("TensorRT cannot run this step: the test forbids it");
        Context& of = at(context);
        bool const captured = machine_.sink != &machine_.stream;
        if (captured && !of.ran) bug("captured before a step has run with these shapes and addresses");
        of.ran = true;
        Shape const ids = of.shapes.at(contract_.inputIds().name);
        auto const checkSize = [&](TensorSpec const& spec) {
            Shape const shape = spec.sized(ids[0], ids[1], stateRows(of));
            if (of.shapes.count(spec.name) && of.shapes.at(spec.name) != shape) bug("sizes differ");
            int64_t bytes = bytesOf(spec.type);
            for (int64_t d : shape) bytes *= d;
            machine_.check(of.bound.at(spec.name), static_cast<size_t>(bytes));
        };
        for (TensorSpec const& spec : contract_.inputs(machine_.byIndex)) checkSize(spec);
        for (TensorSpec const& spec : contract_.outputs(machine_.byIndex)) checkSize(spec);
        machine_.check(of.memory, activationBytes());
        machine_.sink->push_back([=, bound = of.bound, memory = of.memory, version = of.version] {
            if (captured && at(context).version != version) bug("a graph of a context that has changed");
            machine_.check(memory, activationBytes());
            std::memset(memory, 0xA5, activationBytes());
            run(at(context).profile, ids, bound);
        });
    }

 private:
    // An execution context. NVIDIA's guide (CUDA Graphs, with dynamic shapes): after a change of input shapes, a step
    // must run before one is captured, and a graph may not run once the context that it was captured from has changed.
    // After a change of addresses, the next step calls plugins' onShapeChange first (NvInferRuntime.h,
    // IPluginV3OneRuntime); that counts here for plans that take rows by index, as others bind theirs at every step.
    // Activations: NvInferRuntime.h on setDeviceMemoryV2, and NVIDIA's guide to TensorRT-RTX, Limitations of CUDA
    // Graphs, which says that they are a part of a graph.
    struct Context {
        int profile;
        std::map<std::string, Shape> shapes = {};
        std::map<std::string, unsigned char*> bound = {};
        void* memory = nullptr;
        int version = 0;
        bool ran = false;  // since it has changed

        void changed() {
            ++version;
            ran = false;
        }
    };
    Context& at(int context) { return contexts_.at(static_cast<size_t>(context)); }
    int64_t stateRows(Context const& of) const { return of.shapes.at(contract_.state()[0].past.name)[0]; }

    void run(int profile, Shape const& shape, std::map<std::string, unsigned char*> const& at) const {
        machine_.steps.emplace_back(profile, shape);
        auto const* ids = reinterpret_cast<int64_t const*>(at.at(contract_.inputIds().name));
        auto const* past = reinterpret_cast<int32_t const*>(at.at(contract_.pastLength().name));
        auto const* newLength = reinterpret_cast<int32_t const*>(at.at(contract_.newLength().name));
        auto* logits = reinterpret_cast<float*>(at.at(contract_.logits().name));
        std::vector<StateTensor> const tensors = contract_.state();
        unsigned char const* firstPast = at.at(tensors[0].past.name);
        auto const* block = reinterpret_cast<unsigned char const*>(machine_.base(firstPast));
        Feed feed;
        for (int64_t row = 0; row < shape[0]; ++row) {
            if (machine_.byIndex && newLength[row] == 0) continue;
            feed.past.push_back(past[row]);
            feed.rows.push_back((firstPast - block) / tensors[0].rowBytes + row);
            if (machine_.byIndex) {
                feed.rows.back() = reinterpret_cast<int32_t const*>(at.at(contract_.rows().name))[row];
            }
            int64_t const* begin = ids + row * shape[1];
            feed.ids.emplace_back(begin, begin + newLength[row]);
        }
        machine_.feeds.push_back(feed);
        int64_t const logitTokens = contract_.allLogits ? shape[1] : 1;
        for (int64_t row = 0; row < shape[0]; ++row) {
            if (machine_.byIndex && newLength[row] == 0) {  // neither reads nor writes its state (less_attention.h)
                int64_t const width = logitTokens * contract_.vocabSize;
                std::fill_n(logits + row * width, width, NAN);
                continue;
            }
            std::vector<uint64_t> hash(static_cast<size_t>(shape[1]), 0);
            for (int64_t t = newLength[row]; t < shape[1]; ++t) {
                if (ids[row * shape[1] + t] != 0) bug("padding reaches the embedding");
            }
            for (size_t i = 0; i < tensors.size(); ++i) {
                auto const bytes = static_cast<size_t>(tensors[i].rowBytes);
                unsigned char const* from = at.at(tensors[i].past.name);
                unsigned char* to = at.at(tensors[i].present.name);
                if ((from == to) != machine_.inPlace) bug("memory is shared without a plugin, or the reverse");
                auto const place = static_cast<size_t>(machine_.byIndex ? feed.rows[static_cast<size_t>(row)] : row);
                std::memmove(to + place * bytes, from + place * bytes, bytes);
                unsigned char* state = to + place * bytes;
                for (int64_t t = 0; t < newLength[row]; ++t) {
                    for (size_t j = 0; j < bytes; ++j) {
                        state[j] = mixed(state[j], ids[row * shape[1] + t], past[row] + t, i, j);
                    }
                    hash[static_cast<size_t>(t)] += hashed(state, bytes, i);
                }
            }
            for (int64_t t = 0; t < logitTokens; ++t) {
                int64_t const token = contract_.allLogits ? t : std::max(newLength[row] - 1, 0);
                for (int64_t v = 0; v < contract_.vocabSize; ++v) {
                    logits[(row * logitTokens + t) * contract_.vocabSize + v] =
                        logit(hash[static_cast<size_t>(token)], v);
                }
            }
        }
    }

    Contract contract_;
    Machine& machine_;
    std::deque<Context> contexts_;
};

// The engine of a contract on a host machine, run through graphs.
inline std::unique_ptr<PlanRunner> runnerOn(Machine& machine, Contract const& contract) {
    return std::make_unique<PlanRunner>(contract, std::make_unique<HostDevice>(machine),
                                        std::make_unique<HostPlan>(contract, machine), machine.inPlace, true,
                                        machine.byIndex);
}

}  // namespace less::testing
