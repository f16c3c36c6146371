// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace less {

// The hash of what update() was given, piece by piece.
class Sha256 {
 public:
    void update(std::string_view data);
    std::string hex() const;

 private:
    std::array<uint32_t, 8> digest_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<unsigned char, 64> block_{};
    size_t held_ = 0;  // bytes in block_
    uint64_t total_ = 0;
};

std::string sha256(std::string_view data);  // in hexadecimal

}  // namespace less
