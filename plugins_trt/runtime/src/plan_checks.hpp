// Whether a plan is one of a contract.
#pragma once

#include "engine.hpp"

namespace less {

// As in messages: [1, 2].
std::string textOf(Shape const& shape);

// Throws EngineError if tensors or profiles of a plan are not those of the contract, or if the plan contradicts the
// manifest, which says whether it works `inPlace`.
void checkPlan(Plan const& plan, Contract const& contract, bool inPlace, bool rowsByIndex);

}  // namespace less
