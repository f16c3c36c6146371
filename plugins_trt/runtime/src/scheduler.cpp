#include <algorithm>
#include <iterator>
#include <utility>

#include "scheduler_impl.hpp"

namespace less {
namespace {

void require(bool ok, std::string const& why) {
    if (!ok) throw UsageError(why);
}

int64_t within(std::optional<int64_t> const& asked, int64_t most, std::string const& takes) {
    int64_t const value = asked.value_or(most);
    require(value >= 1 && value <= most, "this artifact takes " + takes + ", not " + std::to_string(value));
    return value;
}

}  // namespace

Scheduler::Impl::Impl(Session& session, std::vector<int64_t> eosIds, SchedulerOptions const& options)
    : maxQueue(options.maxQueue), session_(session), eosIds_(std::move(eosIds)) {
    std::string const batch = std::to_string(session.contract().maxBatch);
    std::string const chunk = std::to_string(session.contract().chunk);
    rows = within(options.rows, session.contract().maxBatch, "1 to " + batch + " rows (--max-batch at export)");
    piece_ = within(options.piece, session.contract().chunk,
                    "prompts in pieces of 1 to " + chunk + " tokens (--chunk at export)");
    require(maxQueue >= 0, "max_queue must be at least 0, not " + std::to_string(maxQueue));
}

int64_t Scheduler::Impl::running() const {
    size_t count = decoding_.size();
    for (Prefill const& prefill : prefilling_) count += prefill.sequences.size();
    return static_cast<int64_t>(count);
}

void Scheduler::Impl::open() {
    if (revision_) return;
    session_.open(rows);
    revision_ = session_.revision();
}

uint64_t Scheduler::Impl::submit(Request request) {
    Contract const& contract = session_.contract();
    checkParams(contract, request.params);
    if (request.prefix) session_.check(*request.prefix);
    Sequence sequence(contract, request.prompt, request.params, eosIds_, request.index, request.prefix.get());
    if (full()) {
        throw QueueFullError(std::to_string(waiting() + running()) +
                             " requests are running or waiting, and this scheduler takes " +
                             std::to_string(rows + maxQueue) + ": try again later");
    }
    waiting_.push_back(std::make_shared<Running>(
        Running{next_, std::move(request.prompt), std::move(request.prefix), request.keepState, std::move(sequence)}));
    return next_++;
}

bool Scheduler::Impl::cancel(uint64_t id) {
    auto const isIt = [id](Ref const& s) { return s->id == id; };
    auto const wait = std::find_if(waiting_.begin(), waiting_.end(), isIt);
    if (wait != waiting_.end()) {
        waiting_.erase(wait);
        return true;
    }
    for (auto prefill = prefilling_.begin(); prefill != prefilling_.end(); ++prefill) {
        auto const found = std::find_if(prefill->sequences.begin(), prefill->sequences.end(), isIt);
        if (found == prefill->sequences.end()) continue;
        if (!prefill->drop(Ref(*found))) prefilling_.erase(prefill);
        return true;
    }
    auto const decodes = std::find_if(decoding_.begin(), decoding_.end(), isIt);
    if (decodes == decoding_.end()) return false;
    undisturbed();
    release({*decodes});
    revision_ = session_.revision();
    return true;
}

std::vector<Event> Scheduler::Impl::step() {
    undisturbed();
    open();
    Outcomes outcomes = admit();
    auto const add = [&](Outcomes more) { std::move(more.begin(), more.end(), std::back_inserter(outcomes)); };
    if (!prefilling_.empty()) add(feedPiece());
    if (!decoding_.empty()) add(decode());
    add(std::exchange(lost_, {}));
    revision_ = session_.revision();
    std::vector<Event> events;
    for (Outcome& o : outcomes) {
        events.push_back({o.sequence->id, o.token, o.finish, std::move(o.error), std::move(o.state)});
    }
    return events;
}

void Scheduler::Impl::undisturbed() const {
    require(!revision_ || session_.revision() == *revision_,
            "something else has used the rows of this session: give a scheduler a session of its own");
}

Outcomes Scheduler::Impl::admit() {
    Outcomes outcomes;
    while (!waiting_.empty() && running() < rows) {
        Ref const sequence = std::move(waiting_.front());
        waiting_.pop_front();
        auto const same =
            std::find_if(prefilling_.begin(), prefilling_.end(), [&](Prefill const& p) { return p.isFor(*sequence); });
        if (same != prefilling_.end()) {
            same->sequences.push_back(sequence);
            continue;
        }
        int64_t const row = freeRow();
        auto const error = errorOf([&] {
            if (sequence->prefix) {
                session_.writeRow(row, *sequence->prefix);
            } else {
                session_.resetRow(row);
            }
        });
        if (error) {
            outcomes.push_back(failed(sequence, *error));
            continue;
        }
        sequence->row = row;
        prefilling_.push_back({row, {sequence}});
    }
    return outcomes;
}

Outcomes Scheduler::Impl::feedPiece() {
    Prefill prefill = std::move(prefilling_.front());
    prefilling_.pop_front();
    Running& leader = prefill.leader();
    size_t const count = std::min(static_cast<size_t>(piece_), leader.prompt.size() - leader.fed);
    auto const begin = leader.prompt.begin() + static_cast<ptrdiff_t>(leader.fed);
    auto const error = errorOf([&] {
        Clock const clock(timing.prefillSeconds);
        feed({prefill.row}, {begin, begin + static_cast<ptrdiff_t>(count)});
    });
    if (error) return {lose(prefill, *error)};
    leader.fed += count;
    timing.prefillTokens += static_cast<int64_t>(count);
    if (leader.fed < leader.prompt.size()) {
        prefilling_.push_back(std::move(prefill));
        return {};
    }
    Outcomes outcomes, joined;
    {
        Clock const clock(timing.prefillSeconds);  // a choice waits for the piece where the step did not
        std::vector<Ref> const sequences = join(prefill, outcomes);
        joined = accept(sequences, std::vector<int64_t>(sequences.size(), 0));
    }
    joined = settle(std::move(joined));
    std::move(joined.begin(), joined.end(), std::back_inserter(outcomes));
    return outcomes;
}

Outcomes Scheduler::Impl::decode() {
    double seconds = 0;
    std::vector<Ref> const sequences = decoding_;
    std::vector<int64_t> ids, places;
    for (Ref const& s : sequences) {
        ids.push_back(s->sequence.tokens.back());
        places.push_back(s->row.value());
    }
    Outcomes outcomes;
    {
        Clock const clock(seconds);
        if (auto const error = errorOf([&] { feed(places, ids); })) {
            held_.clear();
            decoding_.clear();
            for (Ref const& s : sequences) {
                s->row.reset();
                outcomes.push_back(failed(s, *error));
            }
            return outcomes;
        }
        outcomes = held_;
        std::vector<Ref> wanting;
        std::vector<int64_t> rowsOf;
        for (size_t i = 0; i < sequences.size(); ++i) {
            if (isHeld(sequences[i])) continue;
            wanting.push_back(sequences[i]);
            rowsOf.push_back(static_cast<int64_t>(i));
        }
        for (Outcome& outcome : accept(wanting, rowsOf)) {
            timing.decodeTokens += outcome.token.has_value();
            outcomes.push_back(std::move(outcome));
        }
    }
    timing.decodeSeconds += seconds;
    return settle(std::move(outcomes));
}

Outcomes Scheduler::Impl::settle(Outcomes outcomes) {
    Outcomes settled;
    for (Outcome& outcome : outcomes) {
        bool const unseen = outcome.sequence->keepState && !isHeld(outcome.sequence);
        if (unseen && outcome.token && outcome.finish == FinishReason::kLength) {
            held_.push_back(std::move(outcome));
        } else {
            settled.push_back(withState(std::move(outcome)));
        }
    }
    std::vector<Ref> ended;
    for (Outcome const& o : settled) {
        if (o.error || !o.sequence->sequence.active()) ended.push_back(o.sequence);
    }
    release(ended);
    return settled;
}

Outcome Scheduler::Impl::withState(Outcome outcome) {
    Running const& s = *outcome.sequence;
    if (outcome.error || !s.keepState || s.sequence.active()) return outcome;
    auto const error =
        errorOf([&] { outcome.state = std::make_shared<RowState const>(session_.readRow(s.row.value())); });
    return error ? failed(outcome.sequence, *error) : outcome;
}

bool Scheduler::Impl::isHeld(Ref const& sequence) const {
    return std::any_of(held_.begin(), held_.end(), [&](Outcome const& o) { return o.sequence == sequence; });
}

Outcomes Scheduler::Impl::accept(std::vector<Ref> const& sequences, std::vector<int64_t> const& rowsOf) {
    std::vector<Sampler*> samplers;
    for (Ref const& s : sequences) samplers.push_back(&s->sequence.sampler());
    std::vector<Choice> const choices = session_.choose(samplers, rowsOf);
    Outcomes outcomes;
    for (size_t i = 0; i < sequences.size(); ++i) {
        Sequence& sequence = sequences[i]->sequence;
        if (auto const error = errorOf([&] { sequence.accept(choices[i]); })) {
            outcomes.push_back(failed(sequences[i], *error));
        } else {
            outcomes.push_back({sequences[i], sequence.tokens.back(), sequence.finish});
        }
    }
    return outcomes;
}

void Scheduler::Impl::feed(std::vector<int64_t> const& places, std::vector<int64_t> const& ids) {
    auto const count = static_cast<int32_t>(ids.size() / places.size());
    session_.advanceRows(ids, std::vector<int32_t>(places.size(), count), places);
}

Scheduler::Scheduler(Session& session, std::vector<int64_t> eosIds, SchedulerOptions const& options)
    : impl_(std::make_unique<Impl>(session, std::move(eosIds), options)) {}
Scheduler::Scheduler(Scheduler&&) noexcept = default;
Scheduler& Scheduler::operator=(Scheduler&&) noexcept = default;
Scheduler::~Scheduler() = default;

int64_t Scheduler::rows() const noexcept { return impl_->rows; }
int64_t Scheduler::waiting() const noexcept { return impl_->waiting(); }
int64_t Scheduler::running() const noexcept { return impl_->running(); }
bool Scheduler::full() const noexcept { return impl_->full(); }
bool Scheduler::busy() const noexcept { return impl_->busy(); }
Timing const& Scheduler::timing() const noexcept { return impl_->timing; }
void Scheduler::open() { impl_->open(); }
uint64_t Scheduler::submit(Request request) { return impl_->submit(std::move(request)); }
bool Scheduler::cancel(uint64_t request) { return impl_->cancel(request); }
std::vector<Event> Scheduler::step() { return impl_->step(); }

}  // namespace less
