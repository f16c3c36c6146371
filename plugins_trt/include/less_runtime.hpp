// Runs LESS bundles in C++ without Python: open a bundle, prefill, decode, save and restore rows of state.
//
// Mirrors less_export/contract.py, bundle/ and runtime/. Every failure throws a less::Error with one line that says
// what is wrong and what to do. Bundle, Contract and RowState are plain values, safe to share between threads that only
// read them. A Session belongs to one thread at a time; several sessions may run at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace less {

// ------------------------------------------------------------------ errors

// Base of all exceptions that this library throws deliberately. Names in messages may come from a bundle: the message
// is one line in which everything that a terminal would obey is escaped.
class Error : public std::runtime_error {
 public:
    explicit Error(std::string const& message);
};
// A bundle or saved state is missing, damaged, modified, or written by a newer version.
class BundleError : public Error {
    using Error::Error;
};
// An argument is out of range, or a prompt does not fit.
class UsageError : public Error {
    using Error::Error;
};
// TensorRT refuses a plan, a plan does not match the contract, or it needs native code that may not be loaded.
class EngineError : public Error {
    using Error::Error;
};
// There is no driver, GPU or memory, or a step failed or is forbidden by the contract.
class BackendError : public Error {
    using Error::Error;
};

// ------------------------------------------------------------------ contract

enum class ElementType { kInt64, kInt32, kFloat32, kFloat16, kBFloat16, kInt8 };
enum class EvictionPolicy { kH2O = 0, kTova = 1, kSink = 2, kWindow = 3, kFull = 4 };
// What slots hold their keys and values in: the compute dtype, or int8 with a float32 scale per token and head.
enum class SlotDtype { kModel, kInt8 };

int64_t bytesOf(ElementType type) noexcept;
char const* nameOf(ElementType type) noexcept;  // as in manifests, e.g. "float16"

using Shape = std::vector<int64_t>;
// Dynamic axes in the shape of a TensorSpec.
constexpr int64_t kBatch = -1;
constexpr int64_t kChunk = -2;
constexpr int64_t kStateRows = -3;  // rows of the state, where a step runs any of them

// Static description of one attention layer.
struct LayerSpec {
    int64_t queryHeads, kvHeads, headDim;
    double scale;
    EvictionPolicy policy;
    int64_t heavy, recent, window;
    bool absorb;
    int64_t capacity, rank;
    std::optional<int64_t> scoreHalfLife{};  // tokens after which a score of h2o counts half; none: scores never fade
    SlotDtype slotDtype = SlotDtype::kModel;
    std::optional<int64_t> maxDistance{};  // largest distance in tokens that a slot is seen at; none: any
    int64_t stateBits = 32;  // 32: sums in float32; 16: means in two int8 planes with a scale, and psi of slots in int8
};

// One input or output of the graph.
struct TensorSpec {
    std::string name;
    ElementType type;
    Shape shape;

    // `shape` with the dynamic axes filled in; the state has `batch` rows unless `stateRows` says how many.
    Shape sized(int64_t batch, int64_t chunk, std::optional<int64_t> stateRows = {}) const;
    int64_t bytes(int64_t batch, int64_t chunk) const;
};

// One state tensor of one layer: `past` is its input, `present` its output.
struct StateTensor {
    TensorSpec past, present;
    int64_t rowBytes;  // of one sequence
    int empty;         // initial value of a row: 0 or -1
};

// Everything a runtime needs to know to run an artifact. Tensor names and shapes are defined only here.
struct Contract {
    std::vector<LayerSpec> layers;
    int64_t vocabSize;
    ElementType dtype;  // compute dtype
    int64_t chunk;      // maximum tokens per step
    int64_t maxBatch;   // maximum rows
    bool allLogits;     // logits [B,T,V] instead of [B,1,V]
    std::optional<int64_t> positionLimit, trainedLength;

