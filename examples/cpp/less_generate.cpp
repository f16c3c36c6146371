// Continues token ids with an engine: one prompt a line in, one line of new ids out, in the same order.
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "less_runtime.hpp"

namespace {

constexpr char const* kUsage =
    "usage: less_generate BUNDLE TOKENS [options]\n"
    "  BUNDLE  folder with an engine.plan, or x.plan with x.json beside it\n"
    "  TOKENS  file with token ids, one prompt a line, separated by spaces ('-': standard input)\n"
    "  --out FILE            write there instead of standard output\n"
    "  --max-new-tokens N    most new tokens of a prompt (128)\n"
    "  --temperature X       0 is greedy (0)\n"
    "  --top-k N, --top-p X  sample among the most likely tokens only (0, 1: all)\n"
    "  --seed N              the same tokens every time\n"
    "  --prefix FILE         continue a saved state\n"
    "  --save-state FILE     prefill the one prompt, save the state and stop\n"
    "  --ignore-eos          go on past the end-of-sequence tokens\n"
    "  --device N            GPU (0)\n"
    "  --no-cuda-graphs      launch every decode step anew\n"
    "  --no-verify           do not hash the plan\n"
    "  --verbose             print TensorRT's log\n";

struct Options {
    std::string bundle, tokens, out, prefix, saveState;
    less::SamplingParams params;
    less::SessionOptions session;
    bool verify = true;
};

// The whole of `text` as a number of type T.
template <class T>
T number(std::string const& text, std::string const& what) {
    std::istringstream stream(text);
    T value{};
    bool const negative = std::is_unsigned_v<T> && text.find('-') != std::string::npos;
    if (negative || !(stream >> value) || !stream.eof())
        throw less::UsageError(what + " is not a number: '" + text + "'");
    return value;
}

Options parse(std::vector<std::string> const& words) {
    Options o;
    std::vector<std::string> places;
    for (size_t i = 0; i < words.size(); ++i) {
        std::string const& word = words[i];
        auto const value = [&]() -> std::string const& {
            if (i + 1 == words.size()) throw less::UsageError(word + " needs a value");
            return words[++i];
        };
        if (word == "--out") {
            o.out = value();
        } else if (word == "--max-new-tokens") {
            o.params.maxNewTokens = number<int64_t>(value(), word);
        } else if (word == "--temperature") {
            o.params.temperature = number<double>(value(), word);
        } else if (word == "--top-k") {
            o.params.topK = number<int64_t>(value(), word);
        } else if (word == "--top-p") {
            o.params.topP = number<double>(value(), word);
        } else if (word == "--seed") {
            o.params.seed = number<uint64_t>(value(), word);
        } else if (word == "--prefix") {
            o.prefix = value();
        } else if (word == "--save-state") {
            o.saveState = value();
        } else if (word == "--ignore-eos") {
            o.params.ignoreEos = true;
        } else if (word == "--device") {
            o.session.device = number<int>(value(), word);
        } else if (word == "--no-cuda-graphs") {
            o.session.cudaGraphs = false;
        } else if (word == "--no-verify") {
            o.verify = false;
        } else if (word == "--verbose") {
            o.session.verbose = true;
        } else if (word.rfind("--", 0) == 0) {
            throw less::UsageError("unknown option " + word + ": less_generate --help lists them");
        } else {
            places.push_back(word);
        }
    }
    if (places.size() != 2) throw less::UsageError("give a bundle and a file of token ids: less_generate --help");
    o.bundle = places[0];
    o.tokens = places[1];
    o.params.validate();
    return o;
}

std::vector<less::Prompt> readPrompts(std::istream& in, std::string const& name) {
    std::vector<less::Prompt> prompts;
    for (std::string line; std::getline(in, line);) {
        less::Prompt prompt;
        std::istringstream words(line);
        for (std::string word; words >> word;) prompt.push_back(number<int64_t>(word, "a token id in " + name));
        if (!prompt.empty()) prompts.push_back(std::move(prompt));
    }
    if (prompts.empty()) throw less::UsageError(name + " holds no token ids: write them with spaces between");
    return prompts;
}

// Where the run is, on a terminal only.
void progress(std::string const& what) {
    static bool const shown = ::isatty(STDERR_FILENO);
    if (shown) std::fprintf(stderr, "\r\033[K%s", what.c_str());
}

void run(Options const& o) {
    std::ifstream file(o.tokens);
    if (o.tokens != "-" && !file) throw less::UsageError("cannot read " + o.tokens + ": " + std::strerror(errno));
    auto const prompts = readPrompts(o.tokens == "-" ? std::cin : file, o.tokens == "-" ? "standard input" : o.tokens);
    if (!o.saveState.empty() && prompts.size() != 1) throw less::UsageError("--save-state takes exactly one prompt");

    progress(o.verify ? "verifying " + o.bundle : "");
    less::Bundle const bundle = less::Bundle::open(o.bundle, o.verify);
    std::optional<less::RowState> prefix;
    if (!o.prefix.empty()) prefix = less::RowState::load(o.prefix, bundle.contract);
    progress("loading " + bundle.plan.string());
    less::Session session = less::openSession(bundle, o.session);
    less::RowState const* const start = prefix ? &*prefix : nullptr;
    progress("prefill");
    if (!o.saveState.empty()) {
        less::prefill(session, prompts.front(), start).save(o.saveState, bundle.contract);
        progress("");
        return;
    }
    size_t made = 0;
    auto const results = less::generate(session, prompts, o.params, bundle.eosIds, start,
                                        [&](less::Token const&) { progress(std::to_string(++made) + " tokens"); });
    progress("");

    std::ostringstream text;
    for (less::Generation const& result : results) {
        for (size_t i = 0; i < result.tokens.size(); ++i) text << (i ? " " : "") << result.tokens[i];
        text << '\n';
    }
    if (o.out.empty()) {
        std::cout << text.str() << std::flush;
    } else if (std::ofstream out(o.out); !(out << text.str() << std::flush)) {
        throw less::UsageError("cannot write " + o.out + ": " + std::strerror(errno));
    }
}

}  // namespace

int main(int argc, char** argv) try {
    std::vector<std::string> const words(argv + 1, argv + argc);
    if (words.empty() || words[0] == "--help" || words[0] == "-h") {
        std::fputs(kUsage, words.empty() ? stderr : stdout);
        return words.empty();
    }
    run(parse(words));
    return 0;
} catch (less::Error const& error) {
    progress("");
    std::fprintf(stderr, "less_generate: error: %s\n", error.what());
    return 1;
}
