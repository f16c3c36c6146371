// Steps over ranges of rows, between copies and resets, against the oracle of each row.
#include "check.hpp"
#include "rig.hpp"

namespace {

using namespace less;
using namespace less::testing;

constexpr int64_t kRows = 3;

// Random steps, copies, resets, reads and writes; every logit and length is checked.
void play(Rig& rig, Session& session, unsigned seed, int count) {
    std::mt19937 random(seed);
    auto const below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
    Contract const& c = rig.contract;
    session.open(kRows);
    std::vector<Oracle> rows(kRows, Oracle(c));
    RowState saved = session.readRow(0);
    Oracle savedRow = rows[0];
    for (int i = 0; i < count; ++i) {
        int64_t const one = below(kRows), other = below(kRows);
        auto& oracle = rows[static_cast<size_t>(one)];
        switch (below(12)) {
            case 0:
                session.copyRow(one, other);
                rows[static_cast<size_t>(other)] = oracle;
                break;
            case 1:
                session.resetRow(one);
                oracle = Oracle(c);
                break;
            case 2:
                saved = session.readRow(one);
                savedRow = oracle;
                break;
            case 3:
                session.writeRow(one, saved);
                oracle = savedRow;
                break;
            default: {
                int64_t const first = std::min(one, other), size = std::max(one, other) - first + 1;
                int64_t const width = below(2) ? 1 : 1 + below(c.chunk);
                std::vector<int64_t> ids;
                std::vector<int32_t> newLength;
                for (int64_t j = 0; j < size * width; ++j) ids.push_back(below(c.vocabSize));
                for (int64_t j = 0; j < size; ++j) newLength.push_back(static_cast<int32_t>(below(width + 1)));
                Logits const logits = session.step(ids, newLength, {first, size});
                for (int64_t j = 0; j < size; ++j) {
                    Oracle& row = rows[static_cast<size_t>(first + j)];
                    int32_t const fed = newLength[static_cast<size_t>(j)];
                    for (int64_t t = 0; t < fed; ++t) row.feed(ids[static_cast<size_t>(j * width + t)]);
                    if (fed) CHECK(row.agrees(logits.row(j, c.allLogits ? fed - 1 : 0)));
                    CHECK(session.length(first + j) == row.length());
                }
            }
        }
    }
}

TEST(ranges_of_rows) {
    for (bool inPlace : {true, false}) {
        for (bool graphs : {true, false}) {
            for (bool all : {true, false}) {
                Contract c = twoLayers(ElementType::kFloat16, all ? SlotDtype::kInt8 : SlotDtype::kModel);
                c.allLogits = all;
                Rig rig(c, graphs);
                rig.machine.inPlace = inPlace;
                {
                    Session session = rig.session();
                    for (unsigned seed = 0; seed < 3; ++seed) play(rig, session, seed, 60);
                }
                CHECK((rig.machine.captured > 2) == graphs);
                CHECK(rig.machine.memory.empty());
            }
        }
    }
}

TEST(a_range_runs_alone) {
    for (bool inPlace : {true, false}) {
        Rig rig;
        rig.machine.inPlace = inPlace;
        Session s = rig.session();
        s.open(3);
        s.step({1, 2, 3}, {3}, {2, 1});
        CHECK(rig.machine.steps.back() == (std::pair<int, Shape>{1, {1, 3}}));
        CHECK((std::vector{s.length(0), s.length(1), s.length(2)} == std::vector<int32_t>{0, 0, 3}));
        s.step({4, 5}, {1, 1}, {1, 2});
        CHECK(rig.machine.steps.back() == (std::pair<int, Shape>{0, {2, 1}}));
        CHECK((rig.machine.feeds.back().ids == std::vector<std::vector<int64_t>>{{4}, {5}}));
        CHECK((rig.machine.feeds.back().past == std::vector<int32_t>{0, 3}));
    }
}

TEST(graphs_of_ranges) {
    Rig rig;  // in place: one graph, for the number of rows that decodes
    Session s = rig.session();
    s.open(3);
    auto const decode = [&](size_t count, int64_t first = 0) {
        s.step(std::vector<int64_t>(count, 1), std::vector<int32_t>(count, 1), {first, static_cast<int64_t>(count)});
    };
    for (int i = 0; i < 4; ++i) decode(2);
    CHECK(rig.machine.captured == 1 && rig.machine.launches == 3);
    s.step({1, 2, 3}, {3}, {2, 1});  // a piece of a prompt between them
    decode(2);
    CHECK(rig.machine.captured == 1 && rig.machine.launches == 4);
    decode(2, 1);  // not from row 0: as many rows, no graph
    CHECK(rig.machine.launches == 4);
    decode(2);
    CHECK(rig.machine.captured == 1 && rig.machine.launches == 5);
    decode(3);
    decode(3);
    CHECK(rig.machine.captured == 2 && rig.machine.launches == 6);
}

TEST(refused_ranges) {
    Rig rig;
    Session s = rig.session();
    REFUSES(BackendError, "is not open", s.step({1}, {1}, {0, 1}));
    s.open(2);
    for (RowRange rows : {RowRange{0, 0}, {0, 3}, {2, 1}, {-1, 1}, {1, 2}, {0, -1}, {1, INT64_MAX}}) {
        REFUSES(BackendError, "rows must be a range of adjacent rows within 0..1", s.step({1}, {1}, rows));
    }
    REFUSES(BackendError, "input_ids must be [1, T]", s.step({}, {1}, {1, 1}));
    REFUSES(BackendError, "new_length must be [1], not [2]", s.step({1}, {1, 1}, {1, 1}));
    CHECK(rig.machine.steps.empty());
}

TEST(a_failure_leaves_the_other_rows) {
    for (bool inPlace : {true, false}) {
        Rig rig;
        rig.machine.inPlace = inPlace;
        Session s = rig.session();
        s.open(3);
        Oracle oracle(rig.contract);
        oracle.feed(7);
        s.step({7, 7, 7}, {1, 1, 1});
        rig.machine.runs = false;
        REFUSES(BackendError, "cannot run this step", s.step({1, 2}, {1, 1}, {1, 2}));
        rig.machine.runs = true;
        REFUSES(BackendError, "the state of row 1 is undefined", s.step({1, 2, 3}, {1, 1, 1}));
        REFUSES(BackendError, "the state of row 2 is undefined", s.step({1}, {1}, {2, 1}));
        REFUSES(BackendError, "the state of row 2 is undefined", s.readRow(2));
        REFUSES(BackendError, "the state of row 1 is undefined", s.copyRow(1, 0));
        oracle.feed(8);
        CHECK(oracle.agrees(s.step({8}, {1}, {0, 1}).row(0)));
        s.copyRow(0, 1);
        s.writeRow(2, s.readRow(1));
        oracle.feed(9);
        Logits const logits = s.step({9, 9, 9}, {1, 1, 1});
        for (int64_t row = 0; row < 3; ++row) CHECK(oracle.agrees(logits.row(row)));
    }
}

TEST(no_memory_for_a_range) {
    Rig rig;
    Session s = rig.session();
    s.open(3);
    size_t const free = std::exchange(rig.machine.freeBytes, 100);
    REFUSES(BackendError, "out of memory", s.step({1}, {1}, {1, 1}));  // no address that the engine takes
    s.step({1}, {1}, {0, 1});
    rig.machine.freeBytes = free;
    s.resetRow(1);
    Oracle oracle(rig.contract);
    oracle.feed(1);
    CHECK(oracle.agrees(s.step({1}, {1}, {1, 1}).row(0)));
}

TEST(every_change_is_counted) {
    Rig rig;
    Session s = rig.session();
    uint64_t before = s.revision();
    auto const counted = [&] { return std::exchange(before, s.revision()) != s.revision(); };
    s.open(2);
    CHECK(counted());
    s.step({1, 2}, {1, 1});
    CHECK(counted());
    RowState const state = s.readRow(0);
    CHECK(!counted());
    s.writeRow(1, state);
    CHECK(counted());
    s.copyRow(0, 1);
    CHECK(counted());
    s.resetRow(0);
    CHECK(counted());
    s.close();
    CHECK(counted());
}

}  // namespace