    // `byIndex`: the tensors of a plan that takes rows of the state by index.
    std::vector<StateTensor> state(bool byIndex = false) const;  // in the graph's order
    TensorSpec inputIds() const;                                 // [B,T] i64
    TensorSpec pastLength() const;                               // [B] i32, tokens that each row has seen
    TensorSpec newLength() const;                                // [B] i32, valid tokens of this step
    TensorSpec rows() const;    // [B] i32, rows of the state, where the plan takes them by index
    TensorSpec logits() const;  // f32
    std::vector<TensorSpec> inputs(bool byIndex = false) const;
    std::vector<TensorSpec> outputs(bool byIndex = false) const;
    int64_t stateBytes() const;                 // of one sequence of any length
    std::string layout() const;                 // hash of the names, dtypes and shapes of the state
    std::optional<int64_t> tokenLimit() const;  // longest sequence, if there is a limit
};

// ------------------------------------------------------------------ bundle

// The LessAttention plugin that a plan needs, as the manifest describes it: the hash says which code that is, and is no
// reason to run it.
struct PluginFacts {
    std::filesystem::path library;
    std::string sha256;        // of the library
    bool inside;               // the plan carries the library
    bool rowsByIndex = false;  // the plan takes rows of the state by index; otherwise a step has adjacent ones
};

// The header of a plan: which TensorRT wrote it.
struct PlanHeader {
    bool rtx;             // written by TensorRT-RTX rather than TensorRT
    std::string version;  // "1.7.1.116"
};

struct OpenOptions {
    // Compare the plan's hash, for which the whole file is read. The manifest and the plugin are always verified.
    bool verifyPlan = true;
    // Also load native code that the bundle brings or names (a plugin library, a plan with one inside) and that this
    // machine did not build. Only for bundles whose source you trust. Without it, code is loaded only if its hash is in
    // the list that less-export keeps in its cache (LESS_EXPORT_CACHE, else ~/.cache/less-export), or if
    // LESS_EXPORT_PLUGIN names the library.
    bool trustCode = false;
};

// An opened bundle, its manifest, plan and plugin verified by hash.
struct Bundle {
    std::filesystem::path plan;
    std::string planSha256;
    PlanHeader header;
    Contract contract;
    std::optional<PluginFacts> plugin;
    std::string identity;  // what a sequence's state depends on: model, weights and kernels
    std::string modelName;
    std::vector<int64_t> eosIds;  // the tokenizer's; without one those of the export's settings or the model's config
    std::optional<int64_t> bosId;
    bool addBos = false;     // whether prompts should begin with bosId
    bool trustCode = false;  // OpenOptions::trustCode, for openSession

    // `path` is a bundle folder with an engine.plan, or x.plan with x.json beside it. Throws BundleError if files are
    // missing, damaged or newer; EngineError if the plan needs native code that may not be loaded.
    static Bundle open(std::filesystem::path const& path, OpenOptions const& options = {});
};

// ------------------------------------------------------------------ sampling

// How to choose tokens and when to stop; every field means the same as in the Python package.
struct SamplingParams {
    double temperature = 0;        // 0: greedy, the lowest id of the highest logits
    int64_t topK = 0;              // 0: all
    double topP = 1;               // 1: all
    std::optional<uint64_t> seed;  // same seed, prompt and row: same tokens; unset: random
    int64_t maxNewTokens = 128;
    bool ignoreEos = false;
    double minP = 0;  // drop tokens less likely than this share of the most likely one's probability; 0: off
    double repetitionPenalty = 1;              // of tokens of the prompt and the text so far; 1: off
    double presencePenalty = 0;                // subtracted from the logits of tokens of the text so far
    double frequencyPenalty = 0;               // the same, once for each time they occur
    std::map<int64_t, double> logitBias = {};  // added to the logits of these ids
    std::vector<int64_t> stopTokenIds = {};    // these end a text (kStop); not affected by ignoreEos

    void validate() const;  // throws UsageError
};

// Chooses a token from `logits` [vocab]; -inf forbids a token. `uniform` in [0, 1) is the random number used if
// temperature > 0.
int64_t chooseToken(float const* logits, int64_t vocab, SamplingParams const& params, double uniform);

// Samples the tokens of one row, one after the other: penalties and bias, then the choice. The random numbers
// (mt19937_64) are the same on every platform, but not Python's.
class Sampler {
 public:
    // `prompt`: tokens before the first choice, which the repetition penalty counts.
    Sampler(SamplingParams const& params, uint64_t row, std::vector<int64_t> const& prompt = {});
    // Throws BackendError if the highest of `logits` [vocab] is no number, UsageError if no token is left to choose.
    int64_t operator()(float const* logits, int64_t vocab);

