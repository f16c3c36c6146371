// Runs a plan step by step and holds its state on the device.
#pragma once

#include <array>
#include <exception>
#include <memory>

#include "device_sampler.hpp"
#include "engine.hpp"
#include "plan_contexts.hpp"

namespace less {

// State is allocated once per batch size. If the plan takes rows by index, the state is bound once, and a step runs any
// rows where they are, without those that are parked.
//
// Other plans run adjacent rows. A plan with the plugin updates the state in place; otherwise there are two blocks of
// it, a step reads one and writes the other, and each row is in one of them. Rows that are stepped together must be in
// the same block, so those in the minority move by a copy of their state: once, when a row joins others. A range of
// rows is bound by its address, or copied to aligned memory where TensorRT cannot take that address.
//
// The decode step of any rows, or of a range that begins at row 0, is captured into a graph (one for each block) that
// copies tokens, lengths and rows from pinned memory, runs the engine and, unless tokens are chosen on the device,
// copies the logits back. By index there are graphs for several numbers of rows (PlanContexts), and a step has parked
// rows behind the others if there is none for so many; of ranges, another number of rows is captured again.
class PlanRunner {
 public:
    // `inPlace`: the plan has the plugin, as the manifest says; the engine need not say so. `rowsByIndex`: that plan
    // takes rows by index. With `sample`, logits stay on the device until they are asked for. Throws EngineError if the
    // plan does not match the contract, or the engine contradicts the manifest.
    PlanRunner(Contract contract, std::unique_ptr<Device> device, std::unique_ptr<Plan> plan, bool inPlace, bool graphs,
               bool rowsByIndex = false, SampleKernel sample = {});

    ~PlanRunner();
    PlanRunner(PlanRunner const&) = delete;
    PlanRunner& operator=(PlanRunner const&) = delete;

    void open(int64_t batch);  // empties all rows; memory and graphs are reused if the batch is the same
    void close();
    bool rowsByIndex() const noexcept { return rowsByIndex_; }
    // Runs `rows` alone; the arrays hold these rows. They are distinct, and adjacent unless rowsByIndex(). A step of
    // one token by index whose logits stay on the device is not waited for: it is in flight until finish(), logits() or
    // pick(), of which the last two throw its BackendError, and must be finished before anything else is called.
    void step(std::vector<int64_t> const& rows, int64_t const* inputIds, int64_t tokens, int32_t const* pastLength,
              int32_t const* newLength);
    // Waits for the step in flight, if there is one; false if it has failed, then and until the next step.
    bool finish();
    // Logits [*, vocab] of all rows given to the latest step in pinned memory, valid until the next one; only those at
    // `places` are defined.
    float const* logits(std::vector<int64_t> const& places);
    // Whether pick() chooses for a sequence: only with `sample`, and not what DeviceSampler leaves to the host.
    bool samples(Sampler const& sampler) const { return sampler_ && sampler_->suits(sampler); }
    // A token for each of `samplers` by the logits at these places; see DeviceSampler.
    std::vector<int32_t> pick(std::vector<Sampler*> const& samplers, std::vector<int64_t> const& places);

    // Rows in the layout of RowState::data.
    void resetRow(int64_t row);
    void copyRow(int64_t from, int64_t to);
    void readRow(int64_t row, std::byte* data);
    void writeRow(int64_t row, std::byte const* data);

 private:
    // One state tensor, its offset in a block of memory and in the empty row, and aligned memory for rows of it (past
    // and present; only the first if `inPlace_`).
    struct Slot {
        StateTensor tensor;
        size_t offset = 0, emptyOffset = 0;
        std::array<Memory, 2> staged{};
        int64_t stagedRows = 0;
    };

    void allocate(int64_t batch);
    void drain() noexcept;
    std::byte* at(Slot const& slot, int64_t row, int side) const;
    std::byte* rowOf(Slot const& slot, int64_t row) const { return at(slot, row, sides_[static_cast<size_t>(row)]); }
    void bind(int context);
    int meet(RowRange rows);
    void stage(Slot& slot, int64_t count);
    void reshape(PlanContext& context, int64_t count, int64_t tokens);
    void park(int64_t running, int64_t count, int64_t tokens);
    void wait();
    void launch(int64_t first, int64_t running, int64_t tokens);
    void run(PlanContext const& context, RowRange rows, int side, int64_t tokens, int64_t wanted);
    void spread();
    int64_t onDevice(int64_t place) const;

    Contract contract_;
    std::unique_ptr<Device> device_;
    std::unique_ptr<Plan> plan_;  // must outlive the graphs and memory below
    PlanContexts contexts_;
    bool inPlace_, graphs_, rowsByIndex_;
    SampleKernel sample_;
    std::vector<Slot> slots_;

    int64_t batch_ = 0;
    std::vector<int> sides_;       // which block holds each row: 0 or 1, always 0 if `inPlace_`
    std::array<Memory, 2> state_;  // only the first if `inPlace_`
    Memory empty_;                 // the state of an empty row, for resets
    Memory activations_;           // of the step that runs
    // Lengths, rows and ids, and the logits, on the device and on the host.
    Memory input_, hostInput_, logits_, hostLogits_;
    std::unique_ptr<DeviceSampler> sampler_;
    // Of each row given to the latest step, its place among those that ran, which alone have logits on the device; -1:
    // it was parked and left out.
    std::vector<int64_t> ran_;
    int64_t logitTokens_ = 1;     // of each row of the latest step
    bool inFlight_ = false;       // whether it has not been waited for
    std::exception_ptr failure_;  // of the latest step, if it was in flight
    size_t newOffset_ = 0, rowsOffset_ = 0, idsOffset_ = 0;
};

}  // namespace less
