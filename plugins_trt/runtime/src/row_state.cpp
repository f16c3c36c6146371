// Rows of state in safetensors files, as less_export/runtime/row_state.py writes them.
#include "row_state.hpp"

#include <algorithm>
#include <charconv>
#include <map>

#include "files.hpp"
#include "json.hpp"
#include "sha256.hpp"
#include "text.hpp"

namespace less {
namespace {

constexpr char const* kFormat = "less-state";

// Names of safetensors. bfloat16 is stored as its bits, because numpy has no such type.
char const* storedType(ElementType type) {
    switch (type) {
        case ElementType::kInt64:
            return "I64";
        case ElementType::kInt32:
            return "I32";
        case ElementType::kFloat32:
            return "F32";
        case ElementType::kFloat16:
            return "F16";
        case ElementType::kBFloat16:
            return "U16";
        case ElementType::kInt8:
            return "I8";
    }
    return "";
}

std::string shapeText(StateTensor const& tensor) {
    std::string text;
    for (size_t i = 1; i < tensor.past.shape.size(); ++i) {
        text += (i > 1 ? "," : "") + std::to_string(tensor.past.shape[i]);
    }
    return "[" + text + "]";
}

bool sameShape(Json const& stored, StateTensor const& tensor) {
    Json::Array const& sizes = stored.array();
    return std::equal(sizes.begin(), sizes.end(), tensor.past.shape.begin() + 1, tensor.past.shape.end(),
                      [](Json const& a, int64_t b) { return a.integer() == b; });
}

int64_t lengthOf(std::string const& text) {
    int64_t length = -1;
    bool const digits = text.size() <= 10 && text.find_first_not_of("0123456789") == std::string::npos;
    if (digits) std::from_chars(text.data(), text.data() + text.size(), length);
    if (length < 0 || length > kMaxLength) {
        throw JsonError("its length is not a whole number in 0.." + std::to_string(kMaxLength) + " (" +
                        text.substr(0, 40) + ")");
    }
    return length;
}

// The checksum of the file format.
std::string checksum(RowState const& state, std::vector<StateTensor> const& tensors) {
    std::map<std::string, std::string_view> sorted;
    auto const* place = reinterpret_cast<char const*>(state.data.data());
    for (StateTensor const& tensor : tensors) {
        sorted[tensor.past.name] = {place, static_cast<size_t>(tensor.rowBytes)};
        place += tensor.rowBytes;
    }
    Sha256 hash;
    std::string_view const zero("\0", 1);
    for (std::string const& text : {std::to_string(state.length), state.identity}) {
        hash.update(text);
        hash.update(zero);
    }
    for (auto const& [name, data] : sorted) {
        hash.update(name);
        hash.update(zero);
        hash.update(data);
    }
    return hash.hex();
}

// Copies the tensors in the `body` of a file into `state`. Throws JsonError if the file is damaged.
void readTensors(Json const& header, std::string_view body, std::vector<StateTensor> const& tensors, RowState& state) {
    auto const foreign = [](std::string const& name) {
        return BackendError("this state belongs to another export (" + name + " differs): prefill again");
    };
    std::map<std::string_view, StateTensor const*> expected;
    for (StateTensor const& tensor : tensors) expected[tensor.past.name] = &tensor;
    for (auto const& [name, entry] : header.object()) {
        if (name != "__metadata__" && !expected.count(name)) throw foreign(name);
    }
    std::vector<std::pair<int64_t, int64_t>> ranges;
    for (StateTensor const& tensor : tensors) {
        Json const* entry = header.find(tensor.past.name);
        if (!entry || (*entry)["dtype"].string() != storedType(tensor.past.type) ||
            !sameShape((*entry)["shape"], tensor)) {
            throw foreign(tensor.past.name);
        }
        Json::Array const& range = (*entry)["data_offsets"].array();
        if (range.size() != 2) throw JsonError("data_offsets are not two numbers");
        int64_t const begin = range[0].integer(), end = range[1].integer();
        if (begin < 0 || end < begin || end - begin != tensor.rowBytes || end > static_cast<int64_t>(body.size())) {
            throw JsonError(tensor.past.name + " lies outside the file");
        }
        ranges.emplace_back(begin, end);
    }
    for (auto const& [begin, end] : ranges) {
        auto const* data = reinterpret_cast<std::byte const*>(body.data());
        state.data.insert(state.data.end(), data + begin, data + end);
    }
    std::sort(ranges.begin(), ranges.end());
    int64_t covered = 0;
    for (auto const& [begin, end] : ranges) {
        if (begin != covered) throw JsonError("its tensors overlap or leave gaps");
        covered = end;
    }
    if (covered != static_cast<int64_t>(body.size())) throw JsonError("there is something after its tensors");
}

}  // namespace

std::string writeState(RowState const& state, Contract const& contract) {
    std::vector<StateTensor> const tensors = contract.state();
    bool const foreign = !state.layout.empty() && state.layout != contract.layout();
    if (foreign || static_cast<int64_t>(state.data.size()) != contract.stateBytes()) {
        throw BackendError("this state belongs to another export (its tensors differ): prefill again");
    }
    if (state.length < 0 || state.length > kMaxLength || !isUtf8(state.identity)) {
        throw BackendError("this state is damaged (length " + std::to_string(state.length) + ", identity '" +
                           state.identity + "'): prefill again");
    }
    std::string header = "{\"__metadata__\":{\"format\":" + jsonString(kFormat) +
                         ",\"identity\":" + jsonString(state.identity) + ",\"length\":\"" +
                         std::to_string(state.length) + "\",\"sha256\":" + jsonString(checksum(state, tensors)) + "}";
    std::string body;
    // Tensors with larger elements come first, so that all are aligned.
    for (int64_t size : {4, 2, 1}) {
        size_t place = 0;
        for (StateTensor const& tensor : tensors) {
            auto const bytes = static_cast<size_t>(tensor.rowBytes);
            if (bytesOf(tensor.past.type) == size) {
                header += "," + jsonString(tensor.past.name) + ":{\"dtype\":\"" + storedType(tensor.past.type) +
                          "\",\"shape\":" + shapeText(tensor) + ",\"data_offsets\":[" + std::to_string(body.size()) +
                          "," + std::to_string(body.size() + bytes) + "]}";
                body.append(reinterpret_cast<char const*>(state.data.data()) + place, bytes);
            }
            place += bytes;
        }
    }
    header += "}";
    header.append((8 - header.size() % 8) % 8, ' ');
    std::string prefix;
    for (int i = 0; i < 8; ++i) prefix += static_cast<char>(uint64_t{header.size()} >> 8 * i & 0xFF);
    return prefix + header + body;
}

RowState readState(std::string_view file, Contract const& contract) {
    uint64_t size = 0;
    for (size_t i = 0; i < 8 && i < file.size(); ++i) size |= uint64_t{static_cast<unsigned char>(file[i])} << 8 * i;
    if (file.size() < 8 || size > file.size() - 8) throw JsonError("it is truncated or not a safetensors file");
    Json const header = Json::parse(file.substr(8, size));
    Json const* metadata = header.find("__metadata__");
    Json const* format = metadata ? metadata->find("format") : nullptr;
    if (!format || format->string() != kFormat) throw JsonError("it is not a saved state");
    for (auto const& [key, value] : metadata->object()) value.string();  // safetensors has no other values
    RowState state;
    state.layout = contract.layout();
    state.length = lengthOf((*metadata)["length"].string());
    if (Json const* identity = metadata->find("identity")) state.identity = identity->string();
    std::vector<StateTensor> const tensors = contract.state();
    readTensors(header, file.substr(8 + size), tensors, state);
    Json const* stated = metadata->find("sha256");
    if (stated && stated->string() != checksum(state, tensors)) {
        throw JsonError("it is damaged (its hash differs from the stated one)");
    }
    std::string const fault = invalidValues(state, contract);
    if (!fault.empty()) throw JsonError("it is damaged (" + fault + ")");
    return state;
}

void RowState::save(std::filesystem::path const& path, Contract const& contract) const {
    writeAtomically(path, writeState(*this, contract));
}

RowState RowState::load(std::filesystem::path const& path, Contract const& contract) {
    try {
        return readState(readFile(path), contract);
    } catch (JsonError const& error) {
        throw BackendError("cannot read the saved state " + path.string() + ": " + error.what());
    } catch (BundleError const& error) {
        throw BackendError(error.what());
    }
}

}  // namespace less
