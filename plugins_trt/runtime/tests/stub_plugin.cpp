// A library that notes in the environment that it was loaded, and cannot be used if LESS_TEST_OLD_DRIVER is set.
#include <cstdlib>

extern "C" char const* lessWhyUnusable() { return std::getenv("LESS_TEST_OLD_DRIVER") ? "an old driver" : nullptr; }

[[maybe_unused]] static int const loaded = ::setenv("LESS_TEST_STUB", "loaded", 1);
