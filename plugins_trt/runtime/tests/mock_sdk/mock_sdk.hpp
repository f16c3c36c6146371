// What a test configures before it opens a session on the mocked machine.
#pragma once

#include "host_machine.hpp"

namespace less::testing {

struct MockSdk {
    Machine machine;
    std::unique_ptr<HostDevice> device = std::make_unique<HostDevice>(machine);
    std::unique_ptr<HostPlan> plan;  // every plan deserialises to this
    int devices = 1, driver = 13000, runtime = 13000, library = 101601;
    bool starts = true, loads = true, prepares = true, captures = true, hostCode = false;
    std::set<int> prepared;  // profiles of this plan that have a context
    int streams = 0, graphs = 0, batches = 0, current = -1;
};

// That of the current test.
MockSdk& mockSdk();
void resetMockSdk(Contract const& contract);

}  // namespace less::testing
