#include "mutate.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>

namespace less::fuzz {
namespace {

constexpr size_t kMaxSize = 1 << 16;

constexpr std::array<std::string_view, 47> kWords = {"0",
                                                     "-0",
                                                     "1",
                                                     "-1",
                                                     "2",
                                                     "63",
                                                     "64",
                                                     "65",
                                                     "255",
                                                     "256",
                                                     "4095",
                                                     "4096",
                                                     "4097",
                                                     "65536",
                                                     "2147483647",
                                                     "2147483648",
                                                     "-2147483648",
                                                     "-2147483649",
                                                     "4294967295",
                                                     "4294967296",
                                                     "9223372036854775807",
                                                     "9223372036854775808",
                                                     "-9223372036854775808",
                                                     "-9223372036854775809",
                                                     "18446744073709551615",
                                                     "18446744073709551616",
                                                     "1.0",
                                                     "1.5",
                                                     "1e3",
                                                     "1e300",
                                                     "1e301",
                                                     "1e308",
                                                     "1e309",
                                                     "5e-324",
                                                     "1e-999",
                                                     "1e9223372036854775807",
                                                     "1e-9223372036854775808",
                                                     "1e99999999999999999999",
                                                     "NaN",
                                                     "-Infinity",
                                                     "null",
                                                     "true",
                                                     "false",
                                                     "\"\"",
                                                     "{}",
                                                     "[]",
                                                     "\"\\ud800\""};

constexpr std::array<uint64_t, 12> kEdges = {0,          1,          0x7F,       0x80,      0xFF,       0x7FFF,
                                             0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, INT64_MAX, 1ull << 63, UINT64_MAX};

size_t below(Random& random, size_t limit) { return limit ? random() % limit : 0; }

// A random part of a text of this size, mostly a short one: where it begins, and how long it is.
std::pair<size_t, size_t> part(Random& random, size_t size) {
    size_t const begin = below(random, size + 1);
    size_t const rest = size - begin, longest = random() % 4 ? std::min<size_t>(rest, 16) : rest;
    return {begin, below(random, longest + 1)};
}

// The end of the JSON value (or key and value) that begins at `at`; npos if none does.
size_t endOfValue(std::string_view text, size_t at) {
    int depth = 0;
    bool quoted = false;
    for (size_t i = at; i < text.size(); ++i) {
        char const c = text[i];
        if (quoted) {
            if (c == '\\') ++i;
            quoted = c != '"' || i == at;
        } else if (c == '"') {
            quoted = true;
        } else if (c == '{' || c == '[') {
            ++depth;
        } else if (c == '}' || c == ']' || c == ',') {
            if (depth == 0) return i > at ? i : std::string_view::npos;
            depth -= c != ',';
        }
    }
    return std::string_view::npos;
}

// A random item of an object or a list: where it begins, and how long it is; length 0 if there is none.
std::pair<size_t, size_t> item(Random& random, std::string_view text) {
    std::vector<size_t> begins;
    bool quoted = false;
    for (size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '\\') ++i;
        if (i < text.size() && text[i] == '"') quoted = !quoted;
        if (!quoted && i < text.size() && std::string_view("{[,").find(text[i]) != std::string_view::npos) {
            begins.push_back(i + 1);
        }
    }
    if (begins.empty()) return {0, 0};
    size_t const begin = begins[below(random, begins.size())], end = endOfValue(text, begin);
    return {begin, end == std::string_view::npos ? 0 : end - begin};
}

void changeBytes(std::string& text, Random& random) {
    if (text.empty()) return;
    size_t const at = below(random, text.size());
    switch (random() % 3) {
        case 0:
            text[at] = static_cast<char>(text[at] ^ 1 << random() % 8);
            break;
        case 1:
            text[at] = static_cast<char>(random());
            break;
        default: {
            uint64_t const edge = kEdges[below(random, kEdges.size())];
            std::memcpy(&text[at], &edge, std::min<size_t>(size_t{1} << random() % 4, text.size() - at));
        }
    }
}

void cut(std::string& text, Random& random) {
    auto const [begin, length] = part(random, text.size());
    random() % 4 ? text.erase(begin, length) : text.erase(begin);
}

void splice(std::string& text, std::string const& other, Random& random) {
    auto const [begin, length] = part(random, other.size());
    std::string const piece = other.substr(begin, length);
    auto const [at, replaced] = part(random, text.size());
    text.replace(at, random() % 2 ? replaced : 0, piece);
}

// Replaces a number by an edge, or by one that is one more or less.
void changeNumber(std::string& text, Random& random) {
    auto const isDigit = [](char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; };
    std::vector<size_t> begins;
    for (size_t i = 0; i < text.size(); ++i) {
        if (isDigit(text[i]) && (i == 0 || !isDigit(text[i - 1]))) begins.push_back(i);
    }
    if (begins.empty()) return;
    size_t const begin = begins[below(random, begins.size())];
    size_t end = begin;
    while (end < text.size() && isDigit(text[end])) ++end;
    std::string number(kWords[below(random, kWords.size())]);
    if (random() % 3 == 0 && end - begin < 18) {
        int64_t const value = std::stoll(text.substr(begin, end - begin));
        number = std::to_string(value + (random() % 2 ? 1 : -1));
    }
    text.replace(begin, end - begin, number);
}

void changeItem(std::string& text, std::string const& other, Random& random) {
    auto const [begin, length] = item(random, text);
    if (length == 0) return;
    std::string const value = text.substr(begin, length);
    switch (random() % 5) {
        case 0:
            text.insert(begin, value + ",");
            break;
        case 1: {  // at another place
            auto const [at, ignored] = item(random, text);
            if (ignored) text.insert(at, value + ",");
            break;
        }
        case 2:  // with the comma that separates it
            text.erase(begin, length + (begin + length < text.size() && text[begin + length] == ','));
            break;
        case 3: {
            size_t const colon = value.find(':');  // keeps a key
            size_t const from = colon == std::string::npos ? begin : begin + colon + 1;
            text.replace(from, begin + length - from, kWords[below(random, kWords.size())]);
            break;
        }
        default: {
            auto const [from, size] = item(random, other);
            text.replace(begin, length, other.substr(from, size));
        }
    }
}

void wrap(std::string& text, Random& random) {
    auto const [begin, length] = part(random, text.size());
    size_t const levels = random() % 80;
    text.insert(begin + length, std::string(levels, ']'));
    text.insert(begin, std::string(levels, '['));
}

}  // namespace

std::string mutated(std::vector<std::string> const& seeds, Random& random) {
    std::string text = seeds[below(random, seeds.size())];
    bool const asText = random() % 2;  // changes that leave JSON what it is, to get past its reader
    for (size_t changes = random() % 2 ? 1 : 1 + random() % 6; changes > 0; --changes) {
        std::string const other = seeds[below(random, seeds.size())];
        switch (random() % (asText ? 4 : 8)) {
            case 0:
            case 1:
                changeNumber(text, random);
                break;
            case 2:
            case 3:
                changeItem(text, other, random);
                break;
            case 4:
                cut(text, random);
                break;
            case 5:
                splice(text, random() % 2 ? other : std::string(text), random);
                break;
            default:
                random() % 8 ? changeBytes(text, random) : wrap(text, random);
        }
    }
    if (text.size() > kMaxSize) text.resize(kMaxSize);
    return text;
}

}  // namespace less::fuzz
