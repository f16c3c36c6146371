// The sampler on the host, for tests.
#define cudaDriverGetVersion(version) (*(version) = 0, cudaSuccess)  // no driver

#include "sample.cu"

extern "C" void less_host_set_order(int order) { emu::order() = order; }