 private:
    friend class DeviceSampler;

    // Tells samplers apart; a copy is another one.
    struct Identity {
        uint64_t value = next();
        Identity() = default;
        Identity(Identity const&) {}
        Identity& operator=(Identity const&) {
            value = next();
            return *this;
        }
        static uint64_t next();
    };

    double drawn();  // the next random number, if the temperature asks for one
    void chosen(int64_t token);
    void adjust(std::vector<float>& logits) const;

    Identity identity_;
    int64_t count_ = 0;  // choices so far
    SamplingParams params_;
    std::mt19937_64 random_;
    bool penalises_;
    std::set<int64_t> prompt_;           // empty without a repetition penalty
    std::map<int64_t, int64_t> counts_;  // of the tokens so far, if something is penalised
};

// ------------------------------------------------------------------ session

// The state of one sequence: a few megabytes, however long it is. The file format is the Python package's
// (docs/bundle-format.md).
struct RowState {
    int64_t length = 0;           // tokens seen, 0..2^31-1
    std::vector<std::byte> data;  // the state tensors of the contract, one after another
    std::string identity = {};    // Bundle::identity of the model, "" if unknown
    std::string layout = {};      // Contract::layout of `data`, "" if unknown

    // Writes the file atomically, with a checksum. Throws BackendError.
    void save(std::filesystem::path const& path, Contract const& contract) const;
    // Verifies checksum, names, shapes, dtypes and values. Throws BackendError.
    static RowState load(std::filesystem::path const& path, Contract const& contract);
};

constexpr int64_t kMaxLength = INT32_MAX;  // of a sequence

// `count` adjacent rows from row `first`.
struct RowRange {
    int64_t first, count;
};

// Logits of a step, in memory owned by the session that the next step overwrites. Row 0 is the first that the step was
// given.
struct Logits {
    float const* data;
    int64_t tokens, vocab;  // tokens: 1, or those of the chunk with Contract::allLogits
    float const* row(int64_t row, int64_t token = 0) const { return data + (row * tokens + token) * vocab; }
};

// A token, or what was thrown in its place.
struct Choice {
    int64_t token = -1;
    std::exception_ptr error{};
};

class PlanRunner;

// Holds the state of `batch` independent rows and runs their steps.
//
// A row with new length 0 is parked: its state does not change. For continuous batching, reset or overwrite a row that
// has finished, or use a Scheduler (less_scheduler.hpp). If a step, copy or write fails on the GPU, the state of the
// rows that it changes is undefined: a session refuses them until they are reset, overwritten or opened again.
class Session {
 public:
    // Use openSession; this constructor is for other devices and engines (runtime/src/plan_runner.hpp).
    Session(Contract contract, std::string identity, std::unique_ptr<PlanRunner> runner);
    Session(Session&&) noexcept;
    Session& operator=(Session&&) noexcept;
    ~Session();

    Contract const& contract() const noexcept { return contract_; }
    std::string const& identity() const noexcept { return identity_; }
    int64_t batch() const noexcept { return static_cast<int64_t>(lengths_.size()); }
    int32_t length(int64_t row) const;  // tokens the row has seen
    // Counts the changes of the state, so that a scheduler notices when something else used its rows.
    uint64_t revision() const noexcept { return revision_; }

    // Allocates `batch` empty rows, 1..maxBatch. Opening again resets all rows.
    void open(int64_t batch);
    void close();

    // Feeds one chunk and advances the state. `inputIds` [B,T], right padded, 1 <= T <= chunk; `newLength` [B]:
    // valid tokens of each row, 0..T. Logits of a parked row are meaningless. With `rows`, B = rows.count: only these
    // rows run, and the others neither change nor cost anything. Throws BackendError.
    Logits step(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength);
    Logits step(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength, RowRange rows);
    // The same for these distinct rows: adjacent ones, and with rowsByIndex() any, in any order.
    Logits stepRows(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength,
                    std::vector<int64_t> const& rows);
    bool rowsByIndex() const noexcept;

