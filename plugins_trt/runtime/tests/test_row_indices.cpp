// Steps over any rows of a plan that takes rows by index, between copies and resets, against the oracle of each row.
#include "check.hpp"
#include "rig.hpp"

namespace {

using namespace less;
using namespace less::testing;

constexpr int64_t kRows = 4;

Contract contract(bool all) {
    Contract c = twoLayers(ElementType::kFloat16, all ? SlotDtype::kInt8 : SlotDtype::kModel);
    c.allLogits = all;
    c.maxBatch = kRows;
    return c;
}

// Random steps over random rows, copies and resets; every logit, length and batch is checked.
void play(Rig& rig, Session& session, unsigned seed, int count) {
    std::mt19937 random(seed);
    auto const below = [&](size_t n) { return static_cast<int64_t>(random() % n); };
    Contract const& c = rig.contract;
    session.open(kRows);
    std::vector<Oracle> oracles(kRows, Oracle(c));
    for (int i = 0; i < count; ++i) {
        std::vector<int64_t> rows = {0, 1, 2, 3};
        for (size_t n = rows.size(); n > 1; --n) std::swap(rows[n - 1], rows[static_cast<size_t>(below(n))]);
        rows.resize(static_cast<size_t>(1 + below(kRows)));
        auto const at = [&](int64_t row) -> Oracle& { return oracles[static_cast<size_t>(row)]; };
        int64_t const kind = below(8);
        if (kind == 0) {
            session.copyRow(rows.front(), rows.back());
            at(rows.back()) = at(rows.front());
            continue;
        }
        if (kind == 1) {
            session.resetRow(rows[0]);
            at(rows[0]) = Oracle(c);
            continue;
        }
        int64_t const width = kind < 5 ? 1 : 1 + below(static_cast<size_t>(c.chunk));
        std::vector<int64_t> ids;
        std::vector<int32_t> newLength;
        for (size_t j = 0; j < rows.size() * static_cast<size_t>(width); ++j)
            ids.push_back(below(static_cast<size_t>(c.vocabSize)));
        for (size_t j = 0; j < rows.size(); ++j)
            newLength.push_back(static_cast<int32_t>(below(static_cast<size_t>(width) + 1)));
        rig.machine.steps.clear();
        Logits const logits = session.stepRows(ids, newLength, rows);
        int64_t ran = 0;
        for (size_t j = 0; j < rows.size(); ++j) {
            Oracle& row = at(rows[j]);
            int32_t const fed = newLength[j];
            ran += fed > 0;
            for (int64_t t = 0; t < fed; ++t) row.feed(ids[j * static_cast<size_t>(width) + static_cast<size_t>(t)]);
            auto const place = static_cast<int64_t>(j);
            if (fed) CHECK(row.agrees(logits.row(place, c.allLogits ? fed - 1 : 0)));
            if (!fed) CHECK(logits.row(place)[0] == 0);
            CHECK(session.length(rows[j]) == row.length());
        }
        CHECK(rig.machine.steps.size() == (ran > 0));  // parked rows take no part
        int64_t bucket = 1;
        while (bucket < ran) bucket *= 2;
        if (ran) CHECK(rig.machine.steps[0].second[0] == (width == 1 && rig.graphs ? bucket : ran));
    }
}

TEST(any_rows) {
    for (bool graphs : {true, false}) {
        for (bool all : {true, false}) {
            Rig rig(contract(all), graphs);
            rig.machine.byIndex = true;
            {
                Session session = rig.session();
                CHECK(session.rowsByIndex());
                for (unsigned seed = 0; seed < 4; ++seed) play(rig, session, seed, 60);
            }
            CHECK((rig.machine.captured > 2) == graphs);
            CHECK(rig.machine.memory.empty());
        }
    }
}

// A session by index, and steps of its rows that are compared with the oracle of each.
struct Decoding {
    explicit Decoding(int64_t rows) {
        rig.machine.byIndex = true;
        session = std::make_unique<Session>(rig.session());
        open(rows);
    }
    void open(int64_t rows) {
        session->open(rows);
        oracles.assign(static_cast<size_t>(rows), Oracle(rig.contract));
    }
    void decode(std::vector<int64_t> const& rows) {
        std::vector<int64_t> ids;
        for (int64_t row : rows) ids.push_back(row + 5);
        Logits const logits = session->stepRows(ids, std::vector<int32_t>(rows.size(), 1), rows);
        for (size_t i = 0; i < rows.size(); ++i) {
            Oracle& oracle = oracles[static_cast<size_t>(rows[i])];
            oracle.feed(ids[i]);
            CHECK(oracle.agrees(logits.row(static_cast<int64_t>(i))));
        }
    }
    // The numbers of rows of the steps since the last call.
    std::vector<int64_t> batches() {
        std::vector<int64_t> result;
        for (auto const& [profile, shape] : rig.machine.steps) result.push_back(shape[0]);
        rig.machine.steps.clear();
        return result;
    }
    bool counted(int captured, int launches) const {
        return rig.machine.captured == captured && rig.machine.launches == launches;
    }

