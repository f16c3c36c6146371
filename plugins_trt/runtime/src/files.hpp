// Hashes, memory-mapped files and atomic writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace less {

// SHA-256 in hex (FIPS 180-4).
std::string sha256(std::string_view data);

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
