#include "json.hpp"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <utility>

#include "text.hpp"

namespace less {
namespace {

constexpr int kMaxDepth = 64;  // objects and lists in one another
constexpr size_t kMaxDigits = 100;
constexpr int64_t kMaxPower = int64_t{1} << 48;  // more than any number of digits before or after a point

bool isDigit(char c) { return c >= '0' && c <= '9'; }

bool isPlain(char c) { return c >= 0x20 && c < 0x7F && c != '"' && c != '\\'; }

bool isInteger(std::string_view number) { return number.find_first_of(".eE") == std::string_view::npos; }

// Whether a number that from_chars finds out of range is too large, and not too small.
bool isLarge(std::string_view number) {
    size_t const exponent = number.find_first_of("eE");
    bool const negative = exponent != std::string_view::npos && number[exponent + 1] == '-';
    std::string_view const digits = number.substr(0, exponent);
    size_t const first = digits.find_first_of("123456789"), point = std::min(digits.find('.'), digits.size());
    if (exponent == std::string_view::npos) return first < point;
    int64_t power = kMaxPower;  // stays if it has too many digits
    std::string_view text = number.substr(exponent + 1);
    text.remove_prefix(text[0] == '-' || text[0] == '+');
    std::from_chars(text.data(), text.data() + text.size(), power);
    power = std::min(power, kMaxPower);
    return static_cast<int64_t>(point) - static_cast<int64_t>(first) + (negative ? -power : power) > 0;
}

}  // namespace

class JsonReader {
 public:
    explicit JsonReader(std::string_view text) : text_(text) {}

    Json document() {
        Json result = value(0);
        space();
        if (at_ != text_.size()) fail("unexpected text after the value");
        return result;
    }

 private:
    [[noreturn]] void fail(char const* why) const {
        throw JsonError(std::string(why) + " at byte " + std::to_string(at_));
    }

