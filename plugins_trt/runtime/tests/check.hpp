// A test is a function; CHECK counts what fails and goes on.
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

inline void fail(char const* file, int line, std::string const& what) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
    ++failures;
}

// Runs `action`, which must throw an E whose message holds `words`.
template <class E, class F>
void refuses(char const* file, int line, char const* words, F const& action) {
    try {
        action();
        fail(file, line, std::string("nothing was thrown, expected: ") + words);
    } catch (E const& error) {
        std::string const said = error.what();
        bool const oneLine = said.find('\n') == std::string::npos;
        if (!oneLine || said.find(words) == std::string::npos) fail(file, line, "it said: " + said);
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
#define CHECK(what) \
    if (!(what)) ::less::testing::fail(__FILE__, __LINE__, #what)
#define REFUSES(kind, words, ...) ::less::testing::refuses<kind>(__FILE__, __LINE__, words, [&] { __VA_ARGS__; })
