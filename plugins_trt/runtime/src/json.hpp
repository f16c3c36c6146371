// A strict JSON reader (RFC 8259, UTF-8), and a writer of the same text as Python's, which manifests are hashed over.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace less {

// A text is malformed (with the byte where), or a value does not have the expected type.
class JsonError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// One value. Numbers keep their text, because Python wrote it and would write the same text again. As in Python's
// manifests, an object may not have a key twice, numbers are finite, integers have at most 100 digits, and at most 64
// objects and lists are nested in one another. Strings are UTF-8, with unpaired surrogates as three bytes each.
class Json {
 public:
    using Array = std::vector<Json>;
    using Object = std::map<std::string, Json, std::less<>>;

    struct Number {
        std::string text;
    };

    static Json parse(std::string_view text);

    // The value if it is a bool, Number, std::string, Array or Object; otherwise nullptr.
    template <class T>
    T const* as() const {
        return std::get_if<T>(&value_);
    }

    bool isNull() const { return std::holds_alternative<std::nullptr_t>(value_); }
    bool boolean() const { return get<bool>("true or false"); }
    std::string const& string() const { return get<std::string>("a string"); }
    Array const& array() const { return get<Array>("a list"); }
    Object const& object() const { return get<Object>("an object"); }
    int64_t integer() const;
    double number() const;

    // Member of an object; throws JsonError if it is missing.
    Json const& operator[](std::string_view key) const;
    // Member of an object, or nullptr if it is missing or null.
    Json const* find(std::string_view key) const;
    // The text of Python's json.dumps(value, sort_keys=True); of an object without the member `except`, if that is
    // given.
    std::string canonical(std::string_view except = {}) const;

 private:
    friend class JsonReader;

    template <class T>
    T const& get(char const* expected) const {
        if (T const* value = as<T>()) return *value;
        throw JsonError(std::string("a value is not ") + expected);
    }
    void write(std::string& out, std::string_view except) const;

    std::variant<std::nullptr_t, bool, Number, std::string, Array, Object> value_ = nullptr;
};

// `text` as Python writes it: in quotes, everything except printable ASCII escaped.
std::string jsonString(std::string_view text);

}  // namespace less
