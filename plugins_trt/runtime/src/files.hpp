// Hashes, whole-file reads and writes that leave a file whole or as it was.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace less {

// Hex digest (FIPS 180-4).
std::string sha256(std::string_view data);

// A file mapped for reading: its pages are read when they are touched. Throws BundleError.
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

// Writes under a temporary name in the same folder and renames. Throws BackendError.
void writeAtomically(std::filesystem::path const& path, std::string_view data);

}  // namespace less
