// Decode steps whose logits stay on the device are not waited for: one wait a token, and whose fault a failure is.
#include "check.hpp"
#include "less_scheduler.hpp"
#include "rig.hpp"

namespace {

using namespace less;
using namespace less::testing;

constexpr char const* kFailed = "the step failed on the GPU: a fault";

// The most likely token; test_device_sampler.cpp has the rest of sample.h. When it is asked for the `faultAt`-th time,
// the step before it fails.
SampleKernel greedyOn(Machine& machine, int faultAt = 0) {
    auto const asked = std::make_shared<int>(0);
    return [&machine, faultAt, asked](float const* logits, int64_t vocab, LessSampleRow const* rows, int32_t count,
                                      uint32_t*, int32_t* picks) {
        machine.sink->push_back([=, &machine] {
            machine.check(rows, static_cast<size_t>(count) * sizeof *rows);
            for (int32_t i = 0; i < count; ++i) {
                float const* const given = logits + rows[i].logits * vocab;
                picks[i] = static_cast<int32_t>(std::max_element(given, given + vocab) - given);
            }
        });
        machine.fault = ++*asked == faultAt;
    };
}

struct Decoding {
    explicit Decoding(int64_t rows, int faultAt = 0) : samplers(static_cast<size_t>(rows), Sampler({}, 0)) {
        rig.contract.maxBatch = rows;
        rig.machine.byIndex = true;
        session = std::make_unique<Session>(rig.session({}, greedyOn(rig.machine, faultAt)));
        session->open(rows);
        oracles.assign(static_cast<size_t>(rows), Oracle(rig.contract));
    }
    void advance(std::vector<int64_t> const& rows) {
        std::vector<int64_t> ids;
        for (int64_t row : rows) ids.push_back(row + 5);
        session->advanceRows(ids, std::vector<int32_t>(rows.size(), 1), rows);
        for (size_t i = 0; i < rows.size(); ++i) oracles[static_cast<size_t>(rows[i])].feed(ids[i]);
    }
    std::vector<Choice> choose(size_t count) {
        std::vector<Sampler*> asked;
        std::vector<int64_t> places;
        for (size_t i = 0; i < count; ++i) {
            asked.push_back(&samplers[i]);
            places.push_back(static_cast<int64_t>(i));
        }
        return session->choose(asked, places);
    }
    void decode(std::vector<int64_t> const& rows) {
        advance(rows);
        std::vector<Choice> const choices = choose(rows.size());
        for (size_t i = 0; i < rows.size(); ++i) {
            CHECK(!choices[i].error && choices[i].token == oracles[static_cast<size_t>(rows[i])].best());
        }
    }
    void refusesChoices(size_t count) {
        for (Choice const& choice : choose(count)) {
            REFUSES(BackendError, kFailed, std::rethrow_exception(choice.error));
        }
    }

    Rig rig;
    std::unique_ptr<Session> session;
    std::vector<Sampler> samplers;
    std::vector<Oracle> oracles;
};

TEST(one_wait_a_token) {
    Decoding d(3);
    for (int i = 0; i < 5; ++i) {
        int const before = d.rig.machine.waits;
        d.decode({2, 0, 1});
        CHECK(d.rig.machine.waits == before + 1);
    }
    CHECK(d.rig.machine.launches == 4);
    int const before = d.rig.machine.waits;
    Logits const logits = d.session->stepRows({7}, {1}, {1});  // which come back
    d.oracles[1].feed(7);
    CHECK(d.oracles[1].agrees(logits.row(0)) && d.rig.machine.waits == before + 1);
}

TEST(inputs_wait_for_the_step_that_reads_them) {
    Decoding d(4);
    for (std::vector<int64_t> const& rows : std::vector<std::vector<int64_t>>{{0, 1}, {2}, {3, 1, 0}, {1}, {0, 2}, {1}})
        d.advance(rows);
    d.decode({3, 2, 1, 0});
}

TEST(a_failure_is_said_by_the_choice_and_by_the_rows) {
    Decoding d(4, 1);
    d.advance({2, 0});
    d.refusesChoices(2);
    d.refusesChoices(2);  // not only to the first who asks
    char const* const undefined = "an earlier step failed, and the state of row 2 is undefined";
    REFUSES(BackendError, undefined, d.session->advanceRows({1, 1}, {1, 1}, {1, 2}));
    REFUSES(BackendError, undefined, d.session->readRow(2));
    REFUSES(BackendError, undefined, d.session->copyRow(2, 1));
    d.decode({1, 3});
    d.session->resetRow(2);
    d.session->copyRow(1, 0);
    d.oracles[2] = Oracle(d.rig.contract);
    d.oracles[0] = d.oracles[1];
    d.decode({2, 0});
}

// It is not theirs, but that of the step and of its rows.
TEST(a_failure_that_others_come_upon) {
    for (int between = 0; between < 3; ++between) {
        Decoding d(4);
        d.advance({0, 1});
        d.rig.machine.fault = true;
        if (between == 0) {
            d.session->readRow(2);
            d.session->resetRow(3);
            d.refusesChoices(2);
        } else if (between == 1) {
            d.decode({2, 3});
        } else {
            d.session->open(4);
            d.oracles.assign(4, Oracle(d.rig.contract));
            d.decode({1, 0});
            continue;
        }
        REFUSES(BackendError, "the state of row 1 is undefined", d.session->advanceRows({1}, {1}, {1}));
    }
}

// Every sequence of the step, also one that is fed once more for its state, and no later one.
TEST(a_failure_ends_what_it_touches) {
    Rig rig;
    rig.machine.byIndex = true;
    Session session = rig.session({}, greedyOn(rig.machine, 4));
    Scheduler scheduler(session, {});
    Request first, second;
    first.prompt = {1, 2, 3};
    first.params.maxNewTokens = 2;
    first.keepState = true;
    second.prompt = {4, 5};
    second.params.maxNewTokens = 9;
    scheduler.submit(first);
    scheduler.submit(second);
    CHECK(scheduler.step().size() == 1);  // its last token waits for the state
    std::vector<Event> const events = scheduler.step();
    CHECK(events.size() == 3 && !events[0].error && events[0].request == 1);
    for (size_t i = 1; i < events.size(); ++i) {
        CHECK(events[i].error);
        bool const said = events[i].error->find(kFailed) != std::string::npos;
        CHECK(said == (events[i].request == 1));  // the other one is told that its state is undefined
    }
    CHECK(!scheduler.busy());
    scheduler.submit(first);
    for (Event const& event : scheduler.step()) CHECK(!event.error);
}

TEST(steps_that_are_waited_for) {
    Decoding d(2);
    d.rig.machine.fault = true;
    REFUSES(BackendError, kFailed, d.session->advanceRows({1, 2}, {2}, {0}));  // a prompt's piece
    REFUSES(BackendError, "the state of row 0 is undefined", d.session->readRow(0));
    d.rig.machine.fault = true;
    REFUSES(BackendError, kFailed, d.session->stepRows({1}, {1}, {1}));
    REFUSES(BackendError, "the state of row 1 is undefined", d.session->readRow(1));
    Rig ranges;
    Session session = ranges.session({}, greedyOn(ranges.machine));
    session.open(1);
    ranges.machine.fault = true;
    REFUSES(BackendError, kFailed, session.advance({1}, {1}, {0, 1}));
}

}  // namespace
