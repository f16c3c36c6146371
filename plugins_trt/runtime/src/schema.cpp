#include "schema.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "text.hpp"

namespace less {
namespace {

constexpr size_t kMaxEntries = 4096;  // layers, files and other entries of a list
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();
constexpr double kMaxNumber = 1e300;
constexpr int64_t kMaxHalfLife = 1 << 20;    // tokens
constexpr int64_t kDistanceLimit = 1 << 20;  // tokens

// A value for a message: ASCII on one line, cut where it is long.
std::string shown(std::string text) {
    if (text.size() > 40) text.replace(37, std::string::npos, "...");
    return text;
}

void require(bool ok, std::string const& place, std::string const& what, Json const& value) {
    if (!ok) throw JsonError(place + " must be " + what + ", not " + shown(value.canonical()));
}

// ------------------------------------------------------------------ rules

void anything(Json const&, std::string const&) {}

Rule text(std::vector<std::string_view> choices = {}, bool onOneLine = false) {
    std::string what = onOneLine ? "printable text" : "text";
    for (std::string_view choice : choices) {
        what = (choice == choices.front() ? "one of " : what + ", ") + std::string(choice);
    }
    return [choices = std::move(choices), onOneLine, what](Json const& value, std::string const& place) {
        auto const* s = value.as<std::string>();
        bool const chosen = choices.empty() || (s && std::find(choices.begin(), choices.end(), *s) != choices.end());
        require(s && chosen && (onOneLine ? isPrintable(*s) : isUtf8(*s)), place, what, value);
    };
}

Rule printableText() { return text({}, true); }

Rule hash(bool orEmpty = false) {
    return [orEmpty](Json const& value, std::string const& place) {
        auto const* s = value.as<std::string>();
        bool const hex = s && s->size() == 64 && s->find_first_not_of("0123456789abcdef") == std::string::npos;
        require(hex || (s && orEmpty && s->empty()), place, "a SHA-256 in hexadecimal", value);
    };
}

Rule fileName(bool orEmpty = false) {
    return [orEmpty](Json const& value, std::string const& place) {
        auto const* s = value.as<std::string>();
        bool const path = s && (*s == "." || *s == ".." || s->find_first_of("/\\") != std::string::npos);
        bool const name = s && !path && !s->empty() && s->size() <= 255 && isPrintable(*s);
        require(name || (s && orEmpty && s->empty()), place, "the name of a file beside the manifest", value);
    };
}

template <class T>
Rule wholeNumber(T low, T high) {
    return [low, high](Json const& value, std::string const& place) {
        auto const* number = value.as<Json::Number>();
        T n{};
        bool whole = number != nullptr;
        if (whole) {
            char const* const last = number->text.data() + number->text.size();
            auto const [end, error] = std::from_chars(number->text.data(), last, n);
            whole = error == std::errc() && end == last;
        }
        require(whole && n >= low && n <= high, place,
                "a whole number from " + std::to_string(low) + " to " + std::to_string(high), value);
    };
}

Rule integer(int64_t low = 0, int64_t high = kMaxInt64) { return wholeNumber(low, high); }

void number(Json const& value, std::string const& place) {
    require(value.as<Json::Number>() && std::fabs(value.number()) <= kMaxNumber, place, "a finite number", value);
}

void flag(Json const& value, std::string const& place) { require(value.as<bool>(), place, "true or false", value); }

Rule nullable(Rule rule) {
    return [rule = std::move(rule)](Json const& value, std::string const& place) {
        if (!value.isNull()) rule(value, place);
    };
}

Rule textOr(Rule rule) {
    return [rule = std::move(rule), plain = text()](Json const& value, std::string const& place) {
        (value.as<std::string>() ? plain : rule)(value, place);
    };
}

Rule listOf(Rule rule, size_t least = 0, size_t most = kMaxEntries) {
    return [rule = std::move(rule), least, most](Json const& value, std::string const& place) {
        auto const* items = value.as<Json::Array>();
        require(items, place, "a list", value);
        if (items->size() < least || items->size() > most) {
            throw JsonError(place + " has " + std::to_string(items->size()) + " entries, " + std::to_string(least) +
                            " to " + std::to_string(most) + " are allowed");
        }
        for (size_t i = 0; i < items->size(); ++i) rule((*items)[i], place + "[" + std::to_string(i) + "]");
    };
}

struct Field {
    std::string_view key;
    Rule rule;
    bool optional = false;
};

// An object with these fields. Other keys are refused unless `others` is a rule for their values.
Rule record(std::vector<Field> fields, Rule others = nullptr) {
    return [fields = std::move(fields), others = std::move(others)](Json const& value, std::string const& place) {
        require(value.as<Json::Object>(), place.empty() ? "the manifest" : place, "an object", value);
        Json::Object const& members = *value.as<Json::Object>();
        std::string const prefix = place.empty() ? "" : place + ".";
        for (Field const& field : fields) {
            auto const member = members.find(field.key);
            if (member != members.end()) {
                field.rule(member->second, prefix + std::string(field.key));
            } else if (!field.optional) {
                throw JsonError(prefix + std::string(field.key) + " is missing");
            }
        }
        for (auto const& [key, item] : members) {
            bool const known = std::any_of(fields.begin(), fields.end(), [&](Field const& f) { return f.key == key; });
            if (known) continue;
            std::string const name = prefix + shown(jsonString(key));
            if (!others) throw JsonError(name + " is unknown");
            others(item, name);
        }
    };
}

// ------------------------------------------------------------------ the table

constexpr bool kOptional = true;

Rule positive() { return integer(1, kMaxInt32); }
Rule count() { return integer(0, kMaxInt32); }
Rule token() { return integer(-kMaxInt32 - 1, kMaxInt32); }
Rule object() { return record({}, anything); }
Rule texts() { return record({}, text()); }

Rule contract() {
    Rule const layer = record({{"query_heads", positive()},
                               {"kv_heads", positive()},
                               {"head_dim", positive()},
                               {"scale", number},
                               {"policy", printableText()},
                               {"heavy", count()},
                               {"recent", positive()},
                               {"window", count()},
                               {"absorb", flag},
                               {"capacity", positive()},
                               {"rank", positive()},
                               {"score_half_life", nullable(integer(1, kMaxHalfLife)), kOptional},
                               {"slot_dtype", text({"model", "int8"}), kOptional},
                               {"max_distance", nullable(integer(1, kDistanceLimit)), kOptional},
                               {"state_bits", integer(16, 32), kOptional}});
    return record({{"layers", listOf(layer, 1)},
                   {"vocab_size", positive()},
                   {"dtype", text({"float32", "float16", "bfloat16"})},
                   {"chunk", positive()},
                   {"max_batch", positive()},
                   {"logits", text({"last", "all"})},
                   {"position_limit", nullable(positive()), kOptional},
                   {"trained_length", nullable(positive()), kOptional}});
}

Rule artifact() {
    Rule const plugin = record({{"library", printableText()},
                                {"sha256", hash()},
                                {"version", printableText()},
                                {"inside", flag},
                                {"rows_by_index", flag, kOptional}});
    Rule const details = record({{"flavour", printableText(), kOptional},
                                 {"version", printableText(), kOptional},
                                 {"gpu_arch", nullable(text()), kOptional},
                                 {"bytes", integer(), kOptional},
                                 {"seconds", number, kOptional},
                                 {"layers", integer(), kOptional},
                                 {"plugin_layers", integer(), kOptional},
                                 {"plugin", nullable(plugin), kOptional}},
                                anything);
    return record({{"kind", text({"ort", "trt", "plan"})},
                   {"file", fileName()},
                   {"sha256", hash()},
                   {"contract", contract()},
                   {"details", details}});
}

Rule weight() {
    return record({{"file", fileName()}, {"bytes", integer()}, {"header_sha256", hash()}, {"sha256", hash()}});
}

Rule tokenizer() {
    return record({{"file", fileName()},
                   {"sha256", hash()},
                   {"bos_id", nullable(token())},
                   {"eos_ids", listOf(token())},
                   {"add_bos", flag},
                   {"chat_template", nullable(textOr(texts()))},
                   {"special_tokens", nullable(texts()), kOptional},
                   {"split_special_tokens", flag, kOptional}});
}

Rule kernels() {
    Rule const facts = record({{"file", fileName(true)},
                               {"sha256", hash(true)},
                               {"bytes", integer()},
                               {"parametrisation", nullable(printableText())},
                               {"rank", count()},
                               {"hidden", count()},
                               {"layers", listOf(integer(0, static_cast<int64_t>(kMaxEntries)))}});
    Rule const noMaps =
        record({{"rank", integer(0, 0)}, {"hidden", integer(0, 0)}, {"layers", listOf(anything, 0, 0)}}, anything);
    return [facts, noMaps](Json const& value, std::string const& place) {
        facts(value, place);
        if (value["parametrisation"].isNull()) noMaps(value, place);
    };
}

Rule model() {
    Rule const config = record({{"text_config", nullable(object()), kOptional}}, anything);
    return record({{"name", text()},
                   {"class", text()},
                   {"parameters", integer()},
                   {"config", config},
                   {"max_position_embeddings", nullable(integer()), kOptional}},
                  anything);
}

Rule onDisk() {
    Rule const inode = wholeNumber<uint64_t>(0, std::numeric_limits<uint64_t>::max());
    Rule const file = record({{"mtime_ns", integer(-kMaxInt64)}, {"inode", inode}});
    return record({{"manifest_inode", inode}, {"weights", record({}, file)}});
}

}  // namespace

Rule const& headRule() {
    static Rule const rule = record({{"format_version", positive()}, {"manifest_sha256", hash()}}, anything);
    return rule;
}

Rule const& manifestRule() {
    static Rule const rule = record({{"format_version", positive()},
                                     {"model", model()},
                                     {"settings", object()},
                                     {"artifacts", listOf(artifact(), 1)},
                                     {"weights", listOf(weight())},
                                     {"tokenizer", nullable(tokenizer())},
                                     {"kernels", nullable(kernels())},
                                     {"tools", texts()},
                                     {"on_disk", onDisk(), kOptional}},
                                    anything);
    return rule;
}

}  // namespace less
