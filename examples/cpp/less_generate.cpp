// Continues token ids with an engine: reads one prompt per line, writes one line of new ids for each, in the same
// order.
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
    "  TOKENS  file with token ids separated by spaces, one prompt per line ('-': standard input)\n"
    "  --out FILE            write to FILE instead of standard output\n"
    "  --max-new-tokens N    maximum number of new tokens per prompt (128)\n"
    "  --temperature X       0 is greedy (0)\n"
    "  --top-k N, --top-p X  sample only from the most likely tokens (0 and 1: all)\n"
    "  --seed N              seed for reproducible sampling\n"
    "  --prefix FILE         continue from a saved state\n"
    "  --save-state FILE     prefill a single prompt, save its state and exit\n"
    "  --ignore-eos          continue past end-of-sequence tokens\n"
    "  --device N            GPU (0)\n"
    "  --no-cuda-graphs      do not capture decode steps in CUDA graphs\n"
    "  --no-verify           do not check the plan's hash\n"
    "  --trust-code          load native code of the bundle that this machine did not build, if you trust its source\n"
    "  --verbose             print TensorRT's log\n";

struct Options {
    std::string bundle, tokens, out, prefix, saveState;
    less::SamplingParams params;
    less::OpenOptions open;
    less::SessionOptions session;
};

// Parses all of `text` as a number of type T; `name` is what the error message calls it.
template <class T>
T number(std::string const& text, std::string const& name) {
    std::istringstream stream(text);
    T value{};
    bool const negative = std::is_unsigned_v<T> && text.find('-') != std::string::npos;
    if (negative || !(stream >> value) || !stream.eof())
        throw less::UsageError(name + " is not a number: '" + text + "'");
    return value;
}

Options parse(std::vector<std::string> const& args) {
    Options o;
    std::vector<std::string> positional;
    for (size_t i = 0; i < args.size(); ++i) {
        std::string const& arg = args[i];
        auto const value = [&]() -> std::string const& {
            if (i + 1 == args.size()) throw less::UsageError(arg + " needs a value");
            return args[++i];
        };
        if (arg == "--out") {
            o.out = value();
        } else if (arg == "--max-new-tokens") {
            o.params.maxNewTokens = number<int64_t>(value(), arg);
        } else if (arg == "--temperature") {
            o.params.temperature = number<double>(value(), arg);
        } else if (arg == "--top-k") {
            o.params.topK = number<int64_t>(value(), arg);
        } else if (arg == "--top-p") {
            o.params.topP = number<double>(value(), arg);
        } else if (arg == "--seed") {
            o.params.seed = number<uint64_t>(value(), arg);
        } else if (arg == "--prefix") {
            o.prefix = value();
        } else if (arg == "--save-state") {
            o.saveState = value();
        } else if (arg == "--ignore-eos") {
            o.params.ignoreEos = true;
        } else if (arg == "--device") {
            o.session.device = number<int>(value(), arg);
        } else if (arg == "--no-cuda-graphs") {
            o.session.cudaGraphs = false;
        } else if (arg == "--no-verify") {
            o.open.verifyPlan = false;
        } else if (arg == "--trust-code") {
            o.open.trustCode = true;
        } else if (arg == "--verbose") {
            o.session.verbose = true;
        } else if (arg.rfind("--", 0) == 0) {
            throw less::UsageError("unknown option " + arg + ": see less_generate --help");
        } else {
            positional.push_back(arg);
        }
    }
    if (positional.size() != 2)
        throw less::UsageError("give a bundle and a file of token ids: see less_generate --help");
    o.bundle = positional[0];
    o.tokens = positional[1];
    o.params.validate();
    return o;
}

std::vector<less::Prompt> readPrompts(std::istream& in, std::string const& name) {
    std::vector<less::Prompt> prompts;
    for (std::string line; std::getline(in, line);) {
        less::Prompt prompt;
        std::istringstream fields(line);
        for (std::string field; fields >> field;) prompt.push_back(number<int64_t>(field, "a token id in " + name));
        if (!prompt.empty()) prompts.push_back(std::move(prompt));
    }
    if (prompts.empty()) throw less::UsageError(name + " contains no token ids: write them separated by spaces");
    return prompts;
}

// Shows the current stage, on a terminal only.
void progress(std::string const& stage) {
    static bool const terminal = ::isatty(STDERR_FILENO);
    if (terminal) std::fprintf(stderr, "\r\033[K%s", stage.c_str());
}

void run(Options const& o) {
    std::ifstream file(o.tokens);
    if (o.tokens != "-" && !file) throw less::UsageError("cannot read " + o.tokens + ": " + std::strerror(errno));
    auto const prompts = readPrompts(o.tokens == "-" ? std::cin : file, o.tokens == "-" ? "standard input" : o.tokens);
    if (!o.saveState.empty() && prompts.size() != 1) throw less::UsageError("--save-state takes exactly one prompt");

    progress(o.open.verifyPlan ? "verifying " + o.bundle : "");
    less::Bundle const bundle = less::Bundle::open(o.bundle, o.open);
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
    size_t count = 0;
    auto const results = less::generate(session, prompts, o.params, bundle.eosIds, start,
                                        [&](less::Token const&) { progress(std::to_string(++count) + " tokens"); });
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
    std::vector<std::string> const args(argv + 1, argv + argc);
    if (args.empty() || args[0] == "--help" || args[0] == "-h") {
        std::fputs(kUsage, args.empty() ? stderr : stdout);
        return args.empty();
    }
    run(parse(args));
    return 0;
} catch (less::Error const& error) {
    progress("");
    std::fprintf(stderr, "less_generate: error: %s\n", error.what());
    return 1;
}
