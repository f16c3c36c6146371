// A strict JSON reader (RFC 8259, UTF-8), and Python's way of writing JSON, which manifests are hashed in.
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

// What is wrong with a text, and at which byte; or which value is not what it should be.
class JsonError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// One value. Numbers keep their text: Python wrote it, and would write it again just so. As in Python, NaN and
// Infinity are numbers; other than there, an object may not have a key twice. Strings are UTF-8, with the halves of
// a broken surrogate pair as three bytes each.
class Json {
 public:
    using Array = std::vector<Json>;
    using Object = std::map<std::string, Json, std::less<>>;

    static Json parse(std::string_view text);

    bool isNull() const { return std::holds_alternative<std::nullptr_t>(value_); }
    bool boolean() const { return get<bool>("true or false"); }
    std::string const& string() const { return get<std::string>("a string"); }
    Array const& array() const { return get<Array>("a list"); }
    Object const& object() const { return get<Object>("an object"); }
    int64_t integer() const;
    double number() const;

    // Member of an object: throws JsonError where it is missing.
    Json const& operator[](std::string_view key) const;
    // Member of an object, or nullptr where it is missing or null.
    Json const* find(std::string_view key) const;
    // This object without one key.
    Json without(std::string_view key) const;

    // json.dumps(value, sort_keys=True) of Python.
    std::string canonical() const;

 private:
    friend class JsonReader;
    struct Number {
        std::string text;
    };

    template <class T>
    T const& get(char const* what) const {
        if (T const* found = std::get_if<T>(&value_)) return *found;
        throw JsonError(std::string("a value is not ") + what);
    }
    void write(std::string& out) const;

    std::variant<std::nullptr_t, bool, Number, std::string, Array, Object> value_ = nullptr;
};

// `text` in quotes, everything but printable ASCII escaped, as Python writes it.
std::string jsonString(std::string_view text);

}  // namespace less
