// less_generate on the mocked machine: the example's own source, with its main renamed.
#include "mock_sdk.hpp"

int exampleMain(int argc, char** argv);

int main(int argc, char** argv) {
    if (argc > 1) {
        less::OpenOptions options;
        options.trustCode = true;
        try {
            less::Bundle const bundle = less::Bundle::open(argv[1], options);
            less::testing::resetMockSdk(bundle.contract);
            less::testing::mockSdk().machine.inPlace = bundle.plugin.has_value();
        } catch (less::Error const&) {
            // The example says so.
        }
    }
    return exampleMain(argc, argv);
}
