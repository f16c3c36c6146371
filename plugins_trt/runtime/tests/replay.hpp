// Replays recorded schedules on the host machine.
#pragma once

#include <iosfwd>

#include "less_runtime.hpp"

namespace less::testing {

// How a plan treats the state: with the plugin, without it, or with the plugin and rows by index.
enum class StateOf { kInPlace, kTwoBlocks, kByIndex };

// Reads schedules as tests/schedules.py writes them, and prints what each of their steps did, as that does.
//
// The steps are those of a real scheduler, session and runner over the host machine's engine, whose tokens depend on
// every byte of a row's state and on all that the row was fed. So equal output means: the same rows ran, with the same
// ids, after the same number of tokens, in the same order; no row was lost, swapped or stale; requests were admitted,
// refused, cancelled and ended alike, also when a run or a copy of a row fails. It does not show that an engine
// computes attention, or evicts: the host machine's arithmetic knows no policy. Nor does it show random choices, whose
// generators differ between the languages: what the schedules sample has one possible outcome.
void replay(std::istream& in, std::ostream& out, Contract const& contract, std::vector<int64_t> const& eosIds,
            StateOf kind);

}  // namespace less::testing
