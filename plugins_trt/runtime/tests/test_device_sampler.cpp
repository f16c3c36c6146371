// Tokens chosen on the device: which rows are asked for, what comes back, and where histories lie. The kernel is a
// plain one by the rules of sample.h; tests/test_cuda_sample.py tests the real one.
#include <cstring>

#include "check.hpp"
#include "less_scheduler.hpp"
#include "rig.hpp"

namespace {

using namespace less;
using namespace less::testing;

SampleKernel kernelOn(Machine& machine) {
    return [&machine](float const* logits, int64_t vocab, LessSampleRow const* rows, int32_t count, uint32_t* histories,
                      int32_t* picks) {
        machine.sink->push_back([=, &machine] {
            machine.check(rows, static_cast<size_t>(count) * sizeof *rows);
            machine.check(picks, static_cast<size_t>(count) * sizeof *picks);
            for (int32_t i = 0; i < count; ++i) {
                LessSampleRow const& row = rows[i];
                auto const size = static_cast<size_t>(vocab);
                float const* const given = logits + row.logits * vocab;
                machine.check(given, size * sizeof *given);
                std::vector<float> x(given, given + vocab);
                uint32_t* const history = row.history < 0 ? nullptr : histories + row.history * vocab;
                if (history) machine.check(history, size * sizeof *history);
                for (size_t v = 0; history && v < size; ++v) {
                    if (history[v] == 0) continue;
                    x[v] = x[v] > 0 ? x[v] / row.repetition : x[v] * row.repetition;
                    auto const times = static_cast<float>(history[v] & ~kLessPrompt);
                    if (times > 0) x[v] -= row.presence + row.frequency * times;
                }
                SamplingParams params;
                params.temperature = row.temperature;
                params.topP = row.topP;
                params.minP = row.minP;
                params.topK = row.topK;
                try {
                    picks[i] = static_cast<int32_t>(chooseToken(x.data(), vocab, params, row.uniform));
                    if (history) ++history[picks[i]];
                } catch (BackendError const&) {
                    picks[i] = kLessNoChoice;
                }
            }
        });
    };
}

SamplingParams asked(int kind) {
    SamplingParams params;
    params.seed = 3;
    params.maxNewTokens = 5 + kind;
    if (kind % 2) params.temperature = 0.8;
    if (kind == 1) params.topK = 9;
    if (kind == 3) params.topP = 0.7;
    if (kind >= 2) {
        params.repetitionPenalty = 1.5;
        params.frequencyPenalty = 0.4;
    }
    if (kind == 4) params.logitBias = {{2, 1.5}};
    return params;
}

// The tokens of ten requests over the rows of a contract.
std::vector<std::vector<int64_t>> scheduled(bool device, bool byIndex) {
    Rig rig;
    rig.machine.byIndex = byIndex;
    Session session = rig.session({}, device ? kernelOn(rig.machine) : SampleKernel{});
    Scheduler scheduler(session, {});
    std::vector<std::vector<int64_t>> tokens(10);
    std::map<uint64_t, size_t> places;
    for (size_t i = 0; i < tokens.size(); ++i) {
        Request request;
        request.prompt = ramp(2 + static_cast<int64_t>(i) % 4, static_cast<int64_t>(i));
        request.params = asked(static_cast<int>(i % 5));
        request.index = i;
        places[scheduler.submit(request)] = i;
    }
    while (scheduler.busy()) {
        for (Event const& event : scheduler.step()) {
            CHECK(!event.error);
            if (event.token) tokens[places.at(event.request)].push_back(*event.token);
        }
    }
    return tokens;
}

TEST(a_scheduler_gives_the_tokens_of_the_host) {
    for (bool byIndex : {false, true}) CHECK(scheduled(true, byIndex) == scheduled(false, byIndex));
}

TEST(generate_gives_the_tokens_of_the_host) {
    for (int kind = 0; kind < 10; ++kind) {
        std::vector<Generation> results[2];
        for (bool device : {false, true}) {
            Rig rig;
            rig.machine.byIndex = kind >= 5;
            Session session = rig.session({}, device ? kernelOn(rig.machine) : SampleKernel{});
            results[device] = generate(session, {ramp(3), ramp(9), ramp(1), ramp(5, 4)}, asked(kind % 5), {});
        }
        for (size_t i = 0; i < results[0].size(); ++i) CHECK(results[0][i].tokens == results[1][i].tokens);
    }
}

TEST(four_bytes_a_row_come_back) {
    Rig rig(twoLayers(), false);
    Session session = rig.session({}, kernelOn(rig.machine));
    session.open(2);
    size_t const row = static_cast<size_t>(session.contract().vocabSize) * sizeof(float);
    Sampler first(asked(1), 0), second(asked(3), 1, {5}), biased(asked(4), 2, {5});
    session.advance({1, 2}, {1, 1}, {0, 2});
    CHECK(rig.machine.copiedBack == 0);
    for (Choice const& choice : session.choose({&first, &second}, {0, 1})) CHECK(!choice.error && choice.token >= 0);
    CHECK(rig.machine.copiedBack == 2 * sizeof(int32_t));
    session.choose({&first, &biased}, {1, 0});
    CHECK(rig.machine.copiedBack == 3 * sizeof(int32_t) + row);
    session.step({3, 4}, {1, 1});  // whose caller gets the logits
    CHECK(rig.machine.copiedBack == 3 * sizeof(int32_t) + 3 * row);
}

// More samplers than histories, and choices of the host in between; a copy goes its own way.
TEST(histories_follow_the_samplers) {
    Rig device(twoLayers(), false), host(twoLayers(), false);
    Session ours = device.session({}, kernelOn(device.machine)), theirs = host.session();
    ours.open(1);
    theirs.open(1);
    std::vector<Sampler> left, right;
    for (uint64_t i = 0; i < 3; ++i) {
        left.emplace_back(asked(3), i, Prompt{5});
        right.emplace_back(asked(3), i, Prompt{5});
    }
    left.push_back(left[1]);
    right.push_back(right[1]);
    for (int64_t step = 0; step < 40; ++step) {
        size_t const turn = static_cast<size_t>(step * step + step / 3) % 4;
        ours.advance({step % 9}, {1}, {0, 1});
        theirs.advance({step % 9}, {1}, {0, 1});
        CHECK(ours.choose({&left[turn]}, {0})[0].token == theirs.choose({&right[turn]}, {0})[0].token);
        if (step % 5 != 3) continue;
        Logits const logits = ours.step({4}, {1});
        CHECK(left[turn](logits.row(0), logits.vocab) == right[turn](theirs.step({4}, {1}).row(0), logits.vocab));
    }
}

// Rows by index leave parked ones out of a launch, so the logits on the device have other places than the rows of the
// step; prefill and decode, with and without the logits of every token.
void parked(bool all, bool graphs) {
    Contract contract = twoLayers();
    contract.allLogits = all;
    contract.maxBatch = 4;
    Rig device(contract, graphs), host(contract, graphs);
    device.machine.byIndex = host.machine.byIndex = true;
    Session ours = device.session({}, kernelOn(device.machine)), theirs = host.session();
    ours.open(4);
    theirs.open(4);
    std::vector<Sampler> left, right;
    for (uint64_t i = 0; i < 4; ++i) {
        left.emplace_back(asked(static_cast<int>(i) + 1), i, Prompt{5});  // the last one with a bias: on the host
        right.emplace_back(asked(static_cast<int>(i) + 1), i, Prompt{5});
    }
    Sampler spare(asked(0), 0);
    std::vector<int64_t> const rows = {2, 0, 3, 1};
    size_t const row = static_cast<size_t>(contract.vocabSize) * sizeof(float);
    auto const compare = [&](std::vector<int32_t> const& newLength, int64_t width, bool returned) {
        std::vector<int64_t> const ids = ramp(4 * width, ours.length(0));
        ours.advanceRows(ids, newLength, rows);
        theirs.advanceRows(ids, newLength, rows);
        std::vector<int64_t> places;
        std::vector<Sampler*> samplers, others;
        for (size_t i = 4; i-- > 0;) {
            if (newLength[i] == 0) continue;
            places.push_back(static_cast<int64_t>(i));
            samplers.push_back(&left[i]);
            others.push_back(&right[i]);
        }
        size_t const before = device.machine.copiedBack;
        std::vector<Choice> const picks = ours.choose(samplers, places), expected = theirs.choose(others, places);
        for (size_t i = 0; i < places.size(); ++i) {
            CHECK(!picks[i].error && picks[i].token >= 0 && picks[i].token == expected[i].token);
        }
        size_t const biased = newLength[3] > 0;
        CHECK(device.machine.copiedBack - before == (places.size() - biased) * sizeof(int32_t) + biased * row);
        for (int64_t i = 0; i < 4; ++i) CHECK(ours.choose({&spare}, {i}).size() == 1);  // parked: nothing is read amiss
        if (!returned) return;
        Logits const a = ours.stepRows(ids, newLength, rows), b = theirs.stepRows(ids, newLength, rows);
        size_t const bytes = 4 * static_cast<size_t>(b.tokens) * row;
        CHECK(a.tokens == b.tokens && std::memcmp(a.data, b.data, bytes) == 0);
        ours.choose({&left[3]}, {3});  // by the host
        theirs.choose({&right[3]}, {3});
        CHECK(std::memcmp(a.data, b.data, bytes) == 0);  // still valid
    };
    compare({0, 0, 0, 0}, 1, false);
    compare({3, 0, 1, 2}, 3, true);
    for (bool returned : {false, false, true, false}) compare({1, 0, 1, 1}, 1, returned);
    compare({0, 4, 0, 2}, 4, true);
    for (bool returned : {false, true, false}) compare({0, 0, 1, 0}, 1, returned);
    compare({1, 1, 1, 1}, 1, true);
    CHECK((device.machine.captured > 1) == graphs);
}

TEST(parked_rows_are_left_out) {
    for (bool all : {false, true}) {
        for (bool graphs : {false, true}) parked(all, graphs);
    }
}

TEST(refused_choices) {
    Rig rig(twoLayers(), false);
    Session session = rig.session({}, kernelOn(rig.machine));
    session.open(2);
    Sampler a(asked(0), 0), b(asked(0), 1), c(asked(0), 2);
    REFUSES(BackendError, "the latest step has no logits of a row 0", session.choose({&a}, {0}));
    session.advance({1}, {1}, {1, 1});
    for (int64_t row : {-1, 1}) {
        REFUSES(BackendError, "the latest step has no logits of a row", session.choose({&a}, {row}));
    }
    REFUSES(BackendError, "a row for each sampler, and at most 2 samplers", session.choose({&a, &b}, {0}));
    REFUSES(BackendError, "a row for each sampler, and at most 2 samplers", session.choose({&a, &b, &c}, {0, 0, 0}));
    CHECK(!session.choose({&a}, {0})[0].error);
    rig.machine.runs = false;
    REFUSES(BackendError, "the test forbids it", session.advance({1}, {1}, {0, 1}));
    REFUSES(BackendError, "the latest step has no logits of a row 0", session.choose({&a}, {0}));
    session.close();
    REFUSES(BackendError, "choose() takes a row for each sampler", session.choose({&a}, {0}));
}

TEST(without_memory_for_histories_the_host_applies_penalties) {
    std::vector<int64_t> tokens[2];
    for (bool enough : {true, false}) {
        Rig rig;
        size_t asks = 0;
        SampleKernel const kernel = kernelOn(rig.machine);
        Session session = rig.session(
            {}, [&](auto const* logits, auto vocab, auto const* rows, auto count, auto* histories, auto* picks) {
                ++asks;
                kernel(logits, vocab, rows, count, histories, picks);
            });
        session.open(2);
        if (!enough) rig.machine.freeBytes = 100;
        Sampler plain(asked(0), 0), penalised(asked(2), 1);
        for (int64_t step = 0; step < 4; ++step) {
            session.advance({step, step}, {1, 1}, {0, 2});
            for (Choice const& choice : session.choose({&plain, &penalised}, {0, 1})) {
                CHECK(!choice.error);
                tokens[enough].push_back(choice.token);
            }
        }
        CHECK(asks == 4);  // for the plain row
    }
    CHECK(tokens[0] == tokens[1]);
}

TEST(what_fails_ends_the_rows_that_it_touches) {
    Rig rig(twoLayers(), false);
    Session session = rig.session({}, [](auto...) { throw BackendError("the sampler cannot be launched"); });
    session.open(1);
    Sampler sampler(asked(0), 0);
    session.advance({1}, {1}, {0, 1});
    std::vector<Choice> const choices = session.choose({&sampler}, {0});
    REFUSES(BackendError, "the sampler cannot be launched", std::rethrow_exception(choices[0].error));
}

}  // namespace
