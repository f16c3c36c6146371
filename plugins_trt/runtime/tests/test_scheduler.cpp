// The scheduler on the host machine. Whole schedules are compared with Python's by tests/test_cpp_scheduler.py.
#include <cmath>

#include "check.hpp"
#include "less_scheduler.hpp"
#include "rig.hpp"

namespace {

using namespace less;
using namespace less::testing;

Request request(Prompt prompt, int64_t tokens) {
    Request r;
    r.prompt = std::move(prompt);
    r.params.maxNewTokens = tokens;
    return r;
}

std::map<uint64_t, std::vector<Event>> runAll(Scheduler& scheduler) {
    std::map<uint64_t, std::vector<Event>> events;
    while (scheduler.busy()) {
        for (Event& e : scheduler.step()) events[e.request].push_back(std::move(e));
    }
    CHECK(scheduler.running() == 0 && scheduler.waiting() == 0);
    return events;
}

std::vector<int64_t> tokens(std::vector<Event> const& events) {
    std::vector<int64_t> ids;
    for (Event const& e : events) ids.push_back(e.token.value_or(-1));
    return ids;
}

TEST(requests_get_the_tokens_that_they_get_alone) {
    for (bool inPlace : {true, false}) {
        for (bool all : {true, false}) {
            Contract c = twoLayers();
            c.allLogits = all;
            Rig rig(c);
            rig.machine.inPlace = inPlace;
            Session session = rig.session();
            Scheduler scheduler(session, {});
            std::vector<Prompt> const prompts = {ramp(11), ramp(1, 5), ramp(4, 7), ramp(8, 9), ramp(11), ramp(5, 2)};
            std::vector<std::vector<Event>> events(prompts.size());
            for (size_t step = 0; step < 12 || scheduler.busy(); ++step) {
                // They arrive at different steps.
                if (step % 2 == 0 && step / 2 < prompts.size()) {
                    CHECK(scheduler.submit(request(prompts[step / 2], 7)) == step / 2);
                }
                for (Event const& e : scheduler.step()) events[e.request].push_back(e);
            }
            for (size_t i = 0; i < prompts.size(); ++i) {
                CHECK(tokens(events[i]) == greedy(rig.contract, prompts[i], 7));
                for (Event const& e : events[i]) CHECK(e.last() == (&e == &events[i].back()));
                CHECK(events[i].back().finish == FinishReason::kLength);
            }
            CHECK(scheduler.timing().decodeTokens == 6 * 6 && scheduler.timing().prefillTokens >= 29);
            CHECK(scheduler.timing().decodeSeconds > 0 && scheduler.timing().prefillSeconds > 0);
        }
    }
}

TEST(a_sample_is_that_of_generate) {
    Rig rig;
    Session session = rig.session();
    SamplingParams params;
    params.maxNewTokens = 9;
    params.temperature = 1;
    params.seed = 3;
    params.presencePenalty = 0.5;
    std::vector<Prompt> const prompts = {ramp(5), ramp(9, 2), ramp(3, 3)};
    auto const want = generate(session, prompts, params, {});
    Scheduler scheduler(session, {});
    for (uint64_t i = 0; i < 3; ++i) scheduler.submit({prompts[i], params, i});
    auto const events = runAll(scheduler);
    for (uint64_t i = 0; i < 3; ++i) CHECK(tokens(events.at(i)) == want[i].tokens);
}

TEST(every_request_has_its_own_parameters) {
    Rig rig;
    Session session = rig.session();
    std::vector<int64_t> const free = greedy(rig.contract, ramp(6), 8);
    auto const firstOf = [&](int64_t id) {
        return static_cast<size_t>(std::find(free.begin(), free.end(), id) - free.begin()) + 1;
    };
    int64_t const eos = free[5], stop = free[2];
    Scheduler scheduler(session, {eos});
    Request stops = request(ramp(6), 8), ignores = request(ramp(6), 8), biased = request(ramp(6), 2);
    stops.params.stopTokenIds = {stop};
    ignores.params.ignoreEos = true;
    biased.params.logitBias = {{11, 1e9}};
    for (Request const& r : {request(ramp(6), 8), stops, ignores, biased}) scheduler.submit(r);
    auto const events = runAll(scheduler);
    CHECK(events.at(0).size() == firstOf(eos) && events.at(0).back().finish == FinishReason::kEos);
    CHECK(events.at(1).size() == firstOf(stop) && events.at(1).back().finish == FinishReason::kStop);
    CHECK(tokens(events.at(2)) == free && events.at(2).back().finish == FinishReason::kLength);
    CHECK((tokens(events.at(3)) == std::vector<int64_t>{11, 11}));
    SamplingParams params = stops.params;
    params.maxNewTokens = 8;
    Generation const alone = generate(session, {ramp(6)}, params, {})[0];
    CHECK(alone.finish == FinishReason::kStop && alone.tokens.back() == stop);
}

TEST(a_state_goes_on_where_a_request_ended) {
    for (bool inPlace : {true, false}) {
        Rig rig;
        rig.machine.inPlace = inPlace;
        Session session = rig.session();
        Scheduler scheduler(session, {});
        for (int64_t count : {1, 2, 5}) {
            Request first = request(ramp(6), count);
            first.keepState = true;
            uint64_t const id = scheduler.submit(first);
            scheduler.submit(request(ramp(1), 2));  // its row moves
            auto const state = runAll(scheduler).at(id).back().state;
            CHECK(state && state->length == 6 + count);
            Prompt history = ramp(6);
            for (int64_t token : greedy(rig.contract, ramp(6), static_cast<size_t>(count))) history.push_back(token);
            history.push_back(9);
            Request second = request({9}, 4);
            second.prefix = state;
            uint64_t const next = scheduler.submit(second);
            auto const events = runAll(scheduler).at(next);
            CHECK(tokens(events) == greedy(rig.contract, history, 4) && !events.back().state);
        }
    }
}

TEST(a_queue_has_a_limit) {
    Rig rig;
    Session session = rig.session();
    Scheduler scheduler(session, {}, {2, {}, 1});
    for (int i = 0; i < 3; ++i) {
        CHECK(!scheduler.full());
        scheduler.submit(request(ramp(3), 4));
    }
    CHECK(scheduler.full() && scheduler.waiting() == 3 && scheduler.running() == 0);
    REFUSES(QueueFullError, "3 requests are running or waiting, and this scheduler takes 3: try again later",
            scheduler.submit(request(ramp(3), 4)));
    REFUSES(UsageError, "a prompt is empty", scheduler.submit(request({}, 4)));  // whether full or not
    CHECK(scheduler.cancel(1) && !scheduler.cancel(1) && !scheduler.full());
    CHECK(scheduler.submit(request(ramp(3), 4)) == 3);  // what was refused has no number
    scheduler.step();
    CHECK(scheduler.running() == 2 && scheduler.waiting() == 1 && scheduler.full());
    CHECK(runAll(scheduler).size() == 3);
    CHECK(!scheduler.cancel(0) && !scheduler.cancel(99));
}

TEST(what_a_scheduler_refuses) {
    Contract c = twoLayers();
    c.positionLimit = 10;
    Rig rig(c);
    Session session = rig.session();
    auto const refused = [&](char const* text, SchedulerOptions const& options) {
        REFUSES(UsageError, text, Scheduler(session, {}, options));
    };
    refused("this artifact takes 1 to 3 rows (--max-batch at export), not 4", {4});
    refused("1 to 3 rows", {0});
    refused("this artifact takes prompts in pieces of 1 to 4 tokens (--chunk at export), not 5", {{}, 5});
    refused("1 to 4 tokens", {{}, 0});
    refused("max_queue must be at least 0, not -1", {{}, {}, -1});
    Scheduler scheduler(session, {});
    auto const unfit = [&](char const* text, std::function<void(Request&)> const& change) {
        Request r = request(ramp(7), 9);
        change(r);
        REFUSES(UsageError, text, scheduler.submit(r));
    };
    unfit("a prompt of 10 tokens and its new tokens do not fit into the 10", [](Request& r) { r.prompt = ramp(10); });
    unfit("token ids must lie in 0..49: is this", [](Request& r) { r.prompt = {50}; });
    unfit("stop_token_ids must lie in 0..49", [](Request& r) { r.params.stopTokenIds = {-1}; });
    unfit("logit_bias and stop_token_ids must lie in", [](Request& r) { r.params.logitBias[50] = 1; });
    unfit("logit_bias must map", [](Request& r) { r.params.logitBias[5] = NAN; });
    unfit("min_p must lie in [0, 1], not 2", [](Request& r) { r.params.minP = 2; });
    unfit("repetition_penalty must lie in 0.01..100", [](Request& r) { r.params.repetitionPenalty = 0; });
    unfit("presence_penalty must be a number", [](Request& r) { r.params.presencePenalty = INFINITY; });
    unfit("frequency_penalty must be a number", [](Request& r) { r.params.frequencyPenalty = -1e31; });
    unfit("max_new_tokens", [](Request& r) { r.params.maxNewTokens = 0; });
    Request foreign = request({1}, 1);
    RowState state{1, std::vector<std::byte>(static_cast<size_t>(c.stateBytes())), "another", ""};
    foreign.prefix = std::make_shared<RowState>(state);
    REFUSES(BackendError, "belongs to another export", scheduler.submit(foreign));
    CHECK(!scheduler.busy() && rig.machine.steps.empty());
    scheduler.submit(request(ramp(7), 9));
    CHECK(runAll(scheduler).at(0).size() == 3);  // up to the limit
}

TEST(somebody_else_in_the_rows_is_noticed) {
    Rig rig;
    Session session = rig.session();
    Scheduler scheduler(session, {});
    scheduler.submit(request({1}, 9));
    scheduler.step();
    session.resetRow(0);
    REFUSES(UsageError, "something else has used the rows", scheduler.step());
    REFUSES(UsageError, "something else has used the rows", scheduler.cancel(0));
}

TEST(rows_that_cannot_be_opened) {
    Rig rig;
    Session session = rig.session();
    Scheduler scheduler(session, {});
    scheduler.submit(request(ramp(5), 3));
    size_t const free = std::exchange(rig.machine.freeBytes, 1000);
    for (int i = 0; i < 2; ++i) REFUSES(BackendError, "not enough GPU memory for 3 rows", scheduler.step());
    rig.machine.freeBytes = free;
    CHECK(tokens(runAll(scheduler).at(0)) == greedy(rig.contract, ramp(5), 3));
}

TEST(a_failed_step_ends_only_what_it_ran) {
    for (bool inPlace : {true, false}) {
        Rig rig;
        rig.machine.inPlace = inPlace;
        Session session = rig.session();
        Scheduler scheduler(session, {});
        scheduler.submit(request(ramp(3), 9));
        scheduler.step();
        scheduler.submit(request(ramp(9, 2), 5));
        int runs = 0;
        rig.machine.before = [&](std::string const& what) {
            if (what == "run" && ++runs == 2) throw BackendError("this decode step");
        };
        auto const first = scheduler.step();
        CHECK(first.size() == 1 && first[0].request == 0 && *first[0].error == "this decode step");
        CHECK(scheduler.running() == 1);
        scheduler.submit(request(ramp(4, 3), 5));
        auto const events = runAll(scheduler);
        CHECK(tokens(events.at(1)) == greedy(rig.contract, ramp(9, 2), 5));
        CHECK(tokens(events.at(2)) == greedy(rig.contract, ramp(4, 3), 5));
    }
}

TEST(penalties_that_leave_no_token) {
    SamplingParams params;
    params.repetitionPenalty = 100;
    Sampler sampler(params, 0, {0, 1});
    float const logits[] = {-3e38f, -2e38f};
    REFUSES(UsageError, "leaves no token to choose", sampler(logits, 2));
    float const broken[] = {NAN, 1};
    REFUSES(BackendError, "the model produced nan logits", sampler(broken, 2));
}

}  // namespace
