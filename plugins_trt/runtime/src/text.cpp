#include "text.hpp"

#include <algorithm>
#include <array>
#include <cstdio>

#include "less_runtime.hpp"

namespace less {
namespace {

// Inclusive ranges of the categories Cc, Cf, Cs, Co, Zl, Zp and Zs (but the space), and of noncharacters.
constexpr std::array<std::pair<uint32_t, uint32_t>, 29> kHidden = {
    {{0x0, 0x1F},        {0x7F, 0xA0},       {0xAD, 0xAD},         {0x600, 0x605},     {0x61C, 0x61C},
     {0x6DD, 0x6DD},     {0x70F, 0x70F},     {0x890, 0x891},       {0x8E2, 0x8E2},     {0x1680, 0x1680},
     {0x180E, 0x180E},   {0x2000, 0x200F},   {0x2028, 0x202F},     {0x205F, 0x206F},   {0x3000, 0x3000},
     {0xD800, 0xF8FF},   {0xFDD0, 0xFDEF},   {0xFEFF, 0xFEFF},     {0xFFF9, 0xFFFB},   {0x110BD, 0x110BD},
     {0x110CD, 0x110CD}, {0x13430, 0x1343F}, {0x1BCA0, 0x1BCA3},   {0x1D173, 0x1D17A}, {0xE0001, 0xE0001},
     {0xE0020, 0xE007F}, {0xF0000, 0xFFFFF}, {0x100000, 0x10FFFF}, {0xFFFE, 0xFFFF}}};

bool isHidden(uint32_t code) {
    if (code >= 0x20 && code < 0x7F) return false;
    bool const noncharacter = (code & 0xFFFE) == 0xFFFE;
    return noncharacter || std::any_of(kHidden.begin(), kHidden.end(),
                                       [code](auto const& r) { return code >= r.first && code <= r.second; });
}

// Calls `use` with each code point and its bytes; the code point of a byte that is not UTF-8 is ~0.
template <class Use>
void forEachCode(std::string_view text, Use const& use) {
    while (!text.empty()) {
        auto const [code, length] = decodeUtf8(text, false);
        use(length ? code : ~uint32_t{0}, text.substr(0, std::max<size_t>(length, 1)));
        text.remove_prefix(std::max<size_t>(length, 1));
    }
}

}  // namespace

void appendUtf8(std::string& out, uint32_t code) {
    if (code < 0x80) {
        out += static_cast<char>(code);
        return;
    }
    int const trailing = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static constexpr unsigned char kLead[] = {0, 0xC0, 0xE0, 0xF0};
    out += static_cast<char>(kLead[trailing] | (code >> (6 * trailing)));
    for (int i = trailing - 1; i >= 0; --i) out += static_cast<char>(0x80 | ((code >> (6 * i)) & 0x3F));
}

std::pair<uint32_t, size_t> decodeUtf8(std::string_view text, bool surrogates) {
    auto const lead = static_cast<unsigned char>(text[0]);
    if (lead < 0x80) return {lead, 1};
    size_t const length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4 || text.size() < length) return {0, 0};
    uint32_t code = lead & (0xFFu >> (length + 1));
    for (size_t i = 1; i < length; ++i) {
        auto const next = static_cast<unsigned char>(text[i]);
        if ((next & 0xC0) != 0x80) return {0, 0};
        code = code << 6 | (next & 0x3Fu);
    }
    static constexpr uint32_t kMinimum[] = {0, 0, 0x80, 0x800, 0x10000};
    bool const surrogate = code >= 0xD800 && code < 0xE000;
    if (code < kMinimum[length] || code > 0x10FFFF || (surrogate && !surrogates)) return {0, 0};
    return {code, length};
}

bool isUtf8(std::string_view text) {
    bool valid = true;
    forEachCode(text, [&](uint32_t code, std::string_view) { valid &= code != ~uint32_t{0}; });
    return valid;
}

bool isPrintable(std::string_view text) {
    bool valid = true;
    forEachCode(text, [&](uint32_t code, std::string_view) { valid &= code != ~uint32_t{0} && !isHidden(code); });
    return valid;
}

std::string printable(std::string_view text) {
    std::string out;
    forEachCode(text, [&out](uint32_t code, std::string_view bytes) {
        char escape[16];
        bool const broken = code == ~uint32_t{0};
        if (!broken && !isHidden(code)) {
            out += bytes;
            return;
        }
        auto const value = static_cast<unsigned>(broken ? static_cast<unsigned char>(bytes[0]) : code);
        char const* const format = value < 0x100 ? "\\x%02x" : value < 0x10000 ? "\\u%04x" : "\\U%08x";
        std::snprintf(escape, sizeof escape, format, value);
        out += code == '\n' ? " " : escape;
    });
    return out;
}

Error::Error(std::string const& message) : std::runtime_error(printable(message)) {}

}  // namespace less
