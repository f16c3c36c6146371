#include "sha256.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace less {
namespace {

constexpr std::array<uint32_t, 64> kRoundConstants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t rotate(uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

using Digest = std::array<uint32_t, 8>;

void absorb(Digest& digest, unsigned char const* block) {
    std::array<uint32_t, 64> w;
    for (size_t i = 0; i < 16; ++i) {
        unsigned char const* b = block + 4 * i;
        w[i] = uint32_t{b[0]} << 24 | uint32_t{b[1]} << 16 | uint32_t{b[2]} << 8 | b[3];
    }
    for (size_t i = 16; i < 64; ++i) {
        uint32_t const early = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t const late = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + early + w[i - 7] + late;
    }
    auto [a, b, c, d, e, f, g, h] = digest;
    for (size_t i = 0; i < 64; ++i) {
        uint32_t const one =
            h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + kRoundConstants[i] + w[i];
        uint32_t const two = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = std::exchange(g, std::exchange(f, std::exchange(e, d + one)));
        d = std::exchange(c, std::exchange(b, std::exchange(a, one + two)));
    }
    Digest const change = {a, b, c, d, e, f, g, h};
    for (size_t i = 0; i < 8; ++i) digest[i] += change[i];
}

}  // namespace

void Sha256::update(std::string_view data) {
    total_ += data.size();
    auto const* bytes = reinterpret_cast<unsigned char const*>(data.data());
    size_t rest = data.size();
    if (held_) {
        size_t const taken = std::min(rest, block_.size() - held_);
        std::copy_n(bytes, taken, block_.begin() + static_cast<ptrdiff_t>(held_));
        held_ += taken;
        bytes += taken;
        rest -= taken;
        if (held_ < block_.size()) return;
        absorb(digest_, block_.data());
        held_ = 0;
    }
    for (; rest >= block_.size(); bytes += block_.size(), rest -= block_.size()) absorb(digest_, bytes);
    std::copy_n(bytes, rest, block_.begin());
    held_ = rest;
}

std::string Sha256::hex() const {
    Digest digest = digest_;
    std::array<unsigned char, 128> tail{};
    size_t const padded = held_ < 56 ? 64 : 128;
    std::copy_n(block_.begin(), held_, tail.begin());
    tail[held_] = 0x80;
    for (size_t i = 0; i < 8; ++i) tail[padded - 1 - i] = static_cast<unsigned char>(total_ * 8 >> 8 * i);
    for (size_t i = 0; i < padded; i += 64) absorb(digest, tail.data() + i);
    std::string text;
    for (uint32_t word : digest) {
        for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
    }
    return text;
}

std::string sha256(std::string_view data) {
    Sha256 hash;
    hash.update(data);
    return hash.hex();
}

}  // namespace less
