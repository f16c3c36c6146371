// Runs CUDA kernels on the host: one fiber per CUDA thread, one block after another, in a selectable order.
//
// Use it to compile a .cu file without nvcc (CUDA's headers are needed for their types; nvcc and a driver are not):
//     g++ -std=c++17 -x c++ -include plugins_trt/emulation/cuda_emu.h -I$CUDA_HOME/include kernel.cu
//
// It finds:
// - missing barriers and waits: a thread runs until it has to wait, so in some order the data is not there yet;
// - reads of shared memory that has not been written: it is initialised to NaN;
// - accesses out of bounds: shared memory is a heap block of the exact size (build with -fsanitize=address);
// - barriers that not all threads reach: reported as a deadlock.
// It cannot find races between blocks, or measure time.
//
// EMU_ORDER: 0 threads and blocks in ascending order, 1 in descending order, 2 and 3 shuffled each time; with 4
// (ascending) and 5 (descending), each warp runs as far as possible before the next one starts.
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
#include <vector>

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
    // Asynchronous copies: `open` until committed, then one group each.
    std::vector<std::function<void()>> open;
    std::vector<std::vector<std::function<void()>>> groups;
};

// Values that lanes exchange; two buffers, so that a fast lane cannot overwrite what a slow one still reads.
struct Exchange {
    alignas(16) unsigned char bytes[2][kWarp][64];
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    std::vector<Exchange> exchanges;
    Barrier block;
    std::function<void()> kernel;
    std::unique_ptr<unsigned char[]> shared;
    size_t sharedBytes = 0;
    void* scheduler[5];
    int current = 0;
    long progress = 0;  // increases whenever a thread makes progress
    uint3 blockIndex{};
    dim3 blockSize, gridSize;
};

inline Machine& machine() {
    static Machine m;
    return m;
}

// Initialised from the environment; may be changed between launches.
inline int& order() {
    static int value = std::getenv("EMU_ORDER") != nullptr ? std::atoi(std::getenv("EMU_ORDER")) : 0;
    return value;
}

// Number of blocks to split a launch into. Tests change it to take other code paths with the same shapes.
inline int& blocksWanted() {
    static int wanted = 512;
    return wanted;
}

inline Fiber& self() { return machine().fibers[machine().current]; }
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

inline Barrier& warpBarrier() { return machine().warps[machine().current / kWarp]; }

inline void fiberMain() {
    for (;;) {
        machine().kernel();
        self().running = false;
        ++machine().progress;
        yield();
    }
}

