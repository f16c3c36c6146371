// Files of row states in memory.
#pragma once

#include <string>
#include <string_view>

#include "less_runtime.hpp"

namespace less {

// The bytes of a file with `state`, whose size and length fit `contract`. Throws BackendError.
std::string writeState(RowState const& state, Contract const& contract);

// The state in the bytes of a file. Throws JsonError if it is damaged, BackendError if it is no saved state or belongs
// to another contract.
RowState readState(std::string_view file, Contract const& contract);

// The first tensor of a state with values that no state has, and which; "" if there is none. `state.data` has the size
// that the contract states.
std::string invalidValues(RowState const& state, Contract const& contract);

}  // namespace less
