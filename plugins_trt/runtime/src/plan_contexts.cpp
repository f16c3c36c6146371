#include "plan_contexts.hpp"

namespace less {
namespace {

constexpr int kNone = -1;

}  // namespace

PlanContexts::PlanContexts(Plan& plan) : plan_(plan) {
    for (int profile = 0; profile < plan.profiles(); ++profile) contexts_.push_back({profile});
}

void PlanContexts::open(int64_t batch, std::function<void(int)> attach) {
    close();
    attach_ = std::move(attach);
    for (int64_t rows = 1; rows < batch; rows *= 2) buckets_[rows] = kNone;
    buckets_[batch] = 0;
    used_ = static_cast<size_t>(plan_.profiles());
    for (size_t i = 0; i < used_; ++i) attach_(contexts_[i].index);
}

void PlanContexts::close() {
    dropGraphs();
    for (PlanContext& context : contexts_) context.shaped = {};  // other addresses: a step has to run before a capture
    buckets_.clear();
    attach_ = {};
}

void PlanContexts::dropGraphs() {
    for (PlanContext& context : contexts_) context.graphs = {};
}

std::pair<int64_t, PlanContext*> PlanContexts::ofBucket(int64_t rows) {
    auto bucket = buckets_.lower_bound(rows);
    for (; bucket->second == kNone; bucket = buckets_.erase(bucket)) {  // the last one has a context
        bucket->second = another();
        if (bucket->second != kNone) break;
    }
    return {bucket->first, &contexts_[static_cast<size_t>(bucket->second)]};
}

// One more context that decodes, or kNone.
int PlanContexts::another() {
    if (used_ == contexts_.size()) {
        int const index = plan_.addContext(0);
        if (index < 0) {
            plan_.note("less: steps of few rows are padded to more: no context for them");
            return kNone;
        }
        contexts_.push_back({index});
    }
    attach_(contexts_[used_].index);
    return static_cast<int>(used_++);
}

}  // namespace less
