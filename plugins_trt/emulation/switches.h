// What tests of emulated kernels set, and what they count.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>

namespace emu {

// The order of threads and blocks, see cuda_emu.h. Initialised from the environment; may be changed between launches.
inline int& order() {
    static int value = std::getenv("EMU_ORDER") != nullptr ? std::atoi(std::getenv("EMU_ORDER")) : 0;
    return value;
}

// Number of blocks to split a launch into. Tests change it to take other code paths with the same shapes.
inline int& blocksWanted() {
    static int wanted = 512;
    return wanted;
}

// Chunks of more tokens take the kernels of long chunks. Tests change it, so that shorter ones take them too.
inline int& longestShortChunk() {
    static int tokens = 64;
    return tokens;
}

// Launches so far.
inline int& launches() {
    static int count = 0;
    return count;
}

// The lines of 128 bytes that the last launch prefetched, and how often.
inline std::map<uintptr_t, int>& prefetches() {
    static std::map<uintptr_t, int> lines;
    return lines;
}
// Reads a byte, so that the address sanitizer sees it.
inline void prefetch(char const* address) {
    static_cast<void>(*static_cast<char const volatile*>(address));
    ++prefetches()[reinterpret_cast<uintptr_t>(address) / 128];
}

}  // namespace emu
