#include "plan_checks.hpp"

#include <algorithm>

namespace less {
namespace {

bool fits(Shape const& actual, Shape const& declared) {
    return actual.size() == declared.size() &&
           std::equal(actual.begin(), actual.end(), declared.begin(), [](auto a, auto b) { return a == -1 || a == b; });
}

void checkTensors(Plan const& plan, std::vector<TensorSpec> const& specs, bool input) {
    std::vector<PlanTensor> tensors = plan.tensors();
    tensors.erase(std::remove_if(tensors.begin(), tensors.end(), [&](auto const& t) { return t.input != input; }),
                  tensors.end());
    auto const named = [](auto const& list, std::string const& name) {
        return std::find_if(list.begin(), list.end(), [&](auto const& t) { return t.name == name; });
    };
    for (PlanTensor const& tensor : tensors) {
        if (named(specs, tensor.name) == specs.end()) {
            throw EngineError("the plan has the tensor " + tensor.name +
                              ", which the contract lacks: export the bundle again");
        }
    }
    for (TensorSpec const& spec : specs) {
        auto const tensor = named(tensors, spec.name);
        if (tensor == tensors.end()) {
            throw EngineError("the plan lacks the tensor " + spec.name + ": export the bundle again");
        }
        Shape const declared = spec.sized(-1, -1);
        if (tensor->dtype != nameOf(spec.type) || !fits(tensor->shape, declared)) {
            throw EngineError("the plan has " + spec.name + " as " + tensor->dtype + " " + textOf(tensor->shape) +
                              " where the contract says " + nameOf(spec.type) + " " + textOf(declared) +
                              ": export the bundle again");
        }
    }
}

void checkAliases(Plan const& plan, Contract const& contract, bool inPlace) {
    for (StateTensor const& tensor : contract.state()) {
        std::string const alias = plan.aliasedInput(tensor.present.name);
        if (alias.empty()) continue;
        std::string const what = "the plan writes " + tensor.present.name + " into " + alias;
        if (!inPlace) throw EngineError(what + ", but its manifest names no plugin: build it again");
        if (alias != tensor.past.name) throw EngineError(what + ": build it again");
    }
}

}  // namespace

std::string textOf(Shape const& shape) {
    std::string result = "[";
    for (int64_t d : shape) result += (result.size() > 1 ? ", " : "") + std::to_string(d);
    return result + "]";
}

void checkPlan(Plan const& plan, Contract const& contract, bool inPlace, bool rowsByIndex) {
    checkTensors(plan, contract.inputs(rowsByIndex), true);
    checkTensors(plan, contract.outputs(rowsByIndex), false);
    // Profile 0 decodes one token, profile 1 prefills up to a chunk.
    int const expected = contract.chunk > 1 ? 2 : 1;
    if (plan.profiles() != expected) {
        throw EngineError("the plan has " + std::to_string(plan.profiles()) + " profiles instead of " +
                          std::to_string(expected) + ": build it again");
    }
    for (int profile = 0; profile < expected; ++profile) {
        for (TensorSpec const& spec : contract.inputs(rowsByIndex)) {
            auto const [minimum, maximum] = plan.range(spec.name, profile);
            Shape const low = spec.sized(1, 1), high = spec.sized(contract.maxBatch, profile ? contract.chunk : 1);
            bool inside = minimum.size() == low.size() && maximum.size() == low.size();
            for (size_t i = 0; inside && i < low.size(); ++i) inside = minimum[i] <= low[i] && high[i] <= maximum[i];
            if (!inside) {
                throw EngineError("the plan's profile " + std::to_string(profile) + " takes " + spec.name + " from " +
                                  textOf(minimum) + " to " + textOf(maximum) + ", the contract needs " + textOf(low) +
                                  " to " + textOf(high) + ": build it again");
            }
        }
    }
    checkAliases(plan, contract, inPlace);
}

}  // namespace less