    Rig rig{contract(false)};
    std::unique_ptr<Session> session;
    std::vector<Oracle> oracles;
};

TEST(a_graph_for_each_bucket) {
    Decoding d(kRows);
    for (std::vector<int64_t> const& rows :
         std::vector<std::vector<int64_t>>{{0}, {1}, {2, 3}, {3, 1}, {3, 1, 2}, {0, 1, 2}, {3, 0, 1, 2}})
        d.decode(rows);
    CHECK((d.batches() == std::vector<int64_t>{1, 1, 2, 2, 4, 4, 4}));
    CHECK(d.counted(3, 4));  // after a change of shapes, once without a graph
    for (std::vector<int64_t> const& rows :
         std::vector<std::vector<int64_t>>{{2}, {1, 3}, {2, 0, 3}, {1}, {0, 1, 2, 3}})
        d.decode(rows);
    d.session->stepRows({1, 2, 3}, {3}, {3});  // the last token of a prompt drops nothing
    d.session->stepRows({4}, {1}, {3});
    CHECK((d.batches() == std::vector<int64_t>{1, 2, 4, 1, 4, 1, 1}));
    CHECK(d.counted(3, 10));
}

TEST(the_last_bucket_is_of_all_rows) {
    Decoding d(3);
    for (std::vector<int64_t> const& rows : std::vector<std::vector<int64_t>>{{0}, {2, 1}, {1, 2, 0}}) d.decode(rows);
    CHECK((d.batches() == std::vector<int64_t>{1, 2, 3}));
    // At other addresses, a step has to run before it is captured; contexts are used again.
    for (int64_t rows : {4, 3, 2, 4}) {
        d.open(rows);
        int const captured = d.rig.machine.captured;
        d.decode({0});
        d.decode({1, 0});
        CHECK(d.rig.machine.captured == captured);
        d.decode({1});
        d.decode({0, 1});
        CHECK(d.rig.machine.captured == captured + 2);
    }
    CHECK(d.rig.machine.moreContexts == 99 - 2);
}

TEST(without_memory_for_a_context) {
    Decoding d(kRows);
    d.rig.machine.moreContexts = 1;
    for (std::vector<int64_t> const& rows : std::vector<std::vector<int64_t>>{{0, 1}, {2}, {3}, {0, 1, 2}, {1}})
        d.decode(rows);
    CHECK((d.batches() == std::vector<int64_t>{2, 2, 2, 4, 2}));
    Decoding none(kRows);
    none.rig.machine.moreContexts = 0;
    for (std::vector<int64_t> const& rows : std::vector<std::vector<int64_t>>{{0, 1}, {2}, {3}}) none.decode(rows);
    CHECK((none.batches() == std::vector<int64_t>{4, 4, 4}) && none.counted(1, 2));
}

TEST(steps_go_on_without_graphs) {
    Decoding d(kRows);
    d.decode({0});
    d.decode({2});
    d.rig.machine.captures = false;
    for (int i = 0; i < 3; ++i) d.decode({1, 2, 3});
    for (int i = 0; i < 3; ++i) d.decode({3});
    CHECK((d.batches() == std::vector<int64_t>{1, 1, 4, 4, 3, 1, 1, 1}));
    CHECK(d.counted(1, 1) && d.rig.machine.captureAttempts == 2);
}

TEST(refused_rows) {
    Rig rig(contract(false));
    rig.machine.byIndex = true;
    Session s = rig.session();
    REFUSES(BackendError, "is not open", s.stepRows({1}, {1}, {0}));
    s.open(3);
    for (std::vector<int64_t> const& rows : std::vector<std::vector<int64_t>>{{}, {3}, {-1}, {1, 1}, {0, 2, 0}}) {
        REFUSES(BackendError, "rows must be distinct rows within 0..2", s.stepRows({1, 2}, {1, 1}, rows));
    }
    REFUSES(BackendError, "new_length must be [1], not [2]", s.stepRows({1}, {1, 1}, {1}));
    CHECK(rig.machine.steps.empty());
    Rig ranged(contract(false));
    Session other = ranged.session();
    CHECK(!other.rowsByIndex());
    other.open(3);
    other.stepRows({1, 2}, {1, 1}, {1, 2});
    REFUSES(BackendError, "this plan runs adjacent rows in order", other.stepRows({1, 2}, {1, 1}, {2, 1}));
    REFUSES(BackendError, "this plan runs adjacent rows in order", other.stepRows({1, 2}, {1, 1}, {0, 2}));
}

TEST(a_plan_that_takes_no_rows) {
    Rig rig(contract(false));
    rig.machine.byIndex = true;
    REFUSES(EngineError, "the plan lacks the tensor rows", rig.session([](HostPlan& plan) {
        for (auto t = plan.io.begin(); t != plan.io.end(); ++t) {
            if (t->name == "rows") return void(plan.io.erase(t));
        }
    }));
    Rig other(contract(false));
    REFUSES(EngineError, "the plan has the tensor rows, which the contract lacks",
            other.session([](HostPlan& plan) { plan.io.push_back({"rows", true, "int32", {-1}}); }));
}

}  // namespace
