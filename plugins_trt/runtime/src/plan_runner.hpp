// Runs a plan step by step and holds its state on the device.
#pragma once

#include <array>
#include <memory>

#include "engine.hpp"

namespace less {

// State is allocated once per batch size. A plan with the plugin updates it in place; otherwise there are two copies,
// which swap roles after every step. The decode step is captured into a graph (one for each assignment of the roles)
// that copies tokens and lengths from pinned memory, runs the engine and copies the logits back.
class PlanRunner {
 public:
    // `inPlace`: the plan has the plugin, as the manifest says; the engine need not say so. Throws EngineError if the
    // plan does not match the contract, or the engine contradicts the manifest.
    PlanRunner(Contract contract, std::unique_ptr<Device> device, std::unique_ptr<Plan> plan, bool inPlace,
               bool graphs);

    ~PlanRunner();
    PlanRunner(PlanRunner const&) = delete;
    PlanRunner& operator=(PlanRunner const&) = delete;

    void open(int64_t batch);  // empties all rows; memory and graphs are reused if the batch is the same
    void close();
    // Returns the logits in pinned memory, valid until the next step.
    float const* step(int64_t const* inputIds, int64_t tokens, int32_t const* pastLength, int32_t const* newLength);

    // Rows in the layout of RowState::data.
    void resetRow(int64_t row);
    void copyRow(int64_t from, int64_t to);
    void readRow(int64_t row, std::byte* data);
    void writeRow(int64_t row, std::byte const* data);

 private:
    // One state tensor and its offset in a block of memory.
    struct Slot {
        StateTensor tensor;
        size_t offset;
    };

    void checkPlan() const;
    void checkAliases() const;
    void checkTensors(std::vector<TensorSpec> const& specs, bool input) const;
    void allocate(int64_t batch);
    void drain() noexcept;
    std::byte* at(Slot const& slot, int side) const;
    std::byte* rowOf(Slot const& slot, int64_t row) const { return at(slot, side_) + row * slot.tensor.rowBytes; }
    void reshape(int profile, int64_t tokens);
    void run(int profile, int64_t tokens);

    Contract contract_;
    std::unique_ptr<Device> device_;
    std::unique_ptr<Plan> plan_;  // must outlive the graphs and memory below
    bool inPlace_, graphs_;
    std::vector<Slot> slots_;

    int64_t batch_ = 0;
    int side_ = 0;                 // which block holds the past state
    std::array<Memory, 2> state_;  // only the first if `inPlace_`
    // Lengths and ids, and the logits, on the device and on the host.
    Memory input_, hostInput_, logits_, hostLogits_;
    size_t newOffset_ = 0, idsOffset_ = 0;
    std::vector<int64_t> shaped_;  // tokens per row that each profile's shapes are set to; 0: not set
    std::array<std::unique_ptr<Graph>, 2> decode_;
};

}  // namespace less
