// What tests of emulated kernels set, and what they count.
#pragma once

#include <cstdlib>

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

}  // namespace emu
