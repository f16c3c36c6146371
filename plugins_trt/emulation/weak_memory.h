// What threads of different blocks see of one another's writes, as weakly as CUDA's memory model allows.
//
// Of the memory that is written with publish (device.cuh) and read with __ldcg. A write becomes visible
// - to its thread at once, and to its block at the next barrier of the block;
// - to a thread of another block if the writer, or a thread that saw the write, ran __threadfence() and then an atomic
//   operation, the reader one after that, and then __threadfence(); or if a barrier passed that on to the reader;
// - to everybody when the launch ends.
// Atomic operations themselves are seen at once.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

namespace emu {

// What a thread knows: the times, in atomic operations, up to which it has observed and acquired what was published.
struct View {
    long observed = 0, acquired = 0;
};

class WeakMemory {
 public:
    // A thread: its block, its number, and how many barriers the block has passed.
    struct Who {
        int block, thread;
        unsigned generation;
    };

    template <class T>
    void store(Who const& who, T* target, T const& value) {
        static_assert(sizeof(T) <= sizeof(Write::bytes), "too large to store");
        Write write{target, sizeof(T), who, -1, 0, {}};
        std::memcpy(write.bytes, &value, sizeof(T));
        at_[target].push_back(writes_.size());
        pending_[who.block].push_back(writes_.size());
        writes_.push_back(write);
    }

    template <class T>
    T load(Who const& who, View const& view, T const* source) const {
        T value = *source;
        auto const found = at_.find(source);
        if (found == at_.end()) return value;
        for (auto i = found->second.rbegin(); i != found->second.rend(); ++i) {
            Write const& write = writes_[*i];
            if (!before(write, who) && (write.published == 0 || write.published > view.acquired)) continue;
            std::memcpy(&value, write.bytes, sizeof(T));
            break;
        }
        return value;
    }

    void fence(Who const& who, View& view) {
        view.acquired = std::max(view.acquired, view.observed);
        for (size_t i : pending_[who.block]) {
            if (before(writes_[i], who)) writes_[i].fencedBy = who.thread;
        }
    }

    void atomic(Who const& who, View& view) {
        view.observed = ++clock_;
        auto& pending = pending_[who.block];
        auto const publish = [&](size_t i) {
            if (writes_[i].fencedBy != who.thread) return false;
            writes_[i].published = clock_;
            return true;
        };
        pending.erase(std::remove_if(pending.begin(), pending.end(), publish), pending.end());
    }

    // At the end of a launch.
    void settle() {
        for (Write const& write : writes_) std::memcpy(write.target, write.bytes, write.size);
        writes_.clear();
        at_.clear();
        pending_.clear();
    }

 private:
    struct Write {
        void* target;
        size_t size;
        Who who;
        int fencedBy;
        long published;  // 0: not yet
        unsigned char bytes[16];
    };
    // Whether a write comes before what `who` does now, in their block.
    static bool before(Write const& write, Who const& who) {
        if (write.who.block != who.block) return false;
        return write.who.thread == who.thread || write.who.generation < who.generation;
    }

    std::vector<Write> writes_;
    std::map<void const*, std::vector<size_t>> at_;  // indices of writes
    std::map<int, std::vector<size_t>> pending_;     // of a block, not yet published
    long clock_ = 0;
};

}  // namespace emu