    [[noreturn]] static void refuseInfinite(std::string_view number) {
        throw JsonError(std::string(number.substr(0, 40)) + " is not a finite number");
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    bool take(std::string_view word) {
        if (text_.substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }

    void space() {
        for (; at_ < text_.size(); ++at_) {
            char const c = text_[at_];
            if (c != ' ' && c != '\t' && c != '\n' && c != '\r') return;
        }
    }

    Json value(int depth) {
        space();
        Json result;
        if (depth == kMaxDepth && (peek() == '{' || peek() == '[')) fail("nested too deeply");
        if (peek() == '{') {
            result.value_ = object(depth);
        } else if (peek() == '[') {
            result.value_ = array(depth);
        } else if (peek() == '"') {
            result.value_ = string();
        } else if (take("true")) {
            result.value_ = true;
        } else if (take("false")) {
            result.value_ = false;
        } else if (!take("null")) {
            result.value_ = Json::Number{number()};
        }
        return result;
    }

    Json::Object object(int depth) {
        Json::Object result;
        ++at_;
        space();
        if (take("}")) return result;
        do {
            space();
            if (peek() != '"') fail("missing key");
            std::string key = string();
            space();
            if (!take(":")) fail("missing colon");
            if (!result.emplace(std::move(key), value(depth + 1)).second) fail("duplicate key");
            space();
        } while (take(","));
        if (!take("}")) fail("unterminated object");
        return result;
    }

    Json::Array array(int depth) {
        Json::Array result;
        ++at_;
        space();
        if (take("]")) return result;
        do {
            result.push_back(value(depth + 1));
            space();
        } while (take(","));
        if (!take("]")) fail("unterminated list");
        return result;
    }

    std::string number() {
        size_t const begin = at_;
        for (char const* word : {"NaN", "Infinity", "-Infinity"}) {
            if (take(word)) refuseInfinite(word);
        }
        take("-");
        if (!take("0")) digits();
        if (take(".")) digits();
        if (take("e") || take("E")) {
            if (!take("+")) take("-");
            digits();
        }
        std::string_view const text = text_.substr(begin, at_ - begin);
        if (isInteger(text) && text.size() > kMaxDigits) fail("too many digits");
        double value = 0;
        auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        static_cast<void>(end);
        if (error != std::errc() && isLarge(text)) refuseInfinite(text);
        return std::string(text);
    }

    void digits() {
        if (!isDigit(peek())) fail("missing or invalid value");
        while (isDigit(peek())) ++at_;
    }

    std::string string() {
        std::string out;
        ++at_;
        while (true) {
            size_t const plain = at_;  // a run of ASCII without quotes, escapes and control characters
            while (at_ < text_.size() && isPlain(text_[at_])) ++at_;
            out.append(text_, plain, at_ - plain);
            if (take("\"")) return out;
            if (at_ == text_.size()) fail("unterminated string");
            if (take("\\")) {
                escape(out);
                continue;
            }
            auto const [code, length] = decodeUtf8(text_.substr(at_), false);
            if (length == 0) fail("invalid UTF-8");
            if (code < 0x20) fail("control character in a string");
            out += text_.substr(at_, length);
            at_ += length;
        }
    }

    void escape(std::string& out) {
        static constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
        if (take("u")) {
            uint32_t code = hex4();
            size_t const after = at_;
            if (code >= 0xD800 && code < 0xDC00 && take("\\u")) {
                uint32_t const low = hex4();
                bool const pair = low >= 0xDC00 && low < 0xE000;
                if (pair) code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
                if (!pair) at_ = after;
            }
            return appendUtf8(out, code);
        }
        size_t const index = at_ < text_.size() ? kNames.find(text_[at_]) : std::string_view::npos;
        if (index == std::string_view::npos) fail("invalid escape");
        out += kMeanings[index];
        ++at_;
    }

    uint32_t hex4() {
        uint32_t code = 0;
        std::string_view const four = text_.substr(at_, 4);
        auto const [end, error] = std::from_chars(four.data(), four.data() + four.size(), code, 16);
        if (error != std::errc() || end != four.data() + 4) fail("invalid escape");
        at_ += 4;
        return code;
    }

    std::string_view text_;
    size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonReader(text).document(); }

int64_t Json::integer() const {
    std::string const& text = get<Number>("a number").text;
    int64_t result = 0;
    auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), result);
    if (error != std::errc() || end != text.data() + text.size()) throw JsonError(text + " is not a whole number");
    return result;
}

double Json::number() const {
    // from_chars ignores the locale, unlike strtod.
    std::string const& text = get<Number>("a number").text;
    double result = 0;
    auto const [end, error] = std::from_chars(text.data(), text.data() + text.size(), result);
    static_cast<void>(end);
    return error == std::errc() ? result : 0;  // smaller than any double: the reader refuses larger ones
}

Json const& Json::operator[](std::string_view key) const {
    auto const member = object().find(key);
    if (member == object().end()) throw JsonError("'" + std::string(key) + "' is missing");
    return member->second;
}

Json const* Json::find(std::string_view key) const {
    auto const member = object().find(key);
    return member == object().end() || member->second.isNull() ? nullptr : &member->second;
}

std::string jsonString(std::string_view text) {
    std::string out = "\"";
    auto const unit = [&out](uint32_t code) {
        char buffer[8];
        std::snprintf(buffer, sizeof buffer, "\\u%04x", code & 0xFFFF);
        out += buffer;
    };
    while (!text.empty()) {
        auto const plain = static_cast<size_t>(std::find_if_not(text.begin(), text.end(), isPlain) - text.begin());
        out += text.substr(0, plain);
        text.remove_prefix(plain);
        if (text.empty()) break;
        auto const [code, length] = decodeUtf8(text, true);
        if (length == 0) throw JsonError("a string is not valid UTF-8");
        static constexpr std::string_view kNamed = "\"\\\n\r\t\f\b", kNames = "\"\\nrtfb";
        size_t const named = code < 0x80 ? kNamed.find(static_cast<char>(code)) : std::string_view::npos;
        if (named != std::string_view::npos) {
            out += '\\';
            out += kNames[named];
        } else if (code < 0x10000) {
            unit(code);
        } else {
            unit(0xD800 + ((code - 0x10000) >> 10));
            unit(0xDC00 + (code & 0x3FF));
        }
        text.remove_prefix(length);
    }
    return out + '"';
}

std::string Json::canonical(std::string_view except) const {
    std::string out;
    write(out, except);
    return out;
}

void Json::write(std::string& out, std::string_view except) const {
    char const* separator = "";
    if (auto const* list = std::get_if<Array>(&value_)) {
        out += '[';
        for (Json const& item : *list) {
            out += std::exchange(separator, ", ");
            item.write(out, {});
        }
        out += ']';
    } else if (auto const* members = std::get_if<Object>(&value_)) {
        out += '{';
        for (auto const& [key, item] : *members) {
            if (!except.empty() && key == except) continue;
            out += std::exchange(separator, ", ") + jsonString(key) + ": ";
            item.write(out, {});
        }
        out += '}';
    } else if (auto const* text = std::get_if<std::string>(&value_)) {
        out += jsonString(*text);
    } else if (auto const* number = std::get_if<Number>(&value_)) {
        out += number->text;
    } else {
        out += isNull() ? "null" : boolean() ? "true" : "false";
    }
}

}  // namespace less
