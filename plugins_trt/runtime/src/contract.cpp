#include "contract.hpp"

#include <algorithm>
#include <array>

#include "sha256.hpp"

namespace less {
namespace {

struct Element {
    ElementType type;
    char const* name;
    int64_t bytes;
};
constexpr std::array<Element, 6> kElements = {{{ElementType::kInt64, "int64", 8},
                                               {ElementType::kInt32, "int32", 4},
                                               {ElementType::kFloat32, "float32", 4},
                                               {ElementType::kFloat16, "float16", 2},
                                               {ElementType::kBFloat16, "bfloat16", 2},
                                               {ElementType::kInt8, "int8", 1}}};
constexpr std::array<ElementType, 3> kComputeTypes = {ElementType::kFloat32, ElementType::kFloat16,
                                                      ElementType::kBFloat16};
constexpr std::array<char const*, 5> kPolicies = {"h2o", "tova", "sink", "window", "full"};
constexpr int64_t kMaxBytes = int64_t{1} << 60;  // of all rows together, so that sums fit into 64 bits

// The dtype of a state tensor: a fixed one, that of keys and values in slots, of psi in slots, or of what features
// absorbed.
enum class Kind { kF32, kI32, kSlots, kPsi, kAbsorbed };

bool hasInt8Slots(LayerSpec const& layer) { return layer.slotDtype == SlotDtype::kInt8; }
bool hasMeans(LayerSpec const& layer) { return layer.stateBits == 16; }

// One state tensor of a layer.
struct Field {
    char const* name;
    std::array<int64_t LayerSpec::*, 3> dims;  // the last may be nullptr
    Kind kind;
    int empty;
    bool (*has)(LayerSpec const&) = nullptr;  // which layers have it; nullptr: all
};
constexpr std::array<Field, 10> kFields = {{
    {"key", {&LayerSpec::kvHeads, &LayerSpec::capacity, &LayerSpec::headDim}, Kind::kSlots, 0},
    {"value", {&LayerSpec::kvHeads, &LayerSpec::capacity, &LayerSpec::headDim}, Kind::kSlots, 0},
    {"psi", {&LayerSpec::kvHeads, &LayerSpec::capacity, &LayerSpec::rank}, Kind::kPsi, 0},
    {"score", {&LayerSpec::kvHeads, &LayerSpec::capacity, nullptr}, Kind::kF32, 0},
    {"position", {&LayerSpec::kvHeads, &LayerSpec::capacity, nullptr}, Kind::kI32, -1},
    {"h", {&LayerSpec::kvHeads, &LayerSpec::rank, &LayerSpec::headDim}, Kind::kAbsorbed, 0},
    {"z", {&LayerSpec::kvHeads, &LayerSpec::rank, nullptr}, Kind::kF32, 0},
    {"key_scale", {&LayerSpec::kvHeads, &LayerSpec::capacity, nullptr}, Kind::kF32, 0, hasInt8Slots},
    {"value_scale", {&LayerSpec::kvHeads, &LayerSpec::capacity, nullptr}, Kind::kF32, 0, hasInt8Slots},
    {"h_scale", {&LayerSpec::kvHeads, &LayerSpec::rank, nullptr}, Kind::kF32, 0, hasMeans},
}};

ElementType typeOf(Kind kind, LayerSpec const& layer, ElementType compute) {
    switch (kind) {
        case Kind::kI32:
            return ElementType::kInt32;
        case Kind::kSlots:
            return hasInt8Slots(layer) ? ElementType::kInt8 : compute;
        case Kind::kPsi:
            return hasMeans(layer) ? ElementType::kInt8 : compute;
        case Kind::kAbsorbed:
            return hasMeans(layer) ? ElementType::kInt8 : ElementType::kFloat32;
        default:
            return ElementType::kFloat32;
    }
}

void require(bool ok, std::string const& why) {
    if (!ok) throw UsageError(why);
}

// Sums and products of sizes up to kMaxBytes, which stands for everything above it too.
int64_t plus(int64_t a, int64_t b) { return std::min(a + b, kMaxBytes); }
int64_t times(int64_t a, int64_t b) { return a && b > kMaxBytes / a ? kMaxBytes : a * b; }

std::optional<int64_t> optionalAt(Json const& data, char const* key) {
    Json const* value = data.find(key);
    return value ? std::optional(value->integer()) : std::nullopt;
}

ElementType computeType(std::string const& name) {
    for (ElementType type : kComputeTypes) {
        if (name == nameOf(type)) return type;
    }
    throw UsageError("unknown dtype '" + name + "'");
}

LayerSpec parseLayer(Json const& data) {
    std::string const& label = data["policy"].string();
    auto const policy = std::find(kPolicies.begin(), kPolicies.end(), label);
    require(policy != kPolicies.end(), "unknown policy '" + label + "'");
    LayerSpec s{};
    s.queryHeads = data["query_heads"].integer();
    s.kvHeads = data["kv_heads"].integer();
    s.headDim = data["head_dim"].integer();
    s.scale = data["scale"].number();
    s.policy = static_cast<EvictionPolicy>(policy - kPolicies.begin());
    s.heavy = data["heavy"].integer();
    s.recent = data["recent"].integer();
    s.window = data["window"].integer();
    s.absorb = data["absorb"].boolean();
    s.capacity = data["capacity"].integer();
    s.rank = data["rank"].integer();
    s.scoreHalfLife = optionalAt(data, "score_half_life");
    Json const* slots = data.find("slot_dtype");
    if (slots && slots->string() == "int8") s.slotDtype = SlotDtype::kInt8;
    s.maxDistance = optionalAt(data, "max_distance");
    s.stateBits = optionalAt(data, "state_bits").value_or(s.stateBits);
    auto const check = [&label](bool ok, char const* why) { require(ok, "impossible layer (" + label + "): " + why); };
    check(s.queryHeads % s.kvHeads == 0, "query heads must be a multiple of KV heads");
    check(s.absorb || s.rank == 1, "a layer that absorbs nothing has rank 1");
    check(s.heavy + s.recent == s.capacity, "heavy + recent must equal the capacity");
    check(!s.scoreHalfLife || s.policy == EvictionPolicy::kH2O, "only the scores of h2o have a half-life");
    check(s.stateBits == 16 || s.stateBits == 32, "a state has 16 or 32 bits");
    check(!hasMeans(s) || (s.absorb && hasInt8Slots(s)), "a state of 16 bits goes with int8 slots");
    check(s.policy != EvictionPolicy::kTova || s.recent == 1, "tova protects only the newest token");
    check(s.policy != EvictionPolicy::kWindow || (s.window == s.recent && !s.absorb),
          "window keeps its window and absorbs nothing");
    check(s.policy != EvictionPolicy::kFull || (s.window == 0 && s.heavy == 0 && !s.absorb),
          "full evicts and absorbs nothing");
    return s;
}

}  // namespace

int64_t bytesOf(ElementType type) noexcept { return kElements[static_cast<size_t>(type)].bytes; }

char const* nameOf(ElementType type) noexcept { return kElements[static_cast<size_t>(type)].name; }

Shape TensorSpec::sized(int64_t batch, int64_t chunk, std::optional<int64_t> stateRows) const {
    Shape result = shape;
    std::replace(result.begin(), result.end(), kStateRows, stateRows.value_or(batch));
    std::replace(result.begin(), result.end(), kBatch, batch);
    std::replace(result.begin(), result.end(), kChunk, chunk);
    return result;
}

int64_t TensorSpec::bytes(int64_t batch, int64_t chunk) const {
    int64_t result = bytesOf(type);
    for (int64_t d : sized(batch, chunk)) result *= d;
    return result;
}

std::vector<StateTensor> Contract::state(bool byIndex) const {
    std::vector<StateTensor> result;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
        for (Field const& field : kFields) {
            if (field.has && !field.has(layers[layer])) continue;
            std::string const name = "." + std::to_string(layer) + "." + field.name;
            TensorSpec past{"past" + name, typeOf(field.kind, layers[layer], dtype), {byIndex ? kStateRows : kBatch}};
            for (auto const dim : field.dims) {
                if (dim) past.shape.push_back(layers[layer].*dim);
            }
            if (field.kind == Kind::kAbsorbed && hasMeans(layers[layer])) past.shape.back() *= 2;  // two planes
            TensorSpec const present{"present" + name, past.type, past.shape};
            int64_t const bytes = past.bytes(1, 1);
            result.push_back({past, present, bytes, field.empty});
        }
    }
    return result;
}

