// Runs CUDA kernels on the host: one fiber per CUDA thread, blocks one after another or at once, in a selectable order.
//
// Use it to compile a .cu file without nvcc (CUDA's headers are needed for their types; nvcc and a driver are not):
//     g++ -std=c++17 -x c++ -include plugins_trt/emulation/cuda_emu.h -I$CUDA_HOME/include kernel.cu
//
// It finds:
// - missing barriers and waits: a thread runs until it has to wait, so in some order the data is not there yet;
// - reads of shared memory that has not been written: it is initialised to NaN;
// - accesses out of bounds: shared memory is a heap block of the exact size (build with -fsanitize=address);
// - barriers that not all threads reach: reported as a deadlock;
// - missing fences between blocks, for memory that is written with publish and read with __ldcg: see weak_memory.h.
// It cannot find other races between blocks, or measure time.
//
// EMU_ORDER: 0 threads and blocks in ascending order, 1 in descending order, 2 and 3 shuffled each time; with 4
// (ascending) and 5 (descending), each warp runs as far as possible before the next one starts. With 3 and 6 (otherwise
// like 0), several blocks run at once, in turn.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "switches.h"
#include "weak_memory.h"

#define LESS_EMULATION 1

#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline
#undef __noinline__
#define __noinline__

namespace emu {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr int kResident = 4;  // blocks that run at once, if more than one does

struct Barrier {
    int size = 0;
    int arrived = 0;
    unsigned generation = 0;
};

// One CUDA thread.
struct Fiber {
    void* resume[5];
    ucontext_t start;
    std::unique_ptr<char[]> stack;
    bool started = false;
    bool running = false;  // inside the kernel
    unsigned exchanges = 0;
    View view;
    // Asynchronous copies: `open` until committed, then one group each.
    std::vector<std::function<void()>> open;
    std::vector<std::vector<std::function<void()>>> groups;
};

// Values that lanes exchange; two buffers, so that a fast lane cannot overwrite what a slow one still reads.
struct Exchange {
    alignas(16) unsigned char bytes[2][kWarp][64];
};

// A place for a CUDA block.
struct Block {
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    std::vector<Exchange> exchanges;
    Barrier barrier;
    long arrived = 0, acquired = 0;  // what threads that arrive at the barrier, and that have passed it, have acquired
    std::unique_ptr<unsigned char[]> shared;
    size_t sharedBytes = 0;
    int number = 0;
    uint3 index{};
};

struct Machine {
    std::vector<Block> blocks;
    std::function<void()> kernel;
    void* scheduler[5];
    int block = 0, current = 0;  // of blocks, and of its fibers
    long progress = 0;           // increases whenever a thread makes progress
    WeakMemory memory;
    dim3 blockSize, gridSize;
};

inline Machine& machine() {
    static Machine m;
    return m;
}

inline bool interleaved() { return order() == 3 || order() == 6; }
inline Block& here() { return machine().blocks[machine().block]; }
inline Fiber& self() { return here().fibers[machine().current]; }
inline int lane() { return machine().current % kWarp; }

// The two halves of a context switch. They use built-ins because the sanitizers report longjmp between stacks as an
// error, and are not inlined because a built-in jump must not end in the function that it starts from.
__attribute__((noinline, no_sanitize("address"))) inline void leave(void** target) { __builtin_longjmp(target, 1); }

__attribute__((noinline, no_sanitize("address"))) inline void yield() {
    if (__builtin_setjmp(self().resume) == 0) leave(machine().scheduler);
}

inline void wait(Barrier& barrier) {
    unsigned const generation = barrier.generation;
    ++machine().progress;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
}

inline Barrier& warpBarrier() { return here().warps[machine().current / kWarp]; }

inline void waitForBlock() {
    Block& block = here();
    block.arrived = std::max(block.arrived, self().view.acquired);
    if (block.barrier.arrived + 1 == block.barrier.size) block.acquired = block.arrived;
    wait(block.barrier);
    self().view.acquired = std::max(self().view.acquired, block.acquired);
}

inline WeakMemory::Who who() { return {here().number, machine().current, here().barrier.generation}; }

// Lets other blocks run between two accesses to what blocks share.
inline void pause() {
    ++machine().progress;
    if (interleaved()) yield();
}

inline void fiberMain() {
    for (;;) {
        machine().kernel();
        self().running = false;
        ++machine().progress;
        yield();
    }
}

// Runs thread `index` of a block until it has to wait.
__attribute__((noinline, no_sanitize("address"))) inline void resume(int block, int index) {
    Machine& m = machine();
    m.block = block;
    m.current = index;
    if (__builtin_setjmp(m.scheduler) != 0) return;
    Fiber& fiber = self();
    if (fiber.started) leave(fiber.resume);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.stack.reset(new char[kStackBytes]);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiberMain, 0);
    setcontext(&fiber.start);
}

