// UTF-8, and which text may be shown on a terminal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace less {

void appendUtf8(std::string& out, uint32_t code);

// The code point at the front of `text`, which is not empty, and its length in bytes; length 0 if it is not UTF-8.
// With `surrogates`, those may stand alone, as three bytes each.
std::pair<uint32_t, size_t> decodeUtf8(std::string_view text, bool surrogates);

bool isUtf8(std::string_view text);

// Whether `text` is UTF-8 without control characters, changes of direction and white space other than the space: what
// Python's str.isprintable says, except that code points which Unicode has not assigned count as printable.
bool isPrintable(std::string_view text);

// `text` with escapes for everything else: one line that does not control a terminal.
std::string printable(std::string_view text);

}  // namespace less
