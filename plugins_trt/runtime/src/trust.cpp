#include "trust.hpp"

#include <fcntl.h>
#include <pwd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>

#include "files.hpp"
#include "sha256.hpp"

namespace less {
namespace {

namespace fs = std::filesystem;

constexpr char const* kKnown = "built-here.sha256";  // one SHA-256 in hexadecimal a line
constexpr char const* kAllow = "allow it with trustCode (--trust-code) if you trust its source";

// The value of an environment variable, or "".
std::string environment(char const* name) {
    char const* const value = std::getenv(name);
    return value ? value : "";
}

fs::path homeFolder() {
    std::string const home = environment("HOME");
    if (!home.empty()) return home;
    passwd const* const user = ::getpwuid(::getuid());
    return user ? user->pw_dir : "/";
}

void refuseShared(fs::path const& path, struct stat const& facts) {
    std::string const advice = "set LESS_EXPORT_CACHE to a folder of your own";
    if (facts.st_uid != ::geteuid()) {
        throw EngineError("the cache " + path.string() + " belongs to another user: " + advice);
    }
    if (facts.st_mode & (S_IWGRP | S_IWOTH)) {
        throw EngineError("others may write to the cache " + path.string() + ": delete it, or " + advice);
    }
}

std::string systemError() { return std::strerror(errno); }

// The bytes of the plugin, verified, if they may be loaded.
std::string readPlugin(PluginFacts const& facts, bool trustCode) {
    std::string const named = environment("LESS_EXPORT_PLUGIN");
    fs::path const path = fs::absolute(named.empty() ? facts.library : fs::path(named));
    std::string const cure = "build the engine again, or set LESS_EXPORT_PLUGIN to the library that it was built with";
    if (std::error_code ignored; !fs::is_regular_file(path, ignored)) {
        throw EngineError("the plugin of this engine is missing (" + path.string() + "): " + cure);
    }
    std::string code;
    try {
        code = readFile(path);
    } catch (BundleError const& error) {
        throw EngineError(error.what());
    }
    if (sha256(code) != facts.sha256) {
        throw EngineError(path.string() +
                          " is not the plugin that this engine was built with (its hash differs): " + cure);
    }
    if (named.empty() && !trustCode && !isKnown(facts.sha256)) {
        throw EngineError("the engine needs native code, the library " + path.string() + " (sha256 " + facts.sha256 +
                          "), which this machine did not build: build the engine here, set LESS_EXPORT_PLUGIN to a "
                          "library of your own, or " +
                          kAllow);
    }
    return code;
}

// A descriptor of a file in memory with this content, which nobody can change.
int sealed(std::string_view code) {
    auto const fail = [] { throw EngineError("cannot copy the plugin into memory: " + systemError()); };
    int const fd = ::memfd_create("less-plugin", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) fail();
    Handle file(fd);
    while (!code.empty()) {
        ssize_t const written = ::write(fd, code.data(), code.size());
        if (written < 0 && errno != EINTR) fail();
        if (written > 0) code.remove_prefix(static_cast<size_t>(written));
    }
    if (::fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0) fail();
    return std::exchange(file.fd, -1);
}

}  // namespace

fs::path cacheFolder() {
    std::string const named = environment("LESS_EXPORT_CACHE"), user = environment("XDG_CACHE_HOME");
    if (!named.empty()) return fs::absolute(named);
    return fs::absolute(user.empty() ? homeFolder() / ".cache" : fs::path(user)) / "less-export";
}

bool isKnown(std::string const& digest) {
    fs::path const folder = cacheFolder(), list = folder / kKnown;
    struct stat facts{};
    if (::stat(folder.c_str(), &facts) != 0) return false;
    refuseShared(folder, facts);
    Handle const file(::open(list.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
    if (file.fd < 0 || ::fstat(file.fd, &facts) != 0 || !S_ISREG(facts.st_mode)) return false;
    refuseShared(list, facts);
    std::istringstream words(readAll(file.fd, static_cast<size_t>(facts.st_size)));
    for (std::string word; words >> word;) {
        if (word == digest && word.size() == 64) return true;
    }
    return false;
}

fs::path findPlugin(PluginFacts const& facts, bool trustCode) {
    // The descriptors stay open: the loader knows a library by the name of its file.
    static std::mutex mutex;
    static std::map<std::string, int> descriptors;
    std::string const code = readPlugin(facts, trustCode);
    std::lock_guard const lock(mutex);
    auto const [entry, added] = descriptors.try_emplace(facts.sha256, -1);
    if (entry->second < 0) entry->second = sealed(code);
    // Not /proc/self: TensorRT-RTX loads what plans carry under such names, and the loader would return that library.
    return "/proc/" + std::to_string(::getpid()) + "/fd/" + std::to_string(entry->second);
}

void refuseUnknownPlan(fs::path const& plan, std::string const& digest) {
    if (isKnown(digest)) return;
    throw EngineError("the plan " + plan.string() + " (sha256 " + digest +
                      ") carries native code, and this machine did not build it: build the engine here, or " + kAllow);
}

void checkTrust(Bundle const& bundle) {
    if (!bundle.plugin) return;
    if (!bundle.plugin->inside) {
        readPlugin(*bundle.plugin, bundle.trustCode);
    } else if (!bundle.trustCode) {
        refuseUnknownPlan(bundle.plan, bundle.planSha256);
    }
}

}  // namespace less
