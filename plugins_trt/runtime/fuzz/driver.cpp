// Runs a fuzz target without libFuzzer: on files, or for some seconds on mutations of them.
//
//   fuzz_X FILE_OR_FOLDER... [-seconds=N] [-seed=N] [-artifact=FILE]
//
// Without -seconds, each file runs once. An input that crashes, hangs or trips a sanitizer is written to the artifact,
// and the exit code is 1.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "mutate.hpp"

extern "C" int LLVMFuzzerTestOneInput(uint8_t const* data, size_t size);

// Sanitizers end with SIGABRT, so that every fault gets to `save`. Allocations of more than 1 GB are faults.
extern "C" char const* __asan_default_options() { return "abort_on_error=1:max_allocation_size_mb=1024"; }
extern "C" char const* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

namespace {

constexpr unsigned kMaxSeconds = 10;  // for one input

// What runs now, for the signal handler.
char const* program;
char const* artifact = "fuzz-fault";
std::string current;

void say(std::initializer_list<char const*> parts) {
    for (char const* text : parts) {
        if (::write(STDERR_FILENO, text, std::strlen(text)) < 0) return;
    }
}

extern "C" void save(int signal) {
    int const file = ::open(artifact, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    bool const saved = file >= 0 && ::write(file, current.data(), current.size()) >= 0;
    say({"\nfault (", signal == SIGALRM ? "it takes too long" : "see above",
         "): ", saved ? "the input is in " : "cannot write the input to ", artifact, "\nrun it again: ", program, " ",
         artifact, "\n"});
    ::_exit(1);
}

void runOnce(std::string input) {
    current = std::move(input);
    ::alarm(kMaxSeconds);
    LLVMFuzzerTestOneInput(reinterpret_cast<uint8_t const*>(current.data()), current.size());
}

std::vector<std::string> read(std::vector<std::string> const& paths) {
    namespace fs = std::filesystem;
    std::vector<fs::path> files;
    for (std::string const& path : paths) {
        if (fs::is_directory(path)) {
            std::copy(fs::directory_iterator(path), fs::directory_iterator(), std::back_inserter(files));
        } else {
            files.emplace_back(path);
        }
    }
    std::sort(files.begin(), files.end());
    std::vector<std::string> inputs;
    for (fs::path const& file : files) {
        std::ifstream in(file, std::ios::binary);
        if (!in) {
            say({"cannot read ", file.c_str(), "\n"});
            ::_exit(2);
        }
        inputs.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
    }
    return inputs;
}

}  // namespace

int main(int argc, char** argv) {
    program = argv[0];
    double seconds = 0;
    uint64_t seed = 1;
    std::vector<std::string> paths;
    for (int i = 1; i < argc; ++i) {
        if (std::strncmp(argv[i], "-seconds=", 9) == 0) {
            seconds = std::atof(argv[i] + 9);
        } else if (std::strncmp(argv[i], "-seed=", 6) == 0) {
            seed = std::strtoull(argv[i] + 6, nullptr, 10);
        } else if (std::strncmp(argv[i], "-artifact=", 10) == 0) {
            artifact = argv[i] + 10;
        } else {
            paths.emplace_back(argv[i]);
        }
    }
    std::vector<std::string> const seeds = read(paths);
    if (seeds.empty()) {
        say({"usage: ", program, " FILE_OR_FOLDER... [-seconds=N] [-seed=N] [-artifact=FILE]\n"});
        return 2;
    }
    for (int fault : {SIGABRT, SIGALRM}) std::signal(fault, save);
    for (std::string const& input : seeds) runOnce(input);
    size_t count = seeds.size();
    less::fuzz::Random random(seed);
    using Clock = std::chrono::steady_clock;
    for (auto const end = Clock::now() + std::chrono::duration<double>(seconds); Clock::now() < end; ++count) {
        runOnce(less::fuzz::mutated(seeds, random));
    }
    std::printf("%zu inputs, no fault (seed %llu)\n", count, static_cast<unsigned long long>(seed));
    return 0;
}
