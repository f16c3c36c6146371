// Files: read whole, mapped, and written atomically.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>

namespace less {

// Owns a file descriptor.
struct Handle {
    explicit Handle(int descriptor) : fd(descriptor) {}
    Handle(Handle&& other) noexcept : fd(std::exchange(other.fd, -1)) {}
    Handle(Handle const&) = delete;
    ~Handle();
    int fd;
};

// At most `most` bytes from the start of an open file, fewer if it ends before or a read fails.
std::string readAll(int file, size_t most);

// The first `most` bytes of a file. Throws BundleError.
std::string readFile(std::filesystem::path const& path, size_t most = SIZE_MAX);

// A file mapped for reading; pages are read on first access. Throws BundleError.
class MappedFile {
 public:
    explicit MappedFile(std::filesystem::path const& path);
    MappedFile(MappedFile const&) = delete;
    MappedFile& operator=(MappedFile const&) = delete;
    ~MappedFile();

    std::string_view view() const { return {data_, size_}; }

 private:
    char const* data_ = nullptr;
    size_t size_ = 0;
};

// Writes to a temporary file in the same folder, then renames it. Throws BackendError.
void writeAtomically(std::filesystem::path const& path, std::string_view data);

}  // namespace less
