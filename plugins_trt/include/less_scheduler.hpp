// Continuous batching over one session: requests come and go between steps, and each gets the tokens that it gets
// alone.
//
// The twin of less_export/runtime/scheduler.py: the same calls lead to the same steps. A decode step runs exactly the
// rows that decode. If the plan takes rows by index, a request keeps its row from its prompt to its end. Otherwise the
// requests that decode have rows 0 to n - 1, and a row that becomes free is filled by the last of them; prompts are fed
// in the rows behind them. Pieces of prompts have a size that does not depend on what else runs, because what a row
// evicts depends on how its prompt was cut. A step feeds at most one piece, then decodes one token of every request
// whose prompt was fed; the prompts take turns, piece by piece. Requests with the same prompt and prefix are prefilled
// once, if the later ones get a row in time, and the row is copied.
#pragma once

#include "less_runtime.hpp"

namespace less {

// As many requests run and wait as the scheduler takes: try again later.
class QueueFullError : public UsageError {
    using UsageError::UsageError;
};

// What to continue, and how.
struct Request {
    Prompt prompt;  // token ids, after `prefix`
    SamplingParams params = {};
    uint64_t index = 0;                           // the same parameters, seed, prompt and index give the same tokens
    std::shared_ptr<RowState const> prefix = {};  // the state that the prompt continues
    bool keepState = false;                       // whether the last event is to bring the state
};

// A new token of a request, or the error that ended it. The last event of a request has `finish` or `error`; its row is
// free by then.
struct Event {
    uint64_t request;  // what submit() returned
    std::optional<int64_t> token;
    std::optional<FinishReason> finish = {};
    std::optional<std::string> error = {};  // one line
    // With `finish` and Request::keepState: has seen the prompt and the new tokens, except one that ended the text by
    // its id (kEos, kStop). A continuation goes on from it.
    std::shared_ptr<RowState const> state = {};

    bool last() const noexcept { return finish || error; }
};

struct SchedulerOptions {
    std::optional<int64_t> rows = {};   // most requests that run at a time, 1..maxBatch; default maxBatch
    std::optional<int64_t> piece = {};  // tokens of a prompt that are fed at a time, 1..chunk; default chunk
    int64_t maxQueue = 64;              // most requests that wait for a row, 0 or more
};

// Seconds and tokens over the life of a scheduler. Prefill gives the first token of a request; decode counts the
// others.
struct Timing {
    double prefillSeconds = 0;
    int64_t prefillTokens = 0;
    double decodeSeconds = 0;
    int64_t decodeTokens = 0;
};

// Runs requests over the rows of a session, which must outlive it; nothing else may use its rows meanwhile. It starts
// no thread, belongs to the thread of its session, reads no clock but for its figures, and does the same at the same
// calls.
class Scheduler {
 public:
    // `eosIds` end a request with kEos (Bundle::eosIds). Throws UsageError if an option is out of range.
    Scheduler(Session& session, std::vector<int64_t> eosIds, SchedulerOptions const& options = {});
    Scheduler(Scheduler&&) noexcept;
    Scheduler& operator=(Scheduler&&) noexcept;
    ~Scheduler();

    int64_t rows() const noexcept;     // most requests that run at a time
    int64_t waiting() const noexcept;  // requests without a row
    int64_t running() const noexcept;  // those with a row, or with one that waits for a prompt which they share
    bool full() const noexcept;        // whether submit() would throw QueueFullError
    bool busy() const noexcept;        // whether a step would do anything
    Timing const& timing() const noexcept;

    // Opens the rows of the session, if this was not done; the first step does so too. Throws BackendError.
    void open();
    // Queues a request, which gets a row in the order of submission; returns its number: 0, 1, and so on.
    // Throws UsageError for an empty or too long prompt and for parameters out of range, BackendError if the prefix
    // belongs to another export, QueueFullError.
    uint64_t submit(Request request);
    // Ends a request without further events, and frees its row at once; false if it is not here (any more).
    bool cancel(uint64_t request);
    // Feeds at most one piece of a prompt, then decodes one token of every request whose prompt was fed. What fails
    // ends the requests that it touches, with an error event each, and no others. Throws UsageError if something else
    // has used the rows, BackendError if they cannot be opened.
    std::vector<Event> step();

 private:
    class Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace less
