// Hashes, JSON, text, sampling and plan headers.
#include <cmath>
#include <limits>

#include "aliases.hpp"
#include "check.hpp"
#include "json.hpp"
#include "plan_header.hpp"
#include "sha256.hpp"
#include "text.hpp"

namespace {

using namespace less;

constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(sha256_of_known_texts) {
    CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    CHECK(sha256(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(json_values) {
    Json const json = Json::parse(R"( {"a": [1, -2.5e3, true, false, null], "b": {"c": "\u00e9\ud83d\ude00\n"}} )");
    CHECK(json["a"].array()[0].integer() == 1);
    CHECK(json["a"].array()[1].number() == -2500);
    CHECK(json["a"].array()[2].boolean() && !json["a"].array()[3].boolean() && json["a"].array()[4].isNull());
    CHECK(json["b"]["c"].string() == "\xC3\xA9\xF0\x9F\x98\x80\n");
    CHECK(json.find("c") == nullptr && json.find("b") != nullptr);
    CHECK(json.canonical("a") == R"({"b": {"c": "\u00e9\ud83d\ude00\n"}})");
    CHECK(Json::parse("\"\\ud83d\\ud83d\\ude00\"").string() == "\xED\xA0\xBD\xF0\x9F\x98\x80");
    CHECK(Json::parse("1e-999").number() == 0 && Json::parse("-0.0e99999999999999999999").number() == 0);
    CHECK(Json::parse("1e-9223372036854775808").number() == 0 && Json::parse("1e-99999999999999999999").number() == 0);
    CHECK(Json::parse("0." + std::string(400, '0') + "1e402").number() == 10);
    CHECK(Json::parse("1" + std::string(400, '0') + ".0e-400").number() == 1);
    for (char const* text : {"NaN", "Infinity", "-Infinity", "1e999", "-1e309", "1e99999999999999999999", "0.01e400",
                             "1e9223372036854775807"}) {
        REFUSES(JsonError, "is not a finite number", Json::parse(text));
    }
    REFUSES(JsonError, "is not a finite number", Json::parse("1" + std::string(400, '0') + ".0"));
    CHECK(Json::parse(std::string(100, '9')).canonical() == std::string(100, '9'));
    REFUSES(JsonError, "too many digits", Json::parse(std::string(101, '9')));
    REFUSES(JsonError, "not a whole number", Json::parse("1.5").integer());
    REFUSES(JsonError, "not a whole number", Json::parse("99999999999999999999").integer());
    REFUSES(JsonError, "is not a string", Json::parse("1").string());
    REFUSES(JsonError, "'x' is missing", json["x"]);
}

TEST(json_malformed) {
    for (char const* text : {"",
                             " ",
                             "{",
                             "[",
                             "\"",
                             "nul",
                             "tru",
                             "01",
                             "-",
                             "1.",
                             ".5",
                             "1e",
                             "+1",
                             "[1,]",
                             "[1 2]",
                             "{\"a\"}",
                             "{\"a\":}",
                             "{\"a\":1,}",
                             "{a:1}",
                             "{1:2}",
                             "1 2",
                             "\"\\x\"",
                             "\"\\u12\"",
                             "\"\\u12G4\"",
                             "\"\\",
                             "\"a\nb\"",
                             "'a'",
                             "[1",
                             "{\"a\":1 \"b\":2}",
                             "{\"a\":1,\"a\":2}",
                             "\"\xFF\"",
                             "\"\xC3\"",
                             "\"\xC0\x80\"",
                             "\"\xED\xA0\x80\"",
                             "\"\xF5\x80\x80\x80\"",
                             "\"\xE2\x82\"",
                             "nan",
                             "--1",
                             "0x10",
                             "[]]",
                             "\"\\u+123\""}) {
        REFUSES(JsonError, "at byte", Json::parse(text));
    }
    REFUSES(JsonError, "at byte", Json::parse(std::string_view("\"a\0b\"", 5)));
    CHECK(Json::parse(std::string(64, '[') + std::string(64, ']')).array().size() == 1);
    REFUSES(JsonError, "nested too deeply", Json::parse(std::string(65, '[') + std::string(65, ']')));
    REFUSES(JsonError, "nested too deeply", Json::parse(std::string(100000, '[')));
}

SamplingParams params(double temperature, int64_t topK = 0, double topP = 1) {
    SamplingParams p;
    p.temperature = temperature;
    p.topK = topK;
    p.topP = topP;
    return p;
}

TEST(sampling) {
    std::vector<float> const logits = {1, 3, -kInf, 3, 2};
    CHECK(chooseToken(logits.data(), 5, params(0), 0.9) == 1);
    CHECK(chooseToken(logits.data(), 5, params(1, 1), 0.999999) == 1);
    CHECK(chooseToken(logits.data(), 5, params(1, 2), 0.999999) == 3);
    CHECK(chooseToken(logits.data(), 5, params(1, 0, 1e-9), 0.999999) == 1);
    CHECK(chooseToken(logits.data(), 5, params(1e-300), 0.999999) == 3);
    CHECK(chooseToken(logits.data(), 5, params(1), 0.9999999) == 4);
    for (double u = 0; u < 1; u += 0x1p-8) CHECK(chooseToken(logits.data(), 5, params(100), u) != 2);
    float const quiet = std::numeric_limits<float>::quiet_NaN();
    for (float bad : {quiet, kInf, -kInf}) {
        std::vector<float> const broken = {bad, -kInf, bad};
        REFUSES(BackendError, "logits: check its weights and its dtype", chooseToken(broken.data(), 3, params(1), 0));
    }
    std::vector<float> const late = {5, quiet, 9};
    REFUSES(BackendError, "nan logits", chooseToken(late.data(), 3, params(0), 0));
}

TEST(sampler_streams) {
    std::vector<float> const logits(1000, 0.f);
    auto const draw = [&](std::optional<uint64_t> seed, uint64_t row) {
        SamplingParams p = params(1);
        p.seed = seed;
        Sampler sampler(p, row);
        std::vector<int64_t> tokens;
        for (int i = 0; i < 8; ++i) tokens.push_back(sampler(logits.data(), 1000));
        return tokens;
    };
    CHECK(draw(7, 0) == draw(7, 0));
    CHECK(draw(7, 0) != draw(7, 1));
    CHECK(draw(7, 0) != draw(8, 0));
    CHECK(draw(7, 0) != draw(7 + (uint64_t{1} << 32), 0));
    CHECK(draw({}, 0) != draw({}, 0));
    // These must never change, on any platform.
    CHECK((draw(7, 0) == std::vector<int64_t>{244, 553, 314, 202, 665, 472, 6, 429}));
}

TEST(sampling_parameters) {
    params(2, 5, 0.5).validate();
    REFUSES(UsageError, "temperature must be 0", params(-1).validate());
    REFUSES(UsageError, "temperature must be 0", params(kInf).validate());
    REFUSES(UsageError, "top_k must be 0", params(1, -1).validate());
    REFUSES(UsageError, "top_p must lie in", params(1, 0, 0).validate());
    REFUSES(UsageError, "top_p must lie in", params(1, 0, 1.1).validate());
    REFUSES(UsageError, "top_p must lie in", params(1, 0, std::nan("")).validate());
    SamplingParams none;
    none.maxNewTokens = 0;
    REFUSES(UsageError, "max_new_tokens must be", none.validate());
}

TEST(plan_headers_and_libraries) {
    std::string plan(99, '\0');
    plan.replace(0, 4, "vtrt");
    plan[16] = 99;
    plan.replace(24, 4, std::string("\1\7\1\x74", 4));
    PlanHeader const header = readHeader("x.plan", plan);
    CHECK(header.rtx && header.version == "1.7.1.116");
    REFUSES(EngineError, "has 98 bytes instead of 99", readHeader("x.plan", plan.substr(0, 98)));
    REFUSES(EngineError, "is not a TensorRT plan", readHeader("x.plan", "vtrt"));
    REFUSES(EngineError, "is not a TensorRT plan", readHeader("x.plan", std::string(99, 'x')));
    checkLibrary(10701, 10701);
    checkLibrary(101401, 101500);
    checkLibrary(101405, 101401);
    REFUSES(EngineError, "headers of TensorRT 10.14.1 and runs with TensorRT-RTX 1.7.1", checkLibrary(101401, 10701));
    REFUSES(EngineError, "compile it with the headers", checkLibrary(101500, 101401));
    REFUSES(EngineError, "compile it with the headers", checkLibrary(90300, 101401));
    checkFlavour(header, "x.plan", 10701);
    REFUSES(EngineError, "was built by TensorRT-RTX 1.7.1.116, and this program is linked with TensorRT 10.14.1",
            checkFlavour(header, "x.plan", 101401));
}

struct OldEngine {};
struct NewEngine {
    char const* getAliasedInputTensor(char const* name) const { return *name == 'p' ? "past" : nullptr; }
};

TEST(aliases_with_old_and_new_headers) {
    CHECK(aliasOf(NewEngine{}, "present", 0) == "past");
    CHECK(aliasOf(NewEngine{}, "logits", 0).empty());
    CHECK(aliasOf(OldEngine{}, "present", 0).empty());
}

TEST(text_for_terminals) {
    CHECK(isPrintable("plain \xC3\xA9 \xE4\xB8\xAD \xF0\x9F\x98\x80") && isPrintable(""));
    for (char const* text : {"\x1b[2J", "\n", "\x7f", "\xC2\x9B", "\xE2\x80\xAE", "\xC2\xA0", "\xEF\xBB\xBF", "\xFF",
                             "\xC3", "\xED\xA0\x80", "\xF3\xB0\x80\x80", "\xEF\xBF\xBF"}) {
        CHECK(!isPrintable(text));
    }
    CHECK(printable("a\nb\t\xC3\xA9\x1b\xC2\x9B\xE2\x80\xAE\xFF\xF3\xB0\x80\x80") ==
          "a b\\x09\xC3\xA9\\x1b\\x9b\\u202e\\xff\\U000f0000");
    CHECK(std::string(BackendError("x\x1b[2J\ny").what()) == "x\\x1b[2J y");
}

}  // namespace
