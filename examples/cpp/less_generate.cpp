// Continues token ids with an engine: reads one prompt per line, writes one line of new ids for each, in the same
// order; or, with --prompts, runs the lines as requests over the rows of the engine, and writes each as it ends.
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "less_scheduler.hpp"

namespace {

constexpr char const* kUsage =
    "usage: less_generate BUNDLE TOKENS [options]\n"
    "       less_generate BUNDLE --prompts FILE [options]\n"
    "  BUNDLE  folder with an engine.plan, or x.plan with x.json beside it\n"
    "  TOKENS  file with token ids separated by spaces, one prompt per line ('-': standard input)\n"
    "  --prompts FILE        a request per line of FILE, in the same format: they share the rows of the engine, and "
    "each\n"
    "                        is written as it ends: its line in FILE, eos, stop, length or error, and the new ids\n"
    "  --rows N              with --prompts: most requests that run at a time (all that the engine takes)\n"
    "  --piece N             with --prompts: tokens of a prompt that are fed between two tokens of others (the chunk)\n"
    "  --out FILE            write to FILE instead of standard output\n"
    "  --max-new-tokens N    maximum number of new tokens per prompt (128)\n"
    "  --temperature X       0 is greedy (0)\n"
    "  --top-k N, --top-p X  sample only from the most likely tokens (0 and 1: all)\n"
    "  --seed N              seed for reproducible sampling\n"
    "  --prefix FILE         continue from a saved state\n"
    "  --save-state FILE     prefill a single prompt, save its state and exit\n"
    "  --ignore-eos          continue past end-of-sequence tokens\n"
    "  --stop-ids N,N        tokens that end a text\n"
    "  --device N            GPU (0)\n"
    "  --no-cuda-graphs      do not capture decode steps in CUDA graphs\n"
    "  --no-verify           do not check the plan's hash\n"
    "  --trust-code          load native code of the bundle that this machine did not build, if you trust its source\n"
    "  --verbose             print TensorRT's log\n";

struct Options {
    std::string bundle, tokens, out, prefix, saveState;
    bool many = false;  // --prompts names `tokens`
    less::SchedulerOptions scheduler;
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

std::vector<int64_t> numbers(std::string const& text, std::string const& name) {
    std::vector<int64_t> values;
    std::istringstream fields(text);
    for (std::string field; std::getline(fields, field, ',');) values.push_back(number<int64_t>(field, name));
    return values;
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
        } else if (arg == "--prompts") {
            o.tokens = value();
            o.many = true;
        } else if (arg == "--rows") {
            o.scheduler.rows = number<int64_t>(value(), arg);
        } else if (arg == "--piece") {
            o.scheduler.piece = number<int64_t>(value(), arg);
        } else if (arg == "--stop-ids") {
            o.params.stopTokenIds = numbers(value(), arg);
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
    if (positional.size() != (o.many ? 1 : 2))
        throw less::UsageError("give a bundle and a file of token ids: see less_generate --help");
    o.bundle = positional[0];
    if (!o.many) o.tokens = positional[1];
    if (!o.many && (o.scheduler.rows || o.scheduler.piece))
        throw less::UsageError("--rows and --piece need --prompts: see less_generate --help");
    if (o.many && !o.saveState.empty()) throw less::UsageError("--save-state takes exactly one prompt, not --prompts");
    o.params.validate();
    return o;
}

// A prompt and its line in the file.
struct Line {
    size_t number;
    less::Prompt prompt;
};

std::vector<Line> readPrompts(std::istream& in, std::string const& name) {
    std::vector<Line> lines;
    size_t count = 0;
    for (std::string line; std::getline(in, line);) {
        less::Prompt prompt;
        std::istringstream fields(line);
        ++count;
        for (std::string field; fields >> field;) prompt.push_back(number<int64_t>(field, "a token id in " + name));
        if (!prompt.empty()) lines.push_back({count, std::move(prompt)});
    }
    if (lines.empty()) throw less::UsageError(name + " contains no token ids: write them separated by spaces");
    return lines;
}

// Shows the current stage, on a terminal only.
void progress(std::string const& stage) {
    static bool const terminal = ::isatty(STDERR_FILENO);
    if (terminal) std::fprintf(stderr, "\r\033[K%s", stage.c_str());
}

// Where results go: a file or standard output.
class Output {
 public:
    explicit Output(std::string path) : path_(std::move(path)) {
        if (!path_.empty()) file_.open(path_);
        check();
    }
    // Writes a line at once.
    void line(std::string const& text) {
        out() << text << '\n' << std::flush;
        check();
    }

