// Prints what the runtime reads and computes, for tests/test_cpp_runtime.py to compare with the Python package.
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "files.hpp"
#include "host_machine.hpp"
#include "json.hpp"
#include "plan_runner.hpp"
#include "replay.hpp"
#include "sha256.hpp"
#include "text.hpp"

namespace {

using namespace less;

std::string read(std::istream& in) { return {std::istreambuf_iterator<char>(in), {}}; }

std::string list(std::vector<int64_t> const& values) {
    std::string text;
    for (int64_t value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
    return "[" + text + "]";
}

std::string number(std::optional<int64_t> const& value) { return value ? std::to_string(*value) : "null"; }

std::string list(std::vector<TensorSpec> const& specs) {
    std::string text;
    for (TensorSpec const& spec : specs) {
        text += (text.empty() ? "[" : ", [") + jsonString(spec.name) + ", " + jsonString(nameOf(spec.type)) + ", " +
                list(spec.shape) + "]";
    }
    return "[" + text + "]";
}

void describe(Bundle const& b) {
    bool const byIndex = b.plugin && b.plugin->rowsByIndex;
    std::vector<int64_t> rows, empties;
    for (StateTensor const& tensor : b.contract.state()) {
        rows.push_back(tensor.rowBytes);
        empties.push_back(tensor.empty);
    }
    std::cout << "{\"inputs\": " << list(b.contract.inputs(byIndex))
              << ", \"outputs\": " << list(b.contract.outputs(byIndex)) << ", \"row_bytes\": " << list(rows)
              << ", \"empty\": " << list(empties) << ", \"state_bytes\": " << b.contract.stateBytes()
              << ", \"token_limit\": " << number(b.contract.tokenLimit())
              << ", \"trained_length\": " << number(b.contract.trainedLength) << ", \"chunk\": " << b.contract.chunk
              << ", \"max_batch\": " << b.contract.maxBatch << ", \"identity\": " << jsonString(b.identity)
              << ", \"name\": " << jsonString(b.modelName) << ", \"eos_ids\": " << list(b.eosIds)
              << ", \"bos_id\": " << number(b.bosId) << ", \"add_bos\": " << (b.addBos ? "true" : "false")
              << ", \"plan\": " << jsonString(b.plan.string()) << ", \"version\": " << jsonString(b.header.version)
              << ", \"rtx\": " << (b.header.rtx ? "true" : "false") << ", \"plugin\": "
              << (b.plugin ? jsonString(b.plugin->inside ? "inside" : b.plugin->library.string()) : "null")
              << ", \"rows_by_index\": " << (byIndex ? "true" : "false") << "}\n";
}

// Opens one file or folder per line and prints "accepted", or why it is refused.
void verdicts(std::function<void(std::string const&)> const& open) {
    for (std::string path; std::getline(std::cin, path);) {
        try {
            open(path);
            std::cout << "accepted\n";
        } catch (Error const& error) {
            std::cout << error.what() << '\n';
        }
    }
}

// Prints the ranges of code points that are printable.
void printableCodes() {
    bool before = false;
    for (uint32_t code = 0; code <= 0x110000; ++code) {
        std::string text;
        appendUtf8(text, code);
        bool const now = code < 0x110000 && isPrintable(text);
        if (now != before) std::cout << code << (now ? ' ' : '\n');
        before = now;
    }
}

// Reads one case per line: temperature, top_k, top_p, min_p, uniform, then the logits.
void sample() {
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream fields(line);
        std::string field;
        auto const next = [&] { return fields >> field ? std::strtod(field.c_str(), nullptr) : 0; };
        SamplingParams params;
        params.temperature = next();
        params.topK = static_cast<int64_t>(next());
        params.topP = next();
        params.minP = next();
        double const uniform = next();
        std::vector<float> logits;
        while (fields >> field) logits.push_back(std::strtof(field.c_str(), nullptr));
        std::cout << chooseToken(logits.data(), static_cast<int64_t>(logits.size()), params, uniform) << '\n';
    }
}

// Continues one prompt per line on the host machine, with state in place or not, optionally after a prefix prompt.
void generateOn(Bundle const& bundle, bool inPlace, int64_t maxNewTokens, Prompt const& prefix) {
    testing::Machine machine;
    machine.inPlace = inPlace;
    Session session(bundle.contract, bundle.identity, testing::runnerOn(machine, bundle.contract));
    std::vector<Prompt> prompts;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream ids(line);
        prompts.emplace_back(std::istream_iterator<int64_t>(ids), std::istream_iterator<int64_t>());
    }
    SamplingParams params;
    params.maxNewTokens = maxNewTokens;
    std::optional<RowState> state;
    if (!prefix.empty()) state = prefill(session, prefix);
    for (Generation const& g : generate(session, prompts, params, bundle.eosIds, state ? &*state : nullptr)) {
        std::cout << list(g.tokens) << ' ' << nameOf(g.finish) << '\n';
    }
}

}  // namespace

int main(int argc, char** argv) try {
    std::vector<std::string> const args(argv + 1, argv + argc);
    std::string const& command = args.at(0);
    if (command == "describe") {  // with "unverified" or "trust"
        OpenOptions options;
        options.verifyPlan = args.back() != "unverified";
        options.trustCode = args.back() == "trust";
        describe(Bundle::open(args.at(1), options));
    }
    if (command == "verdicts") verdicts([](std::string const& path) { Bundle::open(path); });
    if (command == "printable-codes") printableCodes();
    if (command == "canonical") std::cout << Json::parse(read(std::cin)).canonical();
    if (command == "sha256") std::cout << sha256(MappedFile(args.at(1)).view());
    if (command == "sample") sample();
    if (command == "state") {
        Contract const contract = Bundle::open(args.at(1)).contract;
        RowState::load(args.at(2), contract).save(args.at(3), contract);
    }
    if (command == "state-verdicts") {
        Contract const contract = Bundle::open(args.at(1)).contract;
        verdicts([&](std::string const& path) { RowState::load(path, contract); });
    }
    if (command == "generate") {
        std::istringstream prefix(args.at(4));
        generateOn(Bundle::open(args.at(1)), args.at(2) == "in-place", std::stoll(args.at(3)),
                   Prompt(std::istream_iterator<int64_t>(prefix), std::istream_iterator<int64_t>()));
    }
    if (command == "schedules") {
        Bundle const bundle = Bundle::open(args.at(1));
        auto const kind = args.at(2) == "by-index"     ? testing::StateOf::kByIndex
                          : args.at(2) == "two-blocks" ? testing::StateOf::kTwoBlocks
                                                       : testing::StateOf::kInPlace;
        testing::replay(std::cin, std::cout, bundle.contract, bundle.eosIds, kind);
    }
    return 0;
} catch (Error const& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
} catch (JsonError const& error) {
    std::fprintf(stderr, "json: %s\n", error.what());
    return 2;
}