    // As step() and stepRows(), for choose(): the logits stay on the device if it can choose tokens
    // (SessionOptions::sampler). Such a step of one token a row, with rowsByIndex(), is not waited for: if it fails,
    // choose() says so, and its rows are refused as after any failure.
    void advance(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength, RowRange rows);
    void advanceRows(std::vector<int64_t> const& inputIds, std::vector<int32_t> const& newLength,
                     std::vector<int64_t> const& rows);
    // A token for each of at most batch() `samplers`, by the logits after the last token of one of the `rows` of the
    // latest step, counted as in Logits. Where the device can choose, 4 bytes a row are copied from it. Throws
    // BackendError if that step failed at once or has no such row; what fails later is in the choices.
    std::vector<Choice> choose(std::vector<Sampler*> const& samplers, std::vector<int64_t> const& rows);

    void resetRow(int64_t row);
    void copyRow(int64_t from, int64_t to);
    RowState readRow(int64_t row);
    // Replaces the state of a row, unless check() refuses the new one.
    void writeRow(int64_t row, RowState const& state);
    // Throws BackendError if the identity, the tensors or the length of `state` are impossible here.
    void check(RowState const& state) const;

 private:
    void checkRow(int64_t row) const;
    void checkDefined(std::vector<int64_t> const& rows) const;
    void checkStep(std::vector<int64_t> const& ids, int64_t tokens, std::vector<int32_t> const& newLength,
                   std::vector<int64_t> const& rows) const;
    void run(std::vector<int64_t> const& ids, std::vector<int32_t> const& newLength, std::vector<int64_t> const& rows);
    Logits latest();
    void finish();
    void change(std::vector<int64_t> const& rows, std::function<void()> const& action);

    Contract contract_;
    std::string identity_, layout_;
    std::unique_ptr<PlanRunner> runner_;
    std::vector<int32_t> lengths_;
    std::vector<int64_t> padded_;  // the ids of a step, padding replaced by 0
    std::vector<int32_t> past_;    // the lengths of its rows
    std::vector<bool> undefined_;  // rows whose state a failure has left undefined
    std::vector<int64_t> latest_;  // rows of the latest step, until it is known whether it has failed
    std::vector<int64_t> last_;    // of the latest step, unless it failed: where each row's last logits are in Logits
    int64_t logitTokens_ = 1;      // of each row of the latest step
    uint64_t revision_ = 0;
};

struct SessionOptions {
    int device = 0;          // CUDA device
    bool cudaGraphs = true;  // capture the decode step if the engine allows it
    bool verbose = false;    // print TensorRT's log to stderr, and what makes steps slower than they could be
    // libless_sampler.so (plugins_trt/README.md), which chooses tokens on the device for generate() and Scheduler.
    // Empty: the host chooses. It is loaded without a question, so name only a library that you trust.
    std::filesystem::path sampler = {};
};

// Loads the plan of a bundle onto a GPU. Call open() on the session before the first step.
Session openSession(Bundle const& bundle, SessionOptions const& options = {});

// ------------------------------------------------------------------ generation

// An end-of-sequence token, one of SamplingParams::stopTokenIds, or the longest text.
enum class FinishReason { kEos, kStop, kLength };
char const* nameOf(FinishReason reason) noexcept;  // "eos", "stop", "length"

// One new token of prompt `row`; `finish` is set for the last one.
struct Token {
    size_t row;
    int64_t id;
    std::optional<FinishReason> finish;
};

struct Generation {
    std::vector<int64_t> tokens;  // new tokens only, including one that ended them
    FinishReason finish;
};

using Prompt = std::vector<int64_t>;

// Continues every prompt; if there are more than maxBatch, they run in groups. Overwrites the session's rows.
//
// Every prompt is fed in full chunks and a remainder, whatever else is in the batch, so that its tokens do not depend
// on the other prompts. With a `prefix`, every prompt continues that state. `onToken` is called with each token as it
// is generated.
std::vector<Generation> generate(Session& session, std::vector<Prompt> const& prompts, SamplingParams const& params,
                                 std::vector<int64_t> const& eosIds, RowState const* prefix = nullptr,
                                 std::function<void(Token const&)> const& onToken = {});

// The state after `prefix` and `prompt`, which can be continued any number of times. It contains no logits, so a
// continuation needs at least one token of its own.
RowState prefill(Session& session, Prompt const& prompt, RowState const* prefix = nullptr);

}  // namespace less