 private:
    std::ostream& out() { return path_.empty() ? std::cout : file_; }
    void check() {
        std::string const name = path_.empty() ? "standard output" : path_;
        if (!out()) throw less::UsageError("cannot write " + name + ": " + std::strerror(errno));
    }

    std::string path_;
    std::ofstream file_;
};

std::string joined(std::vector<int64_t> const& ids) {
    std::string text;
    for (int64_t id : ids) text += (text.empty() ? "" : " ") + std::to_string(id);
    return text;
}

// One prompt after the other in groups; results in the order of the prompts.
void runGroups(Options const& o, less::Session& session, std::vector<int64_t> const& eosIds,
               std::vector<Line> const& lines, less::RowState const* prefix) {
    std::vector<less::Prompt> prompts;
    for (Line const& line : lines) prompts.push_back(line.prompt);
    size_t count = 0;
    auto const results = less::generate(session, prompts, o.params, eosIds, prefix,
                                        [&](less::Token const&) { progress(std::to_string(++count) + " tokens"); });
    progress("");
    Output output(o.out);
    for (less::Generation const& result : results) output.line(joined(result.tokens));
}

// All prompts as requests; results as they end. One that fails does not end the others.
void runRequests(Options const& o, less::Session& session, std::vector<int64_t> const& eosIds,
                 std::vector<Line> const& lines, std::shared_ptr<less::RowState const> const& prefix) {
    less::Scheduler scheduler(session, eosIds, o.scheduler);
    scheduler.open();
    Output output(o.out);
    std::map<uint64_t, std::pair<size_t, std::vector<int64_t>>> going;  // line and new ids by request
    size_t next = 0, failed = 0;
    auto const write = [&](size_t line, std::string const& how, std::string const& what) {
        progress("");
        output.line(std::to_string(line) + '\t' + how + '\t' + what);
        failed += how == "error";
    };
    while (next < lines.size() || scheduler.busy()) {
        for (; next < lines.size() && !scheduler.full(); ++next) {
            try {
                uint64_t const id = scheduler.submit({lines[next].prompt, o.params, next, prefix});
                going[id].first = lines[next].number;
            } catch (less::Error const& error) {
                write(lines[next].number, "error", error.what());
            }
        }
        for (less::Event const& event : scheduler.step()) {
            auto& [line, ids] = going.at(event.request);
            if (event.token) ids.push_back(*event.token);
            if (event.error) write(line, "error", *event.error);
            if (event.finish) write(line, less::nameOf(*event.finish), joined(ids));
            if (event.last()) going.erase(event.request);
        }
        progress(std::to_string(scheduler.timing().decodeTokens) + " tokens, " + std::to_string(scheduler.running()) +
                 " requests run");
    }
    progress("");
    if (failed) {
        throw less::UsageError(std::to_string(failed) + " of " + std::to_string(lines.size()) +
                               " requests failed: see the lines with error");
    }
}

void run(Options const& o) {
    std::ifstream file(o.tokens);
    if (o.tokens != "-" && !file) throw less::UsageError("cannot read " + o.tokens + ": " + std::strerror(errno));
    auto const lines = readPrompts(o.tokens == "-" ? std::cin : file, o.tokens == "-" ? "standard input" : o.tokens);
    if (!o.saveState.empty() && lines.size() != 1) throw less::UsageError("--save-state takes exactly one prompt");

    progress(o.open.verifyPlan ? "verifying " + o.bundle : "");
    less::Bundle const bundle = less::Bundle::open(o.bundle, o.open);
    std::shared_ptr<less::RowState const> prefix;
    if (!o.prefix.empty())
        prefix = std::make_shared<less::RowState const>(less::RowState::load(o.prefix, bundle.contract));
    progress("loading " + bundle.plan.string());
    less::Session session = less::openSession(bundle, o.session);
    progress("prefill");
    if (!o.saveState.empty()) {
        less::prefill(session, lines.front().prompt, prefix.get()).save(o.saveState, bundle.contract);
        progress("");
    } else if (o.many) {
        runRequests(o, session, bundle.eosIds, lines, prefix);
    } else {
        runGroups(o, session, bundle.eosIds, lines, prefix.get());
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
