#include "contract.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace less {
namespace {

struct Element {
    ElementType type;
    char const* name;
    int64_t bytes;
};
constexpr std::array<Element, 5> kElements = {{{ElementType::kInt64, "int64", 8},
                                               {ElementType::kInt32, "int32", 4},
                                               {ElementType::kFloat32, "float32", 4},
                                               {ElementType::kFloat16, "float16", 2},
                                               {ElementType::kBFloat16, "bfloat16", 2}}};
constexpr std::array<char const*, 5> kPolicies = {"h2o", "tova", "sink", "window", "full"};
constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();  // of any dimension
constexpr double kMaxBytes = 0x1p60;  // of all rows together, so that sums fit into 64 bits

// One state tensor of a layer. A null `dtype` stands for the compute dtype.
struct Field {
    char const* name;
    std::array<int64_t LayerSpec::*, 3> dims;  // the last may be nullptr
    ElementType const* dtype;
    int empty;
};
constexpr ElementType kF32 = ElementType::kFloat32, kI32 = ElementType::kInt32;
constexpr std::array<Field, 7> kFields = {{
    {"key", {&LayerSpec::kvHeads, &LayerSpec::capacity, &LayerSpec::headDim}, nullptr, 0},
    {"value", {&LayerSpec::kvHeads, &LayerSpec::capacity, &LayerSpec::headDim}, nullptr, 0},
    {"psi", {&LayerSpec::kvHeads, &LayerSpec::capacity, &LayerSpec::rank}, nullptr, 0},
    {"score", {&LayerSpec::kvHeads, &LayerSpec::capacity, nullptr}, &kF32, 0},
    {"position", {&LayerSpec::kvHeads, &LayerSpec::capacity, nullptr}, &kI32, -1},
    {"h", {&LayerSpec::kvHeads, &LayerSpec::rank, &LayerSpec::headDim}, &kF32, 0},
    {"z", {&LayerSpec::kvHeads, &LayerSpec::rank, nullptr}, &kF32, 0},
}};

void require(bool ok, std::string const& why) {
    if (!ok) throw UsageError(why);
}

int64_t sizeAt(Json const& data, char const* key, int64_t minimum) {
    int64_t const value = data[key].integer();
    require(value >= minimum && value <= kMaxSize,
            std::string(key) + " is " + std::to_string(value) + ", out of range");
    return value;
}

std::optional<int64_t> optionalAt(Json const& data, char const* key) {
    return data.find(key) ? std::optional(sizeAt(data, key, 1)) : std::nullopt;
}

ElementType computeType(std::string const& name) {
    for (Element const& element : kElements) {
        bool const floating = element.type != ElementType::kInt64 && element.type != ElementType::kInt32;
        if (floating && name == element.name) return element.type;
    }
    throw UsageError("unknown dtype '" + name + "'");
}

LayerSpec parseLayer(Json const& data) {
    std::string const& label = data["policy"].string();
    auto const policy = std::find(kPolicies.begin(), kPolicies.end(), label);
    require(policy != kPolicies.end(), "unknown policy '" + label + "'");
    LayerSpec s{};
    s.queryHeads = sizeAt(data, "query_heads", 1);
    s.kvHeads = sizeAt(data, "kv_heads", 1);
    s.headDim = sizeAt(data, "head_dim", 1);
    s.scale = data["scale"].number();
    s.policy = static_cast<EvictionPolicy>(policy - kPolicies.begin());
    s.heavy = sizeAt(data, "heavy", 0);
    s.recent = sizeAt(data, "recent", 1);
    s.window = sizeAt(data, "window", 0);
    s.absorb = data["absorb"].boolean();
    s.capacity = sizeAt(data, "capacity", 1);
    s.rank = sizeAt(data, "rank", 1);
    auto const check = [&label](bool ok, char const* why) { require(ok, "impossible layer (" + label + "): " + why); };
    check(s.queryHeads % s.kvHeads == 0, "query heads must be a multiple of KV heads");
    check(std::isfinite(s.scale), "the attention scale must be finite");
    check(s.absorb || s.rank == 1, "a layer that absorbs nothing has rank 1");
    check(s.heavy + s.recent == s.capacity, "heavy + recent must equal the capacity");
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

Shape TensorSpec::sized(int64_t batch, int64_t chunk) const {
    Shape result = shape;
    std::replace(result.begin(), result.end(), kBatch, batch);
    std::replace(result.begin(), result.end(), kChunk, chunk);
    return result;
}

int64_t TensorSpec::bytes(int64_t batch, int64_t chunk) const {
    int64_t result = bytesOf(type);
    for (int64_t d : sized(batch, chunk)) result *= d;
    return result;
}

std::vector<StateTensor> Contract::state() const {
    std::vector<StateTensor> result;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
        for (Field const& field : kFields) {
            std::string const name = "." + std::to_string(layer) + "." + field.name;
            TensorSpec past{"past" + name, field.dtype ? *field.dtype : dtype, {kBatch}};
            for (auto const dim : field.dims) {
                if (dim) past.shape.push_back(layers[layer].*dim);
            }
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

TensorSpec Contract::logits() const {
    return {"logits", ElementType::kFloat32, {kBatch, allLogits ? kChunk : 1, vocabSize}};
}

std::vector<TensorSpec> Contract::inputs() const {
    std::vector<TensorSpec> result = {inputIds(), pastLength(), newLength()};
    for (StateTensor& tensor : state()) result.push_back(std::move(tensor.past));
    return result;
}

std::vector<TensorSpec> Contract::outputs() const {
    std::vector<TensorSpec> result = {logits()};
    for (StateTensor& tensor : state()) result.push_back(std::move(tensor.present));
    return result;
}

int64_t Contract::stateBytes() const {
    int64_t total = 0;
    for (StateTensor const& tensor : state()) total += tensor.rowBytes;
    return total;
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
    c.vocabSize = sizeAt(data, "vocab_size", 1);
    c.dtype = computeType(data["dtype"].string());
    c.chunk = sizeAt(data, "chunk", 1);
    c.maxBatch = sizeAt(data, "max_batch", 1);
    std::string const& logits = data["logits"].string();
    require(logits == "last" || logits == "all", "unknown logits '" + logits + "'");
    c.allLogits = logits == "all";
    // Floating point, because integers might overflow.
    double const rows = static_cast<double>(c.maxBatch);
    double total = rows * static_cast<double>(c.chunk) * static_cast<double>(c.vocabSize) * 8;
    for (LayerSpec const& s : c.layers) {
        total += rows * static_cast<double>(s.kvHeads) * static_cast<double>(s.capacity + s.rank) *
                 static_cast<double>(s.headDim + s.rank + 1) * 16;
    }
    require(total < kMaxBytes, "its tensors are too large");
    c.positionLimit = optionalAt(data, "position_limit");
    c.trainedLength = optionalAt(data, "trained_length");
    return c;
}

}  // namespace less
