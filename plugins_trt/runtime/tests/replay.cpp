#include "replay.hpp"

#include <istream>
#include <ostream>
#include <sstream>

#include "host_machine.hpp"
#include "less_scheduler.hpp"
#include "sha256.hpp"

namespace less::testing {
namespace {

using Fields = std::map<std::string, std::string>;

std::vector<std::string> split(std::string const& text, char by) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, by);) parts.push_back(part);
    return parts;
}

std::vector<int64_t> numbers(std::string const& text) {
    std::vector<int64_t> values;
    for (std::string const& part : split(text, ',')) values.push_back(std::stoll(part));
    return values;
}

template <class T>
std::string joined(std::vector<T> const& values) {
    std::string text;
    for (T value : values) text += (text.empty() ? "" : ",") + std::to_string(value);
    return text;
}

// A scheduler on a machine of its own, and what the schedule knows of it.
class Stage {
 public:
    Stage(Contract const& contract, std::vector<int64_t> const& eosIds, StateOf kind, Fields const& fields)
        : session_(contract, "", runner(contract, kind)), scheduler_(session_, eosIds, options(fields)) {
        scheduler_.open();
        machine_.firstBytes = static_cast<size_t>(contract.state()[0].rowBytes * scheduler_.rows());
        machine_.rowBytes = static_cast<size_t>(contract.stateBytes());
        machine_.before = [this](std::string const& what) {
            auto const fault = faults_.find(what);
            if (fault == faults_.end() || --fault->second) return;
            faults_.erase(fault);
            throw BackendError("the test forbids this " + what);
        };
    }

    void submit(std::ostream& out, Fields const& f) {
        Request request;
        request.prompt = numbers(f.at("prompt"));
        SamplingParams& p = request.params;
        auto const real = [&](char const* name, double standard) {
            return f.count(name) ? std::stod(f.at(name)) : standard;
        };
        p.maxNewTokens = std::stoll(f.at("max_new_tokens"));
        p.temperature = real("temperature", 0);
        p.topK = static_cast<int64_t>(real("top_k", 0));
        p.repetitionPenalty = real("repetition_penalty", 1);
        p.presencePenalty = real("presence_penalty", 0);
        p.frequencyPenalty = real("frequency_penalty", 0);
        p.ignoreEos = f.count("ignore_eos");
        if (f.count("stop_token_ids")) p.stopTokenIds = numbers(f.at("stop_token_ids"));
        if (f.count("logit_bias")) {
            for (std::string const& pair : split(f.at("logit_bias"), ',')) {
                size_t const colon = pair.find(':');
                p.logitBias[std::stoll(pair.substr(0, colon))] = std::stod(pair.substr(colon + 1));
            }
        }
        request.keepState = f.count("keep");
        if (f.count("prefix")) {
            auto const state = states_.find(f.at("prefix"));
            if (state != states_.end()) request.prefix = state->second;
        }
        std::string const& name = f.at("name");
        try {
            uint64_t const id = scheduler_.submit(std::move(request));
            ids_[name] = id;
            names_[id] = name;
            out << "submit " << name << " queued\n";
        } catch (QueueFullError const&) {
            out << "submit " << name << " full\n";
        } catch (Error const& error) {
            out << "submit " << name << " refused: " << error.what() << '\n';
        }
    }

    void cancel(std::ostream& out, Fields const& f) {
        auto const id = ids_.find(f.at("name"));
        bool const here = id != ids_.end() && scheduler_.cancel(id->second);
        out << "cancel " << f.at("name") << (here ? " yes" : " no") << '\n';
    }

    void fail(Fields const& f) { faults_[f.at("what")] = std::stoi(f.at("nth")); }

    void step(std::ostream& out) {
        out << "step\n";
        machine_.feeds.clear();
        std::vector<Event> const events = scheduler_.step();
        for (Feed const& feed : machine_.feeds) {
            out << "feed rows=" << joined(feed.rows) << " past=" << joined(feed.past) << " ids=";
            for (size_t row = 0; row < feed.ids.size(); ++row) out << (row ? ";" : "") << joined(feed.ids[row]);
            out << '\n';
        }
        for (Event const& event : events) {
            std::string const& name = names_.at(event.request);
            out << "event " << name;
            if (event.token) out << " token " << *event.token;
            if (event.finish) out << ' ' << nameOf(*event.finish);
            if (event.error) out << " error: " << *event.error;
            if (event.state) {
                auto const* data = reinterpret_cast<char const*>(event.state->data.data());
                out << " state " << event.state->length << ' '
                    << sha256(std::string_view(data, event.state->data.size())).substr(0, 16);
                states_[name] = event.state;
            }
            out << '\n';
        }
        out << "now running=" << scheduler_.running() << " waiting=" << scheduler_.waiting() << '\n';
    }

    void end(std::ostream& out) const {
        out << "end prefilled=" << scheduler_.timing().prefillTokens << " decoded=" << scheduler_.timing().decodeTokens
            << " busy=" << (scheduler_.busy() ? "yes" : "no") << '\n';
    }

 private:
    std::unique_ptr<PlanRunner> runner(Contract const& contract, StateOf kind) {
        machine_.inPlace = kind != StateOf::kTwoBlocks;
        machine_.byIndex = kind == StateOf::kByIndex;
        return runnerOn(machine_, contract);
    }
    static SchedulerOptions options(Fields const& f) {
        return {std::stoll(f.at("rows")), std::stoll(f.at("piece")), std::stoll(f.at("queue"))};
    }

    Machine machine_;
    Session session_;
    Scheduler scheduler_;
    std::map<std::string, int> faults_;  // how many more of an operation until one fails
    std::map<std::string, uint64_t> ids_;
    std::map<uint64_t, std::string> names_;
    std::map<std::string, std::shared_ptr<RowState const>> states_;
};

}  // namespace

void replay(std::istream& in, std::ostream& out, Contract const& contract, std::vector<int64_t> const& eosIds,
            StateOf kind) {
    std::unique_ptr<Stage> stage;
    for (std::string line; std::getline(in, line);) {
        std::istringstream words(line);
        std::string command;
        words >> command;
        Fields fields;
        for (std::string word; words >> word;) {
            size_t const equals = word.find('=');
            fields[word.substr(0, equals)] = equals == std::string::npos ? "" : word.substr(equals + 1);
        }
        if (command == "begin") stage = std::make_unique<Stage>(contract, eosIds, kind, fields);
        if (command == "submit") stage->submit(out, fields);
        if (command == "cancel") stage->cancel(out, fields);
        if (command == "fail") stage->fail(fields);
        if (command == "step") stage->step(out);
        if (command == "end") stage->end(out);
    }
}

}  // namespace less::testing
