// openSession, the CUDA device and the TensorRT plan, on mocks of both libraries.
#include <unistd.h>

#include <fstream>
#include <utility>

#include "check.hpp"
#include "contracts.hpp"
#include "folder.hpp"
#include "mock_sdk.hpp"
#include "sha256.hpp"

namespace {

using namespace less;
using namespace less::testing;

// A bundle with a dummy plan, without a plugin.
struct Rig {
    explicit Rig(Contract contract = twoLayers()) {
        bundle.contract = std::move(contract);
        resetMockSdk(bundle.contract);
        mockSdk().machine.inPlace = false;
        std::ofstream(bundle.plan) << "plan";
    }
    ~Rig() { std::filesystem::remove(bundle.plan); }
    Bundle bundle = [] {
        Bundle b;
        b.plan = std::filesystem::temp_directory_path() / ("less." + std::to_string(::getpid()) + ".plan");
        b.header = {false, "10.16.0.1"};
        b.identity = "this one";
        return b;
    }();
};

SamplingParams maxTokens(int64_t tokens) {
    SamplingParams p;
    p.maxNewTokens = tokens;
    return p;
}

TEST(runs_as_on_the_host_machine) {
    std::vector<Prompt> const prompts = {{1, 2, 3, 4, 5, 6}, {7}, {8, 9, 10, 11, 12}, {13, 14}};
    std::vector<std::vector<int64_t>> first;
    for (bool inPlace : {true, false}) {
        for (bool captures : {true, false}) {
            for (bool graphs : {true, false}) {
                Rig rig;
                mockSdk().machine.inPlace = inPlace;  // which the engine does not tell
                if (inPlace) rig.bundle.plugin = PluginFacts{{}, "", true};
                rig.bundle.trustCode = true;
                mockSdk().captures = captures;
                SessionOptions options;
                options.cudaGraphs = graphs;
                Session session = openSession(rig.bundle, options);
                CHECK(mockSdk().current == 0 && mockSdk().hostCode == inPlace && session.identity() == "this one");
                std::vector<std::vector<int64_t>> tokens;
                for (Generation const& g : generate(session, prompts, maxTokens(9), {})) tokens.push_back(g.tokens);
                if (first.empty()) first = tokens;
                CHECK(tokens == first);
                CHECK((mockSdk().machine.launches > 0) == (captures && graphs));
                CHECK(mockSdk().graphs == (captures && graphs ? (inPlace ? 1 : 2) : 0));
            }
        }
    }
    CHECK(first[0] != first[1]);
    resetMockSdk(twoLayers());  // reports what was not destroyed
}

TEST(rows_by_index) {
    // CUDA 12.8 and later take all copies of a row in one call.
    for (int version : {12060, 12080, 13000}) {
        Rig rig;
        mockSdk().driver = mockSdk().runtime = version;
        mockSdk().machine.inPlace = mockSdk().machine.byIndex = true;
        mockSdk().plan = std::make_unique<HostPlan>(rig.bundle.contract, mockSdk().machine);
        rig.bundle.plugin = PluginFacts{{}, "", true, true};
        rig.bundle.trustCode = true;
        Session session = openSession(rig.bundle);
        CHECK(session.rowsByIndex());
        auto const fed = [&](int64_t row) {
            Logits const logits = session.stepRows({9}, {1}, {row});
            return std::vector<float>(logits.row(0), logits.row(0) + logits.vocab);
        };
        session.open(3);
        std::vector<float> const fresh = fed(1);
        session.open(3);
        session.stepRows({7, 8}, {1, 1}, {2, 0});
        int const before = mockSdk().batches;
        session.copyRow(2, 1);
        session.resetRow(0);
        CHECK(mockSdk().batches - before == (version >= 12080 ? 2 : 0));
        CHECK(fed(0) == fresh);
        std::vector<float> const copy = fed(1);
        CHECK(copy == fed(2) && copy != fresh);
    }
    resetMockSdk(twoLayers());
}

TEST(buckets_without_a_context) {
    Rig rig;
    mockSdk().machine.inPlace = mockSdk().machine.byIndex = true;
    mockSdk().plan = std::make_unique<HostPlan>(rig.bundle.contract, mockSdk().machine);
    rig.bundle.plugin = PluginFacts{{}, "", true, true};
    rig.bundle.trustCode = true;
    Session session = openSession(rig.bundle);
    session.open(3);
    session.stepRows({7}, {1}, {2});
    CHECK(mockSdk().machine.steps.back().second == (Shape{1, 1}));
    mockSdk().prepares = false;
    session.stepRows({7, 8}, {1, 1}, {2, 0});
    CHECK(mockSdk().machine.steps.back().second == (Shape{3, 1}));
}

TEST(unusable_machines) {
    Rig rig;
    auto const refused = [&](char const* text, SessionOptions const& options = {}) {
        REFUSES(BackendError, text, openSession(rig.bundle, options));
    };
    SessionOptions third;
    third.device = 3;
    refused("there is no GPU 3: choose one of 0..0", third);
    mockSdk().devices = 0;
    refused("no CUDA GPU (no device): run nvidia-smi, and check CUDA_VISIBLE_DEVICES");
    mockSdk().driver = 12080;
    refused("the driver supports CUDA up to 12.8, this program needs 13.0: update the driver");
    mockSdk().driver = 0;
    refused("no CUDA driver: run this where nvidia-smi lists a GPU");
    CHECK(mockSdk().streams == 0);
}

TEST(unusable_plans) {
    Rig rig;
    auto const refused = [&](char const* text) { REFUSES(EngineError, text, openSession(rig.bundle)); };
    mockSdk().prepares = false;
    refused("cannot prepare profile 0: out of memory");
    mockSdk().loads = false;
    refused(
        "(built by version 10.16.0.1): The engine plan file is generated on an incompatible device: build it again");
    mockSdk().starts = false;
    refused("TensorRT cannot start: CUDA initialization failure");
    mockSdk().library = 10701;
    refused("compiled with the headers of TensorRT 10.16.0 and runs with TensorRT-RTX 1.7.1");
    mockSdk().library = 101600;
    rig.bundle.header.rtx = true;
    refused("was built by TensorRT-RTX 10.16.0.1, and this program is linked with TensorRT 10.16.0");
    CHECK(mockSdk().streams == 0);
}

TEST(unusable_samplers) {
    Rig rig;
    SessionOptions options;
    options.sampler = "nowhere/libless_sampler.so";
    REFUSES(EngineError, "cannot load the sampler nowhere/libless_sampler.so: ", openSession(rig.bundle, options));
    options.sampler = LESS_STUB_PLUGIN;
    REFUSES(EngineError, "it is of another version: build it again", openSession(rig.bundle, options));
    ::unsetenv("LESS_TEST_STUB");  // which says that the stub was loaded
    CHECK(mockSdk().streams == 0);
}

TEST(plans_of_another_contract) {
    Rig rig;
    mockSdk().plan->io[3].dtype = "fp8";
    REFUSES(EngineError, "past.0.key as TensorRT type 6 [-1, 2, 6, 8]", openSession(rig.bundle));
    mockSdk().plan->io[3].dtype = "float16";
    mockSdk().plan->alias = "past.0.key";
    REFUSES(EngineError, "writes present.0.key into past.0.key, but its manifest names no plugin",
            openSession(rig.bundle));
    CHECK(mockSdk().streams == 0);
}

TEST(plans_with_int8_slots) {
    Rig rig(twoLayers(ElementType::kFloat16, SlotDtype::kInt8));
    Session session = openSession(rig.bundle);
    session.open(2);
    session.step({1, 2}, {1, 1});
    RowState const row = session.readRow(1);
    CHECK(static_cast<int64_t>(row.data.size()) == rig.bundle.contract.stateBytes());
    mockSdk().plan->io[3].dtype = "float16";
    REFUSES(EngineError, "past.0.key as float16 [-1, 2, 6, 8] where the contract says int8", openSession(rig.bundle));
}

TEST(failing_steps_and_allocations) {
    Rig rig;
    Session session = openSession(rig.bundle);
    mockSdk().machine.freeBytes = 4000;
    REFUSES(BackendError, "not enough GPU memory for 3 rows of 0.0 MB: use fewer rows at a time (cudaMalloc failed",
            session.open(3));
    mockSdk().machine.freeBytes = 1 << 20;
    session.open(3);
    session.step({1, 2, 3}, {1, 1, 1});
    mockSdk().machine.runs = mockSdk().loads = false;
    REFUSES(EngineError, "on an incompatible device",
            openSession(rig.bundle));  // must not be reported for the next step
    REFUSES(BackendError, "TensorRT cannot run this step: a kernel is missing", session.step({1, 2, 3}, {1, 1, 1}));
}

// A cache of its own, without hashes.
struct EmptyCache {
    EmptyCache() { ::setenv("LESS_EXPORT_CACHE", folder.path.c_str(), 1); }
    ~EmptyCache() { ::unsetenv("LESS_EXPORT_CACHE"); }
    Folder folder;
};

TEST(plans_that_carry_the_plugin) {
    Rig rig;
    EmptyCache const cache;
    rig.bundle.plugin = PluginFacts{{}, "", true};
    REFUSES(EngineError, "carries native code, and this machine did not build it", openSession(rig.bundle));
    CHECK(!mockSdk().hostCode);
    rig.bundle.trustCode = true;
    openSession(rig.bundle);
    CHECK(std::exchange(mockSdk().hostCode, false));
    rig.bundle.trustCode = false;
    cache.folder.write("built-here.sha256", sha256("plan") + "\n");
    openSession(rig.bundle);
    CHECK(std::exchange(mockSdk().hostCode, false));
    std::ofstream(rig.bundle.plan) << "changed";  // after Bundle::open
    REFUSES(EngineError, "this machine did not build it", openSession(rig.bundle));
    CHECK(!mockSdk().hostCode && mockSdk().streams == 0);
}

TEST(plugin_libraries) {
    Rig rig;
    EmptyCache const cache;
    auto const loaded = [] {
        bool const is = std::getenv("LESS_TEST_STUB") != nullptr;
        ::unsetenv("LESS_TEST_STUB");
        return is;
    };
    auto const library = cache.folder.write("stub.so", contentOf(LESS_STUB_PLUGIN));
    rig.bundle.plugin = PluginFacts{library, sha256(contentOf(library)), false};
    REFUSES(EngineError, "which this machine did not build", openSession(rig.bundle));
    CHECK(!loaded());
    rig.bundle.trustCode = true;
    openSession(rig.bundle);
    CHECK(loaded());
    ::setenv("LESS_TEST_OLD_DRIVER", "1", 1);
    REFUSES(EngineError, "stub.so: an old driver", openSession(rig.bundle));
    ::unsetenv("LESS_TEST_OLD_DRIVER");
    loaded();
    cache.folder.write("stub.so", "other");
    REFUSES(EngineError, "is not the plugin that this engine was built with", openSession(rig.bundle));
    rig.bundle.plugin = PluginFacts{rig.bundle.plan, sha256("plan"), false};
    REFUSES(EngineError, "cannot load the plugin", openSession(rig.bundle));
    rig.bundle.plugin->library = "libm.so.6";  // not searched on the loader's path: the file in this folder
    REFUSES(EngineError, "is missing (" + std::filesystem::current_path().string(), openSession(rig.bundle));
    CHECK(!loaded());
}

}  // namespace
