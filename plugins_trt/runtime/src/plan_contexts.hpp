// The execution contexts of a plan, and which of them runs a step.
#pragma once

#include <array>
#include <deque>
#include <map>

#include "engine.hpp"

namespace less {

struct PlanContext {
    int index;                                          // in the plan
    std::pair<int64_t, int64_t> shaped = {};            // [B, T] that its shapes are set to; 0, 0: not set
    std::array<std::unique_ptr<Graph>, 2> graphs = {};  // of its step, one for each block of state
};

// One context for prompts, if the plan takes them, and those that decode. A CUDA graph of the decode step serves
// one number of rows, and TensorRT forbids launching it once the context that it was captured from has other shapes. So
// there is a context for each bucket: 1, 2, 4, 8, ... rows, and all that are open. A bucket gets its context when a
// step first needs it, that of all rows at once; contexts are kept when rows are opened again. See
// less_export/runtime/trt_contexts.py for what TensorRT says of contexts that share a profile and memory.
class PlanContexts {
 public:
    explicit PlanContexts(Plan& plan);

    // Takes new memory for `batch` rows: `attach` binds it to a context.
    void open(int64_t batch, std::function<void(int)> attach);
    // Forgets memory and graphs.
    void close();
    void dropGraphs();

    // The context of steps of several tokens.
    PlanContext& ofPrompts() { return contexts_[1]; }
    // The context of decode steps whose number of rows changes.
    PlanContext& ofAnyRows() { return contexts_[0]; }
    // The smallest bucket that holds so many rows, and its context; a larger one if there is no memory for it.
    std::pair<int64_t, PlanContext*> ofBucket(int64_t rows);

 private:
    int another();

    Plan& plan_;
    std::deque<PlanContext> contexts_;  // the first ones have the profile of their place, all others decode
    size_t used_ = 0;                   // of these, since rows were opened
    std::map<int64_t, int> buckets_;    // rows, and the context that runs them; kNone: not used yet
    std::function<void(int)> attach_;
};

}  // namespace less
