// Files of row states, and states that sessions take.
#include <cstring>
#include <limits>

#include "check.hpp"
#include "contracts.hpp"
#include "folder.hpp"
#include "host_machine.hpp"
#include "json.hpp"
#include "plan_runner.hpp"
#include "row_state.hpp"

namespace {

using namespace less;
using namespace less::testing;

constexpr SlotDtype kInt8 = SlotDtype::kInt8;

// Where a tensor of the contract is in RowState::data.
std::byte* tensorIn(RowState& state, Contract const& contract, std::string const& name) {
    std::byte* place = state.data.data();
    for (StateTensor const& tensor : contract.state()) {
        if (tensor.past.name == name) return place;
        place += tensor.rowBytes;
    }
    bug("no such tensor");
}

template <class T>
void put(std::byte* tensor, size_t index, T value) {
    std::memcpy(tensor + index * sizeof(T), &value, sizeof value);
}

// A state with values in every tensor; the first slot of each head holds a token, the second none.
RowState stateOf(Contract const& contract) {
    RowState state{123456, std::vector<std::byte>(static_cast<size_t>(contract.stateBytes())), "a \"quoted\" identity"};
    for (size_t i = 0; i < state.data.size(); ++i) state.data[i] = static_cast<std::byte>(i * 7 % 60);
    for (StateTensor const& tensor : contract.state()) {
        if (tensor.past.type != ElementType::kInt32) continue;
        for (size_t i = 0; i < static_cast<size_t>(tensor.rowBytes / 4); ++i) {
            put<int32_t>(tensorIn(state, contract, tensor.past.name), i, i % 2 ? -1 : 123455);
        }
    }
    return state;
}

// The two parts of a file.
std::pair<std::string, std::string> parts(std::string const& file) {
    uint64_t size = 0;
    std::memcpy(&size, file.data(), sizeof size);
    return {file.substr(8, size), file.substr(8 + size)};
}

std::string joined(std::string const& header, std::string const& body) {
    uint64_t const size = header.size();
    return std::string(reinterpret_cast<char const*>(&size), sizeof size) + header + body;
}

// A file with another header; without its checksum, because that covers only part of the header.
std::string edited(std::string const& file, std::string const& before, std::string const& after) {
    auto [header, body] = parts(file);
    size_t const at = header.find(before);
    CHECK(at != std::string::npos);
    if (at != std::string::npos) header.replace(at, before.size(), after);
    return joined(header, body);
}

std::string withoutChecksum(std::string const& file) {
    auto const header = parts(file).first;
    size_t const at = header.find(",\"sha256\":\"");
    CHECK(at != std::string::npos);
    return edited(file, header.substr(at, 11 + 64 + 1), "");
}

TEST(row_state_files) {
    Folder const folder;
    auto const file = folder.path / "state.safetensors";
    for (Contract const& contract : {twoLayers(ElementType::kFloat32), twoLayers(ElementType::kFloat16),
                                     twoLayers(ElementType::kFloat16, kInt8), twoLayers(ElementType::kFloat32, kInt8),
                                     twoLayers(ElementType::kFloat16, kInt8, 16), twoLayers(ElementType::kBFloat16)}) {
        RowState const state = stateOf(contract);
        state.save(file, contract);
        RowState const loaded = RowState::load(file, contract);
        CHECK(loaded.layout == contract.layout());
        CHECK(loaded.length == state.length && loaded.data == state.data && loaded.identity == state.identity);
        CHECK(std::distance(std::filesystem::directory_iterator(folder.path), {}) == 1);
        folder.write("state.safetensors", withoutChecksum(contentOf(file)));  // from an earlier version
        CHECK(RowState::load(file, contract).data == state.data);
        state.save(file, contract);
    }
    Contract const contract = twoLayers(ElementType::kBFloat16);
    for (SlotDtype slots : {SlotDtype::kModel, kInt8}) {
        REFUSES(BackendError, "to another export", RowState::load(file, twoLayers(ElementType::kFloat16, slots)));
    }
    Contract one = contract;
    one.layers.pop_back();
    RowState state = stateOf(contract);
    REFUSES(BackendError, "past.1.", RowState::load(file, one));
    REFUSES(BackendError, "belongs to another export", state.save(file, one));
    REFUSES(BackendError, "cannot write", state.save(folder.path / "missing" / "x", contract));
    REFUSES(BackendError, "cannot read", RowState::load(folder.path / "missing", contract));
    REFUSES(BackendError, "cannot read", RowState::load(folder.path, contract));
    for (int64_t length : {int64_t{-1}, kMaxLength + 1}) {
        state.length = length;
        REFUSES(BackendError, "this state is damaged", state.save(file, contract));
    }
    state.length = 1;
    state.identity = "\xFF";
    REFUSES(BackendError, "this state is damaged", state.save(file, contract));
    CHECK(RowState::load(file, contract).length == 123456);  // what was there has stayed
}

TEST(damaged_row_state_files) {
    Folder const folder;
    Contract const contract = twoLayers(ElementType::kBFloat16);
    std::string const whole = writeState(stateOf(contract), contract), bare = withoutChecksum(whole);
    auto const damaged = [&](std::string const& text, char const* why = "") {
        auto const file = folder.write("damaged", text);
        REFUSES(BackendError, why, RowState::load(file, contract));
    };
    for (size_t size : {size_t{0}, size_t{5}, size_t{8}, size_t{60}, whole.size() - 1}) damaged(whole.substr(0, size));
    damaged(whole + "x", "after its tensors");
    damaged(std::string(8, '\xFF') + whole.substr(8), "truncated or not a safetensors file");
    for (size_t i = whole.size() - parts(whole).second.size(); i < whole.size(); i += 7) {
        std::string text = whole;
        text[i] = static_cast<char>(text[i] ^ 1);
        damaged(text, "its hash differs from the stated one");
    }
    damaged(edited(whole, "quoted", "Quoted"), "its hash differs");
    damaged(edited(whole, "123456", "123457"), "its hash differs");
    for (auto const& [before, after] : {std::pair("less-state", "else-state"),
                                        {"\"123456\"", "\"-23456\""},
                                        {"\"123456\"", "\"\""},
                                        {"\"123456\"", "\"+23456\""},
                                        {"\"123456\"", "\"2147483648\""},
                                        {"\"123456\"", "\"99999999999\""},
                                        {"\"123456\"", "123456"},
                                        {"\"123456\"", "\"123456\",\"x\":[]"},
                                        {"data_offsets\":[0,", "data_offsets\":[9,"},
                                        {"data_offsets\":[0,", "data_offsets\":[9223372036854775807,-2],\"x\":[0,"},
                                        {"past.0.z", "past.0.y"},
                                        {"\"past.0.z\"", "\"past.0.h\""},
                                        {"\"shape\":[2", "\"shape\":[3"},
                                        {"\"dtype\":\"F32\"", "\"dtype\":\"F64\""}}) {
        damaged(edited(bare, before, after));
    }
    // Two tensors of the same size at the same place, and nothing at another.
    auto const range = [&](char const* name) {
        std::string const header = parts(bare).first;
        size_t const begin = header.find("data_offsets", header.find(name));
        return header.substr(begin, header.find(']', begin) + 1 - begin);
    };
    damaged(edited(bare, range("past.0.key"), range("past.0.value")), "overlap or leave gaps");
}

TEST(values_that_no_state_has) {
    Contract const contract = twoLayers();
    RowState const good = stateOf(contract);
    CHECK(invalidValues(good, contract).empty());
    uint16_t const infinite = 0xFC00;
    float const nan = std::numeric_limits<float>::quiet_NaN();
    auto const fault = [&](char const* tensor, size_t index, auto value) {
        RowState state = good;
        put(tensorIn(state, contract, tensor), index, value);
        return invalidValues(state, contract);
    };
    CHECK(fault("past.0.position", 3, 123456) == "past.0.position has positions outside of -1..123455");
    CHECK(fault("past.1.position", 3, -2) == "past.1.position has positions outside of -1..123455");
    CHECK(fault("past.0.key", 2 * 8, infinite) == "past.0.key holds NaN or infinity");
    CHECK(fault("past.0.psi", 4 * 4 + 3, infinite) == "past.0.psi holds NaN or infinity");
    CHECK(fault("past.1.score", 4, nan) == "past.1.score holds NaN or infinity");
    CHECK(fault("past.0.h", 5, nan) == "past.0.h holds NaN or infinity");
    CHECK(fault("past.0.z", 1, -1e-30f) == "past.0.z is negative" && fault("past.0.z", 1, -0.f).empty());
    // Empty slots may hold anything.
    CHECK(fault("past.0.key", 2 * 8 - 1, infinite).empty() && fault("past.1.score", 3, nan).empty());
    RowState state = good;
    put(tensorIn(state, contract, "past.0.z"), 0, -1.f);
    REFUSES(JsonError, "it is damaged (past.0.z is negative)", readState(writeState(state, contract), contract));
}

TEST(values_that_no_state_with_int8_slots_has) {
    Contract const contract = twoLayers(ElementType::kFloat16, kInt8);
    RowState const good = stateOf(contract);
    CHECK(invalidValues(good, contract).empty());
    float const nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    auto const fault = [&](char const* tensor, size_t index, auto value) {
        RowState state = good;
        put(tensorIn(state, contract, tensor), index, value);
        return invalidValues(state, contract);
    };
    // The even slots hold tokens.
    for (std::string const name : {"past.0.key_scale", "past.0.value_scale"}) {
        CHECK(fault(name.c_str(), 2, nan) == name + " holds NaN or infinity");
        CHECK(fault(name.c_str(), 4, infinity) == name + " holds NaN or infinity");
        CHECK(fault(name.c_str(), 2, -1e-30f) == name + " is negative" && fault(name.c_str(), 2, 0.f).empty());
        CHECK(fault(name.c_str(), 3, nan).empty() && fault(name.c_str(), 5, -1.f).empty());
    }
    for (std::string const name : {"past.0.key", "past.0.value"}) {
        CHECK(fault(name.c_str(), 2 * 8, int8_t{-128}) == name + " holds a code of -128");
        for (int code : {-127, -1, 0, 127}) CHECK(fault(name.c_str(), 2 * 8, static_cast<int8_t>(code)).empty());
        CHECK(fault(name.c_str(), 2 * 8 - 1, int8_t{-128}).empty());
    }
    CHECK(fault("past.0.psi", 4 * 4 + 3, uint16_t{0xFC00}) == "past.0.psi holds NaN or infinity");
    CHECK(fault("past.0.position", 3, 123456) == "past.0.position has positions outside of -1..123455");
    CHECK(fault("past.0.z", 1, -1.f) == "past.0.z is negative");
    // The layer after the one with scales.
    CHECK(fault("past.1.value", 2 * 8, uint16_t{0xFC00}) == "past.1.value holds NaN or infinity");
    CHECK(fault("past.1.value", 3 * 8 - 1 + 8, uint16_t{0xFC00}).empty());
    CHECK(fault("past.1.score", 4, nan) == "past.1.score holds NaN or infinity");
}

TEST(values_that_no_state_of_16_bits_has) {
    Contract const contract = twoLayers(ElementType::kFloat16, kInt8, 16);
    RowState const good = stateOf(contract);
    CHECK(invalidValues(good, contract).empty());
    auto const fault = [&](char const* tensor, size_t index, auto value) {
        RowState state = good;
        put(tensorIn(state, contract, tensor), index, value);
        return invalidValues(state, contract);
    };
    CHECK(fault("past.0.psi", 4 * 4 + 3, int8_t{-1}) == "past.0.psi is negative");
    CHECK(fault("past.0.psi", 4 * 4 + 3, int8_t{-128}) == "past.0.psi holds a code of -128");
    CHECK(fault("past.0.psi", 4 * 4 + 3, int8_t{127}).empty() && fault("past.0.psi", 4 * 4 - 1, int8_t{-1}).empty());
    for (int value : {-128, -1, 127}) CHECK(fault("past.0.h", 2 * 4 * 2 * 8 - 1, static_cast<int8_t>(value)).empty());
    CHECK(fault("past.0.h_scale", 7, -1e-30f) == "past.0.h_scale is negative");
    CHECK(fault("past.0.h_scale", 7, std::numeric_limits<float>::infinity()) == "past.0.h_scale holds NaN or infinity");
    CHECK(fault("past.0.h_scale", 7, 0.f).empty());
    CHECK(fault("past.0.key", 2 * 8, int8_t{-128}) == "past.0.key holds a code of -128");
}

TEST(states_that_a_session_refuses) {
    Machine machine;
    Contract const contract = twoLayers();
    Session session(contract, "this one", runnerOn(machine, contract));
    RowState const good = stateOf(contract);
    session.open(2);
    auto const before = session.readRow(0).data;
    auto const refused = [&](char const* why, auto const& change) {
        RowState state = good;
        state.identity = "this one";
        change(state);
        REFUSES(BackendError, why, session.writeRow(0, state));
        REFUSES(BackendError, why, generate(session, {{1}}, {}, {}, &state));
        REFUSES(BackendError, why, prefill(session, {1}, &state));
        CHECK(session.batch() == 2 && session.readRow(0).data == before && session.length(0) == 0);
    };
    refused("belongs to another export", [](RowState& s) { s.identity = "another"; });
    refused("belongs to another export", [](RowState& s) { s.data.pop_back(); });
    refused("belongs to another export", [](RowState& s) {
        Contract other = twoLayers();  // as many bytes of other shapes
        std::swap(other.layers[0], other.layers[1]);
        CHECK(other.stateBytes() == twoLayers().stateBytes());
        s.layout = other.layout();
    });
    refused("this state is damaged (length -1)", [](RowState& s) { s.length = -1; });
    refused("this state is damaged (length 2147483648)", [](RowState& s) { s.length = kMaxLength + 1; });
    refused("length 9223372036854775807", [](RowState& s) { s.length = std::numeric_limits<int64_t>::max(); });
}

TEST(lengths_stay_below_two_to_the_31) {
    Machine machine;
    Contract const contract = twoLayers();
    Session session(contract, "", runnerOn(machine, contract));
    RowState state = stateOf(contract);
    state.length = kMaxLength - 2;
    session.open(2);
    session.writeRow(1, state);
    session.step({1, 1, 1, 2, 2, 0}, {3, 2});
    CHECK(session.length(1) == kMaxLength);
    auto const before = session.readRow(1).data;
    REFUSES(BackendError, "at most 2147483647 tokens, not 2147483648", session.step({1, 1}, {1, 1}));
    CHECK(session.length(0) == 3 && session.readRow(1).data == before);
    session.step({1, 1}, {1, 0});  // parked
    SamplingParams params;
    params.maxNewTokens = std::numeric_limits<int64_t>::max();
    state.length = kMaxLength;
    REFUSES(BackendError, "at most 2147483647 tokens", generate(session, {{1}}, params, {}, &state));
}

}  // namespace