// Runs thread `index` until it has to wait.
__attribute__((noinline, no_sanitize("address"))) inline void resume(int index) {
    Machine& m = machine();
    m.current = index;
    if (__builtin_setjmp(m.scheduler) != 0) return;
    Fiber& fiber = m.fibers[index];
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

inline void runBlock(int threads, Shuffle& shuffle) {
    Machine& m = machine();
    int const warps = (threads + kWarp - 1) / kWarp;
    m.warps.assign(warps, Barrier{});
    for (int w = 0; w < warps; ++w) m.warps[w].size = std::min(kWarp, threads - w * kWarp);
    m.block = Barrier{threads};
    std::memset(m.shared.get(), 0xff, m.sharedBytes);  // NaN
    for (int t = 0; t < threads; ++t) {
        m.fibers[t].running = true;
        m.fibers[t].exchanges = 0;
    }
    bool const greedy = order() >= 4;
    std::vector<int> turn = indices(threads, order() == 1);
    std::vector<int> const warpTurn = indices(warps, order() == 5);
    auto round = [&] {
        if (!greedy) {
            if (order() >= 2) shuffle(turn);
            for (int t : turn) {
                if (m.fibers[t].running) resume(t);
            }
            return;
        }
        for (int w : warpTurn) {
            for (long before = -1; before != m.progress;) {
                before = m.progress;
                for (int t = w * kWarp; t < std::min(threads, (w + 1) * kWarp); ++t) {
                    if (m.fibers[t].running) resume(t);
                }
            }
        }
    };
    auto alive = [&] {
        return std::any_of(m.fibers.begin(), m.fibers.begin() + threads, [](Fiber const& f) { return f.running; });
    };
    while (alive()) {
        long const before = m.progress;
        round();
        if (m.progress == before) {
            std::fprintf(stderr, "emulation: deadlock: not every thread reaches a barrier\n");
            std::abort();
        }
    }
    for (int t = 0; t < threads; ++t) {
        m.fibers[t].open.clear();
        m.fibers[t].groups.clear();
    }
}

template <class Kernel>
cudaError_t launch(dim3 grid, int threads, size_t sharedBytes, Kernel&& kernel) {
    Machine& m = machine();
    if (static_cast<int>(m.fibers.size()) < threads) m.fibers.resize(threads);
    m.exchanges.resize((threads + kWarp - 1) / kWarp);
    m.kernel = kernel;
    m.shared.reset(new unsigned char[sharedBytes]);
    m.sharedBytes = sharedBytes;
    m.gridSize = grid;
    m.blockSize = dim3(threads);
    Shuffle shuffle{12345u + static_cast<uint32_t>(order())};
    int const blocks = static_cast<int>(grid.x * grid.y * grid.z);
    std::vector<int> turn = indices(blocks, order() == 1 || order() == 5);
    if (order() == 2 || order() == 3) shuffle(turn);
    for (int block : turn) {
        m.blockIndex = make_uint3(block % grid.x, block / grid.x % grid.y, block / (grid.x * grid.y));
        runBlock(threads, shuffle);
    }
    return cudaSuccess;
}

// Exchanges `mine` among the lanes of a warp, which all have to call this. Returns the value of lane `from`; those of
// the other lanes lie beside it, sizeof(Exchange::bytes[0][0]) apart.
template <class T>
T const& exchanged(T const& mine, int from) {
    static_assert(sizeof(T) <= sizeof(Exchange::bytes[0][0]), "too large for the exchange");
    Machine& m = machine();
    auto& bytes = m.exchanges[m.current / kWarp].bytes[self().exchanges++ & 1];
    std::memcpy(bytes[lane()], &mine, sizeof(T));
    wait(warpBarrier());
    return *reinterpret_cast<T const*>(bytes[from & (kWarp - 1)]);
}

inline uint3 threadIndex() { return make_uint3(static_cast<unsigned>(machine().current), 0, 0); }

}  // namespace emu

#define threadIdx (emu::threadIndex())
#define blockIdx (emu::machine().blockIndex)
#define blockDim (emu::machine().blockSize)
#define gridDim (emu::machine().gridSize)

inline void __syncthreads() { emu::wait(emu::machine().block); }
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
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __threadfence() {}
template <class T>
T atomicAdd(T* target, T value) {
    T const before = *target;
    *target += value;
    return before;
}
template <class T>
T __ldcg(T const* source) {
    return *source;
}
template <class T>
T __ldcs(T const* source) {
    return *source;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
using std::max;
using std::min;

// ---- runtime calls of the launcher and the plugin, on host memory

namespace emu {
inline cudaError_t copy(void* target, void const* source, size_t bytes) {
    std::memcpy(target, source, bytes);
    return cudaSuccess;
}
template <class T>
cudaError_t allocate(T** address, size_t bytes) {
    *address = static_cast<T*>(std::malloc(bytes));
    return *address != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
}  // namespace emu
#define cudaMemcpyAsync(target, source, bytes, kind, stream) \
    ((void)(kind), (void)(stream), emu::copy(target, source, bytes))
#define cudaMemset(target, value, bytes) (std::memset(target, value, bytes), cudaSuccess)
#define cudaMalloc(address, bytes) emu::allocate(address, bytes)
#define cudaFree(address) (std::free(address), cudaSuccess)
