// Native code of bundles: loaded if this machine built it, if the user names it or says so, and otherwise never.
#include <sys/stat.h>

#include "check.hpp"
#include "folder.hpp"
#include "sha256.hpp"
#include "trust.hpp"

namespace {

using namespace less;
using namespace less::testing;

namespace fs = std::filesystem;

constexpr char const* kKnown = "built-here.sha256";

// A cache and an environment of its own.
struct Rig {
    Rig() {
        ::setenv("LESS_EXPORT_CACHE", cache.path.c_str(), 1);
        ::unsetenv("LESS_EXPORT_PLUGIN");
    }
    ~Rig() {
        ::unsetenv("LESS_EXPORT_CACHE");
        ::unsetenv("LESS_EXPORT_PLUGIN");
    }
    void record(std::string const& text) const { ::chmod(cache.write(kKnown, text).c_str(), 0600); }

    Folder cache, files;
};

TEST(place_of_the_cache) {
    Rig const rig;
    CHECK(cacheFolder() == rig.cache.path);
    ::setenv("LESS_EXPORT_CACHE", "relative", 1);
    CHECK(cacheFolder() == fs::current_path() / "relative");
    ::unsetenv("LESS_EXPORT_CACHE");
    ::setenv("XDG_CACHE_HOME", "/x", 1);
    CHECK(cacheFolder() == "/x/less-export");
    ::unsetenv("XDG_CACHE_HOME");
    std::string const home = std::getenv("HOME") ? std::getenv("HOME") : "";
    ::setenv("HOME", "/y", 1);
    CHECK(cacheFolder() == "/y/.cache/less-export");
    ::unsetenv("HOME");
    CHECK(cacheFolder().is_absolute());
    if (!home.empty()) ::setenv("HOME", home.c_str(), 1);
}

TEST(known_hashes) {
    Rig const rig;
    std::string const digest(64, 'a'), other(64, 'b');
    CHECK(!isKnown(digest));
    rig.record(other + "\n" + digest + "\n" + digest.substr(0, 20));
    CHECK(isKnown(digest) && isKnown(other) && !isKnown(std::string(64, 'c')));
    CHECK(!isKnown("") && !isKnown(digest.substr(0, 20)));
    fs::path const list = rig.cache.path / kKnown;
    for (auto const& [path, usual] : {std::pair(rig.cache.path, 0700), {list, 0600}}) {
        for (int bits : {0020, 0002}) {
            ::chmod(path.c_str(), static_cast<mode_t>(usual | bits));
            REFUSES(EngineError, "others may write to the cache", isKnown(digest));
        }
        ::chmod(path.c_str(), static_cast<mode_t>(usual));
    }
    CHECK(isKnown(digest));
    fs::rename(list, rig.files.path / "list");
    fs::create_symlink(rig.files.path / "list", list);
    CHECK(!isKnown(digest));
    fs::remove(list);
    ::mkfifo(list.c_str(), 0600);
    CHECK(!isKnown(digest));
    ::setenv("LESS_EXPORT_CACHE", "/proc/self/environ/none", 1);
    CHECK(!isKnown(digest));
    if (::geteuid() != 0) {
        ::setenv("LESS_EXPORT_CACHE", "/usr", 1);
        REFUSES(EngineError, "the cache /usr belongs to another user", isKnown(digest));
    }
}

TEST(libraries) {
    Rig const rig;
    fs::path const library = rig.files.write("x.so", "code"), own = rig.files.write("own.so", "code");
    PluginFacts facts{library, sha256("code"), false};
    REFUSES(EngineError, (library.string() + " (sha256 " + facts.sha256 + "), which this machine did not build"),
            findPlugin(facts, false));
    REFUSES(EngineError, "set LESS_EXPORT_PLUGIN to a library of your own, or allow it with trustCode (--trust-code)",
            findPlugin(facts, false));
    fs::path const sealed = findPlugin(facts, true);
    CHECK(contentOf(sealed) == "code" && findPlugin(facts, true) == sealed);
    CHECK(sealed.string().find("/proc/" + std::to_string(::getpid()) + "/fd/") == 0);
    std::ofstream(sealed) << "else";  // refused by the seals
    CHECK(contentOf(sealed) == "code");
    rig.record(facts.sha256 + "\n");
    CHECK(findPlugin(facts, false) == sealed);
    rig.record("");
    facts.library = rig.files.path / "missing.so";
    REFUSES(EngineError, "is missing (", findPlugin(facts, true));
    ::setenv("LESS_EXPORT_PLUGIN", own.c_str(), 1);
    CHECK(findPlugin(facts, false) == sealed);
    rig.files.write("own.so", "other");
    for (bool trust : {false, true}) {
        REFUSES(EngineError, "is not the plugin that this engine was built with", findPlugin(facts, trust));
    }
    ::setenv("LESS_EXPORT_PLUGIN", "/proc/self", 1);
    REFUSES(EngineError, "the plugin of this engine is missing (/proc/self)", findPlugin(facts, true));
    ::unsetenv("LESS_EXPORT_PLUGIN");
    facts = {rig.files.write("x.so", "more code"), sha256("more code"), false};
    CHECK(contentOf(findPlugin(facts, true)) == "more code" && contentOf(sealed) == "code");
}

TEST(plans_with_code_inside) {
    Rig const rig;
    Bundle bundle;
    bundle.plan = "x.plan";
    bundle.planSha256 = sha256("plan");
    checkTrust(bundle);
    bundle.plugin = PluginFacts{"/nowhere.so", std::string(64, '0'), true};
    REFUSES(EngineError, "the plan x.plan (sha256 ", checkTrust(bundle));
    REFUSES(EngineError, "carries native code, and this machine did not build it: build the engine here, or allow it",
            checkTrust(bundle));
    bundle.trustCode = true;
    checkTrust(bundle);
    bundle.trustCode = false;
    rig.record(std::string(64, '0') + "\n");  // the library's hash is not the plan's
    REFUSES(EngineError, "carries native code", checkTrust(bundle));
    rig.record(sha256("plan") + "\n");
    checkTrust(bundle);
}

}  // namespace
