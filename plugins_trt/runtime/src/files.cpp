#include "files.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "less_runtime.hpp"

namespace less {
namespace {

std::string errorText() { return std::strerror(errno); }

BundleError cannotRead(std::filesystem::path const& path, std::string const& why) {
    return BundleError("cannot read " + path.string() + ": " + why);
}

// An open file and its size. Does not wait for the writers of a pipe.
std::pair<Handle, size_t> openRegular(std::filesystem::path const& path) {
    Handle file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    struct stat status{};
    if (file.fd < 0 || ::fstat(file.fd, &status) != 0) throw cannotRead(path, errorText());
    if (!S_ISREG(status.st_mode)) throw cannotRead(path, "it is not a regular file");
    return {std::move(file), static_cast<size_t>(status.st_size)};
}

}  // namespace

Handle::~Handle() {
    if (fd >= 0) ::close(fd);
}

std::string readAll(int file, size_t most) {
    std::string data(most, '\0');
    size_t done = 0;
    while (done < most) {
        ssize_t const count = ::pread(file, data.data() + done, most - done, static_cast<off_t>(done));
        if (count <= 0 && (count == 0 || errno != EINTR)) break;
        done += static_cast<size_t>(std::max<ssize_t>(count, 0));
    }
    data.resize(done);
    return data;
}

std::string readFile(std::filesystem::path const& path, size_t most) {
    auto const [file, size] = openRegular(path);
    size_t const wanted = std::min(size, most);
    std::string data;
    try {
        data = readAll(file.fd, wanted);
    } catch (std::exception const&) {  // of std::string
        throw cannotRead(path, "not enough memory for " + std::to_string(wanted) + " bytes");
    }
    if (data.size() < wanted) throw cannotRead(path, "it was cut meanwhile, or a read failed");
    return data;
}

MappedFile::MappedFile(std::filesystem::path const& path) {
    auto const [file, size] = openRegular(path);
    size_ = size;
    if (size_ == 0) return;  // an empty file cannot be mapped
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
    if (mapped == MAP_FAILED) throw cannotRead(path, errorText());
    data_ = static_cast<char const*>(mapped);
}

MappedFile::~MappedFile() {
    if (data_) ::munmap(const_cast<char*>(data_), size_);
}

void writeAtomically(std::filesystem::path const& path, std::string_view data) {
    std::string name = (path.parent_path() / ("." + path.filename().string() + ".XXXXXX")).string();
    auto const fail = [&path](std::string const& why) {
        throw BackendError("cannot write " + path.string() + ": " + why);
    };
    Handle file{::mkstemp(name.data())};
    if (file.fd < 0) fail(errorText());
    std::string why;
    while (!data.empty() && why.empty()) {
        ssize_t const written = ::write(file.fd, data.data(), data.size());
        if (written < 0 && errno != EINTR) why = errorText();
        if (written > 0) data.remove_prefix(static_cast<size_t>(written));
    }
    if (why.empty() && ::fchmod(file.fd, 0644) != 0) why = errorText();
    if (::close(std::exchange(file.fd, -1)) != 0 && why.empty())
        why = errorText();  // some file systems report a full disk only here
    if (why.empty() && ::rename(name.c_str(), path.c_str()) != 0) why = errorText();
    if (!why.empty()) {
        ::unlink(name.c_str());
        fail(why);
    }
}

}  // namespace less