TensorSpec Contract::inputIds() const { return {"input_ids", ElementType::kInt64, {kBatch, kChunk}}; }

TensorSpec Contract::pastLength() const { return {"past_length", ElementType::kInt32, {kBatch}}; }

TensorSpec Contract::newLength() const { return {"new_length", ElementType::kInt32, {kBatch}}; }

TensorSpec Contract::rows() const { return {"rows", ElementType::kInt32, {kBatch}}; }

TensorSpec Contract::logits() const {
    return {"logits", ElementType::kFloat32, {kBatch, allLogits ? kChunk : 1, vocabSize}};
}

std::vector<TensorSpec> Contract::inputs(bool byIndex) const {
    std::vector<TensorSpec> result = {inputIds(), pastLength(), newLength()};
    if (byIndex) result.push_back(rows());
    for (StateTensor& tensor : state(byIndex)) result.push_back(std::move(tensor.past));
    return result;
}

std::vector<TensorSpec> Contract::outputs(bool byIndex) const {
    std::vector<TensorSpec> result = {logits()};
    for (StateTensor& tensor : state(byIndex)) result.push_back(std::move(tensor.present));
    return result;
}

int64_t Contract::stateBytes() const {
    int64_t total = 0;
    for (StateTensor const& tensor : state()) total += tensor.rowBytes;
    return total;
}

