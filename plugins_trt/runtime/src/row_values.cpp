// Values that the state of a row cannot have.
#include <cmath>
#include <cstring>
#include <map>

#include "row_state.hpp"

namespace less {
namespace {

constexpr int8_t kLargestCode = 127;  // in magnitude, of what slots hold in int8

template <class T>
T valueAt(std::byte const* data, size_t index) {
    T value;
    std::memcpy(&value, data + index * sizeof(T), sizeof value);
    return value;
}

// Whether an element is a number: no NaN, no infinity.
bool isFinite(std::byte const* data, ElementType type, size_t index) {
    if (type == ElementType::kInt8) return true;
    if (type == ElementType::kFloat32) return std::isfinite(valueAt<float>(data, index));
    uint16_t const exponent = type == ElementType::kBFloat16 ? 0x7F80 : 0x7C00;
    return (valueAt<uint16_t>(data, index) & exponent) != exponent;
}

std::string fieldOf(StateTensor const& tensor) { return tensor.past.name.substr(tensor.past.name.rfind('.') + 1); }

std::string layerOf(StateTensor const& tensor) { return tensor.past.name.substr(0, tensor.past.name.rfind('.')); }

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
    // The positions of each layer's slots, by the name of its tensors without the field.
    std::map<std::string, std::pair<std::byte const*, size_t>> slotsOf;
    for (size_t i = 0; i < tensors.size(); ++i) {
        if (fieldOf(tensors[i]) != "position") continue;
        slotsOf[layerOf(tensors[i])] = {places[i], static_cast<size_t>(tensors[i].rowBytes) / sizeof(int32_t)};
    }
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
        // The values of a slot count only if it holds a token; features have no slots.
        bool const inSlots = field != "h" && field != "z" && field != "h_scale";
        auto const [positions, slots] = slotsOf.at(layerOf(tensor));
        bool const scale = field == "key_scale" || field == "value_scale" || field == "h_scale";
        bool const code = tensor.past.type == ElementType::kInt8 && field != "h";  // the planes of h hold any value
        size_t const perSlot = elements / slots;
        for (size_t n = 0; n < elements; ++n) {
            if (inSlots && valueAt<int32_t>(positions, n / perSlot) < 0) continue;
            if (code && valueAt<int8_t>(places[i], n) < -kLargestCode)
                return tensor.past.name + " holds a code of -128";
            if (!isFinite(places[i], tensor.past.type, n)) return tensor.past.name + " holds NaN or infinity";
            bool const negative = (scale || field == "z")  ? valueAt<float>(places[i], n) < 0
                                  : field == "psi" && code ? valueAt<int8_t>(places[i], n) < 0
                                                           : false;
            if (negative) return tensor.past.name + " is negative";
        }
    }
    return "";
}

}  // namespace less
