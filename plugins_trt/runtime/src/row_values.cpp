// Values that the state of a row cannot have.
#include <cmath>
#include <cstring>

#include "row_state.hpp"

namespace less {
namespace {

template <class T>
T valueAt(std::byte const* data, size_t index) {
    T value;
    std::memcpy(&value, data + index * sizeof(T), sizeof value);
    return value;
}

// Whether the bits of an element of a floating-point type are those of a finite number.
bool isFinite(std::byte const* data, ElementType type, size_t index) {
    if (type == ElementType::kFloat32) return std::isfinite(valueAt<float>(data, index));
    uint16_t const exponent = type == ElementType::kBFloat16 ? 0x7F80 : 0x7C00;
    return (valueAt<uint16_t>(data, index) & exponent) != exponent;
}

std::string fieldOf(StateTensor const& tensor) { return tensor.past.name.substr(tensor.past.name.rfind('.') + 1); }

}  // namespace

std::string invalidValues(RowState const& state, Contract const& contract) {
    std::vector<StateTensor> const tensors = contract.state();
    if (tensors.empty()) return "";
    std::vector<std::byte const*> places;
    std::byte const* place = state.data.data();
    for (StateTensor const& tensor : tensors) {
        places.push_back(place);
        place += tensor.rowBytes;
    }
    size_t const fields = tensors.size() / contract.layers.size();
    for (size_t i = 0; i < tensors.size(); ++i) {
        StateTensor const& tensor = tensors[i];
        std::string const field = fieldOf(tensor);
        auto const elements = static_cast<size_t>(tensor.rowBytes / bytesOf(tensor.past.type));
        if (field == "position") {
            for (size_t n = 0; n < elements; ++n) {
                int64_t const position = valueAt<int32_t>(places[i], n);
                if (position < -1 || position >= state.length) {
                    return tensor.past.name + " has positions outside of -1.." + std::to_string(state.length - 1);
                }
            }
            continue;
        }
        // The values of a slot count only if it holds a token; h and z have no slots.
        std::byte const* positions = nullptr;
        size_t slots = 1;
        for (size_t other = i / fields * fields; field != "h" && field != "z" && other < tensors.size(); ++other) {
            if (fieldOf(tensors[other]) != "position") continue;
            positions = places[other];
            slots = static_cast<size_t>(tensors[other].rowBytes) / sizeof(int32_t);
            break;
        }
        size_t const perSlot = elements / slots;
        for (size_t n = 0; n < elements; ++n) {
            if (positions && valueAt<int32_t>(positions, n / perSlot) < 0) continue;
            if (!isFinite(places[i], tensor.past.type, n)) return tensor.past.name + " holds NaN or infinity";
            if (field == "z" && valueAt<float>(places[i], n) < 0) return tensor.past.name + " is negative";
        }
    }
    return "";
}

}  // namespace less