std::string Contract::layout() const {
    Sha256 hash;
    for (StateTensor const& tensor : state()) {
        std::string text = tensor.past.name + " " + nameOf(tensor.past.type);
        for (int64_t size : tensor.past.shape) text += " " + std::to_string(size);
        hash.update(text + "\n");
    }
    return hash.hex();
}

std::optional<int64_t> Contract::tokenLimit() const {
    std::optional<int64_t> limit = positionLimit;
    for (LayerSpec const& layer : layers) {
        if (layer.policy == EvictionPolicy::kFull) limit = std::min(limit.value_or(layer.capacity), layer.capacity);
    }
    return limit;
}

Contract parseContract(Json const& data) {
    Contract c{};
    for (Json const& layer : data["layers"].array()) c.layers.push_back(parseLayer(layer));
    c.vocabSize = data["vocab_size"].integer();
    c.dtype = computeType(data["dtype"].string());
    c.chunk = data["chunk"].integer();
    c.maxBatch = data["max_batch"].integer();
    std::string const& logits = data["logits"].string();
    require(logits == "last" || logits == "all", "unknown logits '" + logits + "'");
    c.allLogits = logits == "all";
    int64_t row = times(8, times(c.chunk, c.vocabSize));
    for (LayerSpec const& s : c.layers) {
        row = plus(row, times(times(16 * s.kvHeads, s.capacity + s.rank), s.headDim + s.rank + 1));
    }
    int64_t const total = times(c.maxBatch, row);
    require(total < kMaxBytes, "its tensors are too large");
    c.positionLimit = optionalAt(data, "position_limit");
    c.trainedLength = optionalAt(data, "trained_length");
    return c;
}

}  // namespace less
