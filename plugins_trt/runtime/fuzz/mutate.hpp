// Mutations for the driver that needs no libFuzzer.
#pragma once

#include <random>
#include <string>
#include <vector>

namespace less::fuzz {

using Random = std::mt19937_64;

// A copy of one of `seeds` with one to six changes: bits and bytes, cuts, pieces of itself and of other seeds, edges
// of numbers (in text and in binary), and JSON values that are repeated, removed or replaced by others.
std::string mutated(std::vector<std::string> const& seeds, Random& random);

}  // namespace less::fuzz
