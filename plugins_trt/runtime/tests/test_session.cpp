// Sessions and generation on the host machine, against an oracle that feeds one token at a time.
#include "check.hpp"
#include "rig.hpp"

namespace {

using namespace less;
using namespace less::testing;

// Takes three rows through prefill, decode, parking, reset, copy and exchange, and checks every logit.
void drive(Rig& rig, int rounds) {
    Session session = rig.session();
    Contract const& c = rig.contract;
    for (int round = 0; round < rounds; ++round) {
        session.open(3);
        std::vector<Oracle> rows(3, Oracle(c));
        auto const step = [&](std::vector<int64_t> const& ids, std::vector<int32_t> const& newLength) {
            Logits const logits = session.step(ids, newLength);
            auto const width = static_cast<int64_t>(ids.size()) / 3;
            for (int64_t row = 0; row < 3; ++row) {
                Oracle& oracle = rows[static_cast<size_t>(row)];
                for (int64_t t = 0; t < newLength[static_cast<size_t>(row)]; ++t) {
                    oracle.feed(ids[static_cast<size_t>(row * width + t)]);
                    bool const last = t + 1 == newLength[static_cast<size_t>(row)];
                    if (c.allLogits || last) CHECK(oracle.agrees(logits.row(row, c.allLogits ? t : 0)));
                }
            }
        };
        if (c.chunk > 1) {
            step({1, 2, 3, 4, 5, 6, 7, -9, 8, -9, -9, -9}, {4, 3, 1});  // padding may contain anything
            step({9, 10, 11, 12, 13, 14}, {2, 2, 0});
        }
        for (int64_t t = 0; t < 6; ++t) step({t, t + 20, t + 40}, {1, t != 2, t % 2 == 0});
        session.resetRow(1);
        rows[1] = Oracle(c);
        session.copyRow(0, 2);
        rows[2] = rows[0];
        session.copyRow(2, 2);
        if (c.chunk > 1) step({1, 2, 3, 4, 5, 6}, {0, 2, 2});
        step({7, 8, 9}, {1, 1, 1});
        RowState const saved = session.readRow(1);
        Oracle const savedRow = rows[1];
        step({10, 11, 12}, {1, 1, 1});
        session.writeRow(0, saved);
        rows[0] = savedRow;
        CHECK(session.length(0) == session.length(1) - 1 && saved.length == session.length(0));
        for (int64_t t = 0; t < 3; ++t) step({t + 1, t + 2, t + 3}, {1, 1, 1});
    }
}

TEST(state_in_place) {
    Rig rig;
    drive(rig, 2);
    CHECK(rig.machine.captured == 1 && rig.machine.launches > 10);
    CHECK(rig.machine.memory.empty());
}

TEST(state_in_two_blocks) {
    Rig rig;
    rig.machine.inPlace = false;
    drive(rig, 2);
    CHECK(rig.machine.captured == 2 && rig.machine.launches > 10);
}

TEST(state_with_int8_slots) {
    for (bool inPlace : {true, false}) {
        Rig rig(twoLayers(ElementType::kFloat16, SlotDtype::kInt8));
        rig.machine.inPlace = inPlace;
        drive(rig, 1);
        CHECK(rig.machine.memory.empty());
        REFUSES(EngineError, "past.0.value as float16 [-1, 2, 6, 8] where the contract says int8 [-1, 2, 6, 8]",
                rig.session([](HostPlan& p) { p.io[4].dtype = "float16"; }));
    }
}

TEST(bytes_of_int8_slots) {
    int64_t const slots = 2 * 6, headDim = 8;
    Contract const half = twoLayers(), int8 = twoLayers(ElementType::kFloat16, SlotDtype::kInt8);
    CHECK(int8.stateBytes() == half.stateBytes() - 2 * slots * headDim + 2 * slots * 4);
    CHECK(int8.state().size() == half.state().size() + 2 && int8.layout() != half.layout());
    CHECK(int8.state()[7].past.name == "past.0.key_scale" && int8.state()[9].past.name == "past.1.key");
    for (StateTensor const& tensor : int8.state()) CHECK(tensor.rowBytes % bytesOf(tensor.past.type) == 0);
}

TEST(without_graphs) {
    Rig rig(twoLayers(), false);
    drive(rig, 1);
    CHECK(rig.machine.captured == 0 && rig.machine.launches == 0);
}

TEST(engine_that_cannot_be_captured) {
    Rig rig;
    rig.machine.captures = false;
    drive(rig, 1);
    CHECK(rig.machine.launches == 0 && rig.machine.captureAttempts == 1);
}

TEST(all_logits) {
    Contract c = twoLayers();
    c.allLogits = true;
    Rig rig(c);
    drive(rig, 1);
}

TEST(chunk_of_one) {
    Contract c = twoLayers();
    c.chunk = 1;
    Rig rig(c);
    drive(rig, 1);
    for (auto const& [profile, shape] : rig.machine.steps) CHECK(profile == 0 && shape == (Shape{3, 1}));
}

TEST(decode_after_other_batch_sizes) {
    Rig rig;
    rig.machine.inPlace = false;
    Session session = rig.session();
    for (int64_t batch : {2, 3, 1, 1, 3}) {
        session.open(batch);
        Oracle oracle(rig.contract);
        for (int64_t t = 0; t < 5; ++t) {
            std::vector<int64_t> const ids(static_cast<size_t>(batch), t);
            Logits const logits = session.step(ids, std::vector<int32_t>(static_cast<size_t>(batch), 1));
            oracle.feed(t);
            CHECK(oracle.agrees(logits.row(batch - 1)));
        }
    }
    session.close();
    CHECK(rig.machine.memory.empty() && session.batch() == 0);
    Session moved = std::move(session);
    moved.open(1);
    CHECK(moved.length(0) == 0);
}

TEST(refused_steps) {
    Contract c = twoLayers();
    c.positionLimit = 6;
    Rig rig(c);
    Session s = rig.session();
    REFUSES(BackendError, "is not open", s.step({1}, {1}));
    REFUSES(BackendError, "is not open", s.resetRow(0));
    REFUSES(BackendError, "batch 0 is outside 1..3", s.open(0));
    REFUSES(BackendError, "batch 4 is outside 1..3", s.open(4));
    s.open(2);
    REFUSES(BackendError, "input_ids must be [2, T], not 3 tokens", s.step({1, 2, 3}, {1, 1}));
    REFUSES(BackendError, "input_ids must be [2, T], not 0 tokens", s.step({}, {1, 1}));
    REFUSES(BackendError, "a step takes at most 4 tokens", s.step(ramp(10), {1, 1}));
    REFUSES(BackendError, "new_length must be [2], not [1]", s.step({1, 2}, {1}));
    REFUSES(BackendError, "new_length must lie in 0..1", s.step({1, 2}, {1, 2}));
    REFUSES(BackendError, "new_length must lie in 0..1", s.step({1, 2}, {1, -1}));
    REFUSES(BackendError, "token ids must lie in 0..49", s.step({1, 50}, {1, 1}));
    REFUSES(BackendError, "token ids must lie in 0..49", s.step({-1, 5}, {1, 1}));
    REFUSES(BackendError, "row 2 is outside 0..1", s.resetRow(2));
    REFUSES(BackendError, "row -1 is outside 0..1", s.copyRow(0, -1));
    RowState state = s.readRow(0);
    state.identity = "another";
    REFUSES(BackendError, "belongs to another export", s.writeRow(0, state));
    state.identity = "";
    state.length = -1;
    REFUSES(BackendError, "is damaged", s.writeRow(0, state));
    state.data.pop_back();
    REFUSES(BackendError, "belongs to another export", s.writeRow(0, state));
    CHECK(rig.machine.steps.empty());
    s.step({1, 2, 3, 4, 5, 6, 7, 8}, {4, 4});
    REFUSES(BackendError, "at most 6 tokens, not 7", s.step(ramp(6), {2, 3}));
    CHECK(s.length(0) == 4);
}

TEST(failing_step) {
    for (bool graphs : {true, false}) {
        Rig rig(twoLayers(), graphs);
        Session s = rig.session();
        s.open(1);
        s.step({1}, {1});
        rig.machine.runs = false;
        REFUSES(BackendError, "cannot run this step", s.step({2}, {1}));
        rig.machine.runs = true;
        REFUSES(BackendError, "call open(batch) again", s.step({2}, {1}));
        // Work of the failed step that is still in the stream must not touch the memory of another batch size.
        for (int64_t batch : {1, 2, 1}) {
            s.open(batch);
            Oracle oracle(rig.contract);
            oracle.feed(5);
            std::vector<int64_t> const ids(static_cast<size_t>(batch), 5);
            CHECK(oracle.agrees(s.step(ids, std::vector<int32_t>(ids.size(), 1)).row(batch - 1)));
            rig.machine.runs = false;
            REFUSES(BackendError, "cannot run this step", s.step(ids, std::vector<int32_t>(ids.size(), 1)));
            rig.machine.runs = true;
        }
    }
}

TEST(not_enough_memory) {
    Rig rig;
    size_t const freeBytes = rig.machine.freeBytes;
    for (size_t size = 0; size < 40000; size += 500) {
        rig.machine.freeBytes = size;
        Session s = rig.session();
        try {
            s.open(3);
            CHECK(size > 3 * static_cast<size_t>(rig.contract.stateBytes()));
        } catch (BackendError const& error) {
            CHECK(std::string(error.what()).find("not enough GPU memory for 3 rows of 0.0 MB") == 0);
            CHECK(rig.machine.memory.empty() && s.batch() == 0);
        }
    }
    CHECK(rig.machine.freeBytes == 39500 && freeBytes > 39500);
}

TEST(plans_of_another_contract) {
    Rig rig;
    auto const refused = [&](char const* text, std::function<void(HostPlan&)> const& change) {
        REFUSES(EngineError, text, rig.session(change));
    };
    refused("lacks the tensor logits", [](HostPlan& p) { p.io.erase(p.io.end() - 15); });
    refused("has the tensor odd, which the contract lacks",
            [](HostPlan& p) { p.io.push_back({"odd", true, "int32", {1}}); });
    refused("lacks the tensor input_ids", [](HostPlan& p) { p.io[0].input = false; });
    refused("past.0.key as float32 [-1, 2, 6, 8] where the contract says float16 [-1, 2, 6, 8]",
            [](HostPlan& p) { p.io[3].dtype = "float32"; });
    refused("past.0.key as float16 [-1, 2, 9, 8]", [](HostPlan& p) { p.io[3].shape[2] = 9; });
    refused("past.0.key as float16 [-1, 2, 6]", [](HostPlan& p) { p.io[3].shape.pop_back(); });
    refused("has 1 profiles instead of 2", [](HostPlan& p) { p.profileCount = 1; });
    refused("profile 1 takes input_ids from [1, 1] to [3, 3], the contract needs [1, 1] to [3, 4]",
            [](HostPlan& p) { p.maxChunk = 3; });
    refused("writes present.0.key into past.1.z: build it again", [](HostPlan& p) { p.alias = "past.1.z"; });
    rig.session([](HostPlan& p) { p.alias = "past.0.key"; });
    rig.machine.inPlace = false;
    refused("writes present.0.key into past.0.key, but its manifest names no plugin",
            [](HostPlan& p) { p.alias = "past.0.key"; });
    CHECK(rig.machine.memory.empty());
}

// ------------------------------------------------------------------ generation

SamplingParams maxTokens(int64_t tokens) {
    SamplingParams p;
    p.maxNewTokens = tokens;
    return p;
}

TEST(generation_agrees_with_the_oracle) {
    for (bool inPlace : {true, false}) {
        Rig rig;
        rig.machine.inPlace = inPlace;
        Session s = rig.session();
        std::vector<Prompt> const prompts = {ramp(11), ramp(1, 5), ramp(4, 7), ramp(8, 9), ramp(5, 2)};
        std::vector<Token> seen;
        auto const results =
            generate(s, prompts, maxTokens(7), {}, nullptr, [&](Token const& t) { seen.push_back(t); });
        for (size_t i = 0; i < prompts.size(); ++i) {
            CHECK(results[i].tokens == greedy(rig.contract, prompts[i], 7));
            CHECK(results[i].finish == FinishReason::kLength);
        }
        // Tokens arrive step by step, the prompts of a group in order; the last token of each prompt has a reason.
        std::vector<std::vector<int64_t>> streamed(prompts.size());
        for (Token const& t : seen) {
            streamed[t.row].push_back(t.id);
            CHECK(t.finish.has_value() == (streamed[t.row].size() == 7));
        }
        for (size_t i = 0; i < prompts.size(); ++i) CHECK(streamed[i] == results[i].tokens);
    }
}

TEST(schedule_of_steps) {
    Rig rig;
    Session s = rig.session();
    generate(s, {ramp(9), ramp(5)}, maxTokens(3), {});
    std::vector<std::pair<int, Shape>> const expected = {
        {1, {2, 4}}, {1, {2, 4}}, {0, {2, 1}}, {0, {2, 1}}, {0, {2, 1}}};
    CHECK(rig.machine.steps == expected);
}

TEST(end_of_sequence) {
    Rig rig;
    Session s = rig.session();
    std::vector<int64_t> const free = greedy(rig.contract, ramp(6), 8);
    size_t const first = static_cast<size_t>(std::find(free.begin(), free.end(), free[3]) - free.begin());
    auto result = generate(s, {ramp(6), ramp(3)}, maxTokens(8), {free[3]})[0];
    CHECK(result.finish == FinishReason::kEos && result.tokens.size() == first + 1 && result.tokens.back() == free[3]);
    SamplingParams on = maxTokens(8);
    on.ignoreEos = true;
    CHECK(generate(s, {ramp(6)}, on, {free[3]})[0].tokens == free);
}

TEST(limits_and_refused_prompts) {
    Contract c = twoLayers();
    c.positionLimit = 10;
    Rig rig(c);
    Session s = rig.session();
    CHECK(generate(s, {ramp(7)}, maxTokens(99), {})[0].tokens.size() == 3);
    REFUSES(UsageError, "a prompt of 10 tokens and its new tokens do not fit into the 10",
            generate(s, {ramp(10)}, maxTokens(1), {}));
    REFUSES(UsageError, "a prompt is empty", generate(s, {{1}, {}}, maxTokens(1), {}));
    REFUSES(UsageError, "token ids must lie in 0..49", generate(s, {{50}}, maxTokens(1), {}));
    REFUSES(UsageError, "max_new_tokens", generate(s, {{1}}, maxTokens(0), {}));
    RowState const prefix = prefill(s, ramp(9));
    CHECK(prefix.length == 9);
    REFUSES(UsageError, "a continuation is empty", generate(s, {{}}, maxTokens(1), {}, &prefix));
    REFUSES(UsageError, "a prompt of 10 tokens", generate(s, {{1}}, maxTokens(1), {}, &prefix));
    CHECK(prefill(s, {1}, &prefix).length == 10);
    REFUSES(UsageError, "a prompt of 11 tokens does not fit", prefill(s, {1, 2}, &prefix));
    CHECK(generate(s, {}, maxTokens(1), {}).empty());
}

TEST(shared_prefix) {
    Rig rig;
    rig.machine.inPlace = false;
    Session s = rig.session();
    RowState const prefix = prefill(s, ramp(9));
    std::vector<Prompt> const rest = {ramp(5, 4), ramp(2, 8), ramp(1, 9), ramp(6, 3)};
    auto const results = generate(s, rest, maxTokens(4), {}, &prefix);
    for (size_t i = 0; i < rest.size(); ++i) {
        Prompt whole = ramp(9);
        whole.insert(whole.end(), rest[i].begin(), rest[i].end());
        CHECK(results[i].tokens == greedy(rig.contract, whole, 4));
    }
}

TEST(sampling_does_not_depend_on_the_batch) {
    Rig rig;
    Session s = rig.session();
    SamplingParams p = maxTokens(12);
    p.temperature = 1;
    p.seed = 3;
    auto const together = generate(s, {ramp(5), ramp(9, 2), ramp(3, 3), ramp(2, 4)}, p, {});
    auto const pair = generate(s, {ramp(5), ramp(9, 2)}, p, {});
    CHECK(together[0].tokens == pair[0].tokens && together[1].tokens == pair[1].tokens);
    CHECK(together[0].tokens != greedy(rig.contract, ramp(5), 12));
    auto const twins = generate(s, {ramp(5), ramp(5)}, p, {});
    CHECK(twins[0].tokens == pair[0].tokens && twins[1].tokens != twins[0].tokens);
    p.seed = 4;
    CHECK(generate(s, {ramp(5)}, p, {})[0].tokens != pair[0].tokens);
}

}  // namespace
