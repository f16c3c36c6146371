// A library that notes in the environment that it was loaded.
#include <cstdlib>

[[maybe_unused]] static int const loaded = ::setenv("LESS_TEST_STUB", "loaded", 1);
