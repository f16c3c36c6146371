// A minimal test framework. A test is a function; CHECK counts failures and does not abort.
#pragma once

#include <cstdio>
#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace less::testing {

inline int failures = 0;

inline std::vector<std::pair<char const*, std::function<void()>>>& tests() {
    static std::vector<std::pair<char const*, std::function<void()>>> all;
    return all;
}

struct Register {
    Register(char const* name, std::function<void()> test) { tests().emplace_back(name, std::move(test)); }
};

inline void fail(char const* file, int line, std::string const& message) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
    ++failures;
}

// Runs `action`, which must throw an E with a message of one line that contains `text`.
template <class E, class F>
void refuses(char const* file, int line, std::string const& text, F const& action) {
    try {
        action();
        fail(file, line, "nothing was thrown, expected: " + text);
    } catch (E const& error) {
        std::string const message = error.what();
        bool const oneLine = message.find('\n') == std::string::npos;
        if (!oneLine || message.find(text) == std::string::npos) fail(file, line, "unexpected message: " + message);
    }
}

inline int runAll() {
    for (auto const& [name, test] : tests()) {
        int const before = failures;
        try {
            test();
        } catch (std::exception const& error) {
            fail(name, 0, std::string("threw: ") + error.what());
        }
        std::printf("%s %s\n", failures == before ? "ok  " : "FAIL", name);
    }
    return failures ? 1 : 0;
}

}  // namespace less::testing

#define TEST(name)                                                 \
    static void name();                                            \
    static ::less::testing::Register register_##name(#name, name); \
    static void name()
#define CHECK(condition) \
    if (!(condition)) ::less::testing::fail(__FILE__, __LINE__, #condition)
#define REFUSES(kind, text, ...) ::less::testing::refuses<kind>(__FILE__, __LINE__, text, [&] { __VA_ARGS__; })