struct Shuffle {
    uint32_t state;
    uint32_t below(uint32_t n) {
        state = state * 1664525u + 1013904223u;
        return (state >> 8) % n;
    }
    void operator()(std::vector<int>& items) {
        for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(static_cast<uint32_t>(i))]);
    }
};

inline std::vector<int> indices(int n, bool descending) {
    std::vector<int> items(n);
    for (int i = 0; i < n; ++i) items[i] = descending ? n - 1 - i : i;
    return items;
}

inline void begin(Block& block, int number, int threads, size_t sharedBytes) {
    dim3 const grid = machine().gridSize;
    int const warps = (threads + kWarp - 1) / kWarp;
    block.number = number;
    block.index = make_uint3(number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y));
    block.warps.assign(warps, Barrier{});
    for (int w = 0; w < warps; ++w) block.warps[w].size = std::min(kWarp, threads - w * kWarp);
    block.exchanges.resize(warps);
    block.barrier = Barrier{threads};
    block.arrived = block.acquired = 0;
    block.shared.reset(new unsigned char[sharedBytes]);
    block.sharedBytes = sharedBytes;
    std::memset(block.shared.get(), 0xff, sharedBytes);  // NaN
    if (static_cast<int>(block.fibers.size()) < threads) block.fibers.resize(threads);
    for (int t = 0; t < threads; ++t) {
        block.fibers[t].running = true;
        block.fibers[t].exchanges = 0;
        block.fibers[t].view = {};
    }
}

inline bool alive(Block const& block) {
    return std::any_of(block.fibers.begin(), block.fibers.end(), [](Fiber const& f) { return f.running; });
}

// Runs every thread of a block until it has to wait.
inline void round(int place, int threads, std::vector<int>& turn, Shuffle& shuffle) {
    Machine& m = machine();
    auto const run = [&](int thread) {
        if (m.blocks[place].fibers[thread].running) resume(place, thread);
    };
    if (order() < 4 || order() == 6) {
        if (order() == 2 || order() == 3) shuffle(turn);
        for (int t : turn) run(t);
        return;
    }
    for (int w : indices((threads + kWarp - 1) / kWarp, order() == 5)) {
        for (long before = -1; before != m.progress;) {
            before = m.progress;
            for (int t = w * kWarp; t < std::min(threads, (w + 1) * kWarp); ++t) run(t);
        }
    }
}

// Runs the first `count` places' blocks to their end, in turn.
inline void runBlocks(int count, int threads, Shuffle& shuffle) {
    Machine& m = machine();
    std::vector<int> turn = indices(threads, order() == 1);
    for (bool running = true; running;) {
        long const before = m.progress;
        running = false;
        for (int place = 0; place < count; ++place) {
            if (!alive(m.blocks[place])) continue;
            running = true;
            round(place, threads, turn, shuffle);
        }
        if (running && m.progress == before) {
            std::fprintf(stderr, "emulation: deadlock: not every thread reaches a barrier\n");
            std::abort();
        }
    }
    for (int place = 0; place < count; ++place) {
        for (Fiber& fiber : m.blocks[place].fibers) {
            fiber.open.clear();
            fiber.groups.clear();
        }
    }
}

