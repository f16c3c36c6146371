// The inside of a scheduler: what it holds, and how a step is made of parts.
#pragma once

#include <deque>

#include "less_scheduler.hpp"
#include "running.hpp"

namespace less {

class Scheduler::Impl {
 public:
    int64_t rows = 0, maxQueue;
    Timing timing;

    Impl(Session& session, std::vector<int64_t> eosIds, SchedulerOptions const& options);

    int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
    int64_t running() const;
    bool full() const { return waiting() + running() >= rows + maxQueue; }
    bool busy() const { return waiting() || running() || !lost_.empty(); }
    void open();
    uint64_t submit(Request request);
    bool cancel(uint64_t id);
    std::vector<Event> step();

 private:
    // scheduler.cpp: the parts of a step.
    void undisturbed() const;
    // Gives every free row to the next sequence; one whose prompt is being fed waits for it, and has a row then.
    Outcomes admit();
    // Feeds the next piece; the last one gives the first token and joins the row to those that decode.
    Outcomes feedPiece();
    // One token of every sequence whose prompt was fed.
    Outcomes decode();
    // Frees the rows of sequences that have ended; those whose state lacks their last token run once more.
    Outcomes settle(Outcomes outcomes);
    // The event, with the state of a sequence that ends with it; or the error that stands against it.
    Outcome withState(Outcome outcome);
    bool isHeld(Ref const& sequence) const;
    // Adds a token to each sequence, by the logits of its row of the latest step.
    Outcomes accept(std::vector<Ref> const& sequences, std::vector<int64_t> const& rowsOf);
    // Runs rows, each with as many of `ids`.
    void feed(std::vector<int64_t> const& places, std::vector<int64_t> const& ids);

    // scheduler_rows.cpp: which row a sequence has.
    // The first row of no sequence, and not `but`. There is one wherever this is called.
    int64_t freeRow(int64_t but = -1) const;
    // Whether a row decodes, or a prompt is fed in it.
    bool taken(int64_t row) const;
    // The end of the sequence whose prompt was fed; its twins begin again.
    Outcome lose(Prefill const& prefill, std::string const& error);
    // Lets the sequences of a prompt decode from its state; returns those that do, and adds the errors of the others.
    std::vector<Ref> join(Prefill const& prefill, Outcomes& errors);
    // The row in which one more sequence decodes, with the state of row `source`: that one if it is free.
    int64_t placeOf(int64_t source);
    // Copies a row to the one behind those that decode; a prompt that is fed there moves to another.
    void copyToLast(int64_t source, int64_t place);
    // Frees rows of decoding sequences.
    void release(std::vector<Ref> const& sequences);
    // Frees rows of decoding sequences; the last ones fill the gaps, or end if their state cannot be copied.
    void fillGaps(std::vector<Ref> sequences);
    void leave(Ref const& sequence);

    Session& session_;
    std::vector<int64_t> eosIds_;
    int64_t piece_ = 0;
    uint64_t next_ = 0;
    std::deque<Ref> waiting_;
    std::deque<Prefill> prefilling_;  // the next one to feed first
    std::vector<Ref> decoding_;       // by row, unless the plan takes rows by index
    Outcomes held_;                   // last tokens of sequences that are fed once more for their state
    Outcomes lost_;                   // errors of sequences whose row could not be moved
    std::optional<uint64_t> revision_;
};

}  // namespace less
