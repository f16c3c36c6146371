// Rows of state in safetensors files, as less_export/runtime/backend.py writes them.
#include <algorithm>
#include <charconv>
#include <cstring>

#include "files.hpp"
#include "json.hpp"
#include "less_runtime.hpp"

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

int64_t wholeNumber(std::string const& text) {
    int64_t value = -1;
    auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 0) {
        throw JsonError("length '" + text + "' is not a whole number");
    }
    return value;
}

// Copies the tensors of `file` into `state`. Throws JsonError if the file is damaged.
void readTensors(Json const& header, std::string_view file, Contract const& contract, RowState& state) {
    auto const foreign = [](std::string const& name) {
        return BackendError("this state belongs to another export (" + name + " differs): prefill again");
    };
    std::vector<StateTensor> const tensors = contract.state();
    for (auto const& [name, entry] : header.object()) {
        bool const known = name == "__metadata__" || std::any_of(tensors.begin(), tensors.end(),
                                                                 [&](auto const& t) { return t.past.name == name; });
        if (!known) throw foreign(name);
    }
    state.data.resize(static_cast<size_t>(contract.stateBytes()));
    std::byte* place = state.data.data();
    size_t covered = 0;
    for (StateTensor const& tensor : tensors) {
        Json const* entry = header.find(tensor.past.name);
        if (!entry || (*entry)["dtype"].string() != storedType(tensor.past.type) ||
            !sameShape((*entry)["shape"], tensor)) {
            throw foreign(tensor.past.name);
        }
        Json::Array const& range = (*entry)["data_offsets"].array();
        if (range.size() != 2) throw JsonError("data_offsets are not two numbers");
        int64_t const begin = range[0].integer(), end = range[1].integer();
        if (begin < 0 || end < begin || end - begin != tensor.rowBytes || end > static_cast<int64_t>(file.size())) {
            throw JsonError(tensor.past.name + " lies outside the file");
        }
        std::memcpy(place, file.data() + begin, static_cast<size_t>(tensor.rowBytes));
        place += tensor.rowBytes;
        covered += static_cast<size_t>(tensor.rowBytes);
    }
    if (covered != file.size()) {
        throw JsonError("the file has " + std::to_string(file.size()) + " bytes of tensors instead of " +
                        std::to_string(covered));
    }
}

}  // namespace

void RowState::save(std::filesystem::path const& path, Contract const& contract) const {
    if (static_cast<int64_t>(data.size()) != contract.stateBytes()) {
        throw BackendError("this state belongs to another export (its size differs): prefill again");
    }
    std::string header = "{\"__metadata__\":{\"format\":" + jsonString(kFormat) +
                         ",\"identity\":" + jsonString(identity) + ",\"length\":\"" + std::to_string(length) + "\"}";
    std::string body;
    // Tensors with larger elements come first, so that all are aligned.
    for (int64_t size : {4, 2}) {
        size_t place = 0;
        for (StateTensor const& tensor : contract.state()) {
            auto const bytes = static_cast<size_t>(tensor.rowBytes);
            if (bytesOf(tensor.past.type) == size) {
                header += "," + jsonString(tensor.past.name) + ":{\"dtype\":\"" + storedType(tensor.past.type) +
                          "\",\"shape\":" + shapeText(tensor) + ",\"data_offsets\":[" + std::to_string(body.size()) +
                          "," + std::to_string(body.size() + bytes) + "]}";
                body.append(reinterpret_cast<char const*>(data.data()) + place, bytes);
            }
            place += bytes;
        }
    }
    header += "}";
    header.append((8 - header.size() % 8) % 8, ' ');
    std::string file;
    for (int i = 0; i < 8; ++i) file += static_cast<char>(uint64_t{header.size()} >> 8 * i & 0xFF);
    writeAtomically(path, file + header + body);
}

RowState RowState::load(std::filesystem::path const& path, Contract const& contract) {
    auto const refuse = [&path](std::string const& why) {
        return BackendError("cannot read the saved state " + path.string() + ": " + why);
    };
    try {
        MappedFile const mapped(path);
        std::string_view const file = mapped.view();
        uint64_t size = 0;
        for (size_t i = 0; i < 8 && i < file.size(); ++i)
            size |= uint64_t{static_cast<unsigned char>(file[i])} << 8 * i;
        if (file.size() < 8 || size > file.size() - 8) throw refuse("it is truncated or not a safetensors file");
        Json const header = Json::parse(file.substr(8, size));
        Json const* metadata = header.find("__metadata__");
        Json const* format = metadata ? metadata->find("format") : nullptr;
        if (!format || format->string() != kFormat) throw BackendError(path.string() + " is not a saved state");
        RowState state;
        state.length = wholeNumber((*metadata)["length"].string());
        if (Json const* identity = metadata->find("identity")) state.identity = identity->string();
        readTensors(header, file.substr(8 + size), contract, state);
        return state;
    } catch (JsonError const& error) {
        throw refuse(error.what());
    } catch (BundleError const& error) {
        throw BackendError(error.what());
    }
}

}  // namespace less