template <class Kernel>
cudaError_t launch(dim3 grid, int threads, size_t sharedBytes, Kernel&& kernel) {
    Machine& m = machine();
    ++launches();
    prefetches().clear();
    m.kernel = kernel;
    m.gridSize = grid;
    m.blockSize = dim3(threads);
    size_t const resident = interleaved() ? kResident : 1;
    if (m.blocks.size() < resident) m.blocks.resize(resident);
    Shuffle shuffle{12345u + static_cast<uint32_t>(order())};
    int const blocks = static_cast<int>(grid.x * grid.y * grid.z);
    std::vector<int> turn = indices(blocks, order() == 1 || order() == 5);
    if (order() == 2 || order() == 3) shuffle(turn);
    for (size_t first = 0; first < turn.size(); first += resident) {
        size_t const count = std::min(resident, turn.size() - first);
        for (size_t i = 0; i < count; ++i) begin(m.blocks[i], turn[first + i], threads, sharedBytes);
        runBlocks(static_cast<int>(count), threads, shuffle);
    }
    m.memory.settle();
    return cudaSuccess;
}

// Exchanges `mine` among the lanes of a warp, which all have to call this. Returns the value of lane `from`; those of
// the other lanes lie beside it, sizeof(Exchange::bytes[0][0]) apart.
template <class T>
T const& exchanged(T const& mine, int from) {
    static_assert(sizeof(T) <= sizeof(Exchange::bytes[0][0]), "too large for the exchange");
    Machine& m = machine();
    auto& bytes = here().exchanges[m.current / kWarp].bytes[self().exchanges++ & 1];
    std::memcpy(bytes[lane()], &mine, sizeof(T));
    wait(warpBarrier());
    return *reinterpret_cast<T const*>(bytes[from & (kWarp - 1)]);
}

inline uint3 threadIndex() { return make_uint3(static_cast<unsigned>(machine().current), 0, 0); }

}  // namespace emu

#define threadIdx (emu::threadIndex())
#define blockIdx (emu::here().index)
#define blockDim (emu::machine().blockSize)
#define gridDim (emu::machine().gridSize)

inline void __syncthreads() { emu::waitForBlock(); }
inline void __syncwarp(unsigned = ~0u) { emu::wait(emu::warpBarrier()); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emu::exchanged(value, emu::lane() ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return emu::exchanged(value, from);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    int const mine = predicate != 0;
    int const* all = &emu::exchanged(mine, 0);
    unsigned bits = 0;
    for (int i = 0; i < emu::kWarp; ++i) {
        auto const* at = reinterpret_cast<unsigned char const*>(all) + i * sizeof(emu::Exchange::bytes[0][0]);
        bits |= static_cast<unsigned>(*reinterpret_cast<int const*>(at)) << i;
    }
    return bits;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    for (int mask = 1; mask < emu::kWarp; mask *= 2) value = std::max(value, __shfl_xor_sync(~0u, value, mask));
    return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __threadfence() {
    emu::machine().memory.fence(emu::who(), emu::self().view);
    emu::pause();
}
template <class T>
T atomicAdd(T* target, T value) {
    emu::machine().memory.atomic(emu::who(), emu::self().view);
    T const before = *target;
    *target += value;
    emu::pause();
    return before;
}
template <class T>
T atomicExch(T* target, T value) {
    emu::machine().memory.atomic(emu::who(), emu::self().view);
    emu::pause();
    return std::exchange(*target, value);
}
template <class T>
T __ldcg(T const* source) {
    return emu::machine().memory.load(emu::who(), emu::self().view, source);
}
namespace emu {
template <class T>
void publish(T* target, T value) {
    auto const* const at = reinterpret_cast<unsigned char const*>(target);
    bool const shared = at >= here().shared.get() && at < here().shared.get() + here().sharedBytes;
    if (shared) {
        *target = value;
    } else {
        machine().memory.store(who(), target, value);
    }
}
}  // namespace emu
template <class T>
T __ldcs(T const* source) {
    return *source;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
using std::max;
using std::min;

#include "host_runtime.h"
